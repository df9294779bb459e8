"""Muon as a rule: the mean of a matrix's gradients, made orthogonal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ftrun.worker.optim.ruled import Rule, State, States, Tensors

Coefficients = tuple[float, float, float]

COEFFICIENTS: Coefficients = (3.4445, -4.7750, 2.0315)
"""Those of https://kellerjordan.github.io/posts/muon/: five steps take singular values from 0.01 to 1 near to 1."""

_EPS = 1e-7
"""The least norm that a matrix is divided by."""

_TOGETHER = {"cpu": 2**18}
"""How many elements go through the iteration at one time on a CPU: what its caches hold. Larger matrices go alone."""

_MOST_TOGETHER = 2**24
"""How many elsewhere: enough to be busy with, in four buffers of at most 32 MiB each."""


@dataclass(frozen=True)
class Muon(Rule):
    """Steps along the nearest semi-orthogonal matrix, nearly, to the mean of gradients.

    Matrices are ``(rows, columns)``, or stacks of them ``(..., rows, columns)``: then each has a step of its own.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_coefficients: Coefficients = COEFFICIENTS
    factor: Callable[[int, int], float] | None = None
    """What the rate of a matrix of so many rows and columns is multiplied by, if by anything."""

    def start(self, weight: Tensor, number: int = 0) -> State:
        """One buffer of the weight's shape and type."""
        return {"momentum": torch.zeros_like(weight)}

    def update(self, weights: Tensors, grads: Tensors, states: States, *, lr: float, weight_decay: float) -> None:
        """Orthogonalise matrices of one shape together: many small products keep no device busy."""
        means = [state["momentum"] for state in states]
        torch._foreach_lerp_(means, list(grads), 1 - self.momentum)
        if self.nesterov:
            torch._foreach_lerp_(list(grads), means, self.momentum)
        ways = grads if self.nesterov else means
        torch._foreach_mul_(list(weights), 1 - lr * weight_decay)
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for weight, way in zip(weights, ways, strict=True):
            rows, columns = weight.shape[-2:]
            pairs = zip(weight.view(-1, rows, columns), way.reshape(-1, rows, columns), strict=True)
            by_shape.setdefault((rows, columns), []).extend(pairs)
        for (rows, columns), matrices in by_shape.items():
            rate = lr * self.factor(rows, columns) if self.factor else lr
            for some in _chunks(matrices, rows * columns):
                steps = orthogonal([way for _, way in some], self.ns_steps, self.ns_coefficients)
                torch._foreach_add_([weight for weight, _ in some], steps, alpha=-rate)


def _chunks(matrices: list[tuple[Tensor, Tensor]], numel: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    most = _TOGETHER.get(matrices[0][0].device.type, _MOST_TOGETHER)
    together = max(1, most // numel)
    for start in range(0, len(matrices), together):
        yield matrices[start : start + together]


def orthogonal(matrices: Sequence[Tensor], steps: int, coefficients: Coefficients = COEFFICIENTS) -> list[Tensor]:
    """Return the nearest semi-orthogonal matrix, nearly, to each of some matrices of one shape.

    By Newton-Schulz iterations: each moves every singular value ``s`` to ``a s + b s^3 + c s^5``.

    Args:
        matrices: Left as they are.
        steps: How many iterations.
        coefficients: ``a``, ``b``, ``c``.
    """
    a, b, c = coefficients
    rows, columns = matrices[0].shape
    tall = rows > columns
    few, many = min(rows, columns), max(rows, columns)
    dtype = _dtype(matrices[0].device.type)
    x = matrices[0].new_empty(len(matrices), few, many, dtype=dtype)
    torch._foreach_copy_(list(x), [one.mT if tall else one for one in matrices])
    # Divided by its Frobenius norm, which its spectral norm cannot exceed, a matrix is where the iteration converges.
    x.div_(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_(min=_EPS))
    spare, gram, powers = (
        torch.empty_like(x),
        x.new_empty(len(matrices), few, few),
        x.new_empty(len(matrices), few, few),
    )
    for _ in range(steps):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=powers)
        torch.baddbmm(x, powers, x, beta=a, out=spare)
        x, spare = spare, x
    return list(x.mT if tall else x)


@cache
def _dtype(device: str) -> torch.dtype:
    """Return the type to iterate in: bfloat16 is exact enough, and the fastest that there are instructions for.

    A CPU without them takes three to forty times as long with it as with float32.
    """
    able = torch.cpu.get_capabilities()
    has_them = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if device != "cpu" or has_them else torch.float32
