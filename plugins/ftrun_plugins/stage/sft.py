"""Supervised fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from ftrun.anchor import Anchored
from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import Stage, register

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import TrainerCallback

    from ftrun.config import Config
    from ftrun.record import Result
    from ftrun.worker.training import Run


class Loss(StrEnum):
    """What is made of how likely the model finds each token of a reply."""

    nll = "nll"
    dft = "dft"
    eaft = "eaft"
    asft = "asft"


class BleuTokenizer(StrEnum):
    """What BLEU takes as words, by the names that sacrebleu has for it."""

    zh = "zh"
    v13a = "13a"
    intl = "intl"
    char = "char"


_PREDICTION = (
    "predict_rows", "max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "bleu_tokenizer",
)  # fmt: skip
"""The keys that say how to predict."""

_SCORES = (
    "predict_rouge1", "predict_rouge2", "predict_rougeL", "predict_bleu", "predict_chrf", "predict_exact_match",
)  # fmt: skip


@register
@dataclass(kw_only=True)
class SFT(Anchored, Stage):
    """Train on conversations: the model learns to give the replies in them."""

    default_data: ClassVar[str] = "demo:identity"
    rows: ClassVar[str] = "conversations"
    reads: ClassVar[tuple[str, ...]] = ("model.*", "template.*", "data.*", "train.*")
    metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "loss", "eval_token_accuracy", "eval_perplexity")
    name: str = "sft"

    loss: Loss = Loss.nll
    """The loss of a token: nll, its negative log-likelihood; dft, times its probability
    (https://arxiv.org/abs/2508.05629); eaft, times how undecided the model is (https://arxiv.org/abs/2601.02151); asft,
    dft and the divergence from the reference (https://arxiv.org/abs/2509.23753)."""

    label_smoothing: float = ranged(0.0, ge=0, lt=1)
    """With nll, how much of each label is spread evenly over the vocabulary."""

    eaft_alpha: float = ranged(1.0, ge=0)
    """Power of eaft's factor: higher learns less where the model is sure."""

    asft_alpha: float = ranged(0.1, ge=0)
    """Weight of asft's divergence: higher stays closer to the reference."""

    sample_prompts: list[str] = field(default_factory=list)
    """Prompts whose replies are shown at each evaluation. Default: those of the first evaluation rows."""

    num_samples: int = ranged(3, ge=0)
    """How many evaluation rows give such a prompt, where ``sample_prompts`` gives none; 0 for no samples."""

    sample_tokens: int = ranged(48, ge=1)
    """Longest sample reply, in tokens."""

    predict: bool = False
    """Reply to the evaluation rows when training ends, write the replies to predictions.jsonl, and score them against
    those of the rows: ROUGE, BLEU, chrF and exact match."""

    predict_rows: int | None = ranged(None, ge=1)
    """With ``predict``, reply to no more than the first so many rows of each evaluation set. Default: all."""

    max_new_tokens: int = ranged(256, ge=1)
    """With ``predict``, the longest reply, in tokens."""

    temperature: float = ranged(0.0, ge=0)
    """With ``predict``, what the logits are divided by before a token is drawn: higher is more varied. 0 always takes
    the likeliest token."""

    top_p: float = ranged(1.0, gt=0, le=1)
    """With a temperature, draw among the likeliest tokens that have this much probability together."""

    top_k: int = ranged(0, ge=0)
    """With a temperature, draw among so many of the likeliest tokens; 0 for all."""

    num_beams: int = ranged(1, ge=1)
    """With ``predict``, how many replies beam search follows at once; 1 is greedy."""

    bleu_tokenizer: BleuTokenizer = BleuTokenizer.zh
    """What predict_bleu takes as words, as sacrebleu names it: ``zh`` splits Chinese characters and treats other text
    like ``v13a`` (sacrebleu's 13a), ``intl`` splits at every Unicode punctuation, ``char`` takes characters."""

    def __post_init__(self) -> None:
        """Offer the scores as the run's objective only where there are any."""
        if self.predict:
            vars(self)["metrics"] = (*type(self).metrics, *_SCORES)

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield keys that nothing would read, and an objective that comes too late."""
        yield from self._check_loss(cfg)
        if not self.predict:
            yield from self._unread(_PREDICTION, "belongs to predictions, and none are made", "stage.predict=true")
            return
        if not self.temperature:
            message = "is for tokens that are drawn, and with stage.temperature=0 the likeliest is taken"
            yield from self._unread(("top_p", "top_k"), message, "stage.temperature=1")
        elif self.num_beams > 1:
            message = f"{self.num_beams} beams search the likeliest reply, and stage.temperature draws one"
            yield Problem("stage.num_beams", message, "stage.temperature=0, or stage.num_beams=1")
        stops = cfg.train.early_stopping_patience is not None
        if (cfg.objective or "").startswith("predict_") and (stops or cfg.train.keep_best):
            key = "train.early_stopping_patience" if stops else "train.keep_best"
            message = f"{cfg.objective} is known only after the last step, and {key} needs it at each evaluation"
            yield Problem("objective", message, f"objective=eval_loss, or leave {key} out")

    def _check_loss(self, cfg: Config) -> Iterator[Problem]:
        """Yield keys that the chosen loss does not read."""
        owner = {"label_smoothing": Loss.nll, "eaft_alpha": Loss.eaft, "asft_alpha": Loss.asft}
        owner |= dict.fromkeys((f.name for f in dataclasses.fields(Anchored)), Loss.asft)
        for name, loss in owner.items():
            if self.loss is not loss:
                yield from self._unread((name,), f"stage.loss={self.loss} does not read it", f"stage.loss={loss}")
        yield from self.check_reference(cfg, can_precompute=False)

    def _unread(self, names: Sequence[str], message: str, fix: str) -> Iterator[Problem]:
        for name in names:
            if getattr(self, name) != getattr(type(self), name):
                yield Problem(f"stage.{name}", message, f"{fix}, or leave stage.{name} out")

    def run(self, cfg: Config) -> Result:
        """Load, encode, train, predict if that is asked for, and say how it went."""
        from ftrun.worker import training
        from ftrun.worker.causal import CausalTrainer

        model, run = training.prepare(cfg)
        trainer = training.build(CausalTrainer, model, run)
        trainer.loss_of_tokens = self._loss_of_tokens()
        trainer.compares = self.loss is Loss.asft
        if self.predict:
            from ftrun.worker import generation, predictions

            decoding = generation.Decoding(
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                num_beams=self.num_beams,
                seed=cfg.seed,
            )
            tokenizer = self.bleu_tokenizer.value
            predictions.at_the_end_of(trainer, decoding, rows=self.predict_rows, bleu_tokenizer=tokenizer)
        return training.fit(trainer)

    def _loss_of_tokens(self) -> Callable[..., torch.Tensor]:
        """Return the chosen loss with its settings."""
        from ftrun.worker.losses import tokens

        if self.label_smoothing:
            return partial(tokens.smoothed, label_smoothing=self.label_smoothing)
        losses: dict[Loss, Callable[..., torch.Tensor]] = {
            Loss.nll: tokens.nll,
            Loss.dft: tokens.dft,
            Loss.eaft: partial(tokens.eaft, alpha=self.eaft_alpha),
            Loss.asft: partial(tokens.asft, alpha=self.asft_alpha),
        }
        return losses[self.loss]

    def callbacks(self, model: nn.Module, run: Run) -> Sequence[TrainerCallback]:
        """Show sample replies at each evaluation."""
        from ftrun.worker.report import Prompt
        from ftrun.worker.samples import Samples

        own = [Prompt([{"role": "user", "content": text}]) for text in self.sample_prompts]
        return [Samples(run, model, own or run.rows.eval_prompts[: self.num_samples], self.sample_tokens)]
