"""Freeze a config into a run's folder, start its processes, watch them, and read what they left.

This process never imports torch; the workers never see Hydra; between them is one file, ``run.yaml``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ftrun
from ftrun import config, environment, events, hardware, model, processes, record
from ftrun.config import Config
from ftrun.data.check import check as check_rows
from ftrun.data.sources import make_absolute
from ftrun.display import Display, near
from ftrun.errors import ConfigError, Problem, RunFailed
from ftrun.record import Result, Status
from ftrun.signals import Signals
from ftrun.slurm import submission

if TYPE_CHECKING:
    from ftrun.launcher import Launcher


def run(overrides: Sequence[str]) -> Result:
    """Do a run from what was typed to its result.

    Raises:
        ConfigError: The input is wrong; with everything that is.
        RunFailed: The run failed.
    """
    return start(freeze(check(overrides), overrides))


def hand_over(overrides: Sequence[str], where: Sequence[str]) -> Result:
    """Freeze a run, hand it to a launcher, and return how it is when the launcher comes back.

    Args:
        overrides: What was typed of the run.
        where: What was typed of the launcher.

    Raises:
        ConfigError: The input is wrong; with everything that is.
        RunFailed: The run failed.
    """
    from ftrun import compose

    there = compose.launcher_alone(where)
    return _bring(freeze(check(overrides, there=there), overrides, held=False), there)


def _bring(folder: Path, there: Launcher) -> Result:
    """Have a launcher bring a frozen run to its end."""
    from ftrun import launcher

    try:
        there.launch([[launcher.override(folder)]], 0)
    finally:
        there.close()
    result = Result.load(folder)
    if result.status is Status.queued:
        result.status = there.told or result.status
    return failing(result)


def check(overrides: Sequence[str], *, to_run: bool = True, there: Launcher | None = None) -> Config:
    """Compose a config, and look at what it names on this machine's disk: model, first rows, the run's folder.

    Args:
        overrides: What was typed.
        to_run: Whether a run is to start from it, which needs a folder of its own.
        there: The launcher that is to start it, if that is not this process.

    Raises:
        ConfigError: With everything that is wrong.
    """
    cfg, problems = config.examine(overrides)
    if cfg is not None:
        problems += [*wrong_on_disk(cfg, to_run=to_run), *(occupied(cfg.output_dir) if to_run else ())]
        if to_run:
            problems += there.check(cfg) if there else hardware.unread_limits(cfg.hardware)
    if problems or cfg is None:
        raise ConfigError(problems)
    return cfg


def wrong_on_disk(cfg: Config, *, to_run: bool = True) -> list[Problem]:
    """Return what is wrong with the model and the first rows that a config names.

    Args:
        cfg: The config.
        to_run: Whether a run is to start from it, which needs weights.
    """
    of_options = [problem for option in cfg.chosen for problem in option.check_files(cfg)] if to_run else []
    return [*model.check(cfg.model, weights=to_run), *of_options, *(check_rows(cfg) if cfg.stage.rows else ())]


def resume(folder: Path, changes: Sequence[str] = (), where: Sequence[str] = ()) -> Result:
    """Go on with a run from its newest checkpoint, or from its beginning if it has none.

    Args:
        folder: The run's.
        changes: Words that change on what it goes on; see `ftrun.config.changed`.
        where: What was typed of the launcher, if another than this process is to start it.

    Raises:
        ConfigError: There is no run, it is done, or somebody else is at it.
        RunFailed: The run failed.
    """
    if not record.is_run(folder):
        raise ConfigError(
            [Problem(str(folder), "holds no run (it has no run.yaml)", "ftrun resume FOLDER; `ftrun runs` lists them")]
        )
    if state := submission.states([folder.resolve()]).get(folder.resolve()):
        raise ConfigError([Problem(str(folder), f"is in SLURM's hands: {state}", f"`ftrun cancel {folder}` first")])
    if (folder / record.RESULT).exists():
        try:
            result = Result.load(folder)
        except (ValueError, KeyError, TypeError) as error:
            fix = f"delete it: the run goes on from its newest checkpoint ({folder / record.CHECKPOINTS})"
            raise ConfigError([Problem(str(folder / record.RESULT), f"cannot be read: {error}", fix)]) from None
        if result.status is Status.running and result.holder:
            raise record.Held.by(result.holder, folder)
        if result.status is Status.completed:
            raise ConfigError(
                [
                    Problem(
                        str(folder),
                        "is completed, so there is nothing to resume",
                        "ftrun model.path=FOLDER starts a new run from it",
                    )
                ]
            )
    if changes:
        cfg = config.changed(folder / record.RUN, changes)
        hardware.settle(cfg.hardware, cfg.train, cfg.model.dtype)
        cfg.save(folder / record.RUN)
    if not where:
        return start(folder)
    from ftrun import compose

    return _bring(folder.resolve(), compose.launcher_alone(where))


def occupied(output_dir: str | None) -> Iterator[Problem]:
    """Yield why a folder cannot be that of a new run, or of a new sweep."""
    if output_dir is None:
        return
    if not output_dir.strip():
        yield Problem("output_dir", "has no value", "output_dir=FOLDER, or leave it out")
        return
    folder = Path(output_dir).expanduser()
    try:
        folder.exists()
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be looked into
        yield Problem("output_dir", f"{_shortened(folder)} cannot be made: {error.args[-1]}", "another folder")
        return
    if record.is_run(folder):
        yield _is_taken(folder)
    elif folder.is_file():
        yield Problem("output_dir", f"{folder} is a file", "a folder")
    elif folder.is_dir() and any(folder.iterdir()):
        yield Problem("output_dir", f"{folder} is not empty", "a new or an empty folder")
    elif above := next((parent for parent in folder.parents if parent.is_file()), None):
        yield Problem("output_dir", f"{folder} cannot be made: {above} is a file", "another folder")


def _shortened(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 120 else f"{text[:60]}...{text[-40:]}"


def _is_taken(folder: Path) -> Problem:
    fix = f"ftrun resume {folder} to go on with it, or another folder"
    return Problem("output_dir", f"{folder} holds another run", fix)


def settle(cfg: Config) -> None:
    """Settle, in place, what depends on where and when: models' files, the paths of rows, today's date.

    Raises:
        ConfigError: A model is nowhere to be found.
    """
    cfg.model = model.locate(cfg.model)
    for option in cfg.chosen:
        option.settle(cfg)
    make_absolute(cfg.data)
    cfg.template.date = cfg.template.date or datetime.now().date().isoformat()


def freeze(cfg: Config, overrides: Sequence[str], *, held: bool = True) -> Path:
    """Settle what depends on the machine, and write the run's folder: from here on nobody reads conf/ again.

    Args:
        cfg: A checked config; it is settled in place.
        overrides: What was typed for it.
        held: Whether this process is going to start it.

    Raises:
        ConfigError: The model is nowhere to be found.
    """
    hardware.settle(cfg.hardware, cfg.train, cfg.model.dtype)
    settle(cfg)
    folder = _make_folder(cfg)
    _write_manifest(cfg, overrides, folder, environment.facts())
    write(cfg, folder)
    if held:
        Result(holder=record.Holder.me()).save(folder)
    else:
        (folder / record.RESULT).unlink()  # it has kept the folder for this process
    return folder


def freeze_job(cfg: Config, overrides: Sequence[str], folder: Path, facts: dict[str, Any], slots: int) -> None:
    """Freeze one of many runs into a folder of its own, to be started later; nothing is forced to the disk yet.

    Args:
        cfg: A checked config; it is settled in place.
        overrides: What was typed for it.
        folder: Where.
        facts: What `ftrun.environment.facts` found, once for all of them.
        slots: How many of them share this machine's CPUs.

    Raises:
        ConfigError: The model is nowhere to be found.
    """
    cfg.hardware.num_processes = cfg.hardware.num_processes or 1
    sharing = cfg.hardware.num_processes * (1 if cfg.hardware.cpus else slots)
    cfg.hardware.num_threads = cfg.hardware.num_threads or hardware.default_threads(sharing, cfg.hardware.cpus)
    hardware.settle(cfg.hardware, cfg.train, cfg.model.dtype)
    settle(cfg)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([Problem("output_dir", f"{folder} cannot be made: {error.strerror}", "another")]) from None
    _write_manifest(cfg, overrides, folder, facts, sync=False)
    write(cfg, folder, sync=False)


def _write_manifest(
    cfg: Config, overrides: Sequence[str], folder: Path, facts: dict[str, Any], *, sync: bool = True
) -> None:
    manifest = {
        "id": uuid.uuid4().hex[:16],
        "command": shlex.join(["ftrun", *overrides]),
        "overrides": list(overrides),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "folder": str(Path.cwd()),
        "ftrun": ftrun.__version__,
        "seed": cfg.seed,
        "model": model.identity(cfg.model),
        **facts,
    }
    record.write_whole(folder / record.MANIFEST, json.dumps(manifest, indent=2) + "\n", sync=sync)


def write(cfg: Config, folder: Path, *, sync: bool = True) -> None:
    """Write a settled config, with the files of the user's own code, into a folder."""
    cfg.output_dir = str(folder)
    cfg.plugins = [_copy_into(folder / "plugins", Path(file)) for file in cfg.plugins]
    cfg.save(folder / record.RUN, sync=sync)


