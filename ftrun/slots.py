"""Places for jobs on this machine: its accelerators, or shares of its CPUs, each locked for whoever is at it.

A lock is an open file that the job's own processes hold, too: a place stays taken while they live, though the driver
that took it has died. The kernel lets go of it when the last of them ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ftrun import hardware
from ftrun.hardware import Device

FOLDER = "FTRUN_SLOTS"
"""Environment variable that names the folder of the locks; all drivers of a machine must use the same."""


@dataclass(frozen=True)
class Slot:
    """What one job has while it runs."""

    env: dict[str, str]
    """Shows the job its own devices only."""

    held: tuple[int, ...]
    """The open locks, for the job's processes to hold, too."""

    def release(self) -> None:
        """Let go of it; it is free once the job's processes have ended."""
        for file in self.held:
            os.close(file)


class Slots:
    """The places of one kind of device on this machine.

    Args:
        device: The kind.
        count: On CPU, how many jobs share it at once; else how many share each accelerator.
    """

    def __init__(self, device: Device, count: int) -> None:
        self.device = device
        self.is_shared = device.is_one
        """Whether the processes of one job share one place."""

        if self.is_shared:
            self._shares = [(device.value, share) for share in range(count)]
        else:
            self._shares = [(each, share) for share in range(count) for each in _devices(device)]

    @property
    def most(self) -> float:
        """How many processes one job can have."""
        return math.inf if self.is_shared else len({each for each, _ in self._shares})

    def take(self, count: int) -> Slot | None:
        """Take so many places (on CPU one, which the processes share), if they are free.

        Places of one job are on different accelerators.
        """
        wanted = 1 if self.is_shared else count
        taken: dict[str, int] = {}
        for each, share in self._shares:
            if len(taken) == wanted:
                break
            if each not in taken and (lock := _lock(f"{self.device}-{each}-{share}")) is not None:
                taken[each] = lock
        slot = Slot(self._shown(list(taken)), tuple(taken.values()))
        if len(taken) < wanted:
            slot.release()
            return None
        return slot

    def _shown(self, devices: Sequence[str]) -> dict[str, str]:
        variable = hardware.VISIBLE.get(self.device)
        return {variable: ",".join(devices)} if variable else {}


def _devices(device: Device) -> list[str]:
    """Return the accelerators as the variable that shows them names them."""
    if shown := os.environ.get(hardware.VISIBLE[device]):
        return [part.strip() for part in shown.split(",") if part.strip() not in ("", "-1")]
    return [str(number) for number in range(len(hardware.find(device).names))]


def _lock(name: str) -> int | None:
    """Return the open lock of that name, or None if somebody holds it."""
    folder = Path(os.environ.get(FOLDER) or "/tmp/ftrun-slots")  # noqa: S108 (all users of the machine share it)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
        folder.chmod(0o1777)
    path = folder / name.replace("/", "_")
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        file = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file
