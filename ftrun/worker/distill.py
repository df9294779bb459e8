"""Training a student on what a teacher makes of each token, of the rows' replies or of the student's own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch

from ftrun.data.tokens import IGNORED
from ftrun.errors import ConfigError, Problem
from ftrun.worker import generation
from ftrun.worker.batches import Batch, num_tokens, padding_collator
from ftrun.worker.causal import CausalTrainer
from ftrun.worker.generation import Decoding, Generator
from ftrun.worker.losses.tokens import nll
from ftrun.worker.sampling import Budget

if TYPE_CHECKING:
    from ftrun_plugins.stage.distill import Distill

_TEXT = {"input_ids", "labels", "attention_mask", "weights", "position_ids", "token_mask"}
"""What a batch of rows without media holds; the last two are of the stand-in for no rows."""


def divergence(student: torch.Tensor, teacher: torch.Tensor, *, beta: float, temperature: float) -> torch.Tensor:
    """Return the divergence of two models' next tokens, in nats times ``temperature`` squared, of shape (N,).

    With M the mixture of ``beta`` parts of the teacher and the rest of the student, it is ``beta`` KL(teacher || M) +
    (1 - ``beta``) KL(student || M), as in https://arxiv.org/abs/2306.13649, equation 1; but at 0 KL(teacher || student)
    and at 1 KL(student || teacher), where that would be 0.

    Args:
        student: Logits of shape (N, V).
        teacher: Logits of shape (N, W). Where W is not V, the larger vocabulary is filled up with tokens that nobody
            has a name for, which are left out.
        beta: From 0 to 1.
        temperature: What the logits are divided by.
    """
    size = min(student.shape[-1], teacher.shape[-1])
    ours, theirs = ((logits[:, :size] / temperature).log_softmax(-1) for logits in (student, teacher))
    if beta == 0:
        return _kl(theirs, ours) * temperature**2
    if beta == 1:
        return _kl(ours, theirs) * temperature**2
    share = torch.tensor(beta, device=ours.device)
    mixture = torch.logaddexp(theirs + share.log(), ours + (1 - share).log())
    return (beta * _kl(theirs, mixture) + (1 - beta) * _kl(ours, mixture)) * temperature**2


def _kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return KL(one || other) of log-probabilities, of shape (N,)."""
    return (one.exp() * (one - other)).sum(-1)


class DistillTrainer(CausalTrainer):
    """Compares each labelled token's distribution with the teacher's."""

    compares = True
    writes = False
    """Whether the student has written the replies of this step."""

    @property
    def stage(self) -> Distill:
        """The keys of the run's stage."""
        return cast("Distill", self.run.cfg.stage)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Load the teacher, then train.

        Raises:
            ConfigError: It cannot be loaded, or has another tokenizer.
        """
        from ftrun_plugins.stage.distill import of_teacher

        with of_teacher():
            return super().train(*args, **kwargs)

    def loss_of_tokens(self, logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return the loss of each token, of shape (N,), from both models' logits (N, V)."""
        stage = self.stage
        apart = divergence(logits, teacher, beta=stage.beta, temperature=stage.temperature)
        if stage.alpha == 1 or self.writes:
            return apart
        return stage.alpha * apart + (1 - stage.alpha) * nll(logits, targets)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the mean loss over the labelled tokens of each evaluation set, on the replies of its rows."""
        self.writes = False
        return super().evaluate(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Draw a step's batches, and have the student write their replies if it is its turn.

        Whose turn it is depends on the seed and the step alone, and so do the draws: there is nothing to be saved.
        """
        found, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        turn = random.Random(f"{self.run.cfg.seed} {self.state.global_step}").random()  # noqa: S311
        self.writes = turn < self.stage.on_policy
        if not self.writes:
            return found, num_items
        self.tokens -= sum(num_tokens(batch) for batch in found)
        written = self._written(found)
        self.tokens += sum(num_tokens(batch) for batch in written)
        return written, self._get_num_items_in_batch(written, device)

    def _written(self, batches: list[Batch]) -> list[Batch]:
        """Return batches whose rows end in replies of the student's own; rows without a reply stay as they are."""
        rows = [row for batch in batches for row in rows_of(batch)]
        begins = [last_reply(row["labels"]) for row in rows]
        prompts = [{"input_ids": row["input_ids"][:at]} for row, at in zip(rows, begins, strict=True) if at]
        longest = max((at for at in begins if at), default=0)
        generation.refuse_too_long(self.model, longest, self.stage.max_new_tokens)
        with self.accelerator.autocast():
            replies = iter(self._generator(len(batches[0]["input_ids"])).replies(self.model, prompts))
        made = [_with_reply(row, at, next(replies)) if at else row for row, at in zip(rows, begins, strict=True)]
        collate, at = padding_collator(self.run.pad_id), 0
        found = []
        for batch in batches:
            count = len(batch["input_ids"])
            found.append(self.on_device(collate(made[at : at + count])))
            at += count
        return found

    def _generator(self, at_once: int) -> Generator:
        stage, run = self.stage, self.run
        seed = (run.cfg.seed * 1_000_003 + self.state.global_step) * run.world_size + run.rank
        return Generator(
            decoding=Decoding(
                max_new_tokens=stage.max_new_tokens, temperature=stage.reply_temperature, seed=seed % 2**31
            ),
            budget=Budget(at_once, None, padded=True),
            ends=generation.end_ids(run.cfg, run.tokenizer, self.model),
            pad_id=run.pad_id,
        )


def rows_of(batch: Batch) -> list[dict[str, list[int]]]:
    """Return the rows of a padded batch.

    Raises:
        ConfigError: They have media.
    """
    if set(batch) - _TEXT:
        message = "rows have images, videos or sounds, and the student writes replies to text only"
        raise ConfigError([Problem("stage.on_policy", message, "stage.on_policy=0, or rows of text")])
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) > 0
    both = zip(batch["input_ids"], batch["labels"], mask, strict=True)
    return [{"input_ids": ids[kept].tolist(), "labels": labels[kept].tolist()} for ids, labels, kept in both]


def last_reply(labels: list[int]) -> int | None:
    """Return where the last labelled part of a row begins; None if nothing is labelled, or all that there is."""
    at = len(labels)
    while at and labels[at - 1] == IGNORED:
        at -= 1
    while at and labels[at - 1] != IGNORED:
        at -= 1
    return at or None


def _with_reply(row: dict[str, list[int]], at: int, reply: list[int]) -> dict[str, list[int]]:
    return {"input_ids": [*row["input_ids"][:at], *reply], "labels": [IGNORED] * at + reply}
