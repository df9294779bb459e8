"""The groups of weights that a run's optimizer makes, and what it will keep of each, counted without the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TextIO

import torch
from torch import nn

from ftrun.config import Config
from ftrun.worker import loading
from ftrun.worker.optim.ruled import Ruled
from ftrun.worker.training import Run

States = dict[Any, dict[str, Any]]
"""What an optimizer keeps of each weight, by the weight."""


def answer(cfg: Config, output: TextIO) -> None:
    """Write a line for each parameter group, as `groups` describes them."""
    _, optimizer = outlined(cfg)
    for group in groups(optimizer, states(optimizer)):
        print(json.dumps(group), file=output)


def outlined(cfg: Config) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model that a run trains, on the meta device, and the optimizer over its weights."""
    run = Outline(cfg)
    model = cfg.stage.outline(cfg.adapter.outline(loading.outline(cfg), run)).to("meta")
    return model, cfg.optimizer.build(model, run)


def groups(optimizer: torch.optim.Optimizer, known: States | None) -> list[dict[str, Any]]:
    """Return of each parameter group its name, rule, tensors, parameters, lr, weight_decay and state_bytes.

    Args:
        optimizer: Over weights on the meta device.
        known: What it keeps of them; without, ``state_bytes`` is None.
    """
    return [
        {
            "name": group["name"],
            "rule": group["rule"],
            "tensors": len(group["params"]),
            "parameters": sum(weight.numel() for weight in group["params"]),
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "state_bytes": None if known is None else sum(_bytes(known.get(weight, {})) for weight in group["params"]),
        }
        for group in optimizer.param_groups
    ]


class Outline(Run):
    """A run that is looked at before its rows are read."""

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.folder = cfg, cfg.folder
        self.world_size, self.rank, self.is_main = 1, 0, True


def states(optimizer: torch.optim.Optimizer) -> States | None:
    """Return what an optimizer keeps of each weight once it has taken a step; None if it takes none without weights."""
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
