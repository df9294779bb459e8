"""Whether the program in a reply passes its tests."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import Reward, register

if TYPE_CHECKING:
    from ftrun.completions import Completion
    from ftrun.config import Config


@register
@dataclass(kw_only=True)
class Code(Reward):
    """1 for a reply whose last block of Python passes the tests that are the row's answer, else 0.

    Tests are a text of assertions, or a list of such texts, or a list of ``{"input": ..., "output": ...}``: what the
    program reads and what it must print. Each test runs in a process of its own, which has limits, an empty folder and
    no environment variables. That keeps accidents small, and is NO security boundary: the program can read this user's
    files and use the network. It says nothing of a row without an answer.
    """

    name: str = "code"

    allow_execution: bool = False
    """Run what the model writes, on this machine and as this user. The limits below are no security boundary: allow it
    in a container, or on a machine, that holds nothing of value."""

    timeout: float = ranged(10.0, gt=0)
    """Seconds that a test may take, waiting included."""

    cpu_seconds: int = ranged(5, ge=1)
    """Seconds of computing that a test may take."""

    memory_mb: int = ranged(1024, ge=64)
    """Address space that a test may take, in MiB."""

    partial: bool = False
    """Give the share of the tests that pass, and not 1 only where all do."""

    parallel: int = ranged(2, ge=1)
    """How many replies are tested at a time."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """It must be allowed, and there must be a way to limit it."""
        if not self.allow_execution:
            message = "runs programs that the model writes, as you and on this machine, and its limits are no security"
            message += " boundary"
            fix = "reward.code.allow_execution=true, in a container or on a machine that holds nothing of value"
            yield Problem("reward.code.allow_execution", message, fix)
        if sys.platform == "win32":
            yield Problem(
                "reward", "reward=code limits what it runs as only POSIX systems can", "Linux, or another reward"
            )

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """Test the program of each reply."""
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self._value, completions))

    def _value(self, reply: Completion) -> float | None:
        from ftrun_plugins.reward import _sandbox as sandbox

        if reply.answer is None:
            return None
        tests = sandbox.tests_of(reply.answer)
        program = program_of(reply.final)
        if program is None:
            return 0.0
        limits = sandbox.Limits(self.timeout, self.cpu_seconds, self.memory_mb)
        if not self.partial:
            return float(all(sandbox.passes(program, test, limits) for test in tests))
        return sum(sandbox.passes(program, test, limits) for test in tests) / len(tests)


def program_of(text: str) -> str | None:
    """Return the last closed block of Python in a text, or None if there is none."""
    found = re.findall(
        r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^[ \t]*```[ \t]*$", text, re.DOTALL | re.MULTILINE
    )
    return found[-1] if found else None
