"""How the processes of a run are started, and what tells each its place."""

from __future__ import annotations

import json
import os
import time

import pytest

from ftrun import forkserver, processes
from ftrun.errors import ConfigError
from ftrun.hardware import Device, Hardware, Sharding

NODES = {"FTRUN_NODE_RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29501"}


@pytest.fixture
def second(monkeypatch):
    """The second of several machines."""
    for name, value in NODES.items():
        monkeypatch.setenv(name, value)


def test_one_process_needs_no_launcher(tmp_path):
    run_file = tmp_path / "run.yaml"
    assert processes.command(Hardware(num_processes=1), run_file)[1:] == ["-m", "ftrun.worker", str(run_file)]
    assert "torch.distributed.run" in processes.command(Hardware(num_processes=8), run_file)


def test_one_process_that_offloads_is_a_group_of_its_own(tmp_path):
    hardware = Hardware(num_processes=1, sharding=Sharding.fsdp2)
    assert "--nproc-per-node=1" in processes.command(hardware, tmp_path / "run.yaml")
    (place,) = processes._places(hardware, tmp_path / "run.yaml")
    assert (place["RANK"], place["WORLD_SIZE"]) == ("0", "1")


def test_machines_meet_where_they_are_told_to(second, tmp_path):
    hardware, run_file = Hardware(num_nodes=2, num_processes=4), tmp_path / "run.yaml"
    words = processes.command(hardware, run_file)
    wanted = ["--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.7", "--master-port=29501", "--nproc-per-node=4"]
    assert words[words.index("torch.distributed.run") + 1 :] == [*wanted, "-m", "ftrun.worker", str(run_file)]
    places = processes._places(hardware, run_file)
    assert [place["RANK"] for place in places] == ["4", "5", "6", "7"]
    assert [place["LOCAL_RANK"] for place in places] == ["0", "1", "2", "3"]
    assert {place["WORLD_SIZE"] for place in places} == {"8"}
    assert {(place["MASTER_ADDR"], place["MASTER_PORT"]) for place in places} == {("10.0.0.7", "29501")}


@pytest.mark.parametrize("name", list(NODES))
def test_a_machine_that_does_not_know_its_place_says_what_to_do(second, name, monkeypatch, tmp_path):
    monkeypatch.delenv(name)
    hardware = Hardware(num_nodes=2, num_processes=4)
    for start in (processes.command, processes._places):
        with pytest.raises(ConfigError) as refused:
            start(hardware, tmp_path / "run.yaml")
        (problem,) = refused.value.problems
        assert problem.key == "hardware.num_nodes"
        assert f"{name}=nothing" in problem.message
        assert f"-m ftrun.worker {tmp_path / 'run.yaml'}" in problem.fix


def test_a_run_of_two_machines(server, ftrun, monkeypatch, tmp_path):
    """Both are this one; each starts its own process of the run."""
    words = ("model=tiny", "hardware=cpu", "train.max_steps=2", "train.log_every=1", "stage.num_samples=0")
    alone = ftrun(*words, "train.micro_batch_size=8").sees(0)
    two = ftrun(*words, "hardware.num_nodes=2", "output_dir=two").sees(2)
    assert "does not know which machine it is on" in two.err
    hardware = Hardware(device=Device.cpu, num_nodes=2, num_processes=1, num_threads=1)
    monkeypatch.setenv(forkserver.VARIABLE, server)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(processes._free_port())}
    started = []
    for node in ("1", "0"):
        for name, value in (env | {"FTRUN_NODE_RANK": node}).items():
            monkeypatch.setenv(name, value)
        started.append(processes.start(hardware, tmp_path / "two" / "run.yaml"))
    deadline = time.monotonic() + 60
    while None in [process.poll() for process in started]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [process.poll() for process in started] == [0, 0], (tmp_path / "two" / "log.txt").read_text()
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(alone.losses, rel=1e-5)


def test_workers_on_a_cpu_see_no_gpu():
    env = processes.worker_environment(Hardware(device=Device.cpu, num_threads=3))
    assert (env["OMP_NUM_THREADS"], env["CUDA_VISIBLE_DEVICES"], env["ACCELERATE_USE_CPU"]) == ("3", "", "true")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
