"""Sweeps whose jobs crash, hang, run out of memory or are killed, and whose driver is: each has one right result."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from ftrun import record
from ftrun.record import Result, Status
from ftrun.sweep.ledger import Ledger

STEPS = 6
SWEEP = (
    "-m", "model=tiny", "hardware=cpu", f"train.max_steps={STEPS}", "train.log_every=1", "train.save_every=2",
    "stage.num_samples=0", "plugins=[moody.py]", "optimizer=moody", "hydra.launcher.slots=4",
)  # fmt: skip

MOODY = '''
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from transformers import TrainerCallback
from ftrun.plugin import register
from ftrun_plugins.optimizer.adamw import AdamW


class Mood(TrainerCallback):
    """What befalls a run after its third step, once."""

    def __init__(self, file):
        self.file = file

    def on_step_end(self, args, state, control, **kwargs):
        while state.global_step == 3 and self.file.with_name("wait").exists():
            time.sleep(0.05)
        if state.global_step == 3 and self.file.exists():
            mood = self.file.read_text()
            self.file.unlink()
            if mood == "raise":
                raise RuntimeError("in a bad mood")
            if mood == "exit":
                os._exit(3)
            if mood == "memory":
                raise MemoryError("all of it is taken")
            if mood == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if mood == "hang":
                time.sleep(1000)


@register
@dataclass(kw_only=True)
class Moody(AdamW):
    """AdamW, and what befalls the run of a seed that has a file in the folder of moods."""

    name: str = "moody"
    moods: str = "moods"
    """The folder."""

    def callbacks(self, model, run):
        return [*super().callbacks(model, run), Mood(Path(self.moods).resolve() / str(run.cfg.seed))]
'''
MOODS = {1: "raise", 2: "exit", 3: "memory", 4: "kill", 5: "hang"}
REASONS = {
    1: "in a bad mood", 2: "exit code 3", 3: "all of it is taken", 4: "signal 9", 5: "no progress for 0.05 minutes"
}  # fmt: skip


@pytest.fixture
def sweep(write, forked):
    """Start the sweep's command with further words, and do not wait."""
    moody = write("moody.py", MOODY)
    started = []

    def start(*words, **env):
        started.append(forked(*SWEEP, *words, **env))
        return started[-1]

    yield start
    (moody.parent / "moods" / "wait").unlink(missing_ok=True)
    for process in started:
        process.kill()


def ended(process) -> str:
    out, err = process.communicate(timeout=300)
    return f"exit code {process.returncode}\n{out}\n{err}"


def results(folder: Path) -> dict[int, Result]:
    """Return the result of each seed's job."""
    return {
        int(json.loads((job.folder / "manifest.json").read_text())["seed"]): Result.load(job.folder)
        for job in Ledger(folder).jobs()
    }


def losses(result: Result) -> list[float]:
    lines = [line for line in record.read_lines(Path(result.folder) / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))  # every step once
    return [line["loss"] for line in lines]


@pytest.mark.slow
def test_what_befalls_one_job_befalls_no_other_and_is_made_good(sweep, ftrun, write, tmp_path):
    seeds = "seed=range(1,8)"
    for seed, mood in MOODS.items():
        write(f"moods/{seed}", mood)
    text = ended(sweep(seeds, "train.stall_minutes=0.05", "output_dir=stormy"))
    assert text.startswith("exit code 1"), text
    stormy = results(tmp_path / "stormy")
    for seed, reason in REASONS.items():
        assert stormy[seed].status is Status.failed, text
        assert reason in stormy[seed].reason
        assert reason in text
        assert stormy[seed].checkpoint == "checkpoints/step-2"
    assert {seed for seed, result in stormy.items() if result.status is Status.completed} == {6, 7}
    began = {seed: (Path(result.folder) / "result.json").stat().st_mtime_ns for seed, result in stormy.items()}

    assert ended(sweep(seeds, "train.stall_minutes=0.05", "output_dir=stormy")).startswith("exit code 1")
    assert results(tmp_path / "stormy")[1].status is Status.failed  # until it is asked for
    done = ftrun("resume", "stormy", "--retry-failed").sees(0)
    assert "5 of 5" in done.out
    after = results(tmp_path / "stormy")
    assert {result.status for result in after.values()} == {Status.completed}
    for seed in (6, 7):  # not touched again
        assert (Path(after[seed].folder) / "result.json").stat().st_mtime_ns == began[seed]

    assert ended(sweep(seeds, "output_dir=calm")).startswith("exit code 0")
    calm = results(tmp_path / "calm")
    assert {seed: losses(result) for seed, result in after.items()} == {
        seed: losses(result) for seed, result in calm.items()
    }
    board = json.loads((tmp_path / "stormy" / "leaderboard.json").read_text())
    assert sorted(job["status"] for job in board["jobs"]) == ["completed"] * 7


def until(condition) -> None:
    waiting = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < waiting
        time.sleep(0.05)


def at_their_third_step(folder: Path) -> list[Path]:
    """Return the folders of the jobs that are there, and wait before they log it."""
    lines = {job.folder: record.read_lines(job.folder / "metrics.jsonl") for job in Ledger(folder).jobs()}
    return [job for job, logged in lines.items() if logged and logged[-1]["step"] == 2]


