"""A sweep from what was typed to its leaderboard.

Everything that is known of it is in its folder, so that the same words, or ``ftrun resume FOLDER``, go on with what is
unfinished after anything has died.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftrun import board, compose, estimate, keep, launch, launcher
from ftrun.config import Config
from ftrun.display import console, size_text
from ftrun.errors import ConfigError, Problem
from ftrun.record import Pause, Result, Rung, Status
from ftrun.sweep import freeze, points
from ftrun.sweep.ledger import DRIVER, Ask, Job, Ledger
from ftrun.sweep.points import Point, parse
from ftrun.sweeper import Sweeper
from ftrun.words import apart


def run(words: Sequence[str], *, retry_failed: bool = False) -> Sweep:
    """Do the sweep that the words ask for.

    Raises:
        ConfigError: Something is wrong with the words or any point, before anything starts; or another process is at
            the sweep.
    """
    return _conduct(Ask(tuple(points.expand(words)), str(Path.cwd()), _title(words)), retry_failed=retry_failed)


def resume(folder: Path, *, retry_failed: bool = False) -> Sweep:
    """Go on with a sweep: with the jobs that are frozen, as they were frozen.

    Raises:
        ConfigError: It cannot be read, or another process is at it.
    """
    folder = folder.resolve()
    asks = Ledger(folder).asks()
    if not asks:
        fix = "type the command again: nothing has been started yet"
        raise ConfigError([Problem(str(folder), "is no sweep whose jobs have all been frozen", fix)])
    if Path(asks[-1].cwd).is_dir():
        os.chdir(asks[-1].cwd)
    return _conduct(asks[-1], folder, retry_failed=retry_failed)


@dataclass(frozen=True)
class Checked:
    """A sweep that has been looked at and not started."""

    sweeper: Sweeper
    folder: Path
    count: int
    """How many runs it has."""

    shapes: list[tuple[Config, int]]
    """A config of each shape (see `ftrun.estimate.shapes`), and about how many runs have it."""


def check(words: Sequence[str]) -> Checked:
    """Look at every point that is known beforehand.

    Raises:
        ConfigError: With everything that is wrong.
    """
    where, rest = apart(points.expand(words))
    sweeper = compose.sweeper(where)
    given = sweeper.points(_without_folder(rest))
    shapes = estimate.shapes(cfg for _, cfg in freeze.check(given, sweeper.launcher.check))
    folder = _folder(sweeper, rest, _title(words))
    known = sum(count for _, count in shapes)
    count = sweeper.num_runs(rest, known)
    return Checked(sweeper, folder, count, [(cfg, max(1, round(each / known * count))) for cfg, each in shapes])


def _conduct(ask: Ask, folder: Path | None = None, *, retry_failed: bool) -> Sweep:
    where, words = apart(ask.words)
    sweeper = compose.sweeper(where)
    sweeper.settings.retry_failed = sweeper.settings.retry_failed or retry_failed
    sweep = Sweep(sweeper, folder or _folder(sweeper, words, ask.title), ask, is_resumed=folder is not None)
    with sweep.ledger.held(), contextlib.closing(sweep):
        try:
            sweeper.search(sweep, _without_folder(words))
        except Stopped:
            return sweep
        if not any(Result.load(job.folder).status in _UNDER_WAY for job in sweep.ledger.jobs()):
            sweep.conclude()
    return sweep


_UNDER_WAY = (Status.queued, Status.running, Status.interrupted, Status.preempted)


class Stopped(Exception):
    """The launcher was told to stop, or has seen enough failures."""


class Sweep:
    """A sweep under way."""

    def __init__(self, sweeper: Sweeper, folder: Path, ask: Ask, *, is_resumed: bool) -> None:
        self.settings = sweeper.settings
        self.launcher = sweeper.launcher
        self.folder = folder
        self.ledger = Ledger(folder)
        self.is_resumed = is_resumed
        """Whether it goes on with what is frozen, instead of freezing what is asked for."""

        self._ask = ask
        self._tried: set[Path] = set()
        self._note_after = 0.0
        self.launcher.on_end = self.note

    @property
    def told(self) -> Status | None:
        """What it was told while it ran, if anything: what ended it early."""
        return self.launcher.told

    def freeze(self, wanted: Iterable[Point]) -> list[Job]:
        """Return the job of each point, frozen if it is not known yet.

        Raises:
            ConfigError: With everything that is wrong with any point; nothing has been frozen then.
        """
        jobs = freeze.freeze(wanted, self.ledger, self.launcher.slots, self.launcher.check)
        self.ledger.note(self._ask)
        return jobs

    def work(self, folders: Sequence[Path]) -> None:
        """Bring jobs to their end, or to where they are to pause; those that are there are left alone.

        Raises:
            Stopped: The launcher was told to stop.
        """
        todo = [folder for folder in dict.fromkeys(folders) if self._is_open(folder)]
        if todo:
            done, self._tried = len(self._tried), self._tried | set(todo)
            self.launcher.launch([[launcher.override(folder)] for folder in todo], done)
        if self.launcher.is_stopped:
            raise Stopped

    def _is_open(self, folder: Path) -> bool:
        result, pause = Result.load(folder), Pause.load(folder)
        if result.status is Status.paused:
            return pause is None or pause not in Rung.all_of(folder)
        if result.status is Status.failed:
            return bool(self.settings.retry_failed) and folder not in self._tried
        return result.status is not Status.completed

    def note(self) -> None:
        """Write the leaderboard as it stands; not so often that it costs much beside the jobs."""
        if time.monotonic() >= self._note_after:
            began = time.monotonic()
            board.write(self.folder)
            keep.apply(self.folder, self.settings.keep)
            self._note_after = time.monotonic() + 20 * (time.monotonic() - began)

    def close(self) -> None:
        """Have the launcher give back what it keeps."""
        self.launcher.close()

    def conclude(self) -> None:
        """Delete what is not kept, of jobs that are stopped early, too: nothing goes on any more."""
        freed = keep.apply(self.folder, self.settings.keep, over=True)
        if freed.size:
            text = f"freed {size_text(freed.size)}: the weights of {freed.jobs} jobs (hydra.sweeper.keep)"
            console.print(text, soft_wrap=True)


def _is_folder(word: str) -> bool:
    return word.lstrip("+").startswith("output_dir=")


def _without_folder(words: Sequence[str]) -> list[str]:
    """Return the words but those that say where the sweep's folder is."""
    return [word for word in words if not _is_folder(word)]


