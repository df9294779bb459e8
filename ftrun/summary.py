"""What a person sees after a run or a sweep: how it ended, what changed, and the table of runs."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ftrun import record
from ftrun.board import Row, rows
from ftrun.board.tables import duration, number
from ftrun.display import clean, console, near
from ftrun.record import EXIT_CODES, Result, Status
from ftrun.slurm.submission import states

_COLOURS = {
    Status.completed: "green",
    Status.running: "cyan",
    Status.failed: "red",
    Status.interrupted: "yellow",
    Status.preempted: "yellow",
    Status.queued: "dim",
    Status.paused: "blue",
}


def conclude(result: Result) -> int:
    """Print how a run ended, and return the exit code for it."""
    folder = Path(result.folder)
    if result.status in (Status.queued, Status.running):
        console.print(
            f"{result.status}; [bold]ftrun runs {escape(near(folder))}[/] shows how it stands", soft_wrap=True
        )
        return 0
    if result.status is Status.completed:
        _show_outcome(result, folder)
    else:
        kept = f"saved in {result.checkpoint}" if result.checkpoint else "before the first checkpoint"
        console.print(
            f"[yellow]{result.status}[/], {kept}; to go on: [bold]ftrun resume {escape(near(folder))}[/]",
            soft_wrap=True,
        )
    return EXIT_CODES[result.status]


_MOST_ARMS = 20
"""More arms are not printed when a sweep ends."""

_MOST_FAILURES = 5
_LOG_LINES = 5


def conclude_sweep(folder: Path) -> int:
    """Print what a sweep has come to, write its report and its winner, and return the exit code.

    Everything is read from the folder.
    """
    from ftrun import board, compare

    found = board.write(folder)
    compare.show_board(found, _MOST_ARMS)
    counts = found.counts()
    _show_failures(folder, [row for row in found.rows if row.status is Status.failed])
    for line in compare.write_outcome(found):
        console.print(line, soft_wrap=True)
    console.print(f"sweep folder {escape(near(folder))}", soft_wrap=True)
    stopped = next((status for status in (Status.interrupted, Status.preempted) if counts.get(status)), None)
    if stopped:
        console.print(f"[yellow]{stopped}[/]; to go on: [bold]ftrun resume {escape(near(folder))}[/]", soft_wrap=True)
        return EXIT_CODES[stopped]
    if counts.get(Status.failed):
        command = f"ftrun resume {escape(near(folder))} --retry-failed"
        console.print(f"[red]{counts[Status.failed]} failed[/]; to try them again: [bold]{command}[/]", soft_wrap=True)
        return EXIT_CODES[Status.failed]
    if waiting := counts.get(Status.queued, 0) + counts.get(Status.running, 0):
        console.print(f"{waiting} to come; [bold]ftrun runs {escape(near(folder))}[/] shows how they stand")
    return 0


def _show_failures(folder: Path, failed: Sequence[Row]) -> None:
    """Print why jobs failed, and how their logs end."""
    for row in failed[:_MOST_FAILURES]:
        name = escape(near(row.folder, folder))
        console.print(f"[red]failed[/] [bold]{name}[/]: {escape(clean(row.reason))}", soft_wrap=True)
        for line in rows.last_lines(row.folder / record.LOG)[-_LOG_LINES:]:
            console.print(f"    [dim]{escape(clean(line))}[/]", soft_wrap=True)
    if left := max(0, len(failed) - _MOST_FAILURES):
        console.print(f"[red]and {left} more[/], each in the log.txt of its folder; all are in leaderboard.csv")


def _show_outcome(result: Result, folder: Path) -> None:
    before, after = _first_and_last_evaluation(folder)
    if before and after and before["step"] != after["step"]:
        console.print(f"held-out loss [bold]{before['eval_loss']:.3f} -> {after['eval_loss']:.3f}[/]")
    _show_samples(folder)
    memory = f", {result.peak_memory_bytes / 2**30:.1f} GiB at most" if result.peak_memory_bytes else ""
    speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
    console.print(f"[green]completed[/] {result.step} steps in {duration(result.wall_seconds)}{speed}{memory}")
    console.print(
        f"model  {escape(near(folder / record.MODEL))}\nplots  {escape(near(folder / record.PLOTS))}", soft_wrap=True
    )


def _first_and_last_evaluation(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    lines = [line for line in record.read_lines(folder / record.METRICS) if "eval_loss" in line]
    return (lines[0], lines[-1]) if lines else (None, None)


def _show_samples(folder: Path) -> None:
    lines = record.read_lines(folder / record.SAMPLES)
    if not lines:
        return
    first, last = lines[0]["step"], lines[-1]["step"]
    before = {line["prompt"]: line["reply"] for line in lines if line["step"] == first}
    after = {line["prompt"]: line["reply"] for line in lines if line["step"] == last}
    if first == last:
        return
    table = Table("prompt", "before", "after", show_lines=True)
    for prompt, reply in after.items():
        table.add_row(*(escape(clean(text)) for text in (prompt, before.get(prompt, ""), reply)))
    console.print(table)


_MOST_RUNS = 200
"""More runs than the newest so many are not printed one by one."""


def show_runs(root: Path, *, as_json: bool) -> None:
    """Print the runs below a folder, the newest last."""
    found = [_Run(folder, result) for folder in record.runs(root) if (result := _result(folder))]
    found.sort(key=lambda run: run.changed)
    waiting = [run.folder for run in found if run.result.status in (Status.queued, Status.running)]
    in_slurm = states(waiting) if waiting else {}
    if as_json:
        print(json.dumps(_described(found, in_slurm), indent=2))  # noqa: T201
        return
    if not found:
        console.print(f"no runs below {escape(str(root))}")
        return
    counts = Counter(run.result.status for run in found)
    parts = ", ".join(f"[{_COLOURS[status]}]{counts[status]} {status}[/]" for status in Status if counts[status])
    console.print(f"runs in {escape(str(root))}" + (f": {parts}" if len(found) > 1 else ""))
    console.print(_table(root, _described(found[-_MOST_RUNS:], in_slurm)))
    if left := max(0, len(found) - _MOST_RUNS):
        console.print(f"and {left:,} that changed before these; --json lists all")


def _described(runs: Sequence[_Run], in_slurm: Mapping[Path, str]) -> list[dict[str, Any]]:
    described = (run.describe() | {"slurm": in_slurm.get(run.folder)} for run in runs)
    return sorted(described, key=lambda row: str(row["started"]))


def _table(root: Path, described: Sequence[dict[str, Any]]) -> Table:
    wide = console.width >= 140
    names = ("status", "step", "loss", "eval_loss", "objective", "time", "started", "folder")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in (*names, *(["overrides"] if wide else [])):
        table.add_column(name, no_wrap=name not in ("folder", "overrides"), overflow="fold")
    for row in described:
        overrides = " ".join(word for word in row["overrides"] if not word.startswith("output_dir="))
        table.add_row(
            f"[{_COLOURS[Status(row['status'])]}]{row['status']}[/]" + (f" {row['slurm']}" if row["slurm"] else ""),
            str(row["step"]),
            *(number(row["metrics"].get(name)) for name in ("loss", "eval_loss")),
            number(row["objective"]),
            duration(row["wall_seconds"]),
            str(row["started"])[5:16].replace("T", " "),
            escape(near(Path(row["folder"]), root.resolve())),
            *([escape(overrides)] if wide else []),
        )
    return table


def _result(folder: Path) -> Result | None:
    try:
        return Result.load(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a run that is just being frozen


@dataclass(frozen=True)
class _Run:
    """A run of which no more has been read than how it stands."""

    folder: Path
    result: Result

    @property
    def changed(self) -> float:
        """When it last changed, in seconds since the epoch: what is newest is found without reading every manifest."""
        for name in (record.RESULT, record.RUN):
            with contextlib.suppress(OSError):
                return (self.folder / name).stat().st_mtime
        return 0.0

    def describe(self) -> dict[str, Any]:
        """Return what a table shows of it."""
        try:
            manifest = json.loads((self.folder / record.MANIFEST).read_text())
        except (OSError, ValueError):
            manifest = {}
        result = self.result
        last = {} if result.metrics else rows.last_values(self.folder / record.METRICS)
        return {
            "folder": str(self.folder.resolve()),
            "status": result.status.value,
            "reason": result.reason,
            "step": result.step or int(last.get("step", 0)),
            "metrics": last | result.metrics,
            "objective": result.objective,
            "wall_seconds": result.wall_seconds,
            "started": manifest.get("started", datetime.fromtimestamp(self.changed).isoformat()),
            "overrides": manifest.get("overrides", []),
        }
