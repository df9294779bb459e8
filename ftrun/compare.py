"""What differs between runs: many in a table (``ftrun compare``), or two in everything (``ftrun diff``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from ftrun import board, record
from ftrun.board import Board, arms, rows, tables, winner
from ftrun.display import clean, console, near
from ftrun.errors import ConfigError, Problem
from ftrun.sweep.ledger import Ledger, is_sweep

_MOST_ARMS = 50
"""More are not printed; ``--json`` has all."""


def show(folders: Sequence[Path], *, as_json: bool) -> None:
    """Print runs and sweeps side by side: the keys in which they differ, and what they came to.

    A sweep's leaderboard, report and winner are written again.

    Raises:
        ConfigError: A folder holds neither.
    """
    if problems := [_is_neither(folder) for folder in folders if not (is_sweep(folder) or record.is_run(folder))]:
        raise ConfigError(problems)
    written = [board.write(folder.resolve()) for folder in folders if is_sweep(folder)]
    said = [line for each in written for line in write_outcome(each)]
    asked = written[0] if len(written) == len(folders) == 1 else arms.board(Path.cwd(), list(_rows(folders)))
    if as_json:
        print(json.dumps(tables.as_json(asked), indent=2, allow_nan=False))  # noqa: T201
        return
    show_board(asked, _MOST_ARMS)
    for line in said:
        console.print(line, soft_wrap=True)


def _is_neither(folder: Path) -> Problem:
    fix = "folders that `ftrun runs` lists, or a sweep's"
    return Problem(str(folder), "holds neither a run (run.yaml) nor a sweep (sweep.yaml)", fix)


def write_outcome(found: Board) -> list[str]:
    """Write a sweep's report, and its winner as an experiment into ./conf, and return what to say of them."""
    said = [f"report {escape(near(board.write_report(found)))}"]
    try:
        for path in winner.write(found, Path("conf")):
            said.append(f"winner [bold]ftrun experiment={path.stem}[/]  ({escape(near(path))})")
    except ConfigError as error:  # which is no fault of the sweep
        said += [f"[yellow]no winner[/]: {escape(f'{each.key} {each.message}')}" for each in error.problems]
    return said


def show_board(shown: Board, most: int) -> None:
    """Print the arms of each table, the best first."""
    console.print(escape(tables.standing(shown.rows)))
    for table in shown.tables:
        good = "low" if table.low_is_good else "high"
        console.print(f"\n[bold]{escape(table.objective)}[/] of {escape(table.stage)}, {good} is good")
        console.print(tables.terminal(table, most, console.width))
        if left := max(0, len(table.arms) - most):
            console.print(f"{left:,} more arms")
        if table.best and len(table.arms) > 1:
            best = escape(clean(table.best.name))
            console.print(f"best [bold]{best}[/]: {escape(table.how_sure())}", soft_wrap=True)


def _rows(folders: Sequence[Path]) -> Iterator[board.Row]:
    """Yield each run, a sweep's jobs among them, with the keys in which not all are equal."""
    runs: dict[Path, Mapping[str, Any]] = {}
    for folder in folders:
        jobs = [job.folder for job in Ledger(folder).jobs()] if is_sweep(folder) else [folder]
        runs |= {job.resolve(): _config(job) for job in jobs if record.is_run(job)}
    keys = [key for key in _compared(list(runs.values())) if key not in _NOT_COMPARED]
    for number, (folder, config) in enumerate(runs.items()):
        yield rows.row(folder, {key: _text(config[key]) for key in keys if key in config}, number)


_NOT_COMPARED = ("seed", "output_dir", "template.date")
"""What differs between any two runs: the seed makes them one arm."""


