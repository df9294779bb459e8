"""What SLURM is asked for, and what is refused before it is asked; no SLURM is needed for that."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace

import pytest

from ftrun import record
from ftrun.errors import ConfigError
from ftrun.hardware import Device, Found, Hardware, unread_limits
from ftrun.record import Holder, Result, Status
from ftrun.slurm import cluster, job, submission, waiting
from ftrun.slurm.cluster import Element, SlurmError, State
from ftrun.slurm.submission import Placed, Resources, Submission, Terms
from ftrun.train import Train
from hydra_plugins.ftrun.slurm import Slurm, SlurmSettings


def problems(**given):
    with pytest.raises(ConfigError) as caught:
        SlurmSettings.read(given, "hydra.launcher.")
    return {(problem.key, problem.fix) for problem in caught.value.problems}


def test_all_that_is_wrong_is_said_at_once():
    flags = ["--mem=4G", "--array=1-9", "-p", "--mail-type=END"]
    assert problems(flags=flags, partition="a\nb", qos=" ", setup=["module load cuda\nrm x"], parallel=0) == {
        ("hydra.launcher.flags", "hardware.memory_gb=..."),
        ("hydra.launcher.flags", "leave it out"),
        ("hydra.launcher.flags", "--NAME=VALUE, each an item of the list"),
        ("hydra.launcher.partition", "one line of plain text"),
        ("hydra.launcher.qos", "one line of plain text"),
        ("hydra.launcher.setup", "one item of the list for each line"),
        ("hydra.launcher.parallel", "hydra.launcher.parallel=X with X >= 1"),
    }


def test_keys_become_options_and_flags_come_last():
    settings = SlurmSettings.read({"account": "me", "partition": "a,b", "flags": ["--mail-type=END"]}, "")
    assert settings.options() == ("--partition=a,b", "--account=me", "--mail-type=END")


def set_up(sweeper, **given):
    launcher = Slurm(**given)
    config = SimpleNamespace(hydra=SimpleNamespace(sweeper={"_target_": sweeper}))
    launcher.setup(hydra_context=None, task_function=None, config=config)
    return launcher


def test_it_needs_sbatch_and_a_search_must_wait(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_: None)
    with pytest.raises(ConfigError) as caught:
        set_up("hydra_plugins.ftrun.optuna.Optuna")
    assert [problem.key for problem in caught.value.problems] == ["hydra/launcher", "hydra.launcher.wait"]
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    set_up("hydra_plugins.ftrun.optuna.Optuna", wait=True)
    set_up("hydra_plugins.ftrun.grid.Grid")


def test_a_time_limit_must_be_longer_than_the_time_to_save(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    launcher = set_up("hydra_plugins.ftrun.grid.Grid", signal_seconds=120)
    assert refused(launcher, device=Device.cpu, minutes=2) == ["hydra.launcher.signal_seconds"]
    assert refused(launcher, device=Device.cpu, minutes=3) == []


def refused(launcher, **hardware) -> list[str]:
    return [each.key for each in launcher.check(SimpleNamespace(hardware=Hardware(**hardware), train=Train()))]


def test_what_the_nodes_have_is_not_guessed_from_a_login_node(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    launcher = set_up("hydra_plugins.ftrun.grid.Grid")
    monkeypatch.setattr("ftrun.hardware.find", lambda device=Device.auto: Found(device))
    assert refused(launcher) == ["hardware.device"]
    assert refused(launcher, device=Device.cuda) == ["train.precision"]
    assert refused(launcher, device=Device.cpu, num_nodes=2, memory_gb=3.0) == []


def test_limits_that_nobody_would_keep_are_refused():
    assert [each.key for each in unread_limits(Hardware(minutes=3, memory_gb=2.0))] == [
        "hardware.memory_gb", "hardware.minutes",
    ]  # fmt: skip
    assert not list(unread_limits(Hardware(minutes=3), ("minutes",)))


def words(hardware, *options):
    return list(Resources.of(hardware).words(options))


def test_resources_are_what_hardware_says():
    assert words(Hardware(device=Device.cpu, num_processes=2, num_threads=3, data_workers=1)) == [
        "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=8",
    ]  # fmt: skip
    gpus = Hardware(device=Device.cuda, num_nodes=2, num_processes=4, cpus=16, memory_gb=1.5, minutes=90)
    asked = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=16", "--mem=1536M", "--time=90"]
    assert words(gpus) == [*asked, "--gpus-per-node=4"]
    assert words(gpus, "--gres=gpu:a100:4") == asked
    assert words(gpus, "--gres-flags=enforce-binding") == [*asked, "--gpus-per-node=4"]


@pytest.fixture
def runs(tmp_path):
    """Frozen runs of a sweep, as far as they are looked at, in a folder whose name means something to shells."""
    sweep = tmp_path / "it's $HOME %a"
    sweep.mkdir()
    (sweep / "jobs.jsonl").touch()
    folders = [sweep / f"seed={number}" for number in range(7)]
    for folder in folders:
        folder.mkdir()
        (folder / record.RUN).write_text("x: 1\nhardware:\n  device: cpu\n  num_processes: 1\nseed: 1\n")
    return folders


@pytest.fixture
def asked(monkeypatch):
    """What sbatch is asked, with a SLURM whose arrays have three elements at most."""
    seen = []
    monkeypatch.setattr(cluster, "longest_array", lambda: 3)
    monkeypatch.setattr(cluster, "submit", lambda words, **_: seen.append(words) or str(40 + len(seen)))
    monkeypatch.setattr("ftrun.config.hardware_of", lambda *_: Hardware(device=Device.cpu, num_processes=1))
    return seen


def test_arrays_are_as_long_as_slurm_lets_them(runs, asked, monkeypatch):
    done = submission.submit(runs, Terms(parallel=2, options=("--partition=p",)))
    assert [each.runs() for each in done] == [runs[:3], runs[3:6], runs[6:]]
    assert [words[1] for words in asked] == ["--array=0-2%2", "--array=0-2%2", "--array=0-0%2"]
    assert [each.job for each in submission.submissions(runs[0].parent)] == ["41", "42", "43"]
    assert asked[0][-2:] == ("--partition=p", str(done[0].file(".sh")))
    state = {Element("42", 1): State("PENDING", "Priority")}
    monkeypatch.setattr(cluster, "states", lambda jobs: state if set(jobs) == {"41", "42", "43"} else {})
    assert submission.states(runs) == {runs[4]: "PENDING (Priority)"}


def test_the_script_holds_no_value_unquoted(runs, asked):
    (one,) = submission.submit(runs[:1], Terms(setup=("module load cuda",)))
    first, place, setup, last = one.file(".sh").read_text().splitlines()
    assert (first, setup) == ("#!/bin/bash", "module load cuda")
    assert shlex.split(place)[:2] == ["cd", "--"]
    assert shlex.split(last)[-2:] == [str(one.file(".jsonl")), "$SLURM_ARRAY_TASK_ID"]


def test_a_refusal_leaves_everything_as_it_was(runs, asked, monkeypatch):
    def refuse(words, held):
        assert not (runs[0] / record.RESULT).exists()  # an element that starts at once finds no old word
        raise SlurmError("sbatch: error: Batch job submission failed: Invalid qos specification")

    Result(status=Status.failed, reason="of old").save(runs[0])
    monkeypatch.setattr(cluster, "submit", refuse)
    monkeypatch.setattr(cluster, "named", lambda *_: None)
    with pytest.raises(ConfigError) as caught:
        submission.submit(runs[:2], Terms())
    (problem,) = caught.value.problems
    assert problem.key == "hydra.launcher.qos"
    assert "Invalid qos" in problem.message
    assert Result.load(runs[0]).reason == "of old"
    assert submission.submissions(runs[0].parent) == []


def test_an_answer_that_comes_too_late_is_no_refusal(runs, asked, monkeypatch):
    def time_out(words, held):
        raise SlurmError("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")

    monkeypatch.setattr(cluster, "submit", time_out)
    monkeypatch.setattr(cluster, "named", lambda *_: "77")
    (one,) = submission.submit(runs[:2], Terms())
    assert one.job == "77"


def test_elements_that_were_cancelled_together_are_told_apart(monkeypatch):
    answer = "5|1-2,4%3|CANCELLED|None\n5|0|RUNNING|None\n6|0|RUNNING|None\n7|N/A|RUNNING|a|b\n"
    monkeypatch.setattr(cluster, "_ask", lambda *_, **__: answer)
    assert {str(element): state.name for element, state in cluster.states(["5", "7"]).items()} == {
        "5_1": "CANCELLED", "5_2": "CANCELLED", "5_4": "CANCELLED", "5_0": "RUNNING",
    }  # fmt: skip


def test_accounts_are_asked_for_what_is_forgotten(monkeypatch):
    answer = "5_1|CANCELLED by 1000\n5_0|OUT_OF_MEMORY\n5_[2-3]|PENDING\n"
    monkeypatch.setattr(cluster, "_ask", lambda *_, **__: answer)
    assert cluster.accounted([Element("5", 0)]) == {
        Element("5", 1): State("CANCELLED"),
        Element("5", 0): State("OUT_OF_MEMORY"),
    }


@pytest.mark.parametrize(
    ("state", "status", "reason"),
    [
        ("CANCELLED", "interrupted", "cancelled in SLURM before it started (job 9_0)"),
        ("TIMEOUT", "interrupted", "signal_seconds"),
        ("NODE_FAIL", "interrupted", "took its node away"),
        ("OUT_OF_MEMORY", "failed", "hardware.memory_gb"),
        ("FAILED", "failed", "says FAILED"),
        ("GONE", "failed", "the last line"),
    ],
)
def test_what_becomes_of_a_run_that_left_no_word(runs, state, status, reason, monkeypatch):
    array = Submission(runs[0].parent, "ftrun-x", job="9")
    array.file("").parent.mkdir()
    array.log(0).write_text("the last line\n")
    monkeypatch.setattr(cluster, "accounted", lambda *_: {})
    result = waiting.settle(runs[0], Placed(array, Element("9", 0), State(state)))
    assert (result.status, reason in result.reason) == (status, True)
    assert json.loads((runs[0] / record.RESULT).read_text())["status"] == status


def test_a_run_that_somebody_else_holds_is_left_alone(runs):
    Result(holder=Holder.me()).save(runs[0])
    assert job._is_held(runs[0])
    assert not job._is_held(runs[1])
