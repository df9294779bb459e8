"""Being told to stop: Ctrl-C means interrupted; SIGTERM and SIGUSR1, which clusters send, mean preempted.

Outside the training loop a signal ends the run at once. Inside it, the step under way is finished and saved first. A
second Ctrl-C ends the process whatever it is doing.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from ftrun.record import EXIT_CODES, Status

_MEANING = {signal.SIGINT: Status.interrupted, signal.SIGTERM: Status.preempted, signal.SIGUSR1: Status.preempted}


class Stopped(BaseException):
    """The run was told to stop. Not an Exception, so that no library's clean-up swallows it."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.value)
        self.status = status


_requested: Status | None = None
_deferred = False


def install() -> None:
    """Take over the signals. Call once, early, in the main thread."""
    global _requested, _deferred
    _requested, _deferred = None, False
    for number in _MEANING:
        signal.signal(number, _handle)


def _handle(number: int, _: FrameType | None) -> None:
    global _requested
    again = _requested is not None
    _requested = _requested or _MEANING[signal.Signals(number)]
    if again and number == signal.SIGINT:
        os._exit(EXIT_CODES[Status.interrupted])
    if not _deferred and not again:
        raise Stopped(_requested)


def request(status: Status) -> None:
    """Have the run stop as if it had been told to, unless it has been already."""
    global _requested
    _requested = _requested or status


def requested() -> Status | None:
    """Return why the run was told to stop, if it was."""
    return _requested


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While inside, only note a signal: the training loop looks for it after each step."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
