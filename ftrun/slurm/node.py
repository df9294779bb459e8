"""One node of a run: starts the node's processes, which find those of others, and waits for them.

    srun --ntasks-per-node=1 python -m ftrun.slurm.node FOLDER

The first node's processes say how the run went. Where one fails, srun ends all.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(folder: str) -> int:
    """Do a node's part of a run; return 0 unless it failed, or was not told to stop and did."""
    from ftrun.slurm.told import Told

    told = Told()  # before the imports that take a while
    from ftrun import launcher, processes, record
    from ftrun.record import Status

    rank = os.environ[processes.NODE_RANK] = os.environ["SLURM_NODEID"]
    if told.numbers:
        if rank == "0":
            record.conclude(Path(folder), Status.preempted, "")
        return 0
    if rank == "0":
        return int(launcher.bring(Path(folder), launcher.Silent()).status is Status.failed)
    return _other(Path(folder))


def _other(folder: Path) -> int:
    from ftrun import config, events, processes, record
    from ftrun.signals import Signals

    receiver, run_file = events.Receiver(), folder / record.RUN
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
