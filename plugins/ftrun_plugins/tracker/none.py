"""Nobody else is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.errors import Problem
from ftrun.plugin import Tracker, register

if TYPE_CHECKING:
    from ftrun.config import Config


@register
@dataclass(kw_only=True)
class NoTracker(Tracker):
    """Metrics go to the run's own metrics.jsonl only."""

    name: str = "none"

    def check(self, cfg: Config) -> Iterator[Problem]:
        """It goes alone."""
        if len(cfg.tracker) > 1:
            others = [name for name in cfg.tracker if name != self.name]
            yield Problem(
                "tracker", f"none and {', '.join(others)} contradict each other", f"tracker=[{','.join(others)}]"
            )
