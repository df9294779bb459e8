"""One node of a run that has several: starts the node's processes, which find the others, and waits for them.

    srun --ntasks-per-node=1 python -m ftrun.slurm.node FOLDER

The first node's processes say how the run went. Where one fails, srun ends all.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ftrun import config, events, launch, processes, record
from ftrun.record import Status
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
    """Do a node's part of a run; return 0 unless it failed."""
    rank = os.environ["SLURM_NODEID"]
    os.environ[NODE_RANK] = rank
    if rank == "0":
        return int(launch.watch(Path(folder), Silent()).status is Status.failed)
    run_file = Path(folder) / record.RUN
    receiver = events.Receiver()
    try:
        with Signals(lambda *_: None) as signals:
            process = processes.start(config.hardware_of(run_file), run_file, env={events.VARIABLE: receiver.address})
            while (code := process.poll()) is None:
                for event in receiver.receive(timeout=0.1):
                    if event["kind"] == "process":
                        signals.add(event["pid"])
    finally:
        receiver.close()
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
