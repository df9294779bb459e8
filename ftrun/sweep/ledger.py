"""A sweep's folder: what was asked for, which jobs there are, and who is at it.

================ ==============================================================================================
``sweep.yaml``   every ask, appended: the words, the working folder, when
``jobs.jsonl``   one object a job: id, overrides, key, folder; how it stands is in its own ``result.json``
``driver.json``  the process that is at the sweep
================ ==============================================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import yaml

from ftrun import record
from ftrun.errors import ConfigError, Problem
from ftrun.record import Holder

SWEEP, JOBS, DRIVER = "sweep.yaml", "jobs.jsonl", "driver.json"


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    id: int
    overrides: tuple[str, ...]
    """The words in which it differs from the other jobs."""

    key: str
    """Hash of its config, the folder left out: jobs with the same key are the same job."""

    folder: Path

    arm: str = ""
    """Hash of its config, folder and seed left out: jobs with the same are compared as one."""

    @property
    def group(self) -> tuple[object, ...]:
        """What it has in common with the jobs that differ from it in nothing but the seed."""
        return (*(word for word in self.overrides if not word.lstrip("+").startswith("seed=")), self.arm)


@dataclass(frozen=True)
class Ask:
    """One time that a sweep was asked for."""

    words: tuple[str, ...]
    """What was typed, with the words of a sweep file in place of its name."""

    cwd: str
    """The working folder, from which paths among the words are meant."""

    title: str = ""
    """The name of the sweep file, if one was typed."""

    time: str = ""


def is_sweep(folder: Path) -> bool:
    """Tell whether a folder holds a sweep."""
    return (folder / SWEEP).is_file()


class Ledger:
    """Reads and writes what a sweep's folder says of it as a whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def jobs(self) -> list[Job]:
        """Return the jobs, in the order in which they were frozen."""
        lines = record.read_lines(self.folder / JOBS)
        return [
            Job(line["id"], tuple(line["overrides"]), line["key"], self.folder / line["folder"], line.get("arm", ""))
            for line in lines
        ]

    def add(self, jobs: Sequence[Job]) -> None:
        """Append jobs in a single write: all of them are there afterwards, or none."""
        lines = [asdict(job) | {"folder": job.folder.name} for job in jobs]
        record.mend_last_line(self.folder / JOBS)
        with (self.folder / JOBS).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def asks(self) -> list[Ask]:
        """Return what was asked for, oldest first."""
        try:
            asks = yaml.safe_load((self.folder / SWEEP).read_text(encoding="utf-8")) or []
        except FileNotFoundError:
            return []
        return [Ask(**ask | {"words": tuple(ask["words"])}) for ask in cast("list[dict[str, Any]]", asks)]

    def note(self, ask: Ask) -> None:
        """Append an ask, unless it repeats the last one."""
        asks = self.asks()
        if asks and (asks[-1].words, asks[-1].cwd) == (ask.words, ask.cwd):
            return
        asks.append(replace(ask, time=datetime.now().astimezone().isoformat(timespec="seconds")))
        content = [asdict(each) | {"words": list(each.words)} for each in asks]
        record.write_whole(
            self.folder / SWEEP, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
        )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the one process that is at the sweep; one that comes to nothing leaves no folder.

        Raises:
            ConfigError: Another one is, or there can be no such folder.
        """
        new = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"{self.folder} cannot be made: {error.strerror}"
            raise ConfigError([Problem("output_dir", message, "another folder")]) from None
        if not os.access(self.folder, os.W_OK):
            raise ConfigError([Problem(str(self.folder), "may not be written to", "another folder")])
        with (self.folder / DRIVER).open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self.driver()
                who = f"process {holder.pid} on {holder.host}" if holder else "another process"
                message = f"is being run: {who} is at it"
                raise ConfigError([Problem(str(self.folder), message, "wait for it, or stop that process")]) from None
            except OSError:  # a file system without locks, on which two at the same moment are not seen
                pass
            lock.truncate(0)
            lock.write(json.dumps(asdict(Holder.me())))
            lock.flush()
            try:
                yield
            finally:
                lock.truncate(0)
                if not is_sweep(self.folder) and new:
                    (self.folder / DRIVER).unlink()
                    with contextlib.suppress(OSError):
                        for folder in new:
                            folder.rmdir()

    def driver(self) -> Holder | None:
        """Return the process that is at the sweep, if one is."""
        try:
            holder = Holder(**json.loads((self.folder / DRIVER).read_text()))
        except (OSError, ValueError):
            return None
        return holder if holder.is_alive((self.folder / DRIVER).stat().st_mtime) else None