@pytest.mark.slow
def test_a_driver_that_is_killed_loses_nothing_and_repeats_nothing(sweep, write, tmp_path):
    wait = write("moods/wait", "")
    words = ("seed=range(1,5)", "hydra.launcher.slots=2", "output_dir=sweep")
    driver = sweep(*words)
    until(lambda: len(at_their_third_step(tmp_path / "sweep")) == 2)
    driver.kill()
    driver.communicate()
    running = at_their_third_step(tmp_path / "sweep")
    driver = sweep(*words)
    assert [driver.stdout.readline().partition(" ")[0] for _ in running] == ["running", "running"]
    assert len(at_their_third_step(tmp_path / "sweep")) == 2  # no room: they still have their slots
    wait.unlink()
    text = ended(driver)
    assert text.startswith("exit code 0"), text
    assert text.count("started") == 2
    after = results(tmp_path / "sweep")
    assert {result.status for result in after.values()} == {Status.completed}
    assert [len(losses(result)) for result in after.values()] == [STEPS] * 4
    assert all(not list((folder / "checkpoints").glob("step-2.*")) for folder in running)


@pytest.mark.slow
def test_ctrl_c_saves_what_runs_and_the_same_words_go_on(sweep, write, tmp_path):
    wait = write("moods/wait", "")
    words = ("seed=1,2,3", "hydra.launcher.slots=2", "output_dir=sweep")
    driver = sweep(*words)
    until(lambda: len(at_their_third_step(tmp_path / "sweep")) == 2)
    driver.send_signal(signal.SIGINT)
    until(lambda: "saving" in driver.stdout.readline())
    wait.unlink()
    text = ended(driver)
    assert text.startswith("exit code 130"), text
    stopped = results(tmp_path / "sweep")
    assert sorted(str(result.status) for result in stopped.values()) == ["interrupted", "interrupted", "queued"]
    assert {result.checkpoint for result in stopped.values()} == {"checkpoints/step-3", None}
    text = ended(sweep(*words))
    assert text.startswith("exit code 0"), text
    assert [len(losses(result)) for result in results(tmp_path / "sweep").values()] == [STEPS] * 3


def test_more_points_and_seeds_run_only_what_is_new(sweep, tmp_path):
    first = ended(sweep("optimizer.lr=1e-3,2e-3", "seed=1", "train.max_steps=2"))
    assert first.startswith("exit code 0"), first
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    # The same number written otherwise is the same job.
    more = ended(sweep("optimizer.lr=0.001,1.0e-3,2e-3", "seed=1,2", "train.max_steps=2", "hydra.launcher.slots=1"))
    assert more.startswith("exit code 0"), more
    assert "2 of 2" in more
    assert [path.name for path in (tmp_path / "outputs" / "sweeps").iterdir()] == [folder.name]
    assert [job.id for job in Ledger(folder).jobs()] == [0, 1, 2, 3]
    assert len(Ledger(folder).asks()) == 2


def test_jobs_that_all_fail_alike_end_the_sweep(sweep, write, tmp_path):
    for seed in range(1, 7):
        write(f"moods/{seed}", "raise")
    words = ("seed=range(1,7)", "hydra.launcher.slots=1", "hydra.launcher.max_failures=2", "output_dir=sweep")
    text = ended(sweep(*words))
    assert text.startswith("exit code 1"), text
    reason = "2 jobs failed for one reason, none completed: RuntimeError: in a bad mood"
    assert f"stopped: {reason}" in " ".join(text.split())
    statuses = sorted(str(result.status) for result in results(tmp_path / "sweep").values())
    assert statuses == ["failed"] * 2 + ["queued"] * 4


def test_one_driver_at_a_time(sweep, ftrun, write, tmp_path):
    wait = write("moods/wait", "")
    driver = sweep("seed=1", "output_dir=sweep")
    until(lambda: (tmp_path / "sweep" / "sweep.yaml").exists())
    second = ftrun("resume", "sweep").sees(2)
    assert f"process {driver.pid} on {os.uname().nodename} is at it" in second.err
    wait.unlink()
    text = ended(driver)
    assert text.startswith("exit code 0"), text


def test_a_worker_whose_driver_died_before_it_began_leaves_the_run_to_its_new_holder(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    mine = record.Holder.me()
    record.Result(holder=mine).save(tmp_path)
    dead = record.Holder(mine.host, 1, started=mine.started)
    record.claim(tmp_path, after=mine)  # its own driver's: taken over
    record.Result(holder=record.Holder(mine.host, os.getppid(), record._start_ticks(os.getppid()))).save(tmp_path)
    with pytest.raises(record.Held, match="is running"):
        record.claim(tmp_path, after=dead)


@pytest.mark.slow
def test_losing_points_of_a_grid_are_stopped_early_and_their_checkpoints_go(ftrun, tmp_path):
    words = ("-m", "model=tiny", "hardware=cpu", "train.max_steps=8", "stage.num_samples=0", "hydra.launcher.slots=2")
    words = (*words, "optimizer.lr=1e-5,1e-4,1e-3,4e-3", "output_dir=sweep", "hydra.sweeper.halving.eta=2")
    done = ftrun(*words, "hydra.sweeper.halving.first=2", "hydra.sweeper.keep=best").sees(0)
    assert "freed" in done.out
    found = {job.overrides[0].partition("=")[2]: Result.load(job.folder) for job in Ledger(tmp_path / "sweep").jobs()}
    assert {lr: (str(result.status), result.step) for lr, result in found.items()} == {
        "1e-05": ("paused", 2), "0.0001": ("paused", 2), "0.001": ("paused", 4), "0.004": ("completed", 8),
    }  # fmt: skip
    assert (Path(found["0.004"].folder) / "model").is_dir()
    assert not list((tmp_path / "sweep").glob("optimizer.lr=1e-05/checkpoints/*"))
    alone = ftrun(*words[1:6], "optimizer.lr=4e-3", f"output_dir={tmp_path / 'alone'}").sees(0)
    assert alone.result.objective == found["0.004"].objective
    again = ftrun(*words, "hydra.sweeper.halving.first=2", "hydra.sweeper.keep=best").sees(0)
    assert "started" not in again.out