def _compared(configs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the keys whose values are not all equal.

    One that some configs lack is an option's that others have not chosen, or else of another version of ftrun, and then
    it says nothing.
    """
    for key in _differing(configs):
        known = [config[key] for config in configs if key in config]
        name = f"{key.partition('.')[0]}.name"
        if any(value != known[0] for value in known) or len({config.get(name) for config in configs}) > 1:
            yield key


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if any(config.get(key, ...) != configs[0].get(key, ...) for config in configs)]


def _config(folder: Path) -> dict[str, Any]:
    """Return a run's config, key by key.

    Raises:
        ConfigError: It cannot be read.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    path = folder / record.RUN
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = f"cannot be read: {str(error).splitlines()[0]}"
        raise ConfigError([Problem(str(path), message, "leave that run out")]) from None
    return dict(_leaves(tree)) if isinstance(tree, dict) else {}


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key with its value; lists, and what is empty, are values."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: object) -> str:
    """Return a value as one types it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def diff(first: Path, second: Path, *, as_json: bool) -> None:
    """Print everything in which two runs differ: config, versions and machine, model and data, results.

    Raises:
        ConfigError: One of the folders holds no run.
    """
    if problems := [_is_no_run(folder) for folder in (first, second) if not record.is_run(folder)]:
        raise ConfigError(problems)
    both = [_sections(folder) for folder in (first, second)]
    found = {
        name: {key: [side[name].get(key) for side in both] for key in _differing([side[name] for side in both])}
        for name in both[0]
    }
    if as_json:
        plain = {"runs": [str(first), str(second)], **found}
        print(json.dumps(_finite(plain), indent=2, ensure_ascii=False, allow_nan=False))  # noqa: T201
        return
    for name, differing in found.items():
        if not differing:
            console.print(f"[bold]{name}[/]: no difference")
            continue
        console.print(f"[bold]{name}[/]")
        console.print(_table(first, second, differing, measured=name == "results"))


def _is_no_run(folder: Path) -> Problem:
    if is_sweep(folder):
        return Problem(str(folder), "is a sweep, and diff takes two runs", "one of its jobs; or `ftrun compare`")
    return Problem(str(folder), "holds no run (it has no run.yaml)", "`ftrun runs` lists runs")


def _sections(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what there is to say of a run, by topic and key."""
    try:
        manifest = json.loads((folder / record.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = {}
    config = {key: value for key, value in _config(folder).items() if key != "output_dir"}
    row = rows.row(folder, {})
    around = {name: manifest.get(name) or {} for name in ("versions", "machine", "git", "model", "data")}
    return {
        "config": config,
        "versions and machine": {
            "ftrun": manifest.get("ftrun"),
            **around["versions"],
            **around["machine"],
            **{f"git {name}": value for name, value in around["git"].items()},
        },
        "model and data": dict(_leaves({name: around[name] for name in ("model", "data")})),
        "results": {"status": row.status.value, "objective": row.objective, **row.metrics} | _costs(row),
    }


def _costs(row: board.Row) -> dict[str, Any]:
    names = ("step", "wall_seconds", "tokens_per_second", "peak_memory_bytes")
    return {name: getattr(row, name) for name in names}


def _table(first: Path, second: Path, differing: Mapping[str, Sequence[Any]], *, measured: bool) -> RichTable:
    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("", no_wrap=True)
    for folder, colour in ((first, "red"), (second, "green")):
        shown.add_column(escape(near(folder)), style=colour, overflow="fold")
    if measured:
        shown.add_column("difference", no_wrap=True)
    for key, values in differing.items():
        texts = [_shown(value, measured=measured) for value in values]
        more = [_difference(*values)] if measured else []
        shown.add_row(*(escape(text) for text in (key, *texts, *more)))
    return shown


def _shown(value: object, *, measured: bool) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if measured and isinstance(value, float) else clean(_text(value))


def _difference(first: object, second: object) -> str:
    """Return by how much the second of two measured numbers is larger."""
    if not (isinstance(first, float) and isinstance(second, float)):
        return ""
    share = f" ({(second - first) / abs(first):+.1%})" if first else ""
    return f"{second - first:+.4g}{share}"


def _finite(value: Any) -> Any:
    """Return a tree in which what is no finite number is null, as JSON wants it."""
    if isinstance(value, dict):
        return {name: _finite(child) for name, child in value.items()}
    if isinstance(value, list):
        return [_finite(child) for child in value]
    return tables.finite(value) if isinstance(value, float) else value
