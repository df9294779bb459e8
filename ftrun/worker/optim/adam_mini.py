"""Adam-mini as a rule, and which elements of a model's weights share a second moment by it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftrun.worker import parameters
from ftrun.worker.optim.ruled import Rule, State, States, Tensors
from ftrun.worker.parameters import Role, Weight


@dataclass(frozen=True)
class Blocks:
    """Which elements of a weight share a second moment."""

    rows: int = 0
    """Those of so many rows; 0: all elements."""

    transposed: bool = False
    """Whether rows are counted in the transposed matrix."""

    def __str__(self) -> str:
        """The name of their rule."""
        return f"{self.rows} {'columns' if self.transposed else 'rows'}" if self.rows else "whole"

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of a tensor in which a block is all that is in the last two dimensions, or in all of them."""
        if not self.rows:
            return tensor
        matrix = tensor.mT if self.transposed else tensor
        return torch.unflatten(matrix, -2, (-1, self.rows))

    def mean_square(self, tensor: Tensor) -> Tensor:
        """Return the mean square of each block, in float32, so that it can be broadcast over `of`."""
        view = self.of(tensor)
        dims = (-2, -1) if self.rows else tuple(range(view.ndim))
        norm = torch.linalg.vector_norm(view, dim=dims, keepdim=True, dtype=torch.float32)
        return norm.square_().div_(view.numel() / norm.numel())


WHOLE, ROW, COLUMN = Blocks(), Blocks(rows=1), Blocks(rows=1, transposed=True)


@dataclass(frozen=True)
class AdamMini(Rule):
    """Adam with one second moment for each block of a weight (https://arxiv.org/abs/2406.16793)."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    blocks: Blocks = WHOLE

    def start(self, weight: Tensor, number: int = 0) -> State:
        """A first moment of the weight's shape and type, and a number for each block.

        In bfloat16 the second moments would stop moving, as their changes are smaller than its steps; there are so few
        of them that float32 costs nothing.
        """
        return {"step": 0, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": self.blocks.mean_square(weight).zero_()}

    def update(self, weights: Tensors, grads: Tensors, states: States, *, lr: float, weight_decay: float) -> None:
        """Take Adam's step, with the root mean square of a block's gradients in place of each element's own."""
        means, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        for state in states:
            state["step"] += 1
        torch._foreach_lerp_(means, list(grads), 1 - self.beta1)
        torch._foreach_lerp_(squares, [self.blocks.mean_square(grad) for grad in grads], 1 - self.beta2)
        sizes = torch._foreach_sqrt(squares)
        torch._foreach_div_(sizes, [math.sqrt(1 - self.beta2 ** state["step"]) for state in states])
        torch._foreach_add_(sizes, self.eps)
        torch._foreach_mul_(list(weights), 1 - lr * weight_decay)
        for weight, mean, size, state in zip(weights, means, sizes, states, strict=True):
            rate = lr / (1 - self.beta1 ** state["step"])
            self.blocks.of(weight).addcdiv_(self.blocks.of(mean), size, value=-rate)


def blocks(model: nn.Module) -> dict[str, Blocks | None]:
    """Return the blocks of each weight that trains, by name; None where each element is a block: biases.

    A block is all that the gradients of which are of one size, by the paper: a head in a query or key, a token's row in
    an embedding or output head, what one output is computed by in any other matrix, and the whole of all else.
    """
    modules = dict(model.named_modules())
    return {weight.name: _blocks(weight, modules) for weight in parameters.weights(model)}


def _blocks(weight: Weight, modules: dict[str, nn.Module]) -> Blocks | None:
    if parameters.is_bias(weight.name):
        return None
    if weight.role is Role.other:
        return WHOLE
    if "lora_embedding_A" in weight.name or _takes_rows(modules.get(weight.module)):
        return COLUMN
    return Blocks(_head_size(weight, modules)) if weight.role is Role.matrix else ROW


def _takes_rows(module: nn.Module | None) -> bool:
    """Tell whether the rows of a module's matrices are its inputs, and the columns its outputs."""
    return isinstance(module, Conv1D) or getattr(module, "is_transposed", False) is True


def _head_size(weight: Weight, modules: dict[str, nn.Module]) -> int:
    """Return how many rows of a matrix belong to one head, which is 1 for all but queries and keys.

    The attention knows it: models have several, vision's beside language's, or layers with larger heads than others.
    """
    attention, found, rest = weight.name.partition(".q_proj.")
    if not found:
        attention, found, rest = weight.name.partition(".k_proj.")
    has_their_rows = rest in ("weight", "base_layer.weight") or rest.startswith(("lora_B.", "modules_to_save."))
    size = getattr(modules.get(attention), "head_dim", 1) if has_their_rows else 1
    return size if weight.parameter.shape[-2] % size == 0 else 1
