"""What a reply loses that comes near the limit of its length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import Reward, register

if TYPE_CHECKING:
    from torch import nn

    from ftrun.completions import Completion
    from ftrun.config import Config
    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class Overlong(Reward):
    """0 for a reply well below a limit, falling evenly to -1 at it: DAPO's soft punishment (arXiv:2503.14476)."""

    name: str = "overlong"

    max_tokens: int | None = ranged(None, ge=1)
    """The length, in tokens with the end token, from which a reply gets -1. Default: that at which the stage cuts a
    reply off (``stage.max_new_tokens``)."""

    buffer: float = ranged(0.2, gt=0, le=1)
    """The last part of that length, as a share of it, over which the value falls."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """There must be a limit, and replies that come near it."""
        longest = _longest(cfg)
        if self.max_tokens is None and longest is None:
            message = f"stage={cfg.stage.name} does not say how long a reply may be"
            yield Problem("reward.overlong.max_tokens", message, "reward.overlong.max_tokens=1024, for example")
        elif self.max_tokens is not None and longest is not None and longest <= self.max_tokens * (1 - self.buffer):
            message = f"replies are cut off at {longest} tokens (stage.max_new_tokens), before the value falls"
            yield Problem("reward.overlong.max_tokens", message, f"reward.overlong.max_tokens={longest}")

    def prepare(self, run: Run, model: nn.Module) -> None:
        """Settle the limit."""
        self._limit = self.max_tokens or _longest(run.cfg) or 0
        assert self._limit, "check() has passed"

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """Return how far into the buffer each reply comes, as a negative share of it."""
        size = self._limit * self.buffer
        begins = self._limit - size
        return [-min(max(len(reply.ids) - begins, 0.0) / size, 1.0) for reply in completions]


def _longest(cfg: Config) -> int | None:
    """Return how many tokens a reply of the stage may have, if the stage has a key for it."""
    return getattr(cfg.stage, "max_new_tokens", None)
