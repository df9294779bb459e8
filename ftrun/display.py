"""What a person sees of a run while it goes: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `ftrun.cli`: rich would end with exit code 1."""
        raise


console = _Console(highlight=False)
"""Where results go."""

errors = _Console(stderr=True, highlight=False)
"""Where problems go."""


def clean(text: str) -> str:
    """Return a text of foreign origin in one line that can do nothing to a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))


_SHOWN = ("loss", "grad_norm", "lr", "tokens_per_second")


class Display:
    """Shows a worker's events."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._total = 0
        self._first: tuple[float, int] | None = None
        # A dumb terminal can draw no bar, so it gets the lines that a file gets.
        self._animated = console.is_terminal and not console.is_dumb_terminal
        bar = [BarColumn(bar_width=None)] if console.width >= 80 else []
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            *bar,
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, numbers="")

    def __enter__(self) -> Display:
        print_line(f"[dim]run folder[/] {escape(near(self.folder))}")
        if self._animated:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._animated:
            self._bar.stop()

    def show(self, event: dict[str, Any]) -> None:
        """Show one event."""
        show = getattr(self, f"_show_{event.pop('kind')}", None)
        if show:
            show(**event)

    def stopping(self, interrupted: bool, again: bool) -> None:
        """Say that a signal has arrived."""
        if not again:
            print_line("[yellow]saving, then stopping[/]" + (" (Ctrl-C again ends at once)" if interrupted else ""))

    def _show_phase(self, text: str) -> None:
        self._bar.update(self._task, description=text)
        if not self._animated:
            print_line(f"[dim]{escape(text)}[/]")

    def _show_note(self, text: str) -> None:
        print_line(escape(text))

    def _show_start(self, step: int, total: int) -> None:
        self._total = total
        self._bar.update(self._task, description="training", total=total, completed=step)
        if step:
            print_line(f"going on from step {step}")

    def _show_step(self, step: int) -> None:
        self._bar.update(self._task, description="training", completed=step)
        self._first = self._first or (time.monotonic(), step)

    def _show_log(self, step: int, **values: Any) -> None:
        if any(name.startswith("eval_") for name in values):
            numbers = "  ".join(
                f"{name} {_number(value)}" for name, value in values.items() if name.startswith("eval_")
            )
            print_line(f"[bold]evaluation after step {step}[/]  {numbers}")
        elif self._animated:
            speed = values.get("tokens_per_second")
            numbers = f"loss {_number(values['loss'])}" + (f"  {_number(speed)} tokens/s" if speed else "")
            self._bar.update(self._task, numbers=numbers)
        else:
            numbers = "  ".join(f"{name} {_number(values[name])}" for name in _SHOWN if name in values)
            print_line(f"step {step}/{self._total}  {numbers}  {self._time_left(step)}")

    def _time_left(self, step: int) -> str:
        if self._first is None or step <= self._first[1]:
            return ""
        began, first = self._first
        seconds = (time.monotonic() - began) / (step - first) * (self._total - step)
        return f"{clock(seconds)} left"

    def _show_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        for sample in samples:
            print_line(f"  [cyan]{escape(clean(sample['prompt']))}[/]")
            print_line(f"    {escape(clean(sample['reply']))}")


def print_line(text: str) -> None:
    """Print a line of a run's, or a sweep's, which go on when nobody reads any more."""
    try:
        console.print(text, soft_wrap=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def clock(seconds: float) -> str:
    """Return a number of seconds as minutes and hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def near(path: Path, root: Path | None = None) -> str:
    """Return a path as seen from the working folder, or from ``root``, where that is shorter."""
    root = root or Path.cwd()
    return str(path.relative_to(root)) if path.is_relative_to(root) and path != root else str(path)


def size_text(size: float) -> str:
    """Return a number of bytes as a person reads it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