def _make_folder(cfg: Config) -> Path:
    """Make the run's folder; one that nobody named gets a name nobody else has."""
    if cfg.output_dir is not None:
        folder = Path(cfg.output_dir).expanduser().resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"{folder} cannot be made: {error.strerror}"
            raise ConfigError([Problem("output_dir", message, "another folder")]) from None
        try:  # of two that start at once, one gets the folder
            (folder / record.RESULT).open("x").close()
        except FileExistsError:
            raise ConfigError([_is_taken(folder)]) from None
        return folder
    stem = Path("outputs", cfg.stage.name, datetime.now().strftime("%Y-%m-%d_%H-%M-%S")).resolve()
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("", *(f"_{number}" for number in range(2, 10_000))):
        with contextlib.suppress(FileExistsError):
            folder = stem.with_name(stem.name + suffix)
            folder.mkdir()
            return folder
    raise RunFailed(f"no name is free for a run at {stem}")


def _copy_into(folder: Path, file: Path) -> str:
    """Copy a file, under a name that no other file there has, and return its path from the folder above."""
    folder.mkdir(exist_ok=True)
    names = (f"{file.stem}{suffix}{file.suffix}" for suffix in ("", *(f"_{number}" for number in range(2, 1000))))
    name = next(name for name in names if not (folder / name).exists())
    shutil.copy2(file.expanduser(), folder / name)
    return str(Path(folder.name, name))


