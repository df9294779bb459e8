"""Simple preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.stage._pairs import PairStage

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.record import Result


@register
@dataclass(kw_only=True)
class SimPO(PairStage):
    """Train on pairs without a reference: rewards are mean log-probabilities (https://arxiv.org/abs/2405.14734)."""

    name: str = "simpo"

    beta: float = ranged(2.0, gt=0)
    """Scale of the rewards: higher is steeper."""

    gamma: float = ranged(1.0, ge=0)
    """How much more reward the better reply is to have; the paper finds 0.3 to 0.5 times beta good."""

    label_smoothing: float = ranged(0.0, ge=0, lt=0.5)
    """Probability that a preference is the wrong way round."""

    def run(self, cfg: Config) -> Result:
        """Load, encode, train, and say how it went."""
        from ftrun.worker import preference

        settings = {"beta": self.beta, "gamma": self.gamma, "label_smoothing": self.label_smoothing}
        objective = preference.Objective(losses=[("simpo", 1.0)], settings=settings)
        return preference.train(cfg, objective)
