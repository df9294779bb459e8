"""What a running worker tells the driver: small JSON messages over a Unix datagram socket.

A driver that is gone, or slow, never holds the worker up: what cannot be sent is dropped. Nothing depends on an event
arriving; what matters is in the run's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIABLE = "FTRUN_EVENTS"
"""Environment variable by which a worker finds its driver's socket."""


def socket_parent() -> str | None:
    """Return the folder to make a socket's folder in: None for the usual one, if its path leaves room for a name.

    The kernel takes no more than 108 bytes for a Unix socket's path, and a cluster's $TMPDIR may be as long by itself.
    """
    return None if len(os.fsencode(tempfile.gettempdir())) <= 64 else "/tmp"  # noqa: S108 (mkdtemp names what is in it)


class Receiver:
    """The driver's end."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="ftrun-", dir=socket_parent())
        self.address = str(Path(self._folder) / "events")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)

    def receive(self, timeout: float) -> Iterator[dict[str, Any]]:
        """Yield what has come, waiting up to ``timeout`` seconds for the first."""
        self._socket.settimeout(timeout)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while True:
                yield json.loads(self._socket.recv(1 << 16))
                self._socket.settimeout(0)

    def close(self) -> None:
        """Remove the socket."""
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)


_sender: socket.socket | None = None


_moved = time.monotonic()


def mark() -> None:
    """Note that the work has moved on, where it is long and there is nothing to tell."""
    global _moved
    _moved = time.monotonic()


def moved() -> float:
    """Return when the work last moved on, on the clock of `time.monotonic`."""
    return _moved


def send(kind: str, **values: Any) -> None:
    """Tell the driver something, if there is one. Of several processes, the first speaks for all."""
    global _sender
    mark()
    address = os.environ.get(VARIABLE)
    if not address or (kind != "process" and os.environ.get("RANK", "0") != "0"):
        return
    if _sender is None:
        _sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        _sender.setblocking(False)
    with contextlib.suppress(OSError):
        _sender.sendto(json.dumps({"kind": kind, **values}).encode(), address)
