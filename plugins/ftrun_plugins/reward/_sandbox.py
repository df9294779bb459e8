"""A program run against one test, in a process of its own with limits. Keeps accidents small; no security boundary."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.errors import RunFailed

MAX_FILE_MB = 1
"""How large a file, its output among them, a program may make."""

# The limits are set by the process on itself before it becomes the program: it cannot raise them again. Setting them
# between fork and exec, as subprocess offers, is not safe beside the threads of a training process.
_LIMITED = f"""
import os, resource, sys
cpu, memory, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for limit, value in (
    (resource.RLIMIT_CPU, cpu),
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_FSIZE, {MAX_FILE_MB} << 20),
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_NPROC, 0),
):
    try:
        resource.setrlimit(limit, (value, value))
    except (OSError, ValueError):
        pass  # a lower limit holds already
os.execve(sys.executable, [sys.executable, "-I", "-B", program], {{}})
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use: seconds, seconds of computing, MiB of address space."""

    timeout: float
    cpu_seconds: int
    memory_mb: int


@dataclass(frozen=True, slots=True)
class Test:
    """One test: assertions that follow the program, or what it reads and must print."""

    assertions: str | None = None
    input: str = ""
    output: str = ""


def tests_of(answer: Any) -> list[Test]:
    """Return the tests that a row's answer is.

    Raises:
        RunFailed: It is none.
    """
    if isinstance(answer, str) and answer.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            answer = json.loads(answer)
    found = [_test(entry) for entry in (answer if isinstance(answer, list) else [answer])]
    if not found:
        raise RunFailed("reward=code: a row's answer is a list without a test")
    return found


def _test(entry: Any) -> Test:
    if isinstance(entry, str):
        return Test(assertions=entry)
    if isinstance(entry, dict) and {"input", "output"} <= set(entry):
        return Test(input=str(entry["input"]), output=str(entry["output"]))
    message = f"reward=code: a row's answer holds {json.dumps(entry, default=str)[:80]}, which is no test"
    raise RunFailed(f'{message}: a text of assertions is wanted, or {{"input": ..., "output": ...}}')


def passes(program: str, test: Test, limits: Limits) -> bool:
    """Tell whether a program passes a test within its limits."""
    proof = secrets.token_hex(8)  # printed after the last assertion, which a program that exits early never reaches
    text = program if test.assertions is None else f"{program}\n\n{test.assertions}\n\nprint({proof!r})\n"
    code, printed = _run(text, test.input, limits)
    if code != 0:
        return False
    lines = printed.rstrip().splitlines()
    if test.assertions is not None:
        return lines[-1:] == [proof]
    return [line.rstrip() for line in lines] == [line.rstrip() for line in test.output.rstrip().splitlines()]


def _run(text: str, given: str, limits: Limits) -> tuple[int | None, str]:
    """Run a program in an empty folder, and return its exit code (None if it ran out of time) and what it printed."""
    place = Path(tempfile.mkdtemp(prefix="ftrun-code-"))
    try:
        folder, program, given_file, printed = (place / name for name in ("work", "program.py", "given", "printed"))
        folder.mkdir()
        program.write_text(text, encoding="utf-8", errors="replace")
        given_file.write_text(given, encoding="utf-8")
        command = [sys.executable, "-I", "-S", "-c", _LIMITED]
        arguments = [str(limits.cpu_seconds), str(limits.memory_mb << 20), str(program)]
        with given_file.open("rb") as stdin, printed.open("wb") as stdout:
            process = subprocess.Popen(
                [*command, *arguments],
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                start_new_session=True,
            )
            code = _wait(process, limits.timeout)
        return code, printed.read_text(encoding="utf-8", errors="replace")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], timeout: float) -> int | None:
    """Wait for a program's end and then kill what it may have left behind."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
