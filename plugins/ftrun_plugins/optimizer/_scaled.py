"""What optimizers share that scale a gradient by what another makes of a projection of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun_plugins.optimizer._projected import Projected

if TYPE_CHECKING:
    from ftrun.config import Config


class Scaling(StrEnum):
    """What has one factor by which its gradient is multiplied."""

    channel = "channel"
    """Each row or column, along the side that is not projected."""

    tensor = "tensor"
    """Each matrix."""


@dataclass(kw_only=True)
class Scaled(Projected):
    """One whose factors are those by which moments of a projected gradient lengthen it."""

    scaling: Scaling = Scaling.channel
    """What has a factor of its own: each channel (row or column, along the side that is not projected), or the whole
    tensor."""

    limiter: float = ranged(1.01, ge=0)
    """By what factor a scaled gradient may be longer than the one before; longer ones are cut. 0 sets no limit."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield a limit that would let steps only shrink."""
        yield from super().check(cfg)
        if 0 < self.limiter < 1:
            message = (
                "below 1 each step would have to be shorter than the one before, and training would come to a halt"
            )
            yield Problem("optimizer.limiter", message, "optimizer.limiter=1.01, or 0 for no limit")
