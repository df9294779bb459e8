"""When a sweep gives up: once enough jobs have failed for one reason, and none has come to anything."""

from __future__ import annotations

import re
from collections import Counter

from ftrun.record import Status


class Failures:
    """How the jobs of a sweep have ended so far.

    Args:
        most: So many failures for one reason are too many; None: never.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._reasons: Counter[str] = Counter()
        self._is_any_good = False

    def note(self, status: Status, reason: str) -> None:
        """Note how a job ended."""
        if status is Status.failed:
            self._reasons[_kind(reason)] += 1
        self._is_any_good = self._is_any_good or status in (Status.completed, Status.paused)

    @property
    def too_many(self) -> str:
        """Why no more jobs should be started, or nothing."""
        reason, count = self._reasons.most_common(1)[0] if self._reasons else ("", 0)
        if self._most is None or self._is_any_good or count < self._most:
            return ""
        return f"{count} jobs failed for one reason, none completed: {reason} (hydra.launcher.max_failures)"


def _kind(reason: str) -> str:
    """Return a reason without the numbers and paths, in which jobs that fail in one way differ."""
    return re.sub(r"(\S*[\d/]\S*\s*)+", "... ", reason.split("\n")[0])
