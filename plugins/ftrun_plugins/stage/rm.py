"""Reward modelling."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from ftrun.data import MESSAGES, ROWS
from ftrun.fields import ranged
from ftrun.plugin import ModelHead, Stage, register

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.record import Result


class AverageOver(StrEnum):
    """What the loss is the mean over."""

    prompts = "prompts"
    pairs = "pairs"


@register
@dataclass(kw_only=True)
class RewardModelling(Stage):
    """Train a model to score replies, so that the better one of a pair scores higher (https://arxiv.org/abs/2203.02155)."""

    default_data: ClassVar[str] = "demo:preferences"
    default_lr: ClassVar[float] = 1e-5
    rows: ClassVar[str] = "pairs"
    head: ClassVar[ModelHead] = ModelHead.score
    reads: ClassVar[tuple[str, ...]] = ("model.*", "template.*", "train.*", *ROWS, *MESSAGES)
    metrics: ClassVar[tuple[str, ...]] = (
        "eval_loss", "loss", "eval_accuracy", "eval_rewards_margins", "accuracy", "rewards_margins",
    )  # fmt: skip
    name: str = "rm"

    use_margin: bool = True
    """Ask for a difference of the scores as large as the row's margin, where it has one."""

    center_rewards_coefficient: float = ranged(0.0, ge=0)
    """Weight of the squared sum of a pair's scores, which keeps their mean near 0 (https://arxiv.org/abs/2312.09244):
    0.01 is usual. Comparisons alone leave the mean open."""

    average_over: AverageOver = AverageOver.prompts
    """prompts: all pairs that come from one row of a file, which ranks several replies, count as much together as the
    only pair of another row. pairs: each counts as much."""

    predict: bool = False
    """Write the scores of the evaluation rows to ``predictions.jsonl`` at the end."""

    def run(self, cfg: Config) -> Result:
        """Load, encode, train, and say how it went."""
        from ftrun.worker import scoring, training

        model, run = training.prepare(cfg)
        trainer = training.build(scoring.RewardTrainer, model, run)
        trainer.with_margin = self.use_margin
        trainer.centering_weight = self.center_rewards_coefficient
        trainer.per_prompt = self.average_over is AverageOver.prompts
        if self.predict:
            scoring.needs_evals(run)
        result = training.fit(trainer)
        if self.predict:
            trainer.predict_scores()
        return result
