"""Proximal policy optimization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, cast

from ftrun.anchor import Anchored
from ftrun.data import MESSAGES, ROWS
from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import Stage, register
from ftrun.train import Train
from ftrun_plugins.stage._rewarded import check_direction

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ftrun.config import Config
    from ftrun.record import Result

# Noise on embeddings would make the policy that is trained another one than wrote the replies; and how long the rows
# of a batch are is not known before they are written.
_NOT_READ = ("neftune", "micro_batch_tokens", "group_by_length", "padding_free")
_TRAIN = tuple(f"train.{field.name}" for field in fields(Train) if field.name not in _NOT_READ)


class Value(StrEnum):
    """What foretells the rewards."""

    shared = "shared"
    separate = "separate"


class Estimator(StrEnum):
    """How a token's KL is estimated."""

    k1 = "k1"
    k3 = "k3"


@register
@dataclass(kw_only=True)
class PPO(Anchored, Stage):
    """Train on the model's own replies, by what rewards and a value model say of them (https://arxiv.org/abs/1707.06347)."""

    default_data: ClassVar[str] = "demo:questions"
    default_lr: ClassVar[float] = 1e-6
    default_reward: ClassVar[str] = "math"
    rows: ClassVar[str] = "questions"
    reads: ClassVar[tuple[str, ...]] = ("model.*", "template.*", *_TRAIN, *ROWS, *MESSAGES)
    takes_shards: ClassVar[bool] = False  # it writes its value model by itself, and that is cut up, too
    metrics: ClassVar[tuple[str, ...]] = (
        "eval_rewards_mean", "rewards_mean", "loss", "eval_kl", "kl", "policy_loss", "value_loss",
    )  # fmt: skip
    name: str = "ppo"

    minibatches: int = ranged(1, ge=1)
    """Optimizer steps of one pass over a rollout, each on another part of its replies. A rollout has this many times
    the questions of a step."""

    ppo_epochs: int = ranged(4, ge=1)
    """Passes over the replies of a rollout before new ones are written."""

    max_new_tokens: int = ranged(64, ge=1)
    """Longest reply, in tokens, its end included; a longer one is cut off."""

    temperature: float = ranged(1.0, gt=0)
    """How freely replies are drawn: the logits are divided by it, for drawing as for training."""

    top_p: float = ranged(1.0, gt=0, le=1)
    """Draw among the likeliest tokens that have this much probability together; 1 draws among all."""

    top_k: int = ranged(0, ge=0)
    """Draw among so many of the likeliest tokens; 0 draws among all."""

    generation_batch_size: int | None = ranged(None, ge=1)
    """Replies that are written at once on one device. Default: all of a rollout; in an evaluation,
    ``train.micro_batch_size``."""

    value_model: Value = Value.shared
    """shared: a linear head on the policy's own hidden states. separate: a head on a copy of the starting model that
    trains beside the policy; weights that the adapter leaves frozen are not copied."""

    value_coef: float = ranged(0.1, ge=0)
    """Weight of the value model's loss beside the policy's."""

    clip_range: float = ranged(0.2, gt=0)
    """How far from 1 the ratio of a token's new to its old probability may count."""

    value_clip_range: float = ranged(0.2, gt=0)
    """How far a value may move from the old one before it is judged as if it had moved only so far."""

    gamma: float = ranged(1.0, gt=0, le=1)
    """What a reward loses with each token that it is away."""

    lam: float = ranged(0.95, ge=0, le=1)
    """Generalised advantages (https://arxiv.org/abs/1506.02438): 1 sums the rewards that followed, 0 trusts the value
    model for all but the next token."""

    kl_coef: float = ranged(0.05, ge=0)
    """Weight of the KL from the reference, taken off each token's reward; at 0 there is no reference. With
    ``kl_target``, the weight to begin with."""

    kl_target: float | None = ranged(None, gt=0)
    """KL of a reply, in nats, at which the weight is kept by raising or lowering it after each rollout. Default: the
    weight stays as it is."""

    kl_horizon: int = ranged(10_000, ge=1)
    """Replies over which that weight changes by a fifth at most: smaller is faster."""

    kl_estimator: Estimator = Estimator.k1
    """Of a token's KL: k1, the log-ratio itself, or k3, which is never negative and varies less."""

    missing_end_penalty: float = ranged(0.0, ge=0)
    """Taken off the reward of a reply that was cut off."""

    score_norm: bool = False
    """Bring the rewards of replies to mean 0 and standard deviation 1, by those of all replies of the run so far."""

    score_clip: float | None = ranged(None, gt=0)
    """Cut rewards of replies off beyond this, above and below 0, after they are normalised. Default: never."""

    whiten_rewards: bool = False
    """Bring the rewards of a rollout's tokens to standard deviation 1."""

    whiten_advantages: bool = True
    """Bring the advantages of a rollout's tokens to mean 0 and standard deviation 1."""

    eval_temperature: float = ranged(0.0, ge=0)
    """The temperature of the replies in evaluations; at 0 each token is the likeliest one."""

    num_samples: int = ranged(3, ge=0)
    """How many of an evaluation's replies are shown and kept in ``samples.jsonl``."""

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that are taken on the replies of a rollout."""
        return self.minibatches * self.ppo_epochs

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield keys that would change nothing, a reference that cannot be, and an objective that points down."""
        yield from self.check_reference(cfg, can_precompute=False)
        if not self.kl_coef:
            yield from self._without_kl()
        elif self.kl_target is None and self.kl_horizon != type(self).kl_horizon:
            message = "the weight of the KL is fixed, so nothing reads it"
            yield Problem("stage.kl_horizon", message, "stage.kl_target=6, for example, or leave it out")
        yield from check_direction(cfg)

    def _without_kl(self) -> Iterator[Problem]:
        """Yield what is set and only matters with a KL."""
        for key in ("kl_target", "kl_horizon", "kl_estimator", "reference"):
            if getattr(self, key) != getattr(type(self), key):
                message = "stage.kl_coef=0 leaves the reference out, so nothing reads it"
                yield Problem(f"stage.{key}", message, "stage.kl_coef=0.05, for example, or leave it out")

    def outline(self, model: nn.Module) -> nn.Module:
        """Put the value model into the policy."""
        from ftrun.worker import ppo

        separate = self.value_model == "separate"
        policy = cast("PreTrainedModel", model)
        policy.add_module(ppo.VALUE_MODEL, ppo.value_model(policy, separate=separate, gradient_checkpointing=False))
        return policy

    def run(self, cfg: Config) -> Result:
        """Load, encode, let the model reply, judge, train, and say how it went."""
        from ftrun.worker import ppo, training

        model, run = training.prepare(cfg, ppo.PolicyRun)
        trainer = training.build(ppo.PPOTrainer, model, run)
        result = training.fit(trainer)
        if run.is_main:
            trainer.value_model.save(run.folder / ppo.VALUE_HEAD)
        return result
