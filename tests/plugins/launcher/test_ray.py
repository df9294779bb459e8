"""Jobs as tasks of Ray: each ends as its folder says, a lost task or folder fails one, Ctrl-C saves all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest

from ftrun import launcher, plugin, record
from ftrun.hardware import Device, Hardware
from ftrun.record import Result, Status

TINY = ("model=tiny", "hardware=cpu", "stage.num_samples=0", "hydra/launcher=ray")


def results(folder):
    return {path.parent.name: Result.load(path.parent) for path in sorted(folder.glob("*/run.yaml"))}


def until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    assert condition(), process.communicate()


def is_training(folder):
    return len(record.read_lines(folder / record.METRICS)) > 2


def test_without_ray_nothing_is_frozen(driver, monkeypatch, tmp_path):
    monkeypatch.setattr(plugin, "is_installed", lambda _: False)
    done = driver("-m", *TINY, "seed=1,2", "output_dir=sweep")
    assert done.code == 2
    assert "pip install 'ftrun[ray]'" in done.err
    assert not list((tmp_path / "sweep").glob("*/run.yaml"))


def test_settings_of_a_ray_started_here_and_of_one_that_runs_exclude_each_other(driver):
    pytest.importorskip("ray")
    done = driver("check", "-m", *TINY, "seed=1,2", "hydra.launcher.address=auto", "hydra.launcher.num_cpus=2")
    assert done.code == 2
    assert "hydra.launcher.num_cpus" in done.err


def test_a_job_asks_ray_for_what_hardware_says():
    from ftrun.on_ray import _text, _wanted

    assert _wanted(Hardware(device=Device.cpu, num_processes=2, num_threads=3), None) == {"CPU": 6}
    assert _wanted(Hardware(device=Device.cpu, num_processes=1, num_threads=8), 2) == {"CPU": 2}
    on_gpus = _wanted(Hardware(device=Device.cuda, num_processes=2, num_threads=4, cpus=5, memory_gb=1.5), None)
    assert on_gpus == {"CPU": 5, "GPU": 2, "memory": 3 << 29}
    assert _text(on_gpus) == "5 CPU, 2 GPU, 1.5 GiB of memory"
    assert _wanted(Hardware(device=Device.npu, num_processes=1, num_threads=1), None) == {"CPU": 1, "NPU": 1}


def test_several_nodes_and_an_address_where_nobody_is_are_refused(driver, tmp_path):
    pytest.importorskip("ray")
    words = ("-m", *TINY, "seed=1,2", "train.max_steps=2")
    nobody = driver(*words, "output_dir=nobody", "hydra.launcher.address=127.0.0.1:1")
    assert nobody.code == 2
    assert "Connection refused" in nobody.err
    nodes = driver(*words, "output_dir=nodes", "hardware.num_nodes=2")
    assert nodes.code == 2
    assert "hydra/launcher=slurm" in nodes.err
    assert {result.status for result in results(tmp_path / "nodes").values()} <= {Status.queued}


@pytest.mark.slow
def test_a_folder_that_a_node_does_not_see_and_a_job_that_fails_end_one_job_each(forked, tmp_path):
    pytest.importorskip("ray")
    # Two CPUs, one for each job: the third waits for one of the first two.
    words = ("-m", *TINY, "seed=1,2,3", "train.max_steps=400", "train.eval_every=400", "output_dir=sweep")
    process = forked(*words, "hydra.launcher.num_cpus=2")
    folder = tmp_path / "sweep"
    until(lambda: is_training(folder / "seed=1") and is_training(folder / "seed=2"), process)
    (folder / "seed=3" / "run.yaml").rename(folder / "hidden")
    holder = json.loads((folder / "seed=2" / "result.json").read_text())["holder"]
    os.kill(holder["pid"], signal.SIGKILL)
    until(lambda: (folder / "seed=3" / "result.json").exists(), process)
    (folder / "hidden").rename(folder / "seed=3" / "run.yaml")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    found = results(folder)
    assert found["seed=1"].status is Status.interrupted
    assert found["seed=1"].checkpoint == f"checkpoints/step-{found['seed=1'].step}"
    assert "killed with signal 9" in found["seed=2"].reason
    assert "all nodes must see" in found["seed=3"].reason


@pytest.mark.slow
def test_on_ray_a_run_is_what_it_is_anywhere(ftrun, forked, tmp_path):
    pytest.importorskip("ray")
    process = forked("-m", *TINY, "seed=1,2", "train.max_steps=2", "output_dir=sweep", "hydra.launcher.num_cpus=2")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    alone = ftrun(*TINY[:3], "seed=2", "train.max_steps=2").sees()
    lines = record.read_lines(tmp_path / "sweep" / "seed=2" / record.METRICS)
    assert [line["loss"] for line in lines if "loss" in line] == alone.losses


def test_a_run_that_another_process_holds_is_left_alone(driver, forked, tmp_path):
    process = forked(*TINY[:3], "train.max_steps=2000", "train.eval_every=2000", "output_dir=run")
    until(lambda: is_training(tmp_path / "run"), process)
    result = launcher.bring(tmp_path / "run", launcher.Silent())
    assert result.status is Status.running
    assert Result.load(tmp_path / "run").status is Status.running
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert Result.load(tmp_path / "run").status is Status.interrupted


def test_a_damaged_run_fails_with_the_reason(ftrun, tmp_path):
    ftrun(*TINY[:3], "train.max_steps=1").sees()
    folder = tmp_path / "damaged"
    shutil.copytree(tmp_path / "run1", folder)
    (folder / record.RESULT).unlink()
    (folder / record.RUN).write_text("train: [")
    assert launcher.bring(folder, launcher.Silent()).status is Status.failed
    assert str(folder) in Result.load(folder).reason
