"""Blocks of weights that train in turns: only those whose turn it is have gradients and a state."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftrun.worker.optim.adamw import AdamW
from ftrun.worker.optim.ruled import Rule, Ruled, State, States, Tensors
from ftrun.worker.parameters import Role, weights

Blocks = dict[str, list[nn.Parameter]]
"""The weights of each block, by its name, in the model's order."""

Turns = Callable[[int], Collection[int]]
"""Says which blocks train in a period, by their numbers. It goes by the period's number, from 0 on, and nothing else,
so that a run that is resumed need not be told."""


def of_layers(model: nn.Module) -> Blocks:
    """Return the weights that train of each layer. What is outside of the layers is in no block."""
    modules = dict(model.named_modules())
    found: Blocks = {}
    for weight in weights(model):
        if layer := _layer(weight.name, modules):
            found.setdefault(layer, []).append(weight.parameter)
    return found


def of_everything(model: nn.Module, *, split: bool) -> Blocks:
    """Return all weights that train in blocks: the embeddings, each layer, the head.

    What is in none of them (the norm before the head, a projector) trains with the block before it.

    Args:
        model: The model.
        split: Whether each part of a layer that has matrices, such as attention, is a block of its own.
    """
    modules = dict(model.named_modules())
    places = [(_OUTSIDE.get(one.role) or _layer(one.name, modules, split=split), one) for one in weights(model)]
    blocks = {place for place, one in places if one.role is not Role.other} - {""}
    found: Blocks = {}
    name = next((place for place, _ in places if place in blocks), "weights")
    for place, weight in places:
        name = place if place in blocks else name
        found.setdefault(name, []).append(weight.parameter)
    return found


_OUTSIDE = {Role.embedding: "embeddings", Role.head: "head"}


