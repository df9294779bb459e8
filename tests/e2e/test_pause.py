"""A run that its sweep has wait on the way goes on as if it had not, and one that hangs is ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ftrun import record
from ftrun.record import Pause, Result, Rung
from tests.ended import comparable, weights

# Dropout, so that the state of the random generator counts; a pause within an epoch of 6 steps, between two lines of
# metrics, and at no step that evaluates or saves.
RUN = (
    "model=tiny", "data.rows=24", "data.eval_size=4", "train.micro_batch_size=2", "train.grad_accumulation=2",
    "train.max_steps=12", "train.log_every=3", "train.neftune=5", "adapter.dropout=0.2", "optimizer.lr=1e-2",
    "stage.num_samples=0",
)  # fmt: skip

JUDGED = ("train.eval_every=4", "train.keep_best=true", "train.early_stopping_patience=3")
PLATEAU = ("train.eval_every=2", "train.scheduler=reduce_lr_on_plateau", "train.plateau_patience=0")


def waiting(whole: Path, name: str, pause: Pause) -> Path:
    """Copy a run as its sweep would have frozen it, to pause."""
    copy = whole.with_name(name)
    copy.mkdir()
    for file in (record.RUN, record.MANIFEST):
        shutil.copy(whole / file, copy)
    pause.save(copy)
    return copy


def without_the_pause(folder: Path, whole: Path) -> list[dict[str, float]]:
    """Return a run's metrics but for evaluations at steps at which the whole run made none."""
    evaluated = {line["step"] for line in comparable(whole) if "eval_loss" in line}
    return [line for line in comparable(folder) if "eval_loss" not in line or line["step"] in evaluated]


@pytest.mark.parametrize("words", [JUDGED, pytest.param(PLATEAU, marks=pytest.mark.slow)], ids=["judged", "plateau"])
def test_a_run_that_paused_twice_ends_like_one_that_did_not(ftrun, words):
    whole = ftrun(*RUN, *words).sees(0)
    folder = waiting(whole.folder, "pausing", Pause(5))
    ftrun("resume", "pausing").sees(0)
    first = Result.load(folder)
    assert (first.status, first.step, first.checkpoint) == ("paused", 5, "checkpoints/step-5")
    assert not (folder / "model").exists()
    (evaluation,) = [line["eval_loss"] for line in comparable(folder) if line["step"] == 5 and "eval_loss" in line]
    assert first.objective == first.metrics["eval_loss"] == evaluation
    assert first.tokens_per_second > 0
    assert first.peak_memory_bytes > 0
    Pause(share=0.75).save(folder)
    ftrun("resume", "pausing").sees(0)
    assert Result.load(folder).step == 9
    (folder / record.PAUSE).unlink()
    ftrun("resume", "pausing").sees(0)
    last = Result.load(folder)
    assert last.status == "completed"
    assert weights(folder) == weights(whole.folder)
    assert without_the_pause(folder, whole.folder) == comparable(whole.folder)
    assert last.metrics == pytest.approx(whole.result.metrics, abs=0, rel=0)
    rungs = Rung.all_of(folder)
    assert {pause: rung.step for pause, rung in rungs.items()} == {Pause(5): 5, Pause(share=0.75): 9}
    assert rungs[Pause(5)].objective == first.objective


def test_the_loss_at_a_pause_is_the_mean_of_all_steps_so_far(ftrun, write):
    asked = {"role": "user", "content": "Count."}
    rows = [[asked, {"role": "assistant", "content": f"To {number}."}] for number in range(24)]
    file = write("rows.jsonl", [{"messages": row} for row in rows])
    words = [word for word in RUN if not word.startswith(("data.", "train.log_every"))]
    whole = ftrun(*words, f"data.path={file}", "train.log_every=1", "train.max_steps=6").sees(0)
    folder = waiting(whole.folder, "pausing", Pause(5))
    run = (folder / record.RUN).read_text()
    (folder / record.RUN).write_text(run.replace("log_every: 1", "log_every: 3"))
    ftrun("resume", "pausing").sees(0)
    assert [line["step"] for line in comparable(folder)] == [1, 3]
    assert Result.load(folder).objective == pytest.approx(sum(whole.losses[:5]) / 5, rel=1e-5)


