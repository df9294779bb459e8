"""GaLore, full fine-tuning with the moments of projected gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import is_installed, register
from ftrun_plugins.optimizer._projected import Method, Projected

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.worker.optim.galore import Inner
    from ftrun.worker.optim.ruled import Rule
    from ftrun.worker.training import Run


class Projection(StrEnum):
    """Which sides of a gradient are projected."""

    std = "std"
    reverse_std = "reverse_std"
    left = "left"
    right = "right"
    full = "full"


class InnerName(StrEnum):
    """What keeps the moments of projected gradients."""

    adamw = "adamw"
    adamw8bit = "adamw8bit"
    adafactor = "adafactor"


@register
@dataclass(kw_only=True)
class GaLore(Projected):
    """Train every weight with Adam's moments in the leading subspace of the gradient (https://arxiv.org/abs/2403.03507).

    A matrix of m x n with m <= n keeps ``rank * m`` numbers for the basis and ``2 * rank * n`` for the moments, where
    AdamW keeps ``2 * m * n``.
    """

    # The default rate is AdamW's, which also updates what is not projected; `scale` makes up for the shorter steps. The
    # paper's pretraining has a rate of 0.01 and a scale of 0.25 instead, which come to much the same for matrices, but
    # move embeddings and norms faster than fine-tuning wants.
    name: str = "galore"

    scale: float = ranged(2.0, gt=0)
    """What the step of a projected matrix is multiplied by. Within its subspace alone, a step is shorter than AdamW's,
    by about the root of rank / smaller side; 2 makes up for a rank of a quarter."""

    projection: Projection = Projection.std
    """The sides that are projected: the smaller one (std), the larger one (reverse_std), rows (left), columns (right),
    or both (full: rank x rank moments)."""

    inner: InnerName = InnerName.adamw
    """What makes steps of projected gradients: AdamW, AdamW with moments of 8 bits (by bitsandbytes), or Adafactor
    without a first moment. What is not projected is AdamW's in any case."""

    method: Method = Method.randomized
    """How the subspace is found: by decomposing the gradient (svd, as the paper), or by a search that starts from
    random directions (randomized) or from the last subspace (subspace), at a few hundredths of the cost."""

    spread: bool = True
    """Spread the searches of the matrices over the interval, so that no step but the first waits for all of them.
    Otherwise all take place in the same step, as in the paper."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield what the inner optimizer needs."""
        yield from super().check(cfg)
        if self.inner is InnerName.adamw8bit and not is_installed("bitsandbytes"):
            fix = "pip install bitsandbytes, or optimizer.inner=adamw"
            yield Problem("optimizer.inner", "moments of 8 bits are kept by bitsandbytes, which is not installed", fix)

    def rules(self, run: Run) -> dict[str, Rule]:
        """GaLore's, and AdamW's for what is not projected."""
        from ftrun.worker.optim.galore import GaLore

        return {"projected": GaLore(**self._settings(run)), "adamw": self.adamw()}

    def _settings(self, run: Run) -> dict[str, Any]:
        """Return what GaLore's rule, and one made of it, takes."""
        return {
            "inner": self._inner(),
            "rank": self.rank,
            "scale": self.scale,
            "update_interval": self.update_interval,
            "projection": self.projection,
            "method": self.method,
            "spread": self.spread,
            "seed": run.cfg.seed,
        }

    def _inner(self) -> Inner:
        from ftrun.worker.optim import galore

        if self.inner is InnerName.adafactor:
            return galore.Adafactor()
        if self.inner is InnerName.adamw8bit:
            return galore.AdamW8bit(beta1=self.beta1, beta2=self.beta2, eps=self.eps)
        return self.adamw()
