"""Many runs on this machine, as many at once as there are slots: what happens to one happens to that one only.

Workers are forked from a server that has imported the heavy packages. A run whose worker is alive from before, because
only the driver died, is watched until it ends; a worker that no longer says that it lives is ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.markup import escape

from ftrun import config, events, forkserver, launch, processes, record
from ftrun.failures import Failures
from ftrun.hardware import Device, Hardware
from ftrun.pool_display import PoolDisplay
from ftrun.record import Result, Status
from ftrun.signals import Signals, send
from ftrun.slots import Slot, Slots

_POLL_SECONDS = 0.05
_LOOK_SECONDS = 2.0
"""How often the folders of runs that are not this pool's own children are looked at."""

_SILENT_AFTER_SECONDS = 30 * record.HEARTBEAT_SECONDS
"""A worker that has shown no sign of life for so long is stuck where not even its watchdog runs."""


@dataclass
class Attempt:
    """A run that is under way."""

    folder: Path
    process: processes.Process | None = None
    """None if it is a run of an earlier driver's."""

    slot: Slot | None = None
    receiver: events.Receiver | None = None
    pids: set[int] = field(default_factory=set)


class Pool:
    """Brings frozen runs to their end.

    Args:
        server: Forks the workers.
        on_cpu: How many jobs at once share the CPUs.
        on_each: How many jobs at once share an accelerator.
        max_failures: After so many failures of one kind, and nothing completed, no more is started.
        on_end: Called after runs have ended.
    """

    def __init__(
        self,
        server: ForkServer,
        on_cpu: int,
        on_each: int,
        max_failures: int | None,
        on_end: Callable[[], None],
    ) -> None:
        self._server = server
        self.told: Status | None = None
        """What it was told while it worked."""

        self._on_cpu, self._on_each = on_cpu, on_each
        self._on_end = on_end
        self._slots: dict[Device, Slots] = {}
        self._hardware: dict[Path, Hardware] = {}
        self._failures = Failures(max_failures)

    def work(self, folders: Sequence[Path]) -> bool:
        """Bring the runs in these folders to their end, or, once told to stop, to a checkpoint.

        Returns:
            Whether all of them came to an end.
        """
        with PoolDisplay(folders) as display, Signals(display.stopping) as signals:
            self._server.ensure()
            waiting, running = deque(folders), list[Attempt]()
            looked = 0.0
            while running or (waiting and not self._is_over(signals)):
                if signals.told:  # those of an earlier driver's go on by themselves
                    running = [attempt for attempt in running if attempt.process]
                if not self._is_over(signals):
                    self._start(waiting, running, signals, display)
                is_time = time.monotonic() - looked > _LOOK_SECONDS
                looked = time.monotonic() if is_time else looked
                ended = [each for each in running if self._has_ended(each, signals, display, is_time)]
                for attempt in ended:
                    running.remove(attempt)
                if ended:
                    self._on_end()
                display.refresh()
                time.sleep(0 if ended else _POLL_SECONDS)
            if waiting and signals.told is None:
                display.line(
                    f"[red]stopped:[/] {escape(self._failures.too_many)}; {len(waiting)} jobs were not started"
                )
            self.told = signals.told
            return not waiting and self.told is None

    def _is_over(self, signals: Signals) -> bool:
        """Tell whether nothing more is to be started."""
        return signals.told is not None or bool(self._failures.too_many)

    def _start(self, waiting: deque[Path], running: list[Attempt], signals: Signals, display: PoolDisplay) -> None:
        """Start what there is room for, first come first served."""
        while waiting:
            folder = waiting[0]
            if Result.load(folder).status is Status.running:
                running.append(Attempt(folder))
                display.adopted(folder)
            else:
                if folder not in self._hardware:  # looked at again and again while a job waits for its slot
                    self._hardware[folder] = config.hardware_of(folder / record.RUN)
                hardware = self._hardware[folder]
                slots = self._slots_of(hardware.device)
                if (count := hardware.num_processes or 1) > slots.most:
                    reason = f"it needs {count} {hardware.device} devices, and there are {slots.most}"
                    self._over(record.conclude(folder, Status.failed, reason), display)
                elif (slot := slots.take(count)) is None:
                    return
                elif attempt := self._attempt(folder, hardware, slot, signals):
                    running.append(attempt)
                    display.started(folder)
            waiting.popleft()

    def _slots_of(self, device: Device) -> Slots:
        if device not in self._slots:
            self._slots[device] = Slots(device, self._on_cpu if device is Device.cpu else self._on_each)
        return self._slots[device]

    def _attempt(self, folder: Path, hardware: Hardware, slot: Slot, signals: Signals) -> Attempt | None:
        """Start a run; if somebody else has just done that, watch theirs."""
        try:
            record.claim(folder)
        except record.Held:
            slot.release()
            return Attempt(folder)
        receiver = events.Receiver()
        env = {events.VARIABLE: receiver.address} | slot.env
        try:
            self._server.ensure()
            process = processes.start(hardware, folder / record.RUN, env=env, held=slot.held)
        except BaseException:
            receiver.close()
            slot.release()
            raise
        attempt = Attempt(folder, process, slot, receiver, {process.pid})
        signals.add_session(process.pid)
        if not hardware.in_a_group:
            signals.add(process.pid)
        return attempt

    def _has_ended(self, attempt: Attempt, signals: Signals, display: PoolDisplay, is_time: bool) -> bool:
        """Pass on what a run tells, and tell whether it is over."""
        if attempt.process is None:
            return is_time and self._theirs_has_ended(attempt, display)
        assert attempt.receiver is not None
        assert attempt.slot is not None
        code = attempt.process.poll()
        for event in attempt.receiver.receive(timeout=0):
            if event["kind"] == "process":
                signals.add(event["pid"])
                attempt.pids.add(event["pid"])
            display.show(attempt.folder, event)
        if code is None:
            if is_time and _silence(attempt.folder) > _SILENT_AFTER_SECONDS:
                self._kill(attempt, display)
            return False
        signals.forget(attempt.pids)
        attempt.receiver.close()
        attempt.slot.release()
        self._over(launch.how_it_was(attempt.folder, code, signals.told), display)
        return True

    def _theirs_has_ended(self, attempt: Attempt, display: PoolDisplay) -> bool:
        """Look at a run that an earlier driver started."""
        result = Result.load(attempt.folder)
        if result.status is Status.running:
            display.seen(attempt.folder)
            return False
        if result.holder:
            result = record.conclude(attempt.folder, Status.failed, "its process ended and said nothing")
        self._over(result, display)
        return True

    @staticmethod
    def _kill(attempt: Attempt, display: PoolDisplay) -> None:
        display.line(
            f"{attempt.folder.name}: no sign of life for {_SILENT_AFTER_SECONDS / 60:.0f} minutes; it is ended"
        )
        for pid in attempt.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            send(pid, signal.SIGKILL)

    def _over(self, result: Result, display: PoolDisplay) -> None:
        """Note how a run ended."""
        self._failures.note(result.status, result.reason)
        display.ended(result)


def _silence(folder: Path) -> float:
    """Return for how many seconds a running run has shown no sign of life."""
    try:
        return time.time() - (folder / record.RESULT).stat().st_mtime
    except FileNotFoundError:
        return 0.0


class ForkServer:
    """A fork server for the jobs of this process, unless somebody has given it one already."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ForkServer:
        self.ensure()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ensure(self) -> None:
        """Start it, if there is none, or if it has ended."""
        is_given = self._folder is None and os.environ.get(forkserver.VARIABLE)
        if is_given or (self._server and self._server.poll() is None):
            return
        self.close()
        self._folder = tempfile.TemporaryDirectory(prefix="ftrun-", dir=events.socket_parent())
        address = str(Path(self._folder.name) / "server")
        self._server = forkserver.start(address)
        os.environ[forkserver.VARIABLE] = address

    def close(self) -> None:
        """End it; what it has forked goes on."""
        if self._server:
            self._server.terminate()
            self._server.wait()
        if self._folder:
            os.environ.pop(forkserver.VARIABLE, None)
            self._folder.cleanup()
        self._folder = self._server = None
