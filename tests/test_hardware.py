"""Accelerators are found by what their drivers leave on a machine, without torch."""

from __future__ import annotations

import os

import pytest

from ftrun import hardware, processes
from ftrun.hardware import Device, Hardware
from ftrun.train import Precision, Train


@pytest.fixture
def nvidia(tmp_path, monkeypatch):
    """A machine with GPUs, as far as ``nvidia-smi`` goes."""

    def with_gpus(*lines):
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return with_gpus


def settled(**keys):
    chosen, train = Hardware(**keys), Train()
    hardware.settle(chosen, train)
    return chosen, train


def test_every_gpu_gets_a_process_and_bf16_where_it_can(nvidia):
    nvidia("NVIDIA H100, 9.0", "NVIDIA H100, 9.0")
    chosen, train = settled()
    assert (chosen.device, chosen.num_processes, train.precision) == (Device.cuda, 2, Precision.bf16)


def test_an_older_gpu_gets_fp16(nvidia):
    nvidia("Tesla V100, 7.0")
    assert settled()[1].precision is Precision.fp16


def test_only_visible_gpus_count(nvidia, monkeypatch):
    nvidia("A, 8.0", "B, 8.0", "C, 8.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert settled()[0].num_processes == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert settled()[0].device is Device.cpu


def test_what_is_asked_for_is_taken(nvidia):
    nvidia("A, 8.0", "B, 8.0")
    assert settled(device=Device.cpu)[0].device is Device.cpu
    assert settled(num_processes=1)[0].num_processes == 1
    assert settled(device=Device.npu)[0].device is Device.npu  # the worker refuses it if torch has none


def test_a_machine_without_accelerators_computes_in_fp32():
    chosen, train = settled()
    assert (chosen.device, chosen.num_processes, train.precision) == (Device.cpu, 1, Precision.fp32)
    assert chosen.num_threads == 1  # as OMP_NUM_THREADS says in these tests


def test_threads_are_shared_by_the_processes(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    usable = len(os.sched_getaffinity(0))
    assert hardware.default_threads(1) == usable
    assert hardware.default_threads(usable * 2) == 1


def test_a_device_that_torch_does_not_see_is_refused(ftrun, nvidia):
    nvidia("NVIDIA H100, 9.0")
    done = ftrun("model=tiny", "debug=smoke", PATH=os.environ["PATH"]).sees(2)
    assert "does not see a cuda device" in done.err
    assert "hardware=cpu" in done.err


def test_one_process_needs_no_launcher(tmp_path):
    run_file = tmp_path / "run.yaml"
    assert processes.command(Hardware(num_processes=1), run_file)[1:] == ["-m", "ftrun.worker", str(run_file)]
    assert "torch.distributed.run" in processes.command(Hardware(num_processes=8), run_file)
