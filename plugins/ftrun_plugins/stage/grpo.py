"""Group relative policy optimization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.stage._online import Grouped

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.record import Result


class Loss(StrEnum):
    """What is done with the ratios of probabilities, and what the sum over tokens is divided by."""

    dapo = "dapo"
    grpo = "grpo"
    bnpo = "bnpo"
    dr_grpo = "dr_grpo"
    cispo = "cispo"
    sapo = "sapo"
    luspo = "luspo"
    vespo = "vespo"


class Level(StrEnum):
    """What has a ratio of probabilities of its own."""

    token = "token"  # noqa: S105
    sequence = "sequence"


class Scale(StrEnum):
    """What a reply's advantage is divided by the spread of."""

    group = "group"
    batch = "batch"
    none = "none"


class Aggregation(StrEnum):
    """How several rewards become one advantage."""

    sum_then_normalize = "sum_then_normalize"
    normalize_then_sum = "normalize_then_sum"


CLIPPED = (Loss.dapo, Loss.grpo, Loss.bnpo, Loss.dr_grpo, Loss.luspo)
"""The losses that clip ratios to ``1 - epsilon`` and ``1 + epsilon_high``."""


@register
@dataclass(kw_only=True)
class GRPO(Grouped):
    """Train on replies that are better than others to the same question (https://arxiv.org/abs/2402.03300)."""

    name: str = "grpo"

    loss: Loss = Loss.dapo
    """dapo divides the sum over all tokens by their number in the step; grpo each reply's by its length; bnpo by the
    tokens of the micro batch; dr_grpo by ``max_new_tokens``. cispo clips what the gradient is weighted by, sapo lets
    ratios fade out, luspo and vespo work on the ratios of whole replies (docs/online.md)."""

    importance_sampling_level: Level = Level.token
    """Whether each token has its own ratio of new to old probability, or each reply the mean of its tokens' (GSPO)."""

    use_bias_correction_kl: bool = True
    """Multiply that divergence by the ratio of new to old probability, which makes its gradient unbiased."""

    scale_rewards: Scale = Scale.group
    """Divide advantages by the standard deviation of the rewards of the question's own replies, of all replies of the
    batch, or not."""

    aggregation: Aggregation = Aggregation.sum_then_normalize
    """Compare sums of rewards; or compare each reward by itself and sum what comes out, so that a reward of small
    spread counts as much (GDPO)."""

    delta: float | None = ranged(None, gt=1)
    """Upper bound of ratios also where the advantage is negative. Default: none."""

    top_entropy_quantile: float = ranged(1.0, gt=0, le=1)
    """Train on this share of a micro batch's tokens, those of the highest entropy."""

    off_policy_mask_threshold: float | None = ranged(None, gt=0)
    """Leave out replies of negative advantage from which the policy has moved further than this, in nats a token.
    Default: none is left out."""

    sapo_temperature_pos: float = ranged(1.0, gt=0)
    """How sharply ratios fade out where the advantage is positive, with ``loss=sapo``."""

    sapo_temperature_neg: float = ranged(1.05, gt=0)
    """The same where it is negative."""

    vespo_k_pos: float = ranged(2.0, ge=0)
    """How fast replies that have become less likely lose weight, at positive advantage, with ``loss=vespo``."""

    vespo_lambda_pos: float = ranged(3.0, ge=0)
    """How fast replies that have become more likely do."""

    vespo_k_neg: float = ranged(3.0, ge=0)
    """``vespo_k_pos`` at negative advantage."""

    vespo_lambda_neg: float = ranged(2.0, ge=0)
    """``vespo_lambda_pos`` at negative advantage."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield keys that would do nothing, and combinations that would not compute what they are named after."""
        yield from super().check(cfg)
        yield from self._idle()
        if self.loss is Loss.cispo and (self.epsilon_high or 0) < 1:
            message = "cispo cuts the ratio itself off there, and it is near 1: every token would have the same weight"
            yield Problem("stage.epsilon_high", message, "stage.epsilon_high=5")
        if self.loss is Loss.luspo and self.importance_sampling_level is Level.token:
            message = "luspo is made for one ratio a reply"
            yield Problem("stage.importance_sampling_level", message, "stage.importance_sampling_level=sequence")
        if self.loss is Loss.vespo and self.importance_sampling_level is Level.sequence:
            message = "vespo makes the ratio of a whole reply itself, of those of its tokens"
            yield Problem("stage.importance_sampling_level", message, "stage.importance_sampling_level=token")
        if self.importance_sampling_level is Level.sequence and self.loss in (
            Loss.dapo, Loss.bnpo, Loss.dr_grpo, Loss.cispo,
        ):  # fmt: skip
            message = f"with one ratio a reply, the sum over tokens in {self.loss} counts long replies more"
            yield Problem("stage.loss", message, "stage.loss=grpo (GSPO), or luspo")

    def _idle(self) -> Iterator[Problem]:
        """Yield keys that are off their default and change nothing."""
        read_by = {
            "delta": (self.loss in CLIPPED, f"stage.loss= one of {', '.join(CLIPPED)}"),
            "epsilon": (self.loss in CLIPPED, f"stage.loss= one of {', '.join(CLIPPED)}"),
            "epsilon_high": (
                self.loss in (*CLIPPED, Loss.cispo),
                f"stage.loss= one of {', '.join((*CLIPPED, Loss.cispo))}",
            ),
            "use_bias_correction_kl": (self.beta > 0, "stage.beta= more than 0"),
            "scale_rewards": (
                self.aggregation is Aggregation.sum_then_normalize,
                "stage.aggregation=sum_then_normalize",
            ),
            "sapo_temperature_pos": (self.loss is Loss.sapo, "stage.loss=sapo"),
            "sapo_temperature_neg": (self.loss is Loss.sapo, "stage.loss=sapo"),
        } | {
            f"vespo_{key}": (self.loss is Loss.vespo, "stage.loss=vespo")
            for key in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
        }
        for key, (is_read, fix) in read_by.items():
            if not is_read and getattr(self, key) != getattr(type(self), key):
                yield Problem(f"stage.{key}", "nothing in this choice of keys reads it", f"{fix}, or without it")

    def trl_arguments(self) -> dict[str, Any]:
        """Return the arguments of TRL's trainer that the keys stand for."""
        same = (
            "use_bias_correction_kl", "delta", "top_entropy_quantile", "off_policy_mask_threshold",
            "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
            "vespo_lambda_neg",
        )  # fmt: skip
        return (
            super().trl_arguments()
            | {key: getattr(self, key) for key in same}
            | {
                "loss_type": self.loss.value,
                "importance_sampling_level": self.importance_sampling_level.value,
                "scale_rewards": self.scale_rewards.value,
                "multi_objective_aggregation": self.aggregation.value,
            }
        )

    def run(self, cfg: Config) -> Result:
        """Load, encode, let the model reply, judge, train, and say how it went."""
        from ftrun.worker import online, training

        return training.fit(online.build(online.GroupTrainer, cfg))
