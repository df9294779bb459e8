"""Many runs as tasks of Ray: a task starts a run's processes on the node where Ray has found room, and stays with them.

A run's folder is read and written on that node, so it lies on a disk that all nodes have at the same path. How a run
went is what its folder says; only where its task is lost does the driver say it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from ftrun import config, launcher, record
from ftrun.display import print_line
from ftrun.errors import ConfigError, Problem
from ftrun.failures import Failures
from ftrun.hardware import Device, Hardware
from ftrun.pool import ForkServer
from ftrun.pool_display import PoolDisplay
from ftrun.record import Result, Status
from ftrun.signals import Signals

_POLL_SECONDS = 0.1
_LOOK_SECONDS = 2.0
"""How often the folders of runs are looked at."""

_STORE_BYTES = 100 << 20
"""Memory for what tasks hand to each other, here next to nothing; Ray takes 30 % of the machine's otherwise."""


def bring(folder: Path) -> Result:
    """Bring a run to its end: the task, as a node of the cluster does it.

    Raises:
        FileNotFoundError: The node does not see the run's folder.
    """
    # Ray starts its workers with Ctrl-C held back, and what they start would inherit that.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if not record.is_run(folder):
        message = f"there is no {folder / record.RUN} on {socket.gethostname()}: all nodes must see a run's folder"
        raise FileNotFoundError(f"{message} at the same path")
    return launcher.bring(folder, launcher.Silent())


class Tasks:
    """Brings frozen runs to their end.

    Args:
        address: The cluster; None for a Ray that is started here and stopped afterwards.
        num_cpus: The CPUs of that one; None for all.
        max_failures: After so many failures of one kind, and nothing completed, no more is started.
        on_end: Called after runs have ended.
    """

    def __init__(
        self, address: str | None, num_cpus: int | None, max_failures: int | None, on_end: Callable[[], None]
    ) -> None:
        self.told: Status | None = None
        """What it was told while it worked."""

        self._address, self._num_cpus = address, num_cpus
        self._on_end = on_end
        self._tasks: dict[Any, Path] = {}
        self._elsewhere: dict[Path, str] = {}
        """Runs that go on without a task of ours, and what to say if they end without a word."""

        self._before: dict[Path, Result] = {}
        """How runs stood when they were handed over."""

        self._shown: set[Path] = set()
        self._stops = self._cancelled = 0
        self._is_over = False
        """Whether runs were left undone."""

        self._failures = Failures(max_failures)

    def work(self, folders: Sequence[Path]) -> bool:
        """Bring the runs in these folders to their end, or, once told to stop, to a checkpoint.

        Returns:
            Whether all of them came to an end.

        Raises:
            ConfigError: There is no such cluster; nothing has been started then.
        """
        hardware = {folder: config.hardware_of(folder / record.RUN) for folder in folders}
        with _cluster(self._address, self._num_cpus), PoolDisplay(folders) as display:
            self._hand_over(hardware, display)
            with Signals(lambda *told: self._stopping(display, *told)) as signals:
                looked = time.monotonic()
                while self._tasks or (self._elsewhere and not signals.told):
                    ended = self._take(display)
                    if time.monotonic() - looked > _LOOK_SECONDS:
                        ended |= self._look(display)
                        looked = time.monotonic()
                    if ended:
                        self._on_end()
                    self._stop_if_due(display)
                    display.refresh()
                self.told = signals.told
        return not self._is_over

    def _hand_over(self, hardware: dict[Path, Hardware], display: PoolDisplay) -> None:
        """Give Ray a task for each run that nobody is at; which of them runs when is Ray's to say."""
        import ray

        remote = ray.remote(max_retries=0, max_calls=0)(bring)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for folder, of_run in hardware.items():
            self._before[folder] = Result.load(folder)
            if self._before[folder].status is Status.running:
                self._elsewhere[folder] = "its process ended and said nothing"
                self._shown.add(folder)
                display.adopted(folder)
                continue
            wanted = _wanted(of_run, most_cpus=nodes[0]["CPU"] if self._address is None else None)
            if not any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
                if self._address is None:
                    reason = f"this machine has less than {_text(wanted)}"
                    self._over(record.conclude(folder, Status.failed, reason), display)
                    continue
                display.line(
                    f"[yellow]no node has {_text(wanted)}[/]; Ray waits for one to join: {escape(folder.name)}"
                )
            cpus, gpus, memory = wanted.pop("CPU"), wanted.pop("GPU", None), wanted.pop("memory", None)
            options = {"num_cpus": cpus, "num_gpus": gpus, "memory": memory, "resources": wanted, "name": folder.name}
            self._tasks[remote.options(**options).remote(folder)] = folder

    def _take(self, display: PoolDisplay) -> bool:
        """Take what tasks have come to, waiting a moment for the first; tell whether there was any."""
        import ray
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        if not self._tasks:
            time.sleep(_POLL_SECONDS)
            return False
        ready, _ = ray.wait(list(self._tasks), num_returns=1, timeout=_POLL_SECONDS)
        for task in ready:
            folder = self._tasks.pop(task)
            try:
                result = ray.get(task)
            except TaskCancelledError:
                result = Result.load(folder)
            except RayError as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                result = self._lost(folder, f"Ray lost its task: {str(cause).strip().splitlines()[0]}")
            except Exception as error:
                result = self._lost(folder, f"its task failed: {error}")
            if result.status is Status.running:
                self._elsewhere.setdefault(folder, "its process ended and said nothing")
            elif result.status is not Status.queued:
                self._over(result, display)
        return bool(ready)

    def _lost(self, folder: Path, reason: str) -> Result:
        """Return how a run stands whose task is gone: its processes may be alive, or have come to an end by then."""
        result = Result.load(folder)
        if result.status is Status.running:
            self._elsewhere[folder] = reason
        elif result.holder or result == self._before[folder]:
            result = record.conclude(folder, Status.failed, reason)
        return result

    def _look(self, display: PoolDisplay) -> bool:
        """Look at the runs' folders, and tell whether one that has no task of ours has ended."""
        for folder in self._tasks.values():
            if Result.load(folder).status is Status.running:
                self._show(folder, display)
        looked_at = {folder: Result.load(folder) for folder in self._elsewhere}
        ended = [folder for folder, result in looked_at.items() if result.status is not Status.running]
        for folder in self._elsewhere.keys() - ended:
            self._show(folder, display)
        for folder in ended:
            result, reason = looked_at[folder], self._elsewhere.pop(folder)
            self._over(record.conclude(folder, Status.failed, reason) if result.holder else result, display)
        return bool(ended)

    def _show(self, folder: Path, display: PoolDisplay) -> None:
        """Show how far a running run is."""
        if folder not in self._shown:
            self._shown.add(folder)
            display.started(folder)
        display.seen(folder)

    def _stopping(self, display: PoolDisplay, interrupted: bool, again: bool) -> None:
        """Note a signal; what is to be done about it is done by the loop, since Ray may be in the middle of a call."""
        self._stops = 2 if interrupted and again else max(self._stops, 1)
        display.stopping(interrupted, again)

    def _stop_if_due(self, display: PoolDisplay) -> None:
        """Have Ray stop all tasks, once told to; after too many failures, those that it has not started."""
        import ray

        while self._cancelled < self._stops:  # a task is told of Ctrl-C, and of a second one
            self._cancelled, self._is_over = self._cancelled + 1, True
            for task in self._tasks:
                ray.cancel(task)
        if self._is_over or not (reason := self._failures.too_many):
            return
        waiting = [task for task, folder in self._tasks.items() if Result.load(folder).status is not Status.running]
        if waiting:
            self._is_over = True
            for task in waiting:
                ray.cancel(task)
            display.line(f"[red]stopped:[/] {escape(reason)}; {len(waiting)} jobs were not started")

    def _over(self, result: Result, display: PoolDisplay) -> None:
        """Note how a run ended."""
        self._failures.note(result.status, result.reason)
        display.ended(result)


