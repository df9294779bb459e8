"""What the driver is told, passed on to the workers, which have sessions of their own."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from ftrun.record import Status


class Signals:
    """Passes signals on to the processes that are added; a second Ctrl-C ends them at once.

    Args:
        stopping: Called at each signal: whether it was Ctrl-C, and whether it is another one.
    """

    def __init__(self, stopping: Callable[[bool, bool], None]) -> None:
        self._stopping = stopping
        self._workers: set[int] = set()
        self._sessions: set[int] = set()
        self._told: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants of SIGHUP
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def told(self) -> Status | None:
        """What this process was told to do, if anything: what a run's status is if its worker could not say."""
        if self._told is None:
            return None
        return Status.interrupted if self._told == signal.SIGINT else Status.preempted

    def add(self, pid: int) -> None:
        """Note a worker's process; one that comes late is told what the others were."""
        if pid not in self._workers:
            self._workers.add(pid)
            if self._told is not None:
                send(pid, self._told)

    def add_session(self, pid: int) -> None:
        """Note the leader of a process group of everything that was started for a run."""
        self._sessions.add(pid)

    def forget(self, pids: set[int]) -> None:
        """Forget processes that have ended: their numbers may be given to others."""
        self._workers -= pids
        self._sessions -= pids

    def kill(self) -> None:
        """End everything that was started, at once."""
        for session in self._sessions:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)
        for pid in self._workers:  # torchrun gives each a session of its own
            send(pid, signal.SIGKILL)

    def _handle(self, number: int, _: FrameType | None) -> None:
        again, self._told = self._told is not None, signal.SIGTERM if number == signal.SIGHUP else number
        self._stopping(number == signal.SIGINT, again)
        if again and number == signal.SIGINT:
            self.kill()
        for pid in self._workers:
            send(pid, self._told)


def send(pid: int, number: int) -> None:
    """Send a signal to a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
