"""How long and in what batches a run trains: the ``train`` group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ftrun.data import Data, Packing
from ftrun.errors import Problem
from ftrun.fields import ranged


class Scheduler(StrEnum):
    """How the learning rate moves after warm-up."""

    linear = "linear"
    cosine = "cosine"
    constant = "constant"
    inverse_sqrt = "inverse_sqrt"
    polynomial = "polynomial"


class Precision(StrEnum):
    """The type that is computed in."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass(kw_only=True)
class Train:
    """The training loop."""

    epochs: float = ranged(3.0, gt=0)
    """Passes over the rows."""

    max_steps: int | None = ranged(None, ge=1)
    """Stop after this many optimizer steps, whatever ``epochs`` says."""

    micro_batch_size: int = ranged(4, ge=1)
    """Rows of one forward pass on one device; with packing, sequences."""

    micro_batch_tokens: int | None = ranged(None, ge=8)
    """Make micro batches of as many rows as have no more than this many tokens, padding counted, instead of
    ``micro_batch_size`` rows."""

    padding_free: bool = False
    """Put the rows of a micro batch behind one another without padding; none sees another."""

    group_by_length: bool = False
    """Draw rows of like lengths into the same batches: less padding, a less random order."""

    grad_accumulation: int = ranged(1, ge=1)
    """Forward passes to an optimizer step. Rows to a step: this times ``micro_batch_size`` times processes."""

    shuffle: bool = True
    """Draw the rows of each epoch in a new seeded order, or in the order of the file."""

    scheduler: Scheduler = Scheduler.cosine
    """How the learning rate falls after warm-up."""

    warmup: float = ranged(0.03, ge=0)
    """Raise the learning rate from zero for this share of all steps, or, from 1 on, for this many steps."""

    max_grad_norm: float = ranged(1.0, ge=0)
    """Scale the gradient down to this norm where it is larger; 0 leaves it alone."""

    precision: Precision = Precision.auto
    """Type of the computation. Default: bf16 where the device has it, else fp16 on a GPU, fp32 on CPU."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""

    neftune: float = ranged(0.0, ge=0)
    """Strength of the uniform noise on embeddings (https://arxiv.org/abs/2310.05914); the paper tries 5 to 15."""

    log_every: int = ranged(5, ge=1)
    """Steps between two lines of metrics."""

    eval_every: int = ranged(0, ge=0)
    """Steps between two evaluations; 0 evaluates before the first step and after the last only."""

    save_every: int = ranged(500, ge=0)
    """Steps between two checkpoints; 0 saves only when interrupted."""

    keep_checkpoints: int = ranged(2, ge=1)
    """How many of the newest checkpoints stay on disk."""

    profile_steps: int = ranged(0, ge=0)
    """Profile this many steps after three for warming up, into ``profile/``."""

    def warmup_steps(self, total_steps: int) -> int:
        """Return how many steps of ``total_steps`` warm up."""
        return int(self.warmup) if self.warmup >= 1 else math.ceil(self.warmup * total_steps)

    def check(self) -> Iterator[Problem]:
        """Yield what the loop's keys contradict each other in."""
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            yield Problem(
                "train.warmup", f"{self.warmup} is neither a share nor a count", "a share below 1, or whole steps"
            )
        if self.group_by_length and not self.shuffle:
            message = "rows drawn in the order of the file cannot be grouped by length"
            yield Problem("train.group_by_length", message, "train.shuffle=true, or train.group_by_length=false")

    def check_lengths(self, data: Data, rows_per_example: int = 1) -> Iterator[Problem]:
        """Yield what the loop's keys contradict in the lengths of the rows.

        Args:
            data: Says how long a row may be.
            rows_per_example: Sequences that one example puts into a batch: two, if the stage trains on pairs.
        """
        longest = data.max_length * rows_per_example
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < longest:
            each = f"{rows_per_example} sequences of" if rows_per_example > 1 else "one sequence of"
            message = f"{each} up to data.max_length={data.max_length} tokens do not fit into {self.micro_batch_tokens}"
            yield Problem("train.micro_batch_tokens", message, f"{longest} or more, or a smaller data.max_length")
        if data.streaming:
            chosen = {
                "micro_batch_tokens": self.micro_batch_tokens is not None,
                "group_by_length": self.group_by_length,
            }
            for key in (key for key, is_set in chosen.items() if is_set):
                message = "it plans an epoch by the lengths of all rows, which a stream does not know"
                yield Problem(f"train.{key}", message, "data.streaming=false, or without it")
        if self.group_by_length and data.packing is not Packing.none:
            message = f"data.packing={data.packing} makes sequences of like lengths already"
            yield Problem("train.group_by_length", message, "one of the two")
