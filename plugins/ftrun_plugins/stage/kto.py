"""Kahneman-Tversky optimization: single replies that were found good or bad."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from ftrun.anchor import Anchored
from ftrun.data import MESSAGES, ROWS
from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import Stage, register

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.record import Result


class Loss(StrEnum):
    """What is made of how much likelier the policy makes a reply than the reference does."""

    kto = "kto"
    apo_zero_unpaired = "apo_zero_unpaired"


@register
@dataclass(kw_only=True)
class KTO(Anchored, Stage):
    """Train on replies that were found good or bad (https://arxiv.org/abs/2402.01306)."""

    default_data: ClassVar[str] = "demo:feedback"
    default_lr: ClassVar[float] = 1e-6
    rows: ClassVar[str] = "feedback"
    reads: ClassVar[tuple[str, ...]] = ("model.*", "template.*", "train.*", *ROWS, *MESSAGES)
    metrics: ClassVar[tuple[str, ...]] = (
        "eval_loss", "loss", "eval_rewards_margins", "eval_rewards_chosen", "eval_rewards_rejected",
        "eval_logps_chosen", "eval_logps_rejected", "eval_kl", "kl",
    )  # fmt: skip
    name: str = "kto"

    loss: Loss = Loss.kto
    """kto: a reply counts by how far its reward is above the divergence from the reference, which replies to other
    prompts measure. apo_zero_unpaired (https://arxiv.org/abs/2408.06266): by its reward alone, which is cheaper."""

    beta: float = ranged(0.1, gt=0)
    """How closely the policy stays to the reference: higher is closer."""

    desirable_weight: float = ranged(1.0, ge=0)
    """Weight of the good replies. Of unbalanced rows, raise that of the rarer kind: weight times number should be about
    the same for both."""

    undesirable_weight: float = ranged(1.0, ge=0)
    """Weight of the bad replies."""

    ftx: float = ranged(0.0, ge=0)
    """Weight of the good replies' mean negative log-likelihood, as in supervised fine-tuning."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield what is wrong with the weights and the reference."""
        if not self.desirable_weight and not self.undesirable_weight:
            message = "no reply counts, good or bad: both weights are 0"
            yield Problem("stage.undesirable_weight", message, "stage.undesirable_weight=1")
        yield from self.check_reference(cfg, can_precompute=True)

    def run(self, cfg: Config) -> Result:
        """Load, encode, note what the reference thinks, train, and say how it went."""
        from ftrun.worker import feedback
        from ftrun.worker.losses.feedback import apo_zero_unpaired, kto

        objective = feedback.Objective(
            loss=kto if self.loss is Loss.kto else apo_zero_unpaired,
            compares_with_mismatched=self.loss is Loss.kto,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            nll_weight=self.ftx,
        )
        return feedback.train(cfg, objective)