def test_a_pause_at_the_end_or_beyond_it_does_nothing(ftrun):
    whole = ftrun(*RUN).sees(0)
    for name, pause in (("at", Pause(12)), ("share", Pause(share=1.0))):
        folder = waiting(whole.folder, name, pause)
        ftrun("resume", name).sees(0)
        assert Result.load(folder).status == "completed"
        assert comparable(folder) == comparable(whole.folder)
        assert not (folder / record.RUNGS).exists()


def test_started_again_where_it_paused_it_takes_no_step(ftrun):
    whole = ftrun(*RUN, "train.save_every=1", "train.keep_checkpoints=99").sees(0)
    folder = waiting(whole.folder, "pausing", Pause(5))
    ftrun("resume", "pausing").sees(0)
    first, lines = Result.load(folder), comparable(folder)
    ftrun("resume", "pausing").sees(0)
    again = Result.load(folder)
    assert (again.status, again.step, again.metrics) == ("paused", 5, first.metrics)
    assert comparable(folder) == lines
    log = (folder / record.LOG).read_text()
    (folder / record.RUNGS).write_text('{"pause": ')  # killed on its way to say so
    ftrun("resume", "pausing").sees(0)
    assert Result.load(folder).objective == first.objective
    assert comparable(folder) == lines
    assert '"step": 6' not in (folder / record.LOG).read_text()[len(log) :]
    Pause(2).save(folder)  # it is further already
    ftrun("resume", "pausing").sees(0)
    assert (Result.load(folder).step, Result.load(folder).objective) == (5, first.objective)
    cut_back = waiting(whole.folder, "unsaid", Pause(4))
    shutil.copytree(whole.folder / "checkpoints" / "step-7", cut_back / "checkpoints" / "step-7")
    ftrun("resume", "unsaid").sees(0)
    assert Result.load(cut_back).step == 7
    assert [line["step"] for line in comparable(cut_back) if "eval_loss" in line] == [7]


@pytest.mark.slow
def test_two_processes_pause_after_the_same_step(ftrun):
    whole = ftrun(*RUN, "hardware.num_processes=2").sees(0)
    folder = waiting(whole.folder, "pausing", Pause(5))
    ftrun("resume", "pausing").sees(0)
    assert Result.load(folder).step == 5
    (folder / record.PAUSE).unlink()
    ftrun("resume", "pausing").sees(0)
    assert weights(folder) == weights(whole.folder)


HANGS = """
from dataclasses import dataclass
from ftrun.plugin import register
from ftrun_plugins.optimizer.adamw import AdamW

@register
@dataclass(kw_only=True)
class Asleep(AdamW):
    \"\"\"Falls asleep before the third step.\"\"\"
    name: str = "asleep"

    def callbacks(self, model, run):
        from transformers import TrainerCallback

        class Sleep(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 2:
                    never_wakes_up()

        return [Sleep()]

def never_wakes_up():
    import threading
    threading.Event().wait()
"""


def test_a_run_that_hangs_is_ended_and_says_where(ftrun, write):
    file = write("asleep.py", HANGS)
    words = (*RUN, f"plugins=[{file}]", "optimizer=asleep", "train.log_every=1", "train.save_every=1")
    done = ftrun(*words, "train.stall_minutes=0.03").sees(1)
    result = done.result
    assert result.status == "failed"
    assert result.reason.startswith("no progress for 0.03 minutes")
    assert (result.step, result.checkpoint) == (2, "checkpoints/step-2")
    assert "in never_wakes_up" in (done.folder / record.LOG).read_text()
    assert "no progress for 0.03 minutes" in done.err
