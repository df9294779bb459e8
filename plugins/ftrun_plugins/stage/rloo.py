"""REINFORCE with a leave-one-out baseline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.stage._online import Grouped

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.record import Result


@register
@dataclass(kw_only=True)
class RLOO(Grouped):
    """Train on replies by how much better they are than the mean of the others (https://arxiv.org/abs/2402.14740)."""

    name: str = "rloo"

    beta: float = ranged(0.05, ge=0)
    """How much of a reply's divergence from the reference, summed over its tokens, is taken off its reward; at 0 it is
    not computed."""

    normalize_advantages: bool = False
    """Shift and scale the advantages of all replies of a batch to mean 0 and standard deviation 1."""

    reward_clip_range: list[float] = field(default_factory=list)
    """Lowest and highest reward; what lies outside counts as the nearer of the two. Default: all count as they are."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield a range that is none."""
        yield from super().check(cfg)
        ends = self.reward_clip_range
        if ends and (len(ends) != 2 or ends[0] >= ends[1]):
            yield Problem("stage.reward_clip_range", f"{ends} is no range", "[LOWEST,HIGHEST], as [-1,1]")

    def trl_arguments(self) -> dict[str, Any]:
        """Return the arguments of TRL's trainer that the keys stand for."""
        return super().trl_arguments() | {
            "normalize_advantages": self.normalize_advantages,
            "reward_clip_range": tuple(self.reward_clip_range) or None,
        }

    def run(self, cfg: Config) -> Result:
        """Load, encode, let the model reply, judge, train, and say how it went."""
        from ftrun.worker import online, training

        return training.fit(online.build(online.LeaveOneOutTrainer, cfg))
