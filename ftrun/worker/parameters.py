"""The weights that train: what each is in the model, and the groups that an optimizer treats alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
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
        return self.parameter.ndim >= 2 and not is_bias(self.name)

    @property
    def module(self) -> str:
        """The name of the module that it is in."""
        return module_of(self.name)


def module_of(name: str) -> str:
    """Return the name of the module that the weight of a name is in."""
    return name.rpartition(".")[0]


def is_bias(name: str) -> bool:
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
        module = modules.get(module_of(name))
        if (
            is_bias(name)
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
        ConfigError: A key is for weights of which none trains.
    """
    assert chosen.lr is not None
    found = weights(model)
    fits = [
        {number for number, group in enumerate(chosen.groups) if re.search(group.weights, one.name)} for one in found
    ]
    if problems := [*_without_weights(chosen, found, fits)]:
        raise ConfigError(problems)
    made: dict[tuple[Any, ...], dict[str, Any]] = {}
    for weight, numbers in zip(found, fits, strict=True):
        name = "matrices" if weight.decays else "vectors"
        lr, decay = chosen.lr, chosen.weight_decay if weight.decays else 0.0
        if weight.role is Role.embedding and chosen.embedding_lr is not None:
            name, lr = "embeddings", chosen.embedding_lr
        if numbers:
            group = chosen.groups[min(numbers)]
            name, lr = group.weights, (lr if group.lr is None else group.lr) * group.lr_scale
            decay = decay if group.weight_decay is None else group.weight_decay
        rule = rule_of(weight)
        group_of = made.setdefault(
            (rule, name, lr, decay), {"params": [], "lr": lr, "weight_decay": decay, "rule": rule, "name": name}
        )
        group_of["params"].append(weight.parameter)
    return sorted(made.values(), key=lambda group: group["lr"] != chosen.lr)


def _without_weights(chosen: Optimizer, found: Sequence[Weight], fits: Sequence[set[int]]) -> Iterator[Problem]:
    """Yield the keys that are for weights of which none trains.

    Args:
        chosen: The keys.
        found: The weights that train.
        fits: The numbers of the groups whose pattern fits each.
    """
    if not found:
        yield Problem("optimizer", "no weight is left for it to train", "an adapter that trains some")
        return
    names = ", ".join(weight.name for weight in found[:3])
    for number, group in enumerate(chosen.groups):
        if any(number == min(numbers, default=None) for numbers in fits):
            continue
        key, fix = f"optimizer.groups.{number}", f"a part of names such as {names} (`ftrun check` prints the groups)"
        message = f"no weight that trains has {group.weights!r} in its name"
        if any(number in numbers for numbers in fits):
            message, fix = f"every weight that {group.weights!r} fits is in a group before it", "another order"
        yield Problem(key, message, fix)
    if chosen.embedding_lr is not None and all(weight.role is not Role.embedding for weight in found):
        fix = "leave it out, or an adapter that trains embeddings: adapter.modules_to_save=[embed_tokens]"
        yield Problem("optimizer.embedding_lr", "no embedding trains", fix)
