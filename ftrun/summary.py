"""What a person sees after a run: how it ended, what changed, and the table of runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich import box
from rich.markup import escape
from rich.table import Table

from ftrun import record
from ftrun.display import clean, console, near
from ftrun.record import EXIT_CODES, Result, Status

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
    if result.status is Status.completed:
        _show_outcome(result, folder)
    else:
        kept = f"saved in {result.checkpoint}" if result.checkpoint else "before the first checkpoint"
        console.print(
            f"[yellow]{result.status}[/], {kept}; to go on: [bold]ftrun resume {escape(near(folder))}[/]",
            soft_wrap=True,
        )
    return EXIT_CODES[result.status]


def conclude_sweep(folder: Path, results: Sequence[Result]) -> int:
    """Print what a sweep's jobs ended with, and return the exit code for all of them."""
    show_runs(folder, as_json=False)
    console.print(f"sweep folder {escape(near(folder))}", soft_wrap=True)
    if best := _best(results):
        console.print(
            f"best {escape(near(Path(best.folder), folder))}  objective [bold]{best.objective:.4g}[/]", soft_wrap=True
        )
    stopped = [result.status for result in results if result.status in (Status.interrupted, Status.preempted)]
    if stopped:
        console.print(f"[yellow]{stopped[0]}[/]; the same words with output_dir={escape(near(folder))} go on")
        return EXIT_CODES[stopped[0]]
    return int(any(result.status is Status.failed for result in results))


def _best(results: Sequence[Result]) -> Result | None:
    """Return the job with the best objective, of those that have one."""
    scored = [result for result in results if result.objective is not None]
    if not scored:
        return None
    mode = OmegaConf.load(Path(scored[0].folder) / record.RUN).objective_mode
    pick = max if mode == "max" else min
    return pick(scored, key=lambda result: result.objective or 0.0)


def _show_outcome(result: Result, folder: Path) -> None:
    before, after = _first_and_last_evaluation(folder)
    if before and after and before["step"] != after["step"]:
        console.print(f"held-out loss [bold]{before['eval_loss']:.3f} -> {after['eval_loss']:.3f}[/]")
    _show_samples(folder)
    memory = f", {result.peak_memory_bytes / 2**30:.1f} GiB at most" if result.peak_memory_bytes else ""
    speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
    console.print(f"[green]completed[/] {result.step} steps in {_duration(result.wall_seconds)}{speed}{memory}")
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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def show_runs(root: Path, *, as_json: bool) -> None:
    """Print the runs below a folder, the newest last."""
    rows = sorted(_describe(root), key=lambda row: str(row["started"]))
    if as_json:
        print(json.dumps(rows, indent=2))  # noqa: T201
        return
    if not rows:
        console.print(f"no runs below {escape(str(root))}")
        return
    console.print(f"runs in {escape(str(root))}")
    wide = console.width >= 140
    names = ("status", "step", "loss", "eval_loss", "objective", "time", "started", "folder")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in (*names, *(["overrides"] if wide else [])):
        table.add_column(name, no_wrap=name not in ("folder", "overrides"), overflow="fold")
    for row in rows:
        overrides = " ".join(word for word in row["overrides"] if not word.startswith("output_dir="))
        table.add_row(
            f"[{_COLOURS[Status(row['status'])]}]{row['status']}[/]",
            str(row["step"]),
            *(_cell(row["metrics"].get(name)) for name in ("loss", "eval_loss")),
            _cell(row["objective"]),
            _duration(row["wall_seconds"]),
            str(row["started"])[5:16].replace("T", " "),
            escape(near(Path(row["folder"]), root.resolve())),
            *([escape(overrides)] if wide else []),
        )
    console.print(table)


def _describe(root: Path) -> Iterator[dict[str, Any]]:
    for folder in record.runs(root):
        try:
            result = Result.load(folder)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a run that is just being frozen
        try:
            manifest = json.loads((folder / record.MANIFEST).read_text())
        except (OSError, ValueError):
            manifest = {}
        last = _last_metrics(folder)
        yield {
            "folder": str(folder.resolve()),
            "status": result.status.value,
            "reason": result.reason,
            "step": result.step or int(last.get("step", 0)),
            "metrics": last | result.metrics,
            "objective": result.objective,
            "wall_seconds": result.wall_seconds,
            "started": manifest.get("started", datetime.fromtimestamp(folder.stat().st_mtime).isoformat()),
            "overrides": manifest.get("overrides", []),
        }


def _last_metrics(folder: Path) -> dict[str, Any]:
    """Return the last value of each metric so far."""
    return {name: value for line in record.read_lines(folder / record.METRICS) for name, value in line.items()}


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
