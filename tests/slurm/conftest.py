"""A SLURM of two nodes for the tests, where Debian's packages are installed: one for each of pytest's processes."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ftrun import record
from ftrun.slurm.submission import Placed, placed
from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if gone := missing():
        pytest.skip(
            f"SLURM is not installed: {', '.join(gone)} missing (apt-get install slurmctld slurmd slurm-client)"
        )
    if os.getuid():
        pytest.skip("slurmd wants to be root")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    os.environ["SLURM_CONF"] = str(cluster.conf)
    yield
    subprocess.run(["scancel", "--user=root"], check=False)
    del os.environ["SLURM_CONF"]
    cluster.stop()


@pytest.fixture
def cluster(_cluster: None) -> Iterator[None]:
    """A cluster that a test finds without jobs."""
    yield
    subprocess.run(["scancel", "--user=root"], check=True)
    until(lambda: not subprocess.check_output(["squeue", "-h"]), 30)


def until(is_so: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def step_of(run: Path) -> int:
    """Return the last step that a run has logged."""
    return max((line["step"] for line in record.read_lines(run / record.METRICS)), default=0)


def place_of(run: Path) -> Placed:
    """Return where a run is in SLURM."""
    return placed([run])[run]


def restarts(run: Path) -> int:
    """Return how often SLURM has started a run's element again."""
    shown = subprocess.check_output(["scontrol", "show", "job", str(place_of(run).element), "-o"], text=True)
    return int(shown.partition("Restarts=")[2].split()[0])


def job_log(run: Path) -> str:
    """Return what a run's element printed."""
    return place_of(run).log.read_text()


def hurry_back(run: Path) -> None:
    """Wait until a run's element is back in the queue, where it would stay for two minutes, and have it start."""
    until(lambda: str(place_of(run).state) == "PENDING (BeginTime)")
    time.sleep(2)  # nodes turn down what is as old, to the second, as what they have just ended
    subprocess.run(["scontrol", "update", f"JobId={place_of(run).element}", "StartTime=now"], check=True)