def _layer(name: str, modules: Mapping[str, nn.Module], *, split: bool = False) -> str:
    """Return the name of the layer that a weight is in, or of the part of one; nothing if it is in none."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit() and isinstance(modules.get(".".join(parts[:place])), nn.ModuleList):
            return ".".join(parts[: place + (2 if split else 1)])
    return ""


def one_after_another(count: int, *, start: int, stride: int) -> Turns:
    """One block in each period: ``stride`` is 1 for upwards, -1 for downwards, 0 for always the same."""
    return lambda period: [(start + stride * period) % count]


def shuffled(count: int, *, seed: int) -> Turns:
    """One block in each period, each once in a round, in an order that is drawn anew for every round."""
    return lambda period: [drawn(count, count, seed=seed)(period // count)[period % count]]


def drawn(count: int, size: int, *, seed: int) -> Callable[[int], list[int]]:
    """As many blocks as ``size`` in each period, drawn anew."""
    return lambda period: random.Random(f"{seed} {period}").sample(range(count), size)  # noqa: S311


class InTurns(Ruled):
    """Updates the weights whose turn it is, and has no gradient computed for the others.

    Every weight must have one until the model is wrapped for several processes, so the first turn begins when training
    does, or with the first step.

    Args:
        groups: As for every optimizer of rules.
        rules: The rules by name.
        blocks: Weights of each block. A weight in none trains always.
        turns: Says whose turn it is.
        interval: Gives the steps of a period. It is asked when training begins.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        rules: Mapping[str, Rule],
        blocks: Sequence[Sequence[nn.Parameter]],
        turns: Turns,
        interval: Callable[[], int],
    ) -> None:
        self.blocks, self.turns, self.interval = blocks, turns, interval
        self._begun = False
        super().__init__([group | {"steps": 0} for group in groups], rules)
        self._resting = self._out_of_turn(0)

    @property
    def steps(self) -> int:
        """How many steps have been taken. It is kept in the groups, which are what torch saves besides states."""
        return int(self.param_groups[0]["steps"])

    def in_blocks(self) -> Iterator[nn.Parameter]:
        """Yield the weights of all blocks."""
        return chain.from_iterable(self.blocks)

    def _out_of_turn(self, period: int) -> set[nn.Parameter]:
        active = self.turns(period)
        return {weight for number, block in enumerate(self.blocks) if number not in active for weight in block}

    def begin(self) -> None:
        """Let those train whose turn it is, and nobody else."""
        self._begun, self._resting = True, self._out_of_turn(self.steps // self.interval())
        for weight in self.in_blocks():
            weight.requires_grad_(weight not in self._resting)
            if weight in self._resting:
                weight.grad = None
                self.state.pop(weight, None)

    def with_state(self) -> list[Tensor]:
        """Return the weights of the largest blocks that may have their turn together, and those that are in none."""
        some = {number for period in range(len(self.blocks)) for number in self.turns(period)}
        largest = sorted(some, key=lambda number: sum(weight.numel() for weight in self.blocks[number]), reverse=True)
        chosen = largest[: len(self.turns(0))]
        waiting = {one for number, block in enumerate(self.blocks) if number not in chosen for one in block}
        return [weight for weight in super().with_state() if weight not in waiting]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights whose turn it is, and pass the turn on if it is over. A turn starts without a state."""
        loss = super().step(closure)
        for group in self.param_groups:
            group["steps"] += 1
        if over := self.steps % self.interval() == 0:
            for weight in self.in_blocks():
                self.state.pop(weight, None)
        if over or not self._begun:
            self.begin()
        return loss

    def update(self, group: dict[str, Any], weights: Sequence[Tensor]) -> None:
        """Update those of a group's weights whose turn it is."""
        if active := [weight for weight in weights if weight not in self._resting]:
            super().update(group, active)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state, and go on with the turn that it was saved in."""
        super().load_state_dict(state_dict)
        self.begin()


def show(model: nn.Module, optimizer: InTurns) -> None:
    """Let DDP, which looks for a step's weights in what the model returns, find there those that train at the time.

    It would miss what the loss takes from inside the model, and all that is computed outside.
    """

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            everything = (weight for group in optimizer.param_groups for weight in group["params"])
            active = [weight for weight in everything if weight.requires_grad]
            output.logits = _Touching.apply(output.logits, *active)  # type: ignore[no-untyped-call]

    model.register_forward_hook(hook)


class _Touching(torch.autograd.Function):
    """What it is given, as if weights had had a part in it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *weights: Tensor) -> Tensor:
        ctx.num_weights = len(weights)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad, *[None] * ctx.num_weights)


class Begin(TrainerCallback):
    """Begins the first turn when the model is wrapped, and lets every weight train again in the end."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let those train whose turn it is."""
        _of_turns(kwargs["optimizer"]).begin()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was found."""
        for weight in _of_turns(kwargs["optimizer"]).in_blocks():
            weight.requires_grad_(True)


def _of_turns(optimizer: Any) -> InTurns:
    """Return the optimizer itself, which the trainer may have wrapped."""
    found = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(found, InTurns)
    return found


class Mastered(AdamW):
    """AdamW on a float32 copy of each weight that is stored in fewer bits, with moments in float32.

    In bfloat16 a weight loses what is below a 256th of it, which small updates are.
    """

    def start(self, weight: Tensor, number: int = 0) -> State:
        """Two moments in float32, and the copy where one is needed."""
        if torch.finfo(weight.dtype).bits >= 32:
            return super().start(weight)
        master = weight.detach().float()
        return super().start(master) | {"master": master}

    def update(self, weights: Tensors, grads: Tensors, states: States, *, lr: float, weight_decay: float) -> None:
        """Take the step on the copies, and round them into the weights."""
        masters = [state.get("master", weight) for weight, state in zip(weights, states, strict=True)]
        grads = [grad.to(master.dtype) for grad, master in zip(grads, masters, strict=True)]
        super().update(masters, grads, states, lr=lr, weight_decay=weight_decay)
        for weight, master in zip(weights, masters, strict=True):
            if master is not weight:
                weight.copy_(master)
