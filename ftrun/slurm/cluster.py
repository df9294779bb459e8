"""SLURM's own commands, and what they answer. None of them needs accounting but `sacct`, which is asked last."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)
"""States that an element leaves by no power of its own."""

GONE = "GONE"
"""What an element is called that SLURM knows nothing of: it forgets them some minutes after they have ended."""

COMPLETING = "COMPLETING"
"""Its processes are being ended; which state it is in then, SLURM does not say."""


class SlurmError(Exception):
    """A command of SLURM's said no, in its own words."""


@dataclass(frozen=True)
class Element:
    """One element of an array: one run's job."""

    job: str
    """The array's number."""

    index: int

    def __str__(self) -> str:
        return f"{self.job}_{self.index}"


@dataclass(frozen=True)
class State:
    """How SLURM says that an element stands."""

    name: str
    reason: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing comes of it any more."""
        return self.name in ENDED or self.name == GONE

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason not in ("", "None") else self.name


def submit(words: Sequence[str], *, held: Sequence[int] = ()) -> str:
    """Submit a job, and return its number.

    Args:
        words: What follows ``sbatch``.
        held: Open files that the command keeps open as long as it lives: locks.

    Raises:
        SlurmError: It is refused.
    """
    # A driver that is in a job itself must not hand down what that job was given.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    return _ask(["sbatch", "--parsable", *words], env=env, held=held).strip().partition(";")[0]


def named(name: str) -> str | None:
    """Return the number of the job of that name, if SLURM knows one.

    Raises:
        SlurmError: It does not answer.
    """
    found = _ask(["squeue", *_ALL, f"--name={name}", "--format=%F"]).split()
    return found[0] if found else None


def states(jobs: Iterable[str]) -> dict[Element, State]:
    """Return how the elements of arrays stand, of those that SLURM has not forgotten.

    Raises:
        SlurmError: It does not answer.
    """
    wanted = frozenset(jobs)
    found: dict[Element, State] = {}
    env = os.environ | {"SLURM_BITSTR_LEN": "0"}  # or a long list of elements ends in dots
    for line in _ask(["squeue", *_ALL, "--array", "--format=%F|%K|%T|%r"], env=env).splitlines():
        job, indices, name, reason = line.split("|", 3)
        if job in wanted:
            found |= {Element(job, index): State(name, reason) for index in _indices(indices)}
    return found


def _indices(text: str) -> Iterator[int]:
    """Yield the elements that a line is about: several, as ``1-3,7%2``, where they were cancelled before they began."""
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text.partition("%")[0]):
        yield from range(int(first), int(last or first) + 1)


def is_ending(element: Element) -> bool:
    """Tell whether SLURM itself is ending an element, to whatever end.

    Raises:
        SlurmError: It does not answer.
    """
    words = ["squeue", "--noheader", "--states=all", "--array", f"--jobs={element}", "--format=%T"]
    name = _ask(words).strip()
    return name == COMPLETING or State(name).is_over


def accounted(elements: Iterable[Element]) -> dict[Element, State]:
    """Return how elements have ended that SLURM has forgotten, where the cluster keeps accounts."""
    jobs = ",".join(sorted({element.job for element in elements}))
    try:
        text = _ask(["sacct", "--jobs", jobs, "--allocations", "--noheader", "--parsable2", "--format=JobID,State"])
    except SlurmError:
        return {}
    found = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"(\d+)_(\d+)\|([A-Z_]+).*", line):  # CANCELLED by 1000
            found[Element(match[1], int(match[2]))] = State(match[3])
    return found


def cancel(elements: Iterable[Element]) -> None:
    """End elements; those that have ended are left alone.

    Raises:
        SlurmError: It does not answer.
    """
    words = [str(element) for element in elements]
    for start in range(0, len(words), _WORDS):
        _ask(["scancel", "--quiet", *words[start : start + _WORDS]])


def cancel_waiting(job: str) -> None:
    """End those elements of an array that have not started.

    Raises:
        SlurmError: It does not answer.
    """
    _ask(["scancel", "--quiet", "--state=PENDING", job])


def requeue(element: Element) -> None:
    """Have an element start again from the queue.

    Its own number must not be given: that of an array's last element is the array's, and all of them would.

    Raises:
        SlurmError: It is refused.
    """
    _ask(["scontrol", "requeue", str(element)])


def longest_array() -> int:
    """Return how many elements an array can have.

    Raises:
        SlurmError: It does not answer.
    """
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask(["scontrol", "show", "config"]), re.MULTILINE)
    return max(1, int(match[1])) if match else 1001


def nodes() -> list[str]:
    """Return the names of the nodes of the job that this process is in, the first first.

    Raises:
        SlurmError: It does not answer.
    """
    return _ask(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]).split()


def address_of(node: str) -> str:
    """Return the address at which SLURM finds a node.

    Raises:
        SlurmError: It does not answer.
    """
    match = re.search(r"\bNodeAddr=(\S+)", _ask(["scontrol", "show", "node", node, "--oneliner"]))
    return match[1] if match else node


_ALL = ("--noheader", "--states=all", f"--user={os.getuid()}")
_WORDS = 500
"""How many elements are named in one command."""


def _ask(words: Sequence[str], *, env: dict[str, str] | None = None, held: Sequence[int] = ()) -> str:
    try:
        done = subprocess.run(words, env=env, pass_fds=held, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise SlurmError(f"{words[0]}: {error.strerror}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise SlurmError("; ".join(lines) or f"{words[0]} ended with exit code {done.returncode}")
    return done.stdout
