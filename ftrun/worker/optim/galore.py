"""GaLore: Adam's moments of a gradient that is projected to its leading subspace."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ftrun.worker.optim import factored
from ftrun.worker.optim.ruled import Rule, State, States, Tensors
from ftrun.worker.optim.subspace import leading

if TYPE_CHECKING:
    from ftrun_plugins.optimizer._projected import Method
    from ftrun_plugins.optimizer.galore import Projection


class Inner(Protocol):
    """What turns a projected gradient into the way to go."""

    def start(self, weight: Tensor) -> State:
        """Return the state of a weight before its first step."""

    def direction(self, grad: Tensor, state: State) -> Tensor:
        """Take up a gradient, and return what is added to a weight at a rate of 1."""


@dataclass(frozen=True)
class GaLore(Rule):
    """Updates a matrix within the leading subspace of its gradient (https://arxiv.org/abs/2403.03507).

    The new weight is ``(1 - lr * weight_decay) * weight``, as AdamW has it, plus what the gradient and the state give.
    The package galore-torch applies the decay after the step, so to the step as well.
    """

    inner: Inner
    rank: int
    scale: float
    update_interval: int
    projection: Projection
    method: Method
    spread: bool
    seed: int

    def start(self, weight: Tensor, number: int = 0) -> State:
        """The inner state of the projected shape, and room for the bases."""
        *batch, rows, columns = weight.shape
        left, right = self._sides(weight)
        state = self.inner.start(weight.new_empty(*batch, self.rank if left else rows, self.rank if right else columns))
        if left:
            state["left"] = weight.new_zeros(*batch, rows, self.rank)
        if right:
            state["right"] = weight.new_zeros(*batch, columns, self.rank)
        return {**state, "count": 0, "number": number}

    def update(self, weights: Tensors, grads: Tensors, states: States, *, lr: float, weight_decay: float) -> None:
        """Project, let the inner optimizer say where to go, and add that, projected back, in one pass over a weight."""
        for weight, grad, state in zip(weights, grads, states, strict=True):
            if self._is_due(state):
                self._choose_bases(grad, state)
            state["count"] += 1
            left, right = state.get("left"), state.get("right")
            small = grad if left is None else left.mT @ grad
            way = self.inner.direction(small if right is None else small @ right, state)
            first, second = left, way
            if right is not None:
                first, second = way if left is None else left @ way, right.mT
            assert first is not None
            add_product(weight, first, second, beta=1 - lr * weight_decay, alpha=lr * self.scale)

    def _sides(self, weight: Tensor) -> tuple[bool, bool]:
        """Tell whether the left side is projected, and whether the right one is."""
        tall = weight.shape[-2] >= weight.shape[-1]
        left = {"std": not tall, "reverse_std": tall}.get(self.projection, self.projection in ("left", "full"))
        return left, not left or self.projection == "full"

    def _is_due(self, state: State) -> bool:
        offset = state["number"] % self.update_interval if self.spread else 0
        return state["count"] == 0 or (state["count"] - offset) % self.update_interval == 0

    def _choose_bases(self, grad: Tensor, state: State) -> None:
        seed = zlib.crc32(f"{self.seed} {state['number']} {state['count']}".encode())
        for side, matrix in (("left", grad), ("right", grad.mT)):
            if side in state:
                last = state[side] if state["count"] else None
                state[side] = leading(matrix, self.rank, self.method, last, seed).to(grad.dtype)


def add_product(weight: Tensor, first: Tensor, second: Tensor, *, beta: float, alpha: float) -> None:
    """Make a weight ``beta * weight + alpha * first @ second`` without a temporary of its size."""
    if weight.ndim == 2:
        weight.addmm_(first, second, beta=beta, alpha=alpha)
    else:
        one, other = first.flatten(0, -3), second.flatten(0, -3)
        weight.view(-1, *weight.shape[-2:]).baddbmm_(one, other, beta=beta, alpha=alpha)


@dataclass(frozen=True)
class AdamW8bit:
    """Adam with moments of 8 bits, in blocks that each have a scale (https://arxiv.org/abs/2110.02861)."""

    beta1: float
    beta2: float
    eps: float

    def start(self, weight: Tensor) -> State:
        """Two moments of 8 bits, and the largest value of each block."""
        blocks = torch.zeros(-(-weight.numel() // 256), device=weight.device)
        codes = torch.zeros_like(weight, dtype=torch.uint8)
        return {"step": 0, "state1": codes, "state2": codes.clone(), "absmax1": blocks, "absmax2": blocks.clone()}

    def direction(self, grad: Tensor, state: State) -> Tensor:
        """Take the step of bitsandbytes."""
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        state["step"] += 1
        way = torch.zeros_like(grad)
        optimizer_update_8bit_blockwise(
            "adam",
            grad,
            way,
            state["state1"],
            state["state2"],
            self.beta1,
            self.beta2,
            beta3=0.0,
            alpha=0.0,
            eps=self.eps,
            step=state["step"],
            lr=1.0,
            qmap1=_values(True, grad.device),
            qmap2=_values(False, grad.device),
            absmax1=state["absmax1"],
            absmax2=state["absmax2"],
        )
        return way


@cache
def _values(signed: bool, device: torch.device) -> Tensor:
    """Return what the codes of 8 bits stand for."""
    from bitsandbytes.functional import create_dynamic_map

    values: Tensor = create_dynamic_map(signed=signed)  # type: ignore[no-untyped-call]
    return values.to(device)


@dataclass(frozen=True)
class Adafactor:
    """A second moment made of row and column means, and no first (https://arxiv.org/abs/1804.04235).

    The decay of the means after t steps is ``1 - t ** -0.8``, and a way longer than 1 (root mean square) is cut to 1.
    """

    def start(self, weight: Tensor) -> State:
        """Means of rows and of columns."""
        return {"step": 0, **factored.start(weight)}

    def direction(self, grad: Tensor, state: State) -> Tensor:
        """Divide by the root of the product of the means."""
        state["step"] += 1
        way = factored.normalised(grad.float(), state, state["step"] ** -0.8).neg_()
        return way.div_(way.square().mean((-2, -1), keepdim=True).sqrt_().clamp_(min=1.0)).to(grad.dtype)