def _wanted(hardware: Hardware, most_cpus: float | None) -> dict[str, float]:
    """Return what a run is to get, by the names that Ray's nodes use; on one machine never more CPUs than it has."""
    cpus = float(hardware.busy_cpus)
    wanted = {"CPU": min(cpus, most_cpus or cpus)}
    if hardware.accelerators:
        wanted["NPU" if hardware.device is Device.npu else "GPU"] = hardware.accelerators
    if hardware.memory_gb is not None:
        wanted["memory"] = int(hardware.memory_gb * 2**30)
    return wanted


def _text(wanted: dict[str, float]) -> str:
    amounts = {"GiB of memory" if name == "memory" else name: amount for name, amount in wanted.items()}
    return ", ".join(f"{amount / 2**30 if 'memory' in name else amount:g} {name}" for name, amount in amounts.items())


def _knock(address: str) -> None:
    """Connect to a cluster's port: Ray itself would try for minutes.

    Raises:
        OSError: Nobody is there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()


@contextlib.contextmanager
def _cluster(address: str | None, num_cpus: int | None) -> Iterator[None]:
    """Be connected to a cluster, or to a Ray that is started here, with a fork server whose workers are up at once.

    Raises:
        ConfigError: No cluster answers at the address.
    """
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:  # nobody there, another version, no address
            message = f"there is no cluster to work with: {str(error).splitlines()[0]}"
            fix = "`ray start --head` starts one; without hydra.launcher.address jobs run on this machine"
            raise ConfigError([Problem("hydra.launcher.address", message, fix)]) from None
        try:
            yield
        finally:
            ray.shutdown()
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unasked
    with ForkServer():
        print_line("[dim]starting Ray[/]")
        try:
            ray.init(
                address="local", num_cpus=num_cpus, include_dashboard=False, object_store_memory=_STORE_BYTES, **quiet
            )
            yield
        finally:
            ray.shutdown()
