"""What a worker does for a config besides runs: look at its rows, fetch and tokenise what it needs.

The config is checked and frozen as for a run, into a folder that is gone afterwards. The worker writes its answer to
its standard output, one JSON object a line.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from ftrun import launch, record
from ftrun.config import Config
from ftrun.display import errors
from ftrun.errors import RunFailed
from ftrun.hardware import Device, Hardware, default_threads
from ftrun.record import Result, Status

_LINES_OF_LOG = 15
"""Of what a worker printed before it failed."""


def do(task: str, cfg: Config, take: Callable[[str], None], **options: Any) -> Result:
    """Have a worker do a task, on the CPU whatever the config says.

    Args:
        task: The module of `ftrun.worker` that does it.
        cfg: A config that `ftrun.launch.check` has passed; it is settled in place.
        take: Called with each line of the answer, as it comes.
        **options: What else the task is told.

    Returns:
        How it ended: completed, or what a signal asked for.

    Raises:
        ConfigError: The worker found something the user can mend.
        RunFailed: It failed.
    """
    cfg.hardware = Hardware(device=Device.cpu, num_processes=1, num_threads=default_threads(1))
    launch.settle(cfg)
    folder = Path(tempfile.mkdtemp(prefix="ftrun-"))
    answer = launch.Answer(take)
    try:
        launch.write(cfg, folder)
        result = launch.watch(folder, Waiting(), [task, json.dumps(options)], answer)
        if result.status is Status.failed:
            raise RunFailed(f"{task} failed: {result.reason}{_tail(folder / record.LOG)}")
        return result
    finally:
        answer.close()
        shutil.rmtree(folder, ignore_errors=True)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES_OF_LOG:]
    return "".join(f"\n    {line}" for line in lines)


class Waiting:
    """Says on a terminal what the worker is at, and nothing elsewhere: standard output is the answer's."""

    def __init__(self) -> None:
        self._status = errors.status("starting")

    def __enter__(self) -> Waiting:
        if errors.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._status.stop()

    def show(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if event["kind"] == "phase":
            self._status.update(escape(event["text"]))
        elif event["kind"] == "note":
            errors.print(escape(event["text"]), soft_wrap=True)

    def stopping(self, interrupted: bool, again: bool) -> None:
        """Say that a signal has arrived."""
        if errors.is_terminal and not again:
            self._status.update("[yellow]stopping[/]")


def command(name: str, overrides: Sequence[str]) -> str:
    """Return what was typed, or, with no name, what starts a run with the same words."""
    return shlex.join(["ftrun", *([name] if name else []), *overrides])
