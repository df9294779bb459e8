"""``ftrun prepare``: fetch the model and tokenise the rows ahead of a run, for machines without a network."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from ftrun import launch, record, task
from ftrun.display import console, size_text
from ftrun.record import Status


def show(overrides: Sequence[str]) -> int:
    """Prepare the run that has the same words, and say what is there now.

    Returns:
        The exit code.

    Raises:
        ConfigError: The config or its rows cannot be.
        RunFailed: The worker failed.
    """
    cfg = launch.check(overrides, to_run=False)
    begun = time.monotonic()
    made: list[dict[str, Any]] = []
    result = task.do("prepare", cfg, lambda line: made.append(json.loads(line)))
    if result.status is not Status.completed:
        return record.EXIT_CODES[result.status]
    if not any(thing["kind"] == "model" for thing in made):
        _line("model", f"{cfg.model.path} is on this machine")
    for thing in made:
        _line(thing["kind"], _described(thing))
    if cfg.data.streaming and cfg.stage.rows:
        _line("rows", "those to train on are tokenised while training: data.streaming=true")
    console.print(
        f"[green]ready[/] after {time.monotonic() - begun:.1f} s; the run that starts from it: "
        f"[bold]{escape(task.command('', overrides))}[/]",
        soft_wrap=True,
    )
    return 0


def _line(kind: str, text: str) -> None:
    console.print(f"[bold]{kind:<6}[/] {escape(text)}", soft_wrap=True)


def _described(thing: dict[str, Any]) -> str:
    counts = f"{thing['rows']:,} rows, {thing['tokens']:,} tokens, " if thing["kind"] == "rows" else ""
    new = {"rows": "tokenised", "model": "downloaded"}[thing["kind"]]
    how = "was there already" if thing["was_there"] else new
    return f"{thing['name']}: {counts}{size_text(thing['bytes'])}, {how}, {Path(thing['place'])}"
