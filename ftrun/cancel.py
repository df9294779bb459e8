"""Stop a run or a sweep wherever it is: on this machine by Ctrl-C's signal, in SLURM by scancel.

What runs saves first, and ends ``interrupted``; ``ftrun resume`` goes on with it.
"""

from __future__ import annotations

import shutil
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ftrun import record
from ftrun.errors import ConfigError, Problem, RunFailed
from ftrun.record import Holder, Result, Status
from ftrun.signals import send
from ftrun.slurm import cluster
from ftrun.slurm.cluster import SlurmError
from ftrun.slurm.submission import Placed, placed
from ftrun.slurm.waiting import settle
from ftrun.sweep import ledger
from ftrun.sweep.ledger import Ledger

_SAVING_SECONDS = 120.0
"""How long something that was told to stop may take to save before nobody waits for it any more."""


def cancel(folder: Path) -> int:
    """Stop what is under way in a folder, a run's or a sweep's, and wait until it has saved.

    Returns:
        How many runs were told.

    Raises:
        ConfigError: There is neither, or what runs is out of reach.
        RunFailed: SLURM does not answer.
    """
    folder = folder.resolve()
    runs = list(record.runs(folder))
    if not runs and not (folder / ledger.DRIVER).exists():
        raise ConfigError([Problem(str(folder), "holds no run and no sweep", "`ftrun runs` lists them")])
    running = {run for run in runs if Result.load(run).status is Status.running}
    problems: list[Problem] = []
    for sweep in {folder, *(run.parent for run in runs)}:
        if driver := Ledger(sweep).driver():  # first: it would start others
            problems += _tell(driver, sweep)
    told = _cancel_in_slurm(runs)
    here = running - told
    for run in here:
        result = Result.load(run)
        if result.status is Status.running and result.holder:
            problems += _tell(result.holder, run)
    if problems:
        raise ConfigError(problems)
    return len(told | here)


def _tell(holder: Holder, folder: Path) -> Iterator[Problem]:
    """Send a process what Ctrl-C sends, and wait until it is gone; yield a problem if it is on another machine."""
    if holder.host != socket.gethostname():
        message = f"process {holder.pid} on {holder.host} is at it, which no signal from here reaches"
        yield Problem(str(folder), message, f"`ftrun cancel {folder}` on {holder.host}")
        return
    send(holder.pid, signal.SIGINT)
    until = time.monotonic() + _SAVING_SECONDS
    while holder.is_alive(0.0) and time.monotonic() < until:
        time.sleep(0.05)


def _cancel_in_slurm(runs: Sequence[Path]) -> set[Path]:
    """Cancel the jobs of runs, wait until they have ended, and return the runs.

    Raises:
        RunFailed: SLURM does not answer.
    """
    if not shutil.which("squeue"):
        return set()
    until = time.monotonic() + _SAVING_SECONDS
    told: dict[Path, Placed] = {}
    try:
        while active := {run: place for run, place in placed(runs).items() if not place.state.is_over}:
            told |= active
            # Again and again: one that was just asking to be started again is back in the queue.
            cluster.cancel(place.element for place in active.values() if place.state.name != cluster.COMPLETING)
            if time.monotonic() > until:
                break
            time.sleep(0.5)
        for run, place in placed(list(told)).items():
            if place.state.is_over:
                settle(run, place)
    except SlurmError as error:
        raise RunFailed(f"SLURM does not answer: {error}") from None
    return set(told)
