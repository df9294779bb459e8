"""The ``ftrun`` command: ``ftrun stage=dpo model=qwen2 adapter=lora``.

A word with a ``=`` is an override of the config tree; a first word without one is a command; no command means: run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ftrun
from ftrun.errors import ConfigError, FtrunError, Problem, RunFailed

if TYPE_CHECKING:
    from ftrun.sweep.run import Sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Do what was typed.

    Returns:
        The exit code: 0 done, 1 failed, 2 the input is wrong, 75 wants to be requeued, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal does not have ends no run
            stream.reconfigure(errors="replace")
    try:
        try:
            _check_here()
            code = _dispatch(words)
        except SystemExit:  # argparse has printed a command's own help
            code = 0
        if sys.stdout:  # it may be closed
            sys.stdout.flush()  # here, not when the interpreter ends: a reader that is gone is no error
        return code
    except FtrunError as error:
        _show_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `ftrun list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:  # a disk that is full, a folder that may not be written to
        where = f"{error.filename}: " if error.filename else ""
        _show_error(RunFailed(f"{where}{error.strerror or error}"))
        return RunFailed.exit_code


def _check_here() -> None:
    """Refuse to work in a folder that has been deleted: no path means anything there."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ConfigError([Problem("the working folder", "has been deleted", "cd to another")]) from None


def _dispatch(words: list[str]) -> int:
    command = words[0] if words and words[0] in _COMMANDS else None
    rest = words[1:] if command else words
    if "--version" in words:
        print(f"ftrun {ftrun.__version__}")  # noqa: T201
        return 0
    if ("--help" in rest or "-h" in rest) and command in (None, "show", "check"):
        from ftrun import help as pages

        pages.show_help(command, [word for word in rest if not word.startswith("-")])
        return 0
    return _COMMANDS[command](rest) if command else _run(rest)


def _run(words: list[str]) -> int:
    from ftrun import launch, summary
    from ftrun import words as typed

    retry_failed = _RETRY in words
    words = [word for word in words if word != _RETRY]
    if multirun := _without_multirun(words):
        from ftrun.sweep import run

        return _conclude(run.run(multirun, retry_failed=retry_failed))
    if retry_failed:
        raise ConfigError([Problem(_RETRY, "is about a sweep", f"ftrun -m {_RETRY} KEY=VALUE,VALUE")])
    where, rest = typed.apart(words)
    return summary.conclude(launch.hand_over(rest, where) if where else launch.run(rest))


def _conclude(sweep: Sweep) -> int:
    from ftrun import summary
    from ftrun.record import EXIT_CODES

    code = summary.conclude_sweep(sweep.folder)
    return EXIT_CODES[sweep.told] if sweep.told else code


def _resume(words: list[str]) -> int:
    from ftrun import launch, summary
    from ftrun import words as typed
    from ftrun.sweep import ledger

    parser = _parser("resume", "Go on with a run or a sweep that was stopped, from the newest checkpoints.")
    parser.add_argument("folder", type=Path, help="the folder of the run or the sweep")
    parser.add_argument(_RETRY, action="store_true", help="of a sweep, the jobs that have failed, too")
    about = "of a run: hardware.*, train.micro_batch_size, train.grad_accumulation, hydra/launcher"
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help=about)
    asked = parser.parse_intermixed_args(words)
    if ledger.is_sweep(asked.folder) or (asked.folder / ledger.DRIVER).exists():
        from ftrun.sweep import run

        if asked.changes:
            raise ConfigError([Problem(asked.changes[0], "cannot change in the middle of a sweep", "leave it out")])

        return _conclude(run.resume(asked.folder, retry_failed=asked.retry_failed))
    if asked.retry_failed:
        raise ConfigError([Problem(_RETRY, "is about a sweep; a run is tried again anyway", "leave it out")])
    where, changes = typed.apart(asked.changes)
    return summary.conclude(launch.resume(asked.folder, changes, where))


def _show(words: list[str]) -> int:
    from ftrun import config

    print(config.compose(words).to_yaml(), end="")  # noqa: T201
    return 0


