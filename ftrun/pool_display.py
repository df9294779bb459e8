"""What a person sees of many runs at once: a live table on a terminal, a line for each start and end elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from ftrun import record
from ftrun.display import clock, console, print_line
from ftrun.record import Result, Status

_COLOURS = {Status.completed: "green", Status.failed: "red", Status.paused: "blue"}


@dataclass
class _Job:
    began: float = field(default_factory=time.monotonic)
    doing: str = "starting"
    step: int = 0
    first: int = 0
    total: int = 0
    values: dict[str, float] = field(default_factory=dict)

    def seconds_left(self) -> float | None:
        """Return how long the rest takes at the speed so far."""
        done = self.step - self.first
        return (time.monotonic() - self.began) / done * (self.total - self.step) if done > 0 else None


class PoolDisplay:
    """Shows the runs of a pool."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._total = len(folders)
        self._began = time.monotonic()
        self._jobs: dict[Path, _Job] = {}
        self._ended: Counter[Status] = Counter()
        self._animated = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn = 0.0

    def __enter__(self) -> PoolDisplay:
        if self._animated:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._animated:
            self._live.stop()

    def started(self, folder: Path) -> None:
        """A run has been started."""
        self._jobs[folder] = _Job()
        if not self._animated:
            self.line(f"[dim]started[/] {escape(folder.name)}")

    def adopted(self, folder: Path) -> None:
        """A run is under way already."""
        self._jobs[folder] = _Job(doing="running since before")
        if not self._animated:
            self.line(f"[dim]running already[/] {escape(folder.name)}")

    def seen(self, folder: Path) -> None:
        """A run that tells nothing has been looked at."""
        job, so_far = self._jobs[folder], record.so_far(folder)
        job.step, job.values = so_far["step"], so_far["metrics"]
        job.doing = f"after step {job.step}"

    def show(self, folder: Path, event: dict[str, Any]) -> None:
        """Show what a run tells."""
        job, kind = self._jobs[folder], event["kind"]
        if kind == "phase":
            job.doing = event["text"]
        elif kind == "start":
            job.doing, job.began = "training", time.monotonic()
            job.step = job.first = event["step"]
            job.total = event["total"]
        elif kind == "step":
            job.step = event["step"]
        elif kind == "log":
            job.values |= {name: value for name, value in event.items() if name in ("loss", "eval_loss")}

    def ended(self, result: Result) -> None:
        """A run has ended."""
        folder = Path(result.folder)
        self._jobs.pop(folder, None)
        self._ended[result.status] += 1
        objective = f"  objective {result.objective:.4g}" if result.objective is not None else ""
        why = f"  {escape(result.reason.splitlines()[0])}" if result.reason else ""
        count = f"{sum(self._ended.values())} of {self._total}"
        colour = _COLOURS.get(result.status, "yellow")
        self.line(f"{count}  [{colour}]{result.status}[/] {escape(folder.name)}{objective}{why}")

    def stopping(self, interrupted: bool, again: bool) -> None:
        """Say that a signal has arrived."""
        if not again:
            hint = " (Ctrl-C again ends at once)" if interrupted else ""
            self.line(f"[yellow]saving what runs, then stopping[/]{hint}")

    def line(self, text: str) -> None:
        """Print a line above the table."""
        print_line(text)

    def refresh(self) -> None:
        """Draw the table again, a few times a second."""
        if self._animated and time.monotonic() - self._drawn > 0.25:
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _table(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("job", "", "step", "loss", "eval_loss", "left"):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        for folder, job in self._jobs.items():
            is_training = job.total > 0
            bar = ProgressBar(total=job.total, completed=job.step, width=20) if is_training else escape(job.doing)
            table.add_row(
                escape(folder.name),
                bar,
                f"{job.step}/{job.total}" if is_training else "",
                *(f"{job.values[name]:.4g}" if name in job.values else "" for name in ("loss", "eval_loss")),
                clock(left) if (left := job.seconds_left()) is not None else "",
            )
        done = sum(self._ended.values())
        summary = f"{done} of {self._total} jobs done"
        if done:
            left = (time.monotonic() - self._began) / done * (self._total - done)
            counts = ", ".join(f"{count} {status}" for status, count in self._ended.items())
            summary += f" ({counts}), {clock(left)} left"
        return Group(table, summary)
