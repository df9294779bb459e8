"""Nobody else is told."""

from __future__ import annotations

from dataclasses import dataclass

from ftrun.plugin import Tracker, register


@register
@dataclass(kw_only=True)
class NoTracker(Tracker):
    """Metrics go to the run's own metrics.jsonl only."""

    name: str = "none"
