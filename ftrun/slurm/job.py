"""An element's work: does its run on its node, and goes back into the queue when it has to make room.

The run is a step of the job, also where it has one node: when SLURM begins to make room for others, it says so to
steps only. SIGUSR1, some time before the time limit, comes to this process, and is passed on. Once the run has saved,
SLURM is asked to start it again later, unless it is ending the job already: then that is SLURM's to do where it wants
it, and one that was cancelled must not come back. A run that is done is not done again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from ftrun import record
from ftrun.failures import Failures
from ftrun.record import EXIT_CODES, Result, Status
from ftrun.slurm import cluster
from ftrun.slurm.cluster import Element, SlurmError
from ftrun.slurm.submission import Submission
from ftrun.slurm.told import Told

_PORTS = (20_000, 20_000)
"""The first port where processes of several nodes meet, and how many there are: a job's number chooses."""


def do(list_file: str, index: int, told: Told) -> int:
    """Do an element's run.

    Args:
        list_file: The array's list of runs.
        index: Which of them.
        told: The signals that have come since this process began.

    Returns:
        The exit code, which SLURM shows.
    """
    submission = Submission.load(Path(list_file))
    folder = submission.runs()[index]
    me = Element(os.environ["SLURM_ARRAY_JOB_ID"], int(os.environ["SLURM_ARRAY_TASK_ID"]))
    is_back = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    _say(f"{folder}: job {me} on {os.environ.get('SLURM_JOB_NODELIST')}{', started again' if is_back else ''}")
    if _is_held(folder):
        _say("another process is at it, so there is nothing to do")
        return 0
    before = Result.load(folder)
    if before.status is Status.completed or (is_back and before.status is Status.failed):
        _say(f"it is {before.status} already")
        return EXIT_CODES[before.status]
    if _is_stopped(submission):
        return 0
    step = _saved_step(folder)
    result = _run(folder, told)
    if result.status is Status.preempted:
        result = _make_room(folder, me, step, told)
    _say(f"{result.status} after step {result.step}{': ' if result.reason else ''}{result.reason}")
    ended = {"status": result.status, "reason": result.reason.split("\n")[0]}
    record.write_whole(submission.file(f"-{index}.ended"), json.dumps(ended) + "\n")
    return EXIT_CODES[result.status]


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ftrun: {text}", flush=True)  # noqa: T201


def _is_held(folder: Path) -> bool:
    """Tell whether somebody else is at a run; waits for signs of life where the holder was on another node.

    That is where the element itself was, perhaps, before that node was lost.
    """
    began = None
    while (result := Result.load(folder)).status is Status.running:
        here = result.holder is not None and result.holder.host == socket.gethostname()
        sign = (folder / record.RESULT).stat().st_mtime
        if here or (began is not None and sign != began):
            return True
        began = sign
        time.sleep(1.0)
    return False


def _is_stopped(submission: Submission) -> bool:
    """Tell whether too many of the others have failed for one reason; if so, the rest does not start either."""
    stop = submission.file(".stop")
    if stop.exists():
        return True
    if submission.max_failures is None:
        return False
    failures = Failures(submission.max_failures)
    for file in stop.parent.glob(f"{submission.name}-*.ended"):
        ended = json.loads(file.read_text())
        failures.note(Status(ended["status"]), ended["reason"])
    if not (text := failures.too_many):
        return False
    record.write_whole(stop, text + "\n")
    _say(f"the others are stopped: {text}")
    try:
        cluster.cancel_waiting(os.environ["SLURM_ARRAY_JOB_ID"])
    except SlurmError as error:  # each of them will read it
        _say(str(error))
    return True


def _run(folder: Path, told: Told) -> Result:
    """Do a run on the nodes of the job, and return how it went."""
    if told.numbers:
        return record.conclude(folder, Status.preempted, "")
    command = ["srun", "--mpi=none", "--export=ALL", "--kill-on-bad-exit=1", "--ntasks-per-node=1", *_places()]
    command += [sys.executable, "-P", "-m", "ftrun.slurm.node", str(folder)]
    process = subprocess.Popen(command, env=os.environ | _meeting(), stdin=subprocess.DEVNULL, start_new_session=True)
    is_passed_on = False
    while (code := process.poll()) is None:
        if signal.SIGUSR1 in told.numbers and not is_passed_on:  # SIGTERM comes to every process of a job by itself
            process.send_signal(signal.SIGUSR1)
            is_passed_on = True
        time.sleep(0.1)
    result = Result.load(folder)
    if result.holder or result.status is Status.queued or (code and result.status is Status.preempted):
        if told.numbers:
            return record.conclude(folder, Status.preempted, "")
        reason = f"its processes on one of its nodes ended, and all with them (srun: exit code {code})"
        return record.conclude(folder, Status.failed, reason)
    return result


def _places() -> tuple[str, ...]:
    """Return on how many nodes a run's processes are to be started: one of `node` on each."""
    nodes = os.environ["SLURM_JOB_NUM_NODES"]
    return (f"--nodes={nodes}", f"--ntasks={nodes}", f"--cpus-per-task={os.environ.get('SLURM_CPUS_PER_TASK', '1')}")


def _meeting() -> dict[str, str]:
    """Return where the processes of several nodes find each other."""
    here, *others = cluster.nodes()
    if not others:
        return {}
    address = _own_address(towards=others[0])
    port = _PORTS[0] + int(os.environ["SLURM_JOB_ID"]) % _PORTS[1]
    _say(f"{len(others) + 1} nodes, the first {here}, which meet at {address}:{port}")
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _own_address(*, towards: str) -> str:
    """Return this node's address on the way to another, which may be none of those that its own name stands for."""
    try:
        found = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)
    except socket.gaierror:
        found = socket.getaddrinfo(cluster.address_of(towards), 9, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def _saved_step(folder: Path) -> int:
    """Return the step that a run goes on from."""
    saved = record.latest_checkpoint(folder)
    return record.step_of(saved) if saved else 0


def _make_room(folder: Path, me: Element, step_before: int, told: Told) -> Result:
    """See to it that a run that has saved and stopped goes on later, and return how it stands."""
    for attempt in range(_ATTEMPTS):  # a controller that is being started again answers a little later
        try:
            return _made_room(folder, me, step_before, told)
        except SlurmError as error:
            _say(str(error))
            if attempt + 1 < _ATTEMPTS:
                time.sleep(2.0)
    return Result.load(folder)


def _made_room(folder: Path, me: Element, step_before: int, told: Told) -> Result:
    result = Result.load(folder)
    if cluster.is_ending(me):  # by somebody's will, which it is too late to change
        if _is_cancelled():
            result.status, result.reason = Status.interrupted, f"cancelled in SLURM (job {me})"
            result.save(folder)
    elif signal.SIGUSR1 in told.numbers and _saved_step(folder) <= step_before:
        result.status = Status.failed
        result.reason = "its time limit came before it had taken a step: more hardware.minutes"
        result.save(folder)
    else:
        cluster.requeue(me)
    return result


_ATTEMPTS = 5
"""How often SLURM is asked to start a run again."""


def _is_cancelled() -> bool:
    """Tell whether SLURM ends this job because somebody wants that, and not to start it again.

    SLURM answers that question no more while a job ends; but it has written why into the job's own output.
    """
    with Path(f"/proc/{os.getpid()}/fd/1").open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 65_536))
        text = log.read().decode(errors="replace")
    found = re.findall(rf"JOB {os.environ['SLURM_JOB_ID']} ON \S+ CANCELLED AT \S+(?: DUE TO ([^*]*))?", text)
    return bool(found) and (not found[-1] or found[-1].startswith("SIGNAL"))
