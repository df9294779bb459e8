"""Odds-ratio preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.stage._pairs import PairStage

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.record import Result


@register
@dataclass(kw_only=True)
class ORPO(PairStage):
    """Train on pairs without a reference, and on the better reply itself (https://arxiv.org/abs/2403.07691)."""

    default_lr: ClassVar[float] = 8e-6
    name: str = "orpo"

    beta: float = ranged(0.1, gt=0)
    """Weight of the odds ratio beside the likelihood of the better reply; the paper calls it lambda."""

    def run(self, cfg: Config) -> Result:
        """Load, encode, train, and say how it went."""
        from ftrun.worker import preference

        objective = preference.Objective(losses=[("orpo", 1.0)], settings={"beta": self.beta})
        return preference.train(cfg, objective)
