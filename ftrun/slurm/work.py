"""What the launcher does: hands in the runs that are not in SLURM's hands already, and waits for them if told to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from ftrun.display import near, print_line
from ftrun.errors import ConfigError, Problem
from ftrun.record import Result, Status
from ftrun.slurm.cluster import SlurmError
from ftrun.slurm.submission import Placed, Submission, Terms, home_of, is_active, placed, submit
from ftrun.slurm.waiting import Waiting, settle


def work(runs: Sequence[Path], terms: Terms, waiting: Waiting | None) -> bool:
    """Bring frozen runs into SLURM's hands, each once.

    Args:
        runs: Their folders.
        terms: On what terms.
        waiting: Waits for them; None returns at once.

    Returns:
        Whether all of them have ended, or none was to be waited for.

    Raises:
        ConfigError: SLURM refuses, or does not answer.
    """
    try:
        places = placed(runs)
    except SlurmError as error:
        raise ConfigError([Problem("hydra/launcher", f"SLURM does not answer: {error}", "try again later")]) from None
    failed = {run for run in runs if _has_failed(run, places.get(run))}
    active = [run for run in runs if is_active(run, places.get(run))]
    if active:
        print_line(f"{len(active)} of {len(runs)} runs are under way already")
    todo = [run for run in runs if run not in failed and run not in set(active)]
    if todo:
        _show(submit(todo, terms))
    if waiting is None:
        home = escape(near(home_of(runs[0])))
        print_line(f"[bold]ftrun runs {home}[/] shows how they stand, [bold]ftrun cancel {home}[/] ends them")
        return True
    waiting.wait([run for run in runs if run not in failed])
    return waiting.told is None


def _has_failed(run: Path, place: Placed | None) -> bool:
    """Tell whether a run turns out to have failed since it was handed in, without having said so."""
    if place is None or place.state.name not in ("FAILED", "OUT_OF_MEMORY"):
        return False
    return Result.load(run).status is not Status.failed and settle(run, place).status is Status.failed


def _show(submissions: Sequence[Submission]) -> None:
    for each in submissions:
        count = len(each.runs())
        print_line(f"submitted {count} {'run' if count == 1 else 'runs'} to SLURM as job {each.job}")
