"""A medium that cannot be used, found out while a batch is made."""

from __future__ import annotations

from ftrun.errors import ConfigError, Problem


class UnreadableMedium(ConfigError):
    """A medium that cannot be read, or that the model cannot take: a user's file is at fault, and it is named."""

    def __init__(self, problem: Problem | str) -> None:
        super().__init__([problem if isinstance(problem, Problem) else _from_text(problem)])

    def __reduce__(self) -> tuple[type[UnreadableMedium], tuple[Problem]]:  # type: ignore[override]
        """Travel between processes as the problem."""
        return type(self), (self.problems[0],)


def _from_text(text: str) -> Problem:
    """Return the problem in a traceback: torch makes an error of a data worker anew from its text alone."""
    told = text.rpartition(f"{UnreadableMedium.__name__}: ")[2].partition("\n\n")[2].strip()
    problem, _, fix = told.partition("\n    fix: ")
    key, _, message = problem.partition(": ")
    return Problem(key, message, fix)
