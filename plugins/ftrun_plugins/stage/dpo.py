"""Direct preference optimization."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.data import MESSAGES, ROWS
from ftrun.fields import ranged
from ftrun.plugin import Stage, register

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.record import Result


@register
@dataclass(kw_only=True)
class DPO(Stage):
    """Train on pairs of a better and a worse reply (https://arxiv.org/abs/2305.18290)."""

    default_data: ClassVar[str] = "demo:preferences"
    default_lr: ClassVar[float] = 1e-6
    rows: ClassVar[str] = "pairs"
    reads: ClassVar[tuple[str, ...]] = ("model.*", "template.*", "train.*", *ROWS, *MESSAGES)
    metrics: ClassVar[tuple[str, ...]] = (
        "eval_loss", "loss", "eval_rewards_accuracies", "eval_rewards_margins", "rewards_accuracies", "rewards_margins",
    )  # fmt: skip
    name: str = "dpo"

    beta: float = ranged(0.1, gt=0)
    """How closely the policy stays to the reference, which is the model as it starts: higher is closer."""

    label_smoothing: float = ranged(0.0, ge=0, lt=0.5)
    """Probability that a preference is the wrong way round (conservative DPO)."""

    def run(self, cfg: Config) -> Result:
        """Load, encode, note what the reference thinks, train, and say how it went."""
        from ftrun.worker import training
        from ftrun.worker.preference import PreferenceTrainer, dpo_loss

        model, run = training.prepare(cfg)
        trainer = training.build(PreferenceTrainer, model, run)
        trainer.beta = self.beta
        trainer.loss_of_pairs = functools.partial(dpo_loss, beta=self.beta, label_smoothing=self.label_smoothing)
        return training.fit(trainer)
