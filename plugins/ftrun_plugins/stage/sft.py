"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ftrun.fields import ranged
from ftrun.plugin import Stage, register

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

    from ftrun.config import Config
    from ftrun.record import Result
    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class SFT(Stage):
    """Train on conversations: the model learns to give the replies in them."""

    default_data: ClassVar[str] = "demo:identity"
    rows: ClassVar[str] = "conversations"
    reads: ClassVar[tuple[str, ...]] = ("model.*", "template.*", "data.*", "train.*")
    metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "loss", "eval_token_accuracy", "eval_perplexity")
    name: str = "sft"

    sample_prompts: list[str] = field(default_factory=list)
    """Prompts whose replies are shown at each evaluation. Default: those of the first evaluation rows."""

    num_samples: int = ranged(3, ge=0)
    """How many evaluation rows give such a prompt, where ``sample_prompts`` gives none; 0 for no samples."""

    sample_tokens: int = ranged(48, ge=1)
    """Longest sample reply, in tokens."""

    def run(self, cfg: Config) -> Result:
        """Load, encode, train, and say how it went."""
        from ftrun.worker import training
        from ftrun.worker.causal import CausalTrainer

        model, run = training.prepare(cfg)
        return training.fit(training.build(CausalTrainer, model, run))

    def callbacks(self, model: nn.Module, run: Run) -> Sequence[TrainerCallback]:
        """Show sample replies at each evaluation."""
        from ftrun.worker.report import Prompt
        from ftrun.worker.samples import Samples

        own = [Prompt([{"role": "user", "content": text}]) for text in self.sample_prompts]
        return [Samples(run, own or run.rows.eval_prompts[: self.num_samples], self.sample_tokens)]
