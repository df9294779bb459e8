"""The command as it is typed, in a process forked from one that has imported what the driver imports."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "ftrun.cli", "ftrun.launch", "ftrun.compose", "ftrun.summary", "ftrun.data.check", "hydra.core.plugins",
        "hydra._internal.hydra", "hydra._internal.core_plugins.basic_sweeper", "hydra._internal.callbacks", "rich.live",
        "rich.progress", "rich.table",
    ]
)  # fmt: skip


def run(words: Sequence[str], cwd: Path, env: dict[str, str], timeout: float) -> tuple[int, str, str]:
    """Do ``ftrun WORDS`` and return its exit code and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _FORKS.Process(target=_do, args=(list(words), cwd, env, out, err), daemon=True)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"still at work after {timeout} s: ftrun {' '.join(words)}\n{out.read_text()}")
        return process.exitcode, out.read_text(), err.read_text()


def _do(words: list[str], cwd: Path, env: dict[str, str], out: Path, err: Path) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    from ftrun import cli

    sys.exit(cli.main(words))