class Screen(Protocol):
    """What a person sees of workers at work."""

    def __enter__(self) -> Screen: ...

    def __exit__(self, *error: object) -> None: ...

    def show(self, event: dict[str, Any]) -> None:
        """Show one event."""

    def stopping(self, interrupted: bool, again: bool) -> None:
        """Say that a signal has arrived."""


class Answer:
    """What a task writes to its standard output, line by line as it comes: a pipe, so that none of it piles up."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take = take
        self._begun = b""
        self._output, self.input = os.pipe()
        os.set_blocking(self._output, False)
        self._is_open = True

    def receive(self, timeout: float) -> None:
        """Pass on the lines that have come, waiting up to ``timeout`` seconds for the first."""
        if not self._is_open:
            time.sleep(timeout)
            return
        select.select([self._output], [], [], timeout)
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._output, 1 << 16):
                *lines, self._begun = (self._begun + chunk).split(b"\n")
                for line in lines:
                    self._take(line.decode())
            self._is_open = False

    def close(self) -> None:
        """Close this end; the worker has the other."""
        os.close(self._output)


def start(folder: Path) -> Result:
    """Start the processes of a frozen run, watch them to the end, and return what they left.

    Raises:
        ConfigError: The worker found something the user can mend.
        RunFailed: The run failed.
    """
    return failing(watch(folder, Display(folder)))


def failing(result: Result) -> Result:
    """Return a run's result, unless it failed.

    Raises:
        RunFailed: It did.
    """
    if result.status is Status.failed:
        folder = Path(result.folder)
        text = f"the run in {near(folder)} failed: {result.reason}"
        text += f"\n    what it printed is in {near(folder / record.LOG)}"
        if result.checkpoint:
            text += f"\n    saved in {result.checkpoint}; to go on: ftrun resume {near(folder)}"
        raise RunFailed(text)
    return result


def watch(folder: Path, display: Screen, words: Sequence[str] = (), answer: Answer | None = None) -> Result:
    """Start the processes of a frozen folder, watch them to the end, and return how it was.

    Args:
        folder: Where ``run.yaml`` is.
        display: Screen what the workers tell.
        words: A task other than the run, and its options.
        answer: Takes what the task answers.

    Raises:
        ConfigError: The worker found something the user can mend.
    """
    run_file = folder / record.RUN
    cfg = Config.load(run_file)
    record.claim(folder)
    receiver = events.Receiver()
    try:
        with display, Signals(display.stopping) as signals:
            try:
                told = {events.VARIABLE: receiver.address}
                process = processes.start(cfg.hardware, run_file, words, env=told, out=answer.input if answer else None)
            finally:
                if answer:
                    os.close(answer.input)
            signals.add_session(process.pid)
            if not cfg.hardware.in_a_group:
                signals.add(process.pid)
            try:
                code = _until_the_end(process, receiver, display, signals, answer)
            except BaseException:
                if answer:  # nobody listens any more, as in `ftrun preview --json | head`; a run goes on
                    signals.kill()
                raise
    finally:
        receiver.close()
    result = how_it_was(folder, code, signals.told)
    if result.problems:
        raise ConfigError(result.user_problems())
    return result


def _until_the_end(
    process: processes.Process, receiver: events.Receiver, display: Screen, signals: Signals, answer: Answer | None
) -> int:
    """Show what comes until the process has ended, and return how it did."""
    while True:
        code = process.poll()
        if answer:
            answer.receive(timeout=0.05 if code is None else 0)
        for event in receiver.receive(timeout=0 if answer or code is not None else 0.1):
            if event["kind"] == "process":
                signals.add(event["pid"])
            display.show(event)
        if code is not None:
            return code


def how_it_was(folder: Path, code: int, told: Status | None) -> Result:
    """Return what a run's processes left, and say how they ended where they could not.

    Args:
        folder: The run's folder.
        code: The exit code, or minus the signal.
        told: What they had been told to do.
    """
    result = Result.load(folder)
    if result.status is Status.running and result.holder != record.Holder.me():
        return result  # somebody else has come to be at it
    if result.holder:  # nobody said how it ended; the holder may be this process, if no worker came that far
        return record.conclude(folder, told or Status.failed, "ended at once" if told else _how_it_died(code))
    return result


def _how_it_died(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed with signal 9; the kernel does that when memory runs out"
    return f"its process ended with {'signal' if code < 0 else 'exit code'} {abs(code)} and no word"