def _check(words: list[str]) -> int:
    from ftrun import compose, launch
    from ftrun import words as typed
    from ftrun.display import console

    is_quick, probe = _QUICK in words, _PROBE in words
    overrides = [word for word in words if word not in (_QUICK, _PROBE)]
    if is_quick and probe:
        raise ConfigError([Problem(_PROBE, f"takes real steps, and {_QUICK} none", "one of them")])
    if multirun := _without_multirun(overrides):
        return _check_sweep(multirun, is_quick=is_quick, probe=probe)
    where, overrides = typed.apart(overrides)
    cfg = launch.check(overrides, there=compose.launcher_alone(where) if where else None)
    if not is_quick:
        from ftrun import estimate

        estimate.show(cfg, probe=probe)
    console.print("[green]no problems[/]")
    return 0


def _check_sweep(words: list[str], *, is_quick: bool, probe: bool) -> int:
    from ftrun.display import console
    from ftrun.sweep import run

    if probe:
        raise ConfigError([Problem(_PROBE, "is about one run", f"ftrun check {_PROBE} KEY=VALUE")])
    checked = run.check(words)
    if not is_quick:
        from ftrun import estimate

        slots, keep = checked.sweeper.launcher.slots, checked.sweeper.settings.keep
        estimate.show_sweep(checked.count, checked.shapes, slots=slots, keep=keep, folder=checked.folder)
    console.print(f"[green]no problems[/] in {checked.count} runs")
    return 0


def _preview(words: list[str]) -> int:
    from ftrun import preview

    parser = _parser("preview", "Show rows as they will be trained on, token by token, and what became of all of them.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of the run")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one object for each row: text, input_ids, labels")
    form.add_argument("--html", type=Path, metavar="FILE", help="write a page that one can send")
    many = f"how many rows (default: {preview.ROWS}; with --json, all)"
    parser.add_argument("--rows", type=_positive, metavar="N", help=many)
    asked = parser.parse_intermixed_args(words)
    return preview.show(asked.overrides, as_json=asked.json, html=asked.html, rows=asked.rows)


def _prepare(words: list[str]) -> int:
    from ftrun import prepare

    parser = _parser(
        "prepare", "Fetch the model and tokenise the rows, so that a run with the same words starts from it."
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of the run")
    return prepare.show(parser.parse_intermixed_args(words).overrides)


def _cache(words: list[str]) -> int:
    from ftrun import cache

    parser = _parser("cache", "List the tokenised rows that are kept for later runs, or delete them.")
    parser.add_argument("--json", action="store_true", help="for machines")
    less = parser.add_mutually_exclusive_group()
    less.add_argument("--prune", type=_days, metavar="DAYS", help="delete what no run has used for so many days")
    less.add_argument("--clear", action="store_true", help="delete everything")
    asked = parser.parse_args(words)
    cache.show(as_json=asked.json, unused_days=0.0 if asked.clear else asked.prune)
    return 0


def _list(words: list[str]) -> int:
    from ftrun import help as pages

    parser = _parser("list", "List the config groups, a group's options, or the keys of an option.")
    parser.epilog = "plugins=[FILE] lists what a plugin file of your own adds, too."
    parser.add_argument("what", nargs="?", metavar="GROUP[=OPTION]", help="optimizer, optimizer=adamw, or data.format")
    parser.add_argument("--json", action="store_true", help="for machines")
    if files := [word for word in words if word.startswith("plugins=")]:
        from ftrun import words as typed

        *_, problems = typed.read(files)
        if problems:
            raise ConfigError(problems)
    asked = parser.parse_args([word for word in words if word not in files])
    pages.show_list(asked.what, as_json=asked.json)
    return 0


def _runs(words: list[str]) -> int:
    from ftrun import summary

    parser = _parser("runs", "List the runs below a folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"), help="default: outputs")
    parser.add_argument("--json", action="store_true", help="for machines")
    asked = parser.parse_args(words)
    summary.show_runs(asked.folder, as_json=asked.json)
    return 0


