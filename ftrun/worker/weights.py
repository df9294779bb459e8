"""The groups of weights that a run's optimizer makes, and what it will keep of each, counted without the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TextIO

import torch

from ftrun.config import Config
from ftrun.worker import loading
from ftrun.worker.optim.ruled import Ruled
from ftrun.worker.training import Run


def answer(cfg: Config, output: TextIO) -> None:
    """Write a line for each parameter group: name, rule, tensors, parameters, lr, weight_decay, state_bytes.

    ``state_bytes`` is null where an optimizer cannot take a step without weights.
    """
    run = Outline(cfg)
    model = cfg.stage.outline(cfg.adapter.outline(loading.outline(cfg), run)).to("meta")
    optimizer = cfg.optimizer.build(model, run)
    states = _states(optimizer)
    for group in optimizer.param_groups:
        line = {
            "name": group["name"],
            "rule": group["rule"],
            "tensors": len(group["params"]),
            "parameters": sum(weight.numel() for weight in group["params"]),
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "state_bytes": None
            if states is None
            else sum(_bytes(states.get(weight, {})) for weight in group["params"]),
        }
        print(json.dumps(line), file=output)


class Outline(Run):
    """A run that is looked at before its rows are read."""

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.folder = cfg, cfg.folder
        self.world_size, self.rank, self.is_main = 1, 0, True


def _states(optimizer: torch.optim.Optimizer) -> dict[Any, dict[str, Any]] | None:
    """Return what an optimizer keeps of each weight once it has taken a step."""
    if isinstance(optimizer, Ruled):
        kept = set(optimizer.with_state())
        return {
            weight: optimizer.start(group, weight)
            for group in optimizer.param_groups
            for weight in group["params"]
            if weight in kept
        }
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.empty_like(weight)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError):  # a kernel that is for real tensors only
        return None
    return dict(optimizer.state)


def _bytes(state: dict[str, Any]) -> int:
    tensors: Iterable[torch.Tensor] = (value for value in state.values() if isinstance(value, torch.Tensor))
    return sum(tensor.nbytes for tensor in tensors)
