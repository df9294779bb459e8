"""One node of a run: starts the node's processes, which find those of others, and waits for them.

    srun --ntasks-per-node=1 python -m ftrun.slurm.node FOLDER

The first node's processes say how the run went. Where one fails, srun ends all.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

from ftrun import config, events, launch, processes, record
from ftrun.errors import ConfigError
from ftrun.record import Result, Status
from ftrun.signals import Signals

NODE_RANK = "FTRUN_NODE_RANK"
"""Environment variable that says which of a run's nodes this is; the first is 0."""


class Silent:
    """Shows nothing: nobody is there to see it, and what matters is in the run's folder."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, event: dict[str, Any]) -> None:
        """Show nothing."""

    def stopping(self, interrupted: bool, again: bool) -> None:
        """Say nothing."""


def main(folder: str) -> int:
    """Do a node's part of a run; return 0 unless it failed, or was not told to stop and did."""
    rank = os.environ["SLURM_NODEID"]
    os.environ[NODE_RANK] = rank
    return _first(Path(folder)) if rank == "0" else _other(Path(folder) / record.RUN)


def _first(folder: Path) -> int:
    try:
        return int(launch.watch(folder, Silent()).status is Status.failed)
    except ConfigError as error:
        reason = str(error)
        print(reason, file=sys.stderr)  # noqa: T201
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    result = Result.load(folder)
    if result.status is Status.queued or result.holder == record.Holder.me():  # no worker could say it
        Result(status=Status.failed, reason=reason, **record.so_far(folder)).save(folder)
    return 1


def _other(run_file: Path) -> int:
    receiver = events.Receiver()
    try:
        with Signals(lambda *_: None) as signals:
            process = processes.start(config.hardware_of(run_file), run_file, env={events.VARIABLE: receiver.address})
            while (code := process.poll()) is None:
                for event in receiver.receive(timeout=0.1):
                    if event["kind"] == "process":
                        signals.add(event["pid"])
            return int(code != 0 and signals.told is None)
    finally:
        receiver.close()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