def _compare(words: list[str]) -> int:
    from ftrun import compare

    parser = _parser("compare", "Show in what runs differ and what came of it; of a sweep, its leaderboard and report.")
    parser.add_argument("folder", nargs="+", type=Path, help="of a run or a sweep")
    parser.add_argument("--json", action="store_true", help="for machines")
    asked = parser.parse_args(words)
    compare.show(asked.folder, as_json=asked.json)
    return 0


def _diff(words: list[str]) -> int:
    from ftrun import compare

    parser = _parser("diff", "Show all in which two runs differ: config, versions, data, model, results.")
    parser.add_argument("first", type=Path, help="a run's folder")
    parser.add_argument("second", type=Path, help="another's")
    parser.add_argument("--json", action="store_true", help="for machines")
    asked = parser.parse_args(words)
    compare.diff(asked.first, asked.second, as_json=asked.json)
    return 0


def _cancel(words: list[str]) -> int:
    from ftrun import cancel
    from ftrun.display import console

    parser = _parser("cancel", "Stop a run, or all jobs of a sweep, here or on SLURM; they save first.")
    parser.add_argument("folder", type=Path, help="of the run or the sweep")
    folder = parser.parse_args(words).folder
    count = cancel.cancel(folder)
    console.print(f"stopped {count} {'run' if count == 1 else 'runs'}" if count else "nothing was under way")
    return 0


def _env(words: list[str]) -> int:
    from ftrun import environment
    from ftrun.display import console

    parser = _parser("env", "Print versions, hardware and settings, for bug reports.")
    parser.add_argument("--json", action="store_true", help="for machines")
    rows = environment.report() if not parser.parse_args(words).json else None
    if rows is None:
        print(json.dumps(dict(environment.report()), indent=2))  # noqa: T201
        return 0
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"[bold]{name:<{width}}[/]  {value}", soft_wrap=True)
    return 0


def _completion(words: list[str]) -> int:
    from ftrun import completion

    parser = _parser("completion", "Print the script that makes a shell complete ftrun's words.")
    parser.add_argument("shell", choices=completion.SHELLS)
    print(completion.script(parser.parse_args(words).shell))  # noqa: T201
    return 0


def _complete(words: list[str]) -> int:
    """Print the words that could stand last; the completion scripts call this."""
    from ftrun import completion

    print("\n".join(completion.candidates(words)))  # noqa: T201
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "list": _list,
    "show": _show,
    "check": _check,
    "preview": _preview,
    "prepare": _prepare,
    "cache": _cache,
    "runs": _runs,
    "compare": _compare,
    "diff": _diff,
    "cancel": _cancel,
    "env": _env,
    "resume": _resume,
    "completion": _completion,
    "__complete": _complete,
}


_QUICK = "--quick"
"""Has ``ftrun check`` leave out what needs torch."""

_PROBE = "--probe"
"""Has ``ftrun check`` take two steps for real."""


_RETRY = "--retry-failed"
"""Has a sweep start jobs again that have failed."""


class _Parser(argparse.ArgumentParser):
    """argparse, whose errors are ours."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise instead of exiting."""
        raise ConfigError([Problem(self.prog, message, f"`{self.prog} --help`")])


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return _Parser(prog=f"ftrun {command}", description=description)


def _positive(text: str) -> int:
    """Read a whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 up")
    return int(text)


def _days(text: str) -> float:
    """Read a number of days, which may be part of one."""
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not 0 <= days < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of days from 0 up")
    return days


def _without_multirun(words: Sequence[str]) -> list[str]:
    """Return the words besides ``-m`` if that is among them, else nothing."""
    rest = [word for word in words if word not in ("-m", "--multirun")]
    return rest if len(rest) < len(words) else []


def _show_error(error: FtrunError) -> None:
    from rich.markup import escape

    from ftrun.display import errors

    if not isinstance(error, ConfigError):
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return
    many = len(error.problems) > 1
    errors.print(
        f"[bold red]error:[/] {len(error.problems)} problems" if many else "[bold red]error:[/]",
        soft_wrap=True,
        end="\n" if many else " ",
    )
    for problem in error.problems:
        errors.print(
            f"[bold]{escape(problem.key)}[/]: {escape(problem.message)}\n    [green]fix:[/] {escape(problem.fix)}",
            soft_wrap=True,
        )
