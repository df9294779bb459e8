"""Muon."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.optimizer._ruled import AdamLike

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.worker.optim.ruled import Rule
    from ftrun.worker.parameters import Weight
    from ftrun.worker.training import Run


class Matching(StrEnum):
    """How the rate of a matrix follows from its shape."""

    match_rms_adamw = "match_rms_adamw"
    """``0.2 sqrt(max(rows, columns))``: the elements of a step are as large as AdamW's usually are."""

    original = "original"
    """``sqrt(max(1, rows / columns))``"""

    none = "none"
    """1: the singular values of a step are the rate."""

    def factor(self, rows: int, columns: int) -> float:
        """Return what the rate of a matrix of so many rows and columns is multiplied by."""
        if self is Matching.match_rms_adamw:
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns)) if self is Matching.original else 1.0


@register
@dataclass(kw_only=True)
class Muon(AdamLike):
    """Momentum made orthogonal (https://kellerjordan.github.io/posts/muon/), at AdamW's rates.

    For the matrices between hidden states, among them LoRA's factors and each expert by itself: all directions of a
    step are equally long. Embeddings, the output head, norms and biases are left to AdamW. It keeps one number for an
    element of a matrix, where AdamW keeps two. Models that were trained with AdamW need not gain from it.
    """

    name: str = "muon"

    momentum: float = ranged(0.95, gt=0, lt=1)
    """Decay of the mean of gradients, of matrices."""

    nesterov: bool = True
    """Let a gradient count once more beside the mean that it has entered."""

    matching: Matching = Matching.match_rms_adamw
    """How the rate of a matrix follows from its shape: ``match_rms_adamw`` makes the elements of a step as large as
    AdamW's (https://arxiv.org/abs/2502.16982), so that one ``optimizer.lr`` serves both; ``original`` is
    ``sqrt(max(1, rows / columns))``; ``none`` is 1, for all shapes."""

    scale: float = ranged(1.0, gt=0)
    """What the rate of matrices is multiplied by besides: ``optimizer.lr`` alone is that of AdamW's weights. With
    ``matching=original``, 0.02 for matrices beside 3e-4 for the rest is usual: ``lr=3e-4 scale=66``."""

    ns_steps: int = ranged(5, ge=1, lt=100)
    """Iterations towards an orthogonal matrix. More of them are slower, and let smaller singular values grow to 1."""

    ns_coefficients: list[float] = field(default_factory=lambda: [3.4445, -4.7750, 2.0315])
    """The iteration's a, b and c: it moves every singular value s to ``a s + b s^3 + c s^5``. ``[2, -1.5, 0.5]``
    converges to 1 itself, and needs more steps to."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield coefficients that make nothing orthogonal."""
        yield from super().check(cfg)
        key, fix = "optimizer.ns_coefficients", "[3.4445, -4.7750, 2.0315], or [2, -1.5, 0.5] with more ns_steps"
        if len(self.ns_coefficients) != 3:
            yield Problem(key, f"has {len(self.ns_coefficients)} values, and the iteration takes three", fix)
        elif (largest := self._largest()) > 2:
            message = f"takes some singular value between 0 and 1 to {largest:.3g} in {self.ns_steps} steps, not near 1"
            yield Problem(key, message, fix)
        elif largest < 0.5:
            message = (
                f"takes no singular value between 0 and 1 beyond {largest:.3g} in {self.ns_steps} steps, not near 1"
            )
            yield Problem(key, message, fix)

    def _largest(self) -> float:
        """Return the largest size to which the iteration takes a singular value that it may start with."""
        a, b, c = self.ns_coefficients
        largest = 0.0
        for number in range(1, 101):
            value = number / 100
            for _ in range(self.ns_steps):
                value *= a + b * value**2 + c * value**4
                if not abs(value) < 1e9:
                    return math.inf
            largest = max(largest, abs(value))
        return largest

    def rules(self, run: Run) -> dict[str, Rule]:
        """Muon's, and Adam's for the rest."""
        from ftrun.worker.optim import muon

        a, b, c = self.ns_coefficients
        rule = muon.Muon(
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            ns_coefficients=(a, b, c),
            factor=lambda rows, columns: self.scale * self.matching.factor(rows, columns),
        )
        return {"muon": rule, "adamw": self.adamw()}

    def rule_of(self, weight: Weight) -> str:
        """Set the matrices apart."""
        return "muon" if weight.role == "matrix" else "adamw"