def _title(words: Sequence[str]) -> str:
    """Return the name of the sweep file, if one is typed."""
    return next((word.partition("=")[2] for word in words if word.startswith("sweep=")), "")


def _folder(sweeper: Sweeper, words: Sequence[str], title: str) -> Path:
    """Return where a sweep's folder is."""
    given = [override for word in words if _is_folder(word) and (override := parse(word))]
    if any(override.is_sweep_override() for override in given):
        message = "is the folder of the whole sweep, and not swept"
        raise ConfigError([Problem("output_dir", message, "output_dir=FOLDER")])
    if given and given[-1].value() is not None:
        folder = Path(str(given[-1].value())).expanduser()
        if folder.is_dir() and (folder / DRIVER).exists():  # one that has been begun
            return folder.resolve()
        if problems := list(launch.occupied(str(given[-1].value()))):
            raise ConfigError(problems)
        return folder.resolve()
    return Path("outputs", "sweeps", _name(sweeper, _without_folder(words), title)).resolve()


def _name(sweeper: Sweeper, words: Sequence[str], title: str) -> str:
    """Return the name of a sweep's folder: the same for a wider grid, more seeds, another launcher."""
    swept = sorted({key for key in sweeper.swept(words) if key != "seed"})
    keys = {*swept, "seed"}
    fixed = sorted(word for word in words if word.partition("=")[0] not in keys)
    digest = hashlib.sha256("\n".join([type(sweeper).__name__, *fixed, "", *swept]).encode()).hexdigest()[:8]
    stem = re.sub(r"[^\w.,-]+", "_", title or ",".join(swept) or "seed")[:60]
    return f"{stem}-{digest}"
