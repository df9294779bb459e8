"""Contrastive preference optimization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.stage._pairs import PairStage

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.record import Result


class Loss(StrEnum):
    """What is made of how much likelier the policy makes the better reply."""

    sigmoid = "sigmoid"
    hinge = "hinge"


@register
@dataclass(kw_only=True)
class CPO(PairStage):
    """Train on pairs as if the reference were uniform, and on the better reply (https://arxiv.org/abs/2401.08417)."""

    name: str = "cpo"

    loss: Loss = Loss.sigmoid
    """The loss of a pair."""

    beta: float = ranged(0.1, gt=0)
    """Scale of the log-probabilities: higher is steeper."""

    nll_weight: float = ranged(1.0, ge=0)
    """Weight of the better reply's mean negative log-likelihood."""

    label_smoothing: float = ranged(0.0, ge=0, lt=0.5)
    """Probability that a preference is the wrong way round: of sigmoid."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield a key that the chosen loss does not read."""
        if self.label_smoothing and self.loss is Loss.hinge:
            yield Problem("stage.label_smoothing", "stage.loss=hinge does not read it", "stage.loss=sigmoid")

    def run(self, cfg: Config) -> Result:
        """Load, encode, train, and say how it went."""
        from ftrun.worker import preference

        objective = preference.Objective(
            losses=[("cpo_hinge" if self.loss is Loss.hinge else "cpo", 1.0)],
            settings={"beta": self.beta, "label_smoothing": self.label_smoothing},
            nll_weight=self.nll_weight,
        )
        return preference.train(cfg, objective)
