"""The processes of one run: forked from a server that has imported the heavy packages, or started cold.

A run of several processes is started cold by torchrun, or forked process by process with the environment variables that
torchrun sets.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ftrun import forkserver, record
from ftrun.errors import ConfigError, Problem
from ftrun.hardware import Device, Hardware
from ftrun.signals import send

GRACE_SECONDS = 10.0
"""How long the other processes of a run have to end by themselves once one has failed."""

NODE_RANK = "FTRUN_NODE_RANK"
"""Environment variable that says which of a run's machines this is, counted from 0."""


class Process(Protocol):
    """A started worker, or the launcher of several."""

    pid: int

    def poll(self) -> int | None:
        """Return how it ended, if it has: the exit code, or minus the signal."""


def start(
    hardware: Hardware,
    run_file: Path,
    words: Sequence[str] = (),
    *,
    env: dict[str, str] | None = None,
    out: int | None = None,
    held: Sequence[int] = (),
) -> Process:
    """Start the processes of a frozen run.

    Args:
        hardware: How many, on what.
        run_file: The path of ``run.yaml``; what they print goes to the log beside it.
        words: A task other than the run, and its options.
        env: Environment variables besides this process's own and `worker_environment`.
        out: File descriptor for standard output instead of the log.
        held: Open files that they keep open as long as they live: locks.

    Raises:
        ConfigError: The run is one of several machines, and nothing says which of them this is.
    """
    env = worker_environment(hardware) | record.Holder.me().to_environment() | (env or {})
    with run_file.with_name(record.LOG).open("ab") as log:
        output = log.fileno() if out is None else out
        if server := os.environ.get(forkserver.VARIABLE):
            forked = [
                forkserver.fork(server, [str(run_file), *words], env | place, output, log.fileno(), held)
                for place in _places(hardware, run_file)
            ]
            return forked[0] if len(forked) == 1 else Together(forked)
        # A session of its own: Ctrl-C in the terminal reaches this process only, which then tells the workers.
        return subprocess.Popen(
            command(hardware, run_file, words),
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=log,
            start_new_session=True,
            pass_fds=held,
        )


def command(hardware: Hardware, run_file: Path, words: Sequence[str] = ()) -> list[str]:
    """Return the command that starts this machine's processes of a run, or, with further words, of a task.

    ``accelerate launch`` starts one process on CPU whatever it is told, so several go through torchrun, which
    accelerate's own launcher wraps.

    Raises:
        ConfigError: There are several machines, and nothing says which of them this is.
    """
    worker = ["-m", "ftrun.worker", str(run_file), *words]
    if not hardware.in_a_group:
        return [sys.executable, *worker]
    meeting = ["--standalone"]
    if hardware.num_nodes > 1:
        node, address, port = _meeting(hardware, run_file)
        meeting = [
            f"--nnodes={hardware.num_nodes}",
            f"--node-rank={node}",
            f"--master-addr={address}",
            f"--master-port={port}",
        ]
    torchrun = ["-m", "torch.distributed.run", *meeting, f"--nproc-per-node={hardware.num_processes}"]
    return [sys.executable, *torchrun, *worker]


def _meeting(hardware: Hardware, run_file: Path) -> tuple[int, str, int]:
    """Return which of a run's machines this is, counted from 0, and where the first one listens.

    Raises:
        ConfigError: The environment does not say so.
    """
    found = [os.environ.get(name, "") for name in _MEETING]
    node, address, port = found
    if node.isdigit() and int(node) < hardware.num_nodes and address and port.isdigit():
        return int(node), address, int(port)
    wrong = ", ".join(f"{name}={value or 'nothing'}" for name, value in zip(_MEETING, found, strict=True))
    message = f"is {hardware.num_nodes}, and a process does not know which machine it is on ({wrong})"
    by_hand = (
        f"on each machine N from 0 on: torchrun --nnodes={hardware.num_nodes} --node-rank=N --master-addr=FIRST_MACHINE"
        f" --master-port=29500 --nproc-per-node={hardware.num_processes} -m ftrun.worker {run_file}"
    )
    raise ConfigError([Problem("hardware.num_nodes", message, f"hydra/launcher=slurm, or {by_hand}")])


_MEETING = (NODE_RANK, "MASTER_ADDR", "MASTER_PORT")


def worker_environment(hardware: Hardware) -> dict[str, str]:
    """Return the environment variables that a worker needs besides the driver's own."""
    env = {
        "OMP_NUM_THREADS": str(hardware.num_threads),
        # Threads that wait for each other by spinning slow down a hundredfold when anything else runs on the machine.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a datasets.py in the working folder is not the package of that name
    }
    if hardware.device is Device.cpu:
        env |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return env


def _places(hardware: Hardware, run_file: Path) -> list[dict[str, str]]:
    """Return what tells each process of this machine its place, as torchrun does.

    Raises:
        ConfigError: There are several machines, and nothing says which of them this is.
    """
    if not hardware.in_a_group:
        return [{}]
    here = hardware.num_processes or 1
    node, address, port = _meeting(hardware, run_file) if hardware.num_nodes > 1 else (0, "127.0.0.1", _free_port())
    world = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(hardware.world_size),
        "LOCAL_WORLD_SIZE": str(here),
    }
    return [world | {"RANK": str(node * here + local), "LOCAL_RANK": str(local)} for local in range(here)]


def _free_port() -> int:
    """Return a port that nobody listens at: the first process does, a moment later."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Together:
    """Several forked processes of one run: where one fails, the others are ended."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self._processes = processes
        self.pid = processes[0].pid
        self._failed: int | None = None
        self._kill_at: float | None = None

    def poll(self) -> int | None:
        """Return how they ended, if all have: the first failure counts."""
        codes = [process.poll() for process in self._processes]
        self._failed = self._failed or next((code for code in codes if code), None)
        if None not in codes:
            return self._failed or 0
        if self._failed:
            alive = [process.pid for process, code in zip(self._processes, codes, strict=True) if code is None]
            if self._kill_at is None:
                self._kill_at = time.monotonic() + GRACE_SECONDS
                for pid in alive:
                    send(pid, signal.SIGTERM)
            elif time.monotonic() >= self._kill_at:
                for pid in alive:
                    send(pid, signal.SIGKILL)
        return None
