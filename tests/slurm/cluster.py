"""A SLURM of two nodes on this machine, for tests: Debian's daemons, with ports and a folder of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")

# Without munge: nobody else is on this cluster.
_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=20
MinJobAge=300
MaxArraySize=1001
DefMemPerCPU=512
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=4 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Starts and ends the daemons.

    Args:
        folder: Where their files are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.conf = folder / "slurm.conf"

    def start(self) -> None:
        """Start, and wait until both nodes are idle."""
        for name in ("state", "spool.n1", "spool.n2"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        port, port1, port2 = _free_ports(3)
        user = subprocess.check_output(["id", "-un"], text=True).strip()
        host = socket.gethostname().partition(".")[0]
        self.conf.write_text(
            _CONF.format(folder=self._folder, host=host, user=user, port=port, port1=port1, port2=port2)
        )
        env = os.environ | {"SLURM_CONF": str(self.conf)}
        for command in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
            subprocess.run(command, env=env, check=True, capture_output=True)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            done = subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], env=env, capture_output=True, text=True)
            if done.stdout.split()[:1] == ["2"]:
                return
            time.sleep(0.1)
        logs = "\n".join(path.read_text()[-2000:] for path in self._folder.glob("*.log"))
        self.stop()
        raise RuntimeError(f"SLURM did not come up:\n{done.stdout}{done.stderr}\n{logs}")

    def stop(self) -> None:
        """End the daemons."""
        for path in self._folder.glob("*.pid"):
            with contextlib.suppress(ValueError, ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGTERM)


def missing() -> list[str]:
    """Return which of SLURM's programs are not here."""
    return [name for name in DAEMONS if not shutil.which(name)]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
