"""What has become of runs that were handed in to SLURM, by its word and by what they left in their folders."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ftrun import record
from ftrun.display import near
from ftrun.pool_display import PoolDisplay
from ftrun.record import Result, Status
from ftrun.signals import Signals
from ftrun.slurm import cluster
from ftrun.slurm.cluster import SlurmError, State
from ftrun.slurm.submission import Placed, placed

GRACE_SECONDS = 10.0
"""How long a folder on a network's disk may take to show what a run wrote last."""

_FINAL = (Status.completed, Status.failed, Status.paused, Status.interrupted)
_LOG_LINES = 5


class Waiting:
    """Looks after runs until all of them have ended.

    Args:
        poll_seconds: How often SLURM is asked.
        on_end: Called after runs have ended.
    """

    def __init__(self, poll_seconds: float, on_end: Callable[[], None]) -> None:
        self.told: Status | None = None
        """What this process was told while it waited; the runs go on meanwhile."""

        self._poll_seconds = poll_seconds
        self._on_end = on_end
        self._over_since: dict[Path, float] = {}
        self._shown: set[Path] = set()

    def wait(self, runs: Sequence[Path]) -> None:
        """Wait for runs to end, or for a signal."""
        left = list(runs)
        with PoolDisplay(runs) as display, Signals(lambda *_: None) as signals:
            while left and signals.told is None:
                try:
                    places = placed(left)
                except SlurmError as error:  # its controller has a pause now and then
                    display.line(f"[yellow]SLURM does not answer[/]: {error}")
                else:
                    ended = [run for run in left if self._has_ended(run, places.get(run), display)]
                    left = [run for run in left if run not in set(ended)]
                    if ended:
                        self._on_end()
                self._sleep(signals, display, left)
            self.told = signals.told
            if left:
                display.line(f"{len(left)} runs go on in SLURM")

    def _sleep(self, signals: Signals, display: PoolDisplay, left: Collection[Path]) -> None:
        until = time.monotonic() + self._poll_seconds
        while left and signals.told is None and time.monotonic() < until:
            display.refresh()
            time.sleep(0.1)

    def _has_ended(self, run: Path, place: Placed | None, display: PoolDisplay) -> bool:
        state = place.state if place else State(cluster.GONE)
        if state.name == "PENDING" and run not in self._shown:
            return False
        result = Result.load(run)
        if not _is_final(result):
            self._show(run, result, display)
            if not state.is_over or time.monotonic() - self._since(run) < GRACE_SECONDS:
                return False
            result = settle(run, place)
        display.ended(result)
        return True

    def _since(self, run: Path) -> float:
        """Return since when a run's element has been over."""
        return self._over_since.setdefault(run, time.monotonic())

    def _show(self, run: Path, result: Result, display: PoolDisplay) -> None:
        if result.status is Status.running:
            if run not in self._shown:
                self._shown.add(run)
                display.started(run)
            display.seen(run)


def _is_final(result: Result) -> bool:
    """Tell whether a run has said itself how it ended, and not that it goes on later."""
    return result.holder is None and result.status in _FINAL


def settle(run: Path, place: Placed | None) -> Result:
    """Write down how a run ended that could not say so itself, and whose element is over."""
    result = Result.load(run)
    if place is None or _is_final(result):
        return result
    if result.status is Status.preempted and result.holder is None:
        return result  # it has saved; only the queue did not take it back
    if result.status is Status.queued and place.submission.file(".stop").exists():
        return result  # nobody has tried it
    state = place.state
    if state.name == cluster.GONE:
        state = cluster.accounted([place.element]).get(place.element, state)
    return record.conclude(run, *_why(state, place, result))


def _why(state: State, place: Placed, result: Result) -> tuple[Status, str]:
    """Return how a run is to be seen whose element is over, and why."""
    job = f"job {place.element}"
    is_lost = state.name == cluster.GONE and not place.log.exists()  # SLURM keeps no record of what has not begun
    if state.name == "CANCELLED" or is_lost:
        before = " before it started" if result.status is Status.queued else ""
        return Status.interrupted, f"cancelled in SLURM{before} ({job})"
    if state.name in ("TIMEOUT", "DEADLINE"):
        why = "before it had saved and stopped: a larger hydra.launcher.signal_seconds gives it more time for that"
        return Status.interrupted, f"its time limit in SLURM came {why} ({job})"
    if state.name in ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED"):
        return Status.interrupted, f"SLURM took its node away: {state.name} ({job})"
    if state.name == "OUT_OF_MEMORY":
        return Status.failed, f"SLURM ended it because it took more than hardware.memory_gb ({job})"
    said = "knows nothing of it any more" if state.name == cluster.GONE else f"says {state.name}"
    lines = [f"SLURM {said} ({job}), and it left no word; its log there, {near(place.log)}, ends"]
    return Status.failed, "\n".join([*lines, *_last_lines(place.log)])


def _last_lines(log: Path) -> list[str]:
    try:
        return log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    except OSError:
        return ["(there is none)"]
