"""Errors a user can act on: which key or file, what is wrong with it, what to type instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar


@dataclass(frozen=True)
class Problem:
    """One thing wrong with what the user gave."""

    key: str
    """The key at fault as typed (``optimizer.rank``), or the file and line (``rows.jsonl:12``)."""

    message: str
    """What is wrong, and by what mechanism."""

    fix: str
    """What to type instead."""

    def __str__(self) -> str:
        return f"{self.key}: {self.message}\n    fix: {self.fix}"


class FtrunError(Exception):
    """Base of every error that ftrun raises on purpose; none is shown with a traceback."""

    exit_code: ClassVar[int] = 1


class ConfigError(FtrunError):
    """The input cannot run as it is. Holds every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count}\n\n" + "\n\n".join(f"  {problem}" for problem in self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[Sequence[Problem]]]:
        """Travel between processes as the problems."""
        return type(self), (self.problems,)


class RunFailed(FtrunError):
    """A run started, and failed."""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return ``"; did you mean a, b?"`` for the known words nearest to ``word``, or nothing."""
    near = get_close_matches(word, known, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(near)}?" if near else ""
