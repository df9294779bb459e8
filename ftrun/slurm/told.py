"""Which signals have come to this process, whoever handles them."""

from __future__ import annotations

import contextlib
import os
import signal


class Told:
    """Notes SIGTERM and SIGUSR1 from now on, instead of ending by them."""

    def __init__(self) -> None:
        self._numbers: set[int] = set()
        self._end, write = os.pipe()
        for end in (self._end, write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(write)  # each signal's number is written there, whatever handler it has by then
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)

    @property
    def numbers(self) -> set[int]:
        """The signals that have come so far."""
        with contextlib.suppress(BlockingIOError):
            self._numbers.update(os.read(self._end, 4096))
        return self._numbers
