"""Continued pre-training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.data import ROWS
from ftrun.plugin import Stage, register

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.record import Result


@register
@dataclass(kw_only=True)
class Pretrain(Stage):
    """Train on plain text, every token of it."""

    default_data: ClassVar[str] = "demo:text"
    rows: ClassVar[str] = "texts"
    reads: ClassVar[tuple[str, ...]] = (
        "model.*", "train.*", *ROWS, "data.packing", "data.streaming", "data.shuffle_buffer",
    )  # fmt: skip
    metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "loss", "eval_perplexity", "eval_token_accuracy")
    name: str = "pt"

    def run(self, cfg: Config) -> Result:
        """Load, encode, train, and say how it went."""
        from ftrun.worker import training
        from ftrun.worker.causal import CausalTrainer

        model, run = training.prepare(cfg)
        return training.fit(training.build(CausalTrainer, model, run))
