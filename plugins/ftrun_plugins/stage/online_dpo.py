"""Direct preference optimization on pairs of the model's own replies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.stage._online import Online

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.record import Result


class Loss(StrEnum):
    """What is made of a pair's margin."""

    sigmoid = "sigmoid"
    ipo = "ipo"


@register
@dataclass(kw_only=True)
class OnlineDPO(Online):
    """Train on pairs of the model's own replies, the one that rewards prefer (https://arxiv.org/abs/2402.04792)."""

    name: str = "online_dpo"

    beta: float = ranged(0.1, gt=0)
    """How closely the policy stays to the reference: higher is closer."""

    loss: Loss = Loss.sigmoid
    """The loss of a pair: DPO's own, or IPO's, which wants a margin of ``1 / (2 * beta)`` and no larger one."""

    @property
    def group_size(self) -> int:
        """How many replies each question gets."""
        return 2

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield a micro batch that would hold half a pair."""
        if cfg.train.micro_batch_size % 2:
            message = "it counts replies, and a pair is trained on as one"
            yield Problem("train.micro_batch_size", message, f"train.micro_batch_size={cfg.train.micro_batch_size + 1}")
        else:
            yield from super().check(cfg)

    def run(self, cfg: Config) -> Result:
        """Load, encode, let the model reply, judge, train, and say how it went."""
        from ftrun.worker import online, training

        return training.fit(online.build(online.PairTrainer, cfg))
