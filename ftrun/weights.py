"""What ``ftrun check`` says of the weights that train: the groups that the optimizer makes of them."""

from __future__ import annotations

import copy
import json
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ftrun import task
from ftrun.config import Config
from ftrun.display import console, size_text
from ftrun.errors import RunFailed

_COLUMNS = ("weights", "rule", "tensors", "parameters", "lr", "decay", "state")


def show(cfg: Config) -> None:
    """Print the table of parameter groups, from the model's config alone: no weight is read."""
    groups: list[dict[str, Any]] = []
    try:
        task.do("weights", copy.deepcopy(cfg), lambda line: groups.append(json.loads(line)))
    except RunFailed as error:
        console.print(f"[yellow]what trains is not known before the run:[/] {escape(_reason(error))}", soft_wrap=True)
        return
    console.print(table(groups))


def table(groups: list[dict[str, Any]]) -> Table:
    """Return the table of parameter groups, as `ftrun.worker.weights.groups` describes them."""
    made = Table(*_COLUMNS, box=box.SIMPLE_HEAD)
    for column in made.columns[2:]:
        column.justify = "right"
    for group in groups:
        made.add_row(*_cells(group))
    total = {name: _sum(groups, name) for name in ("tensors", "parameters", "state_bytes")}
    if len(groups) > 1:
        made.add_section()
        made.add_row("in all", "", f"{total['tensors']:,}", f"{total['parameters']:,}", "", "", _state(total))
    return made


def _cells(group: dict[str, Any]) -> tuple[str, ...]:
    rate, decay = f"{group['lr']:g}", f"{group['weight_decay']:g}"
    counts = f"{group['tensors']:,}", f"{group['parameters']:,}"
    return escape(group["name"]), group["rule"], *counts, rate, decay, _state(group)


def _state(group: dict[str, Any]) -> str:
    return "unknown" if group["state_bytes"] is None else size_text(group["state_bytes"])


def _sum(groups: list[dict[str, Any]], name: str) -> int | None:
    values = [group[name] for group in groups]
    return None if None in values else sum(values)


def _reason(error: RunFailed) -> str:
    return str(error).splitlines()[0]
