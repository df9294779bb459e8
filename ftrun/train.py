"""How long and in what batches a run trains: the ``train`` group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ftrun.data import Data, Packing
from ftrun.errors import Problem
from ftrun.fields import ranged

if TYPE_CHECKING:
    from ftrun.config import Config


class Scheduler(StrEnum):
    """How the learning rate moves after warm-up."""

    linear = "linear"
    cosine = "cosine"
    cosine_with_min_lr = "cosine_with_min_lr"
    cosine_with_restarts = "cosine_with_restarts"
    constant = "constant"
    inverse_sqrt = "inverse_sqrt"
    polynomial = "polynomial"
    wsd = "wsd"
    reduce_lr_on_plateau = "reduce_lr_on_plateau"


class DecayShape(StrEnum):
    """How the learning rate falls in the last part of warm-up, stable, decay."""

    cosine = "cosine"
    linear = "linear"
    sqrt = "sqrt"


class BadLoss(StrEnum):
    """What is done about a step whose loss or gradient is not finite, or leaps."""

    stop = "stop"
    skip = "skip"


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

    min_lr_ratio: float | None = ranged(None, ge=0, le=1)
    """Learning rate that the scheduler goes down to, as a share of the peak; inverse_sqrt and constant have none.
    Default: 0.1 with cosine_with_min_lr, a rate of 1e-7 with polynomial, else 0."""

    num_cycles: int = ranged(2, ge=1)
    """How often cosine_with_restarts falls, each time from the peak."""

    power: float = ranged(1.0, gt=0)
    """Exponent of polynomial: 1 is a straight line, 2 falls fast at first and slowly at the end."""

    decay: float = ranged(0.1, gt=0)
    """Last part of wsd, in which the learning rate falls: a share of all steps, or, from 1 on, this many steps."""

    decay_shape: DecayShape = DecayShape.cosine
    """Curve of that part; sqrt, which is 1 - sqrt(share done), did best in https://arxiv.org/abs/2405.18392."""

    plateau_patience: int = ranged(2, ge=0)
    """Evaluations in a row without a better objective that reduce_lr_on_plateau bears before it lowers the rate."""

    plateau_factor: float = ranged(0.5, gt=0, lt=1)
    """What reduce_lr_on_plateau multiplies the learning rate by, each time."""

    max_grad_norm: float = ranged(1.0, ge=0)
    """Scale the gradient down to this norm where it is larger; 0 leaves it alone."""

    on_bad_loss: BadLoss = BadLoss.stop
    """Stop at a step whose loss or gradient is not finite, naming its rows, or skip it: no weight moves, it is counted,
    and ten in a row stop the run after all."""

    max_loss_spike: float | None = ranged(None, gt=1)
    """Treat a step likewise if its loss or its gradient's norm is more than this many times the median of the last 100
    steps."""

    precision: Precision = Precision.auto
    """Type of the computation. Default: bf16 where the device has it, else fp16 on a GPU, fp32 on CPU. With bf16 and
    weights that are all stored in bfloat16 (``model.dtype=bfloat16``), nothing is computed in float32 (pure bf16)."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""

    neftune: float = ranged(0.0, ge=0)
    """Strength of the uniform noise on embeddings (https://arxiv.org/abs/2310.05914); the paper tries 5 to 15."""

    log_every: int = ranged(5, ge=1)
    """Steps between two lines of metrics."""

    eval_every: int = ranged(0, ge=0)
    """Steps between two evaluations; 0 evaluates before the first step and after the last only."""

    early_stopping_patience: int | None = ranged(None, ge=1)
    """End the run after this many evaluations in a row without a better objective. Default: never."""

    early_stopping_threshold: float = ranged(0.0, ge=0)
    """By how much more than this an evaluation must better the objective to count for early stopping."""

    save_every: int = ranged(500, ge=0)
    """Steps between two checkpoints; 0 saves only when interrupted."""

    keep_checkpoints: int = ranged(2, ge=1)
    """How many of the newest checkpoints stay on disk."""

    keep_best: bool = False
    """Save and keep a checkpoint where an evaluation has the best objective so far, and end with its weights instead of
    the last ones."""

    stall_minutes: float | None = ranged(60.0, gt=0)
    """End the run as failed if nothing has moved for this many minutes: no step, no batch evaluated, no row encoded, no
    reply written. A download that takes longer counts, too: `ftrun prepare` does it beforehand. null waits for ever."""

    profile_steps: int = ranged(0, ge=0)
    """Profile this many steps after three for warming up, into ``profile/``."""

    def warmup_steps(self, total_steps: int) -> int:
        """Return how many steps of ``total_steps`` warm up."""
        return _steps(self.warmup, total_steps)

    def decay_steps(self, total_steps: int) -> int:
        """Return how many steps of ``total_steps`` the decay takes; with shares, what the warm-up leaves at most."""
        steps = _steps(self.decay, total_steps)
        return steps if self.decay >= 1 else min(steps, total_steps - self.warmup_steps(total_steps))

    @property
    def judged_by_evaluation(self) -> list[str]:
        """The keys in use that go by how evaluations come out."""
        used = {
            "train.early_stopping_patience": self.early_stopping_patience is not None,
            "train.keep_best": self.keep_best,
            "train.scheduler": self.scheduler is Scheduler.reduce_lr_on_plateau,
        }
        return [key for key, is_used in used.items() if is_used]

    def check(self) -> Iterator[Problem]:
        """Yield what the loop's keys contradict each other in."""
        for key in ("warmup", "decay"):
            if (value := getattr(self, key)) >= 1 and value != int(value):
                yield Problem(
                    f"train.{key}", f"{value} is neither a share nor a count", "a share below 1, or whole steps"
                )
        if self.group_by_length and not self.shuffle:
            message = "rows drawn in the order of the file cannot be grouped by length"
            yield Problem("train.group_by_length", message, "train.shuffle=true, or train.group_by_length=false")
        yield from self._check_schedule()
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            message = "nothing stops early, so it would change nothing"
            yield Problem("train.early_stopping_threshold", message, "train.early_stopping_patience=N beside it")

    def _check_schedule(self) -> Iterator[Problem]:
        """Yield the keys that are typed for another scheduler, and parts that are longer than the whole."""
        defaults = Train()
        for key, readers in _READ_BY.items():
            if getattr(self, key) != getattr(defaults, key) and self.scheduler not in readers:
                message = f"train.scheduler={self.scheduler} does not read it, so it would change nothing"
                yield Problem(f"train.{key}", message, f"train.scheduler={' or '.join(readers)}, or leave it out")
        if self.scheduler is Scheduler.wsd and self.warmup < 1 and self.decay < 1 and self.warmup + self.decay > 1:
            message = f"{self.decay:g} of all steps and train.warmup={self.warmup:g} are more than the whole"
            yield Problem("train.decay", message, "shares that make up 1 at most")

    def check_with(self, cfg: Config) -> Iterator[Problem]:
        """Yield what the loop's keys cannot do with the rest of the config: what to judge by, what to compute in."""
        for key in self.judged_by_evaluation:
            if not self.eval_every:
                message = "it goes by how evaluations come out, and there is only one, after the last step"
                yield Problem(key, message, "train.eval_every=N, the steps between two evaluations")
            elif cfg.objective and not cfg.objective.startswith("eval_"):
                message = f"it goes by the objective, and {cfg.objective} is not measured on rows to evaluate on"
                yield Problem(key, message, f"objective=eval_{cfg.objective}, or leave objective out")
        stored = cfg.model.dtype.value
        if stored == "float16" and cfg.adapter.trains_base_weights:
            message = "weights that train lose small updates in float16, and torch does not scale a loss for them"
            yield Problem("model.dtype", message, "model.dtype=float32 with train.precision=fp16, or bfloat16")
        if stored != "auto" and self.precision is Precision.fp32 and stored != "float32":
            message = f"weights that are stored in {stored} are multiplied in {stored}, and not in float32"
            yield Problem("train.precision", message, f"train.precision={_PRECISIONS[stored]}, or model.dtype=float32")

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


_READ_BY: dict[str, tuple[Scheduler, ...]] = {
    "min_lr_ratio": (
        Scheduler.cosine_with_min_lr, Scheduler.cosine, Scheduler.cosine_with_restarts, Scheduler.linear,
        Scheduler.polynomial, Scheduler.wsd, Scheduler.reduce_lr_on_plateau,
    ),
    "num_cycles": (Scheduler.cosine_with_restarts,),
    "power": (Scheduler.polynomial,),
    "decay": (Scheduler.wsd,),
    "decay_shape": (Scheduler.wsd,),
    "plateau_patience": (Scheduler.reduce_lr_on_plateau,),
    "plateau_factor": (Scheduler.reduce_lr_on_plateau,),
}  # fmt: skip
"""The schedulers that read a key, for keys that not all of them do."""

_PRECISIONS = {"bfloat16": Precision.bf16, "float16": Precision.fp16}


def _steps(share_or_count: float, total_steps: int) -> int:
    return int(share_or_count) if share_or_count >= 1 else math.ceil(share_or_count * total_steps)
