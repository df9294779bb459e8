"""What the stages share that train on the model's own replies, as rewards judge them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.anchor import Anchored, Reference
from ftrun.data import MESSAGES, ROWS
from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import Stage
from ftrun.train import Train
from ftrun_plugins.stage._rewarded import check_direction

if TYPE_CHECKING:
    from ftrun.config import Config

# Noise on embeddings would make the policy that is trained another one than wrote the replies; and a batch is made of
# replies, whose lengths nobody knows beforehand.
_NOT_READ = ("neftune", "micro_batch_tokens", "group_by_length", "padding_free")
TRAIN = tuple(f"train.{field.name}" for field in fields(Train) if field.name not in _NOT_READ)


@dataclass(kw_only=True)
class Online(Anchored, Stage):
    """The keys that say how replies are written, and how often they are trained on."""

    default_data: ClassVar[str] = "demo:questions"
    default_lr: ClassVar[float] = 1e-6
    default_reward: ClassVar[str] = "math"
    rows: ClassVar[str] = "questions"
    reads: ClassVar[tuple[str, ...]] = ("model.*", "template.*", *TRAIN, *ROWS, *MESSAGES)
    metrics: ClassVar[tuple[str, ...]] = ("eval_rewards_mean", "rewards_mean", "loss")

    beta: float = ranged(0.0, ge=0)
    """Weight of the divergence from the reference; at 0 it is not computed."""

    max_new_tokens: int = ranged(256, ge=1)
    """Longest reply, in tokens; a longer one is cut off."""

    temperature: float = ranged(1.0, gt=0)
    """How freely replies are drawn: the logits are divided by it, for drawing as for training."""

    top_p: float = ranged(1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability; 1 draws from all."""

    top_k: int = ranged(0, ge=0)
    """Draw from this many of the likeliest tokens; 0 draws from all."""

    min_p: float = ranged(0.0, ge=0, le=1)
    """Draw from the tokens that have at least this share of the likeliest one's probability."""

    repetition_penalty: float = ranged(1.0, gt=0)
    """Above 1, tokens that the text has already become less likely."""

    steps_per_generation: int | None = ranged(None, ge=1)
    """Micro batches whose replies are written in one go. Default: those of one optimizer step. More than that trains on
    replies of a policy that is some steps old, and writes them faster."""

    num_iterations: int = ranged(1, ge=1)
    """How often each batch of replies is trained on before new ones are written."""

    eval_temperature: float = ranged(0.0, ge=0)
    """The temperature of the replies in evaluations; at 0 each token is the likeliest one."""

    num_samples: int = ranged(3, ge=0)
    """How many of an evaluation's replies are shown and kept in ``samples.jsonl``."""

    @property
    def group_size(self) -> int:
        """How many replies each question gets."""
        raise NotImplementedError

    def micro_batches(self, cfg: Config) -> int:
        """Return how many micro batches the replies that are written in one go make."""
        return self.steps_per_generation or cfg.train.grad_accumulation

    def trl_arguments(self) -> dict[str, Any]:
        """Return the arguments of TRL's trainer that the keys stand for."""
        return {
            "num_generations": self.group_size,
            "num_iterations": self.num_iterations,
            "max_completion_length": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            # What is not said here, transformers would take from what the model was published with.
            "generation_kwargs": {
                "min_p": self.min_p, "num_beams": 1, "no_repeat_ngram_size": 0, "typical_p": 1.0, "use_cache": True,
            },
        }  # fmt: skip

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield a reference that is none, an objective that points down, and batches of no whole groups."""
        yield from self.check_reference(cfg, can_precompute=False)
        if not self.beta and self.reference is not Reference.auto:
            yield Problem(
                "stage.reference", "stage.beta=0 compares with none", "stage.beta= more than 0, or without it"
            )
        yield from check_direction(cfg)
        yield from self._check_batches(cfg)

    def _check_batches(self, cfg: Config) -> Iterator[Problem]:
        """Yield batches of no whole groups, and steps that lie across two of them."""
        accumulation, together = cfg.train.grad_accumulation, self.micro_batches(cfg)
        if max(accumulation, together) % min(accumulation, together):
            message = f"replies for {together} micro batches, and steps of {accumulation}: some would lie across two"
            yield Problem("stage.steps_per_generation", message, f"{accumulation}, or a multiple or a part of it")
        if self.num_iterations > 1 and accumulation > together:
            message = f"passes over the replies of {together} micro batches would share a step of {accumulation}"
            fix = f"stage.steps_per_generation={accumulation}, or without either"
            yield Problem("stage.num_iterations", message, fix)
        elsewhere = together * (cfg.hardware.num_processes or 1)
        size, written = cfg.train.micro_batch_size, cfg.train.micro_batch_size * elsewhere
        if written % self.group_size:
            step = self.group_size // math.gcd(self.group_size, elsewhere)
            message = (
                f"{written} replies are written in one go, which is not a whole number of groups of {self.group_size}"
            )
            fix = f"train.micro_batch_size={math.ceil(size / step) * step}: it counts replies, not questions"
            yield Problem("train.micro_batch_size", message, fix)


@dataclass(kw_only=True)
class Grouped(Online):
    """The keys of the stages that compare each reply with the others to the same question."""

    num_generations: int = ranged(4, ge=2)
    """How many replies each question gets, which are compared with one another."""

    epsilon: float = ranged(0.2, ge=0, lt=1)
    """How far below 1 the ratio of the new policy's probability to the old one's may count."""

    epsilon_high: float | None = ranged(None, gt=0)
    """How far above 1 it may. Default: ``epsilon``."""

    mask_truncated_completions: bool = False
    """Leave replies that were cut off out of the loss."""

    @property
    def group_size(self) -> int:
        """How many replies each question gets."""
        return self.num_generations

    def trl_arguments(self) -> dict[str, Any]:
        """Return the arguments of TRL's trainer that the keys stand for."""
        return super().trl_arguments() | {
            "epsilon": self.epsilon,
            "epsilon_high": self.epsilon_high,
            "mask_truncated_completions": self.mask_truncated_completions,
        }
