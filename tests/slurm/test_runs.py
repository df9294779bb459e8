"""Runs on a real SLURM without accounting: as many as are asked for, each once, whatever happens to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ftrun import record
from ftrun.cancel import cancel
from ftrun.record import Result
from ftrun.slurm import submission
from tests.ended import comparable, weights
from tests.slurm.conftest import hurry_back, job_log, place_of, restarts, step_of, until

pytestmark = pytest.mark.usefixtures("cluster")

SLURM = ("hydra/launcher=slurm", "hydra.launcher.poll_seconds=0.2", "hardware.memory_gb=0.1", "hardware.cpus=1")
WAIT = (*SLURM, "hydra.launcher.wait=true")
TINY = ("model=tiny", "hardware=cpu", "stage.num_samples=0", "train.max_steps=2")
LONG = (
    "model=tiny", "hardware=cpu", "stage.num_samples=0", "adapter=full", "train.max_steps=80", "train.log_every=1",
    "train.micro_batch_size=16", "train.save_every=40",
)  # fmt: skip


def statuses(folder):
    return sorted(Result.load(run).status for run in record.runs(folder))


def shape(folder):
    """Return the arrays that were submitted, as the number of their elements."""
    return [len(each.runs()) for each in submission.submissions(folder)]


@pytest.fixture
def long(ftrun, tmp_path):
    """Submit a long run, and return its folder once it has taken five steps."""

    def submit(*words):
        words = words if any(word.startswith("seed=") for word in words) else (*words, "seed=1")
        done = ftrun("-m", *LONG, *SLURM, *words, f"output_dir={tmp_path / 'sweep'}").sees(0)
        assert "to come" in done.out
        run = next(record.runs(tmp_path / "sweep"))
        until(lambda: step_of(run) >= 5)
        return run

    return submit


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The long run as it goes where nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    words = [*LONG, "hardware.num_threads=1", "seed=1", f"output_dir={folder}"]
    env = os.environ | {"FTRUN_FORK_SERVER": server}
    subprocess.run([sys.executable, "-m", "ftrun", *words], env=env, check=True, capture_output=True)
    return folder


def test_a_single_run_is_started_cold_and_waited_for(start, ftrun, tmp_path):
    process = start(*TINY, *WAIT, "output_dir=run")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "submitted 1 run to SLURM as job" in out
    here = ftrun(*TINY)
    assert comparable(tmp_path / "run") == comparable(here.folder)
    until(lambda: "completed after step 2" in job_log(tmp_path / "run"))


def test_a_grid_is_one_array_and_is_not_submitted_again(ftrun, tmp_path):
    words = ("-m", *TINY, *WAIT, "output_dir=sweep")
    ftrun(*words, "seed=1,2,3,4").sees(0)
    assert statuses(tmp_path / "sweep") == ["completed"] * 4
    assert shape(tmp_path / "sweep") == [4]
    here = ftrun(*TINY, "seed=3")
    assert comparable(tmp_path / "sweep" / "seed=3") == comparable(here.folder)
    ftrun(*words, "seed=1,2,3,4").sees(0)
    assert shape(tmp_path / "sweep") == [4]
    ftrun(*words, "seed=3,4,5,6").sees(0)
    assert shape(tmp_path / "sweep") == [4, 2]


def test_an_array_for_each_kind_of_resources(ftrun, tmp_path):
    ftrun("-m", *TINY, *WAIT, "hardware.minutes=10,20", "seed=1,2", "output_dir=sweep").sees(0)
    assert shape(tmp_path / "sweep") == [2, 2]
    times = {
        word
        for each in submission.submissions(tmp_path / "sweep")
        for word in each.command
        if word.startswith("--time")
    }
    assert times == {"--time=10", "--time=20"}


def test_what_fails_fails_alone_and_is_tried_again_only_if_that_is_wanted(ftrun, tmp_path):
    words = ("-m", *TINY, *WAIT, "optimizer.lr=1e-4,1e20", "train.max_steps=6", "seed=1", "output_dir=sweep")
    done = ftrun(*words).sees(1)
    assert statuses(tmp_path / "sweep") == ["completed", "failed"]
    assert "lr=1e+20" in done.out
    ftrun(*words).sees(1)
    assert shape(tmp_path / "sweep") == [2]
    ftrun(*words, "--retry-failed").sees(1)
    assert shape(tmp_path / "sweep") == [2, 1]


def test_what_slurm_refuses_is_said_with_the_key(ftrun, tmp_path):
    done = ftrun("-m", *TINY, *SLURM, "hydra.launcher.partition=nowhere", "seed=1,2", "output_dir=sweep").sees(2)
    assert "hydra.launcher.partition: SLURM refuses" in done.err
    assert "invalid partition" in done.err
    assert shape(tmp_path / "sweep") == []
    assert statuses(tmp_path / "sweep") == ["queued"] * 2


def test_a_job_that_dies_without_a_word_has_failed_and_its_log_says_more(ftrun, tmp_path):
    setup = "hydra.launcher.setup=['echo no such module >&2','exit 3']"
    ftrun("-m", *TINY, *WAIT, setup, "seed=1", "output_dir=sweep").sees(1)
    result = Result.load(tmp_path / "sweep" / "all")
    assert result.status == "failed"
    assert "SLURM says FAILED" in result.reason
    assert result.reason.endswith("no such module")


def test_a_killed_worker_has_failed(long):
    run = long()
    os.kill(Result.load(run).holder.pid, signal.SIGKILL)
    until(lambda: place_of(run).state.name == "FAILED")
    result = Result.load(run)
    assert (result.status, result.holder) == ("failed", None)
    assert "signal 9" in result.reason
    assert restarts(run) == 0


def test_many_failures_of_one_kind_stop_the_rest(ftrun, tmp_path):
    stop = ("hydra.launcher.max_failures=2", "hydra.launcher.parallel=1")
    done = ftrun(
        "-m", *TINY, *WAIT, *stop, "optimizer.lr=1e20", "train.max_steps=6", "seed=range(1,8)", "output_dir=sweep"
    )
    done.sees(1)
    assert statuses(tmp_path / "sweep") == ["failed"] * 2 + ["queued"] * 5


def test_scancel_saves_and_ends_and_resume_goes_on(long, ftrun, whole):
    run = long()
    subprocess.run(["scancel", place_of(run).element.job], check=True)
    until(lambda: place_of(run).state.name == "CANCELLED")
    result = Result.load(run)
    assert (result.status, result.checkpoint) == ("interrupted", f"checkpoints/step-{result.step}")
    assert "cancelled in SLURM" in result.reason
    assert 5 <= result.step < 80
    ftrun("-m", *LONG, *WAIT, "seed=1", "output_dir=sweep").sees(0)
    assert comparable(run) == comparable(whole)
    assert weights(run) == weights(whole)


def test_cancel_ends_what_runs_and_what_waits(long, tmp_path):
    run = long("seed=1,2,3", "hydra.launcher.parallel=1")
    assert submission.states(record.runs(tmp_path / "sweep")) == {
        run: "RUNNING",
        run.with_name("seed=2"): "PENDING (JobArrayTaskLimit)",
        run.with_name("seed=3"): "PENDING (JobArrayTaskLimit)",
    }
    assert cancel(tmp_path / "sweep") == 3
    assert statuses(tmp_path / "sweep") == ["interrupted"] * 3
    assert Result.load(run).checkpoint
    assert "before it started" in Result.load(run.with_name("seed=2")).reason
    assert submission.states(record.runs(tmp_path / "sweep")) == {}
    assert cancel(tmp_path / "sweep") == 0


def test_a_run_makes_room_for_others_and_goes_on_afterwards(long, whole):
    run = long("hardware.cpus=4", "hardware.num_threads=1")
    node = subprocess.check_output(["squeue", "-h", "-o", "%N"], text=True).strip()
    other = ["--partition=high", f"--nodelist={node}", "--cpus-per-task=4", "--mem=100", "--output=/dev/null"]
    subprocess.run(["sbatch", "--parsable", *other, "--wrap=sleep 1"], check=True, capture_output=True)
    until(lambda: "preempted" in job_log(run))
    assert Result.load(run).status == "preempted"
    hurry_back(run)
    until(lambda: place_of(run).state.is_over)
    assert restarts(run) == 1
    assert comparable(run) == comparable(whole)
    assert weights(run) == weights(whole)


def test_before_the_time_limit_a_run_saves_and_goes_back_into_the_queue(long, whole):
    run = long()
    element = str(place_of(run).element)
    subprocess.run(["scancel", "--batch", "--signal=USR1", element], check=True)  # as SLURM does
    until(lambda: "preempted" in job_log(run))
    saved = Result.load(run).step
    hurry_back(run)
    until(lambda: place_of(run).state.is_over)
    assert restarts(run) == 1
    assert 5 <= saved < 80
    assert comparable(run) == comparable(whole)


def test_a_time_limit_that_leaves_no_time_for_a_step_fails(ftrun, tmp_path):
    ftrun("-m", *LONG, *SLURM, "seed=1", "output_dir=sweep").sees(0)
    run = tmp_path / "sweep" / "all"
    until(lambda: (run / record.RESULT).exists() and place_of(run).log.exists())
    subprocess.run(["scancel", "--batch", "--signal=USR1", str(place_of(run).element)], check=True)
    until(lambda: place_of(run).state.is_over)
    assert Result.load(run).status == "failed"
    assert "more hardware.minutes" in Result.load(run).reason


def test_a_done_run_whose_job_is_requeued_is_not_done_again(ftrun, tmp_path):
    ftrun("-m", *TINY, *WAIT, "seed=1", "output_dir=sweep").sees(0)
    run = tmp_path / "sweep" / "all"
    before = (run / record.RESULT).read_bytes()
    until(lambda: place_of(run).state.name == "COMPLETED")
    subprocess.run(["scontrol", "requeue", str(place_of(run).element)], check=True)
    hurry_back(run)
    until(lambda: "it is completed already" in job_log(run))
    assert (run / record.RESULT).read_bytes() == before


def test_a_driver_that_is_killed_leaves_the_jobs_and_finds_them_again(forked, long, ftrun, tmp_path, whole):
    run = long()
    words = ("-m", *LONG, *WAIT, "seed=1", "output_dir=sweep")
    process = forked(*words)
    until(lambda: "under way already" in process.stdout.readline())
    process.kill()
    process.wait()
    assert Result.load(run).status == "running"
    ftrun(*words).sees(0)
    assert shape(tmp_path / "sweep") == [1]
    assert restarts(run) == 0
    assert comparable(run) == comparable(whole)


def test_a_driver_that_dies_before_it_knows_the_number_finds_the_array_by_its_name(long, ftrun, tmp_path):
    run = long()
    (file,) = (tmp_path / "sweep" / ".slurm").glob("*.json")
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"job": None}))
    assert place_of(run).element.job == values["job"]
    assert json.loads(file.read_text())["job"] == values["job"]


def test_ctrl_c_ends_the_waiting_and_not_the_runs(forked, tmp_path):
    process = forked("-m", *LONG, *WAIT, "seed=1", "output_dir=sweep")
    run = tmp_path / "sweep" / "all"
    until(lambda: step_of(run) >= 5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, out + err
    assert "1 runs go on in SLURM" in out
    step = step_of(run)
    until(lambda: step_of(run) > step)


def test_cancel_ends_a_local_sweep(forked, tmp_path):
    process = forked("-m", *LONG, "seed=1,2,3", "hydra.launcher.slots=1", "output_dir=sweep")
    until(lambda: step_of(tmp_path / "sweep" / "seed=1") >= 5)
    assert cancel(tmp_path / "sweep") == 1
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, out + err
    assert statuses(tmp_path / "sweep") == ["interrupted", "queued", "queued"]
    assert Result.load(tmp_path / "sweep" / "seed=1").checkpoint


def test_cancel_ends_a_single_run(forked, tmp_path):
    process = forked(*LONG, "output_dir=run")
    until(lambda: step_of(tmp_path / "run") >= 5)
    assert cancel(tmp_path / "run") == 1
    assert process.wait(30) == 130


def test_a_run_of_two_nodes_equals_one_of_two_processes(ftrun, tmp_path):
    words = (*TINY, "train.max_steps=6", "train.log_every=1", "train.micro_batch_size=2", "data.rows=48")
    ftrun(*words, *WAIT, "hardware.num_nodes=2", "hardware.num_threads=1", "output_dir=two").sees(0)
    assert "2 nodes, the first n1, which meet at 127.0.0.1" in job_log(tmp_path / "two")
    here = ftrun(*words, "hardware.num_processes=2", "hardware.num_threads=1").sees(0)
    assert comparable(tmp_path / "two") == comparable(here.folder)


def test_a_thousand_runs_are_submitted_in_seconds(ftrun, tmp_path):
    ftrun("-m", *TINY, *SLURM, "seed=1", "hydra.launcher.flags=[--hold]", "output_dir=sweep").sees(0)
    first = tmp_path / "sweep" / "all"
    text = (first / record.RUN).read_bytes()
    runs = [tmp_path / "sweep" / f"copy{number}" for number in range(1000)]
    for run in runs:
        run.mkdir()
        (run / record.RUN).write_bytes(text)
    before = time.process_time()
    (one,) = submission.submit(runs, submission.Terms(options=("--hold",)))
    assert time.process_time() - before < 2
    assert one.runs() == runs
    assert submission.states(runs) == dict.fromkeys(runs, "PENDING (JobHeldUser)")
    subprocess.run(["scancel", "--user=root"], check=True)
