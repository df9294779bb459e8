"""What goes from the disk, and what never does."""

from __future__ import annotations

import pytest

from ftrun import board, keep
from ftrun.keep import Keep
from ftrun.record import Status


@pytest.fixture
def disk(sweep):
    """Two whole arms, one that failed in part, a paused one, one that was stopped: each with weights."""
    for name, value in (("best", 1.0), ("good", 2.0)):
        for seed in (1, 2):
            weigh(sweep.job(f"a={name}", value, seed=seed))
    weigh(sweep.job("a=half", 0.5, seed=1))
    weigh(sweep.job("a=half", seed=2, status="failed", reason="bad"))
    weigh(sweep.job("a=paused", 3.0, status="paused"))
    weigh(sweep.job("a=stopped", status="interrupted"))
    return sweep


def weigh(folder, adapter: bool = False) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(b"x" * 1000)
    if adapter:
        (folder / "model" / "adapter_config.json").write_text("{}")
    (folder / "checkpoints" / "step-5").mkdir(parents=True)
    (folder / "checkpoints" / "step-5" / "state").write_bytes(b"x" * 100)


def with_weights(sweep, name: str = "model") -> list[str]:
    folders = sorted(folder.name for folder in sweep.folder.iterdir() if (folder / name).exists())
    return [name.removeprefix("a=") for name in folders]


EVERYTHING = [
    "best,seed=1", "best,seed=2", "good,seed=1", "good,seed=2", "half,seed=1", "half,seed=2", "paused,seed=1",
    "stopped,seed=1",
]  # fmt: skip


def test_all_stays(disk):
    assert keep.apply(disk.folder, Keep.all, over=True) == keep.Freed(0, 0)
    assert with_weights(disk) == with_weights(disk, "checkpoints") == EVERYTHING


def test_of_the_best_arms_rivals_only_those_that_are_beaten_lose_theirs(disk):
    assert keep.apply(disk.folder, Keep.best) == keep.Freed(2, 2200)
    left = [name for name in EVERYTHING if not name.startswith("good")]
    assert with_weights(disk) == with_weights(disk, "checkpoints") == left
    assert keep.apply(disk.folder, Keep.best) == keep.Freed(0, 0)


def test_once_the_sweep_is_over_only_the_best_and_the_unfinished_have_theirs(disk):
    assert keep.apply(disk.folder, Keep.best, over=True) == keep.Freed(4, 4400)
    left = ["best,seed=1", "best,seed=2", "half,seed=2", "stopped,seed=1"]
    assert with_weights(disk) == with_weights(disk, "checkpoints") == left


def test_while_no_arm_is_whole_none_is_beaten(sweep):
    weigh(sweep.job("a=1", 1.0, seed=1))
    sweep.job("a=1", seed=2, status=None)
    weigh(sweep.job("a=2", 2.0, seed=1))
    sweep.job("a=2", seed=2, status=None)
    assert keep.apply(sweep.folder, Keep.best) == keep.Freed(0, 0)


def test_none_goes_job_by_job(disk):
    keep.apply(disk.folder, Keep.none)
    assert with_weights(disk) == ["half,seed=2", "paused,seed=1", "stopped,seed=1"]
    keep.apply(disk.folder, Keep.none, over=True)
    assert with_weights(disk) == ["half,seed=2", "stopped,seed=1"], "what can be gone on with stays"


def test_adapters_stay_and_whole_models_go(sweep):
    weigh(sweep.job("adapter=lora", 1.0), adapter=True)
    weigh(sweep.job("adapter=full", 2.0))
    assert keep.apply(sweep.folder, Keep.adapters) == keep.Freed(2, 1200)
    assert [folder.parent.name for folder in sweep.folder.glob("*/model")] == ["adapter=lora,seed=1"]
    assert with_weights(sweep, "checkpoints") == []


def test_what_was_cleaned_is_still_completed_and_what_was_cut_short_is_ended(disk):
    folder = disk.folder / "a=best,seed=1"
    (folder / ".model.going").mkdir()
    (folder / ".model.going" / "weights").write_bytes(b"x" * 10)
    assert keep.apply(disk.folder, Keep.none, over=True).size == 6 * 1100 + 10
    assert list(folder.glob(".*")) == []
    assert board.load(disk.folder).counts()[Status.completed] == 5
