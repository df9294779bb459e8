"""The weights that train: what each is in the model, and the groups that an optimizer treats alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from torch import nn

from ftrun.errors import ConfigError, Problem
from ftrun.plugin import ModelHead

if TYPE_CHECKING:
    from ftrun.plugin import Optimizer


class Role(StrEnum):
    """What a weight is in the model."""

    embedding = "embedding"
    """A table with a row for each token or position. One that is the output head too is an embedding."""

    head = "head"
    """The output head: logits, or a score."""

    matrix = "matrix"
    """A linear map between hidden states, or several of one shape: ``(..., rows, columns)``."""

    other = "other"
    """Norms, biases, scales, kernels of convolutions."""


@dataclass(frozen=True)
class Weight:
    """A weight that trains."""

    name: str
    parameter: nn.Parameter
    role: Role

    @property
    def decays(self) -> bool:
        """Whether weight decay is for it.

        Norms, biases and magnitudes scale or shift: pulling them to zero fights the model rather than its complexity.
        """
        return self.parameter.ndim >= 2 and not _is_bias(self.name)


def _is_bias(name: str) -> bool:
    """Tell so by the name: the biases of all experts of a layer are in one table."""
    return "bias" in name.rpartition(".")[2]


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the weights that train, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def weights(model: nn.Module) -> list[Weight]:
    """Return the weights that train, each with its role."""
    modules = dict(model.named_modules())
    tables = {id(one) for module in modules.values() if isinstance(module, nn.Embedding) for one in module.parameters()}
    heads = _heads(model)

    def role(name: str, parameter: nn.Parameter) -> Role:
        if id(parameter) in tables or "lora_embedding" in name:
            return Role.embedding
        if any(name.startswith(head) for head in heads):
            return Role.head
        module = modules.get(name.rpartition(".")[0])
        if (
            _is_bias(name)
            or parameter.ndim < 2
            or min(parameter.shape[-2:]) < 2
            or isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        ):
            return Role.other
        return Role.matrix

    return [Weight(name, parameter, role(name, parameter)) for name, parameter in trained(model)]


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Return how the names of the output head's weights begin, in a model that peft may have wrapped."""
    found = getattr(model, "get_output_embeddings", lambda: None)()
    names = [name.partition(".original_module")[0] for name, module in model.named_modules() if module is found]
    scores = [
        name for name, _ in model.named_modules() for head in ModelHead for one in head.modules if _ends(name, one)
    ]
    return tuple(f"{name}." for name in [*names, *scores])


def _ends(name: str, module: str) -> bool:
    return name == module or name.endswith(f".{module}")


def groups(
    model: nn.Module, chosen: Optimizer, rule_of: Callable[[Weight], str] = lambda _: "adamw"
) -> list[dict[str, Any]]:
    """Return the weights that train in the groups that the optimizer's keys make of them.

    Args:
        model: The model.
        chosen: Says the rate and decay of each weight: ``lr``, ``weight_decay``, ``embedding_lr``, ``groups``.
        rule_of: Says by which rule a weight is updated, for an optimizer that has several.

    Returns:
        Parameter groups with ``params``, ``lr``, ``weight_decay``, ``rule`` and ``name``. Those of the usual rate come
        first: the rate of the first group is the one that is logged.

    Raises:
        ConfigError: A pattern is found in the name of no weight that trains.
    """
    assert chosen.lr is not None
    unused = {group.weights for group in chosen.groups}
    made: dict[tuple[Any, ...], dict[str, Any]] = {}
    for weight in weights(model):
        name = "matrices" if weight.decays else "vectors"
        lr, decay = chosen.lr, chosen.weight_decay if weight.decays else 0.0
        if weight.role is Role.embedding and chosen.embedding_lr is not None:
            name, lr = "embeddings", chosen.embedding_lr
        for group in chosen.groups:
            if re.search(group.weights, weight.name):
                unused.discard(group.weights)
                name = group.weights
                lr = (lr if group.lr is None else group.lr) * group.lr_scale
                decay = decay if group.weight_decay is None else group.weight_decay
                break
        rule = rule_of(weight)
        group_of = made.setdefault(
            (rule, name, lr, decay), {"params": [], "lr": lr, "weight_decay": decay, "rule": rule, "name": name}
        )
        group_of["params"].append(weight.parameter)
    if unused:
        names = ", ".join(name for name, _ in trained(model)[:3])
        fix = f"a part of names such as {names} (`ftrun check` prints the groups)"
        raise ConfigError(
            [Problem("optimizer.groups", f"no weight that trains has {one!r} in its name", fix) for one in unused]
        )
    return sorted(made.values(), key=lambda group: group["lr"] != chosen.lr)
