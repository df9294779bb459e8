"""The learning rate that a step is taken with, against the formula of each schedule and against transformers' own."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from transformers import get_scheduler

from ftrun import config, record
from ftrun.config import ObjectiveMode
from ftrun.errors import ConfigError
from ftrun.train import DecayShape, Scheduler, Train
from ftrun.worker import schedule

PEAK, STEPS, WARM = 1e-3, 12, 3
LEFT = STEPS - WARM

# The rate of the n-th step, counted from 0, as a share of the peak, and the words that ask for it.
FORMULAS = {
    "linear": ((), lambda n: (STEPS - n) / LEFT),
    "cosine": ((), lambda n: 0.5 * (1 + math.cos(math.pi * (n - WARM) / LEFT))),
    "cosine_with_min_lr": (("train.min_lr_ratio=0.2",), lambda n: 0.6 + 0.4 * math.cos(math.pi * (n - WARM) / LEFT)),
    "cosine_with_restarts": (
        ("train.num_cycles=3",),
        lambda n: 0.5 * (1 + math.cos(math.pi * ((n - WARM) % 3) / 3)),
    ),
    "constant": ((), lambda _: 1.0),
    "inverse_sqrt": ((), lambda n: 1 / math.sqrt(n / WARM)),
    "polynomial": (("train.power=2",), lambda n: (1e-7 + (PEAK - 1e-7) * (1 - (n - WARM) / LEFT) ** 2) / PEAK),
    "wsd": (
        ("train.decay=5", "train.decay_shape=linear"),
        lambda n: 1.0 if n < STEPS - 5 else (STEPS - n) / 5,
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_rate_of_every_step(ftrun, name):
    words, formula = FORMULAS[name]
    done = ftrun(
        "model=tiny", "data.rows=24", f"train.max_steps={STEPS}", "train.log_every=1", f"optimizer.lr={PEAK}",
        f"train.scheduler={name}", f"train.warmup={WARM}", "stage.num_samples=0", *words,
    ).sees(0)  # fmt: skip
    rates = [line["lr"] for line in done.metrics if "lr" in line]
    expected = [PEAK * n / WARM for n in range(WARM)] + [PEAK * formula(n) for n in range(WARM, STEPS)]
    assert rates == pytest.approx(expected, rel=1e-6)


def rates(train: Train, steps: int, peak: float = 1e-3) -> list[float]:
    curve = schedule.curve(train, peak, steps)
    return [peak * curve(step) for step in range(steps)]


def of_transformers(name: str, steps: int, warm: int, peak: float = 1e-3, **keys: float | str) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(name, optimizer, warm, steps, scheduler_specific_kwargs=keys)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 0.1, 7])
@pytest.mark.parametrize(
    ("keys", "theirs", "their_keys"),
    [
        ({"scheduler": "linear"}, "linear", {}),
        ({"scheduler": "cosine"}, "cosine", {}),
        ({"scheduler": "cosine_with_min_lr"}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ({"scheduler": "cosine", "min_lr_ratio": 0.3}, "cosine_with_min_lr", {"min_lr_rate": 0.3}),
        ({"scheduler": "cosine_with_restarts"}, "cosine_with_restarts", {"num_cycles": 2}),
        ({"scheduler": "constant"}, "constant_with_warmup", {}),
        ({"scheduler": "inverse_sqrt"}, "inverse_sqrt", {}),
        ({"scheduler": "polynomial"}, "polynomial", {}),
        ({"scheduler": "polynomial", "power": 3, "min_lr_ratio": 0.1}, "polynomial", {"power": 3, "lr_end": 1e-4}),
        ({"scheduler": "wsd"}, "warmup_stable_decay", {"num_decay_steps": 5}),
        (
            {"scheduler": "wsd", "decay": 20, "decay_shape": DecayShape.sqrt, "min_lr_ratio": 0.2},
            "warmup_stable_decay",
            {"num_decay_steps": 20, "decay_type": "1-sqrt", "min_lr_ratio": 0.2},
        ),
    ],
)
def test_a_curve_is_that_of_transformers(keys, theirs, their_keys, warmup):
    train = Train(**keys | {"scheduler": Scheduler(keys["scheduler"])}, warmup=warmup)
    expected = of_transformers(theirs, 50, train.warmup_steps(50), **their_keys)
    if "min_lr_ratio" in their_keys and warmup:  # theirs begins at the lowest rate, ours at 0
        steps = train.warmup_steps(50)
        expected[:steps] = [1e-3 * step / steps for step in range(steps)]
    assert rates(train, 50) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_a_peak_below_the_lowest_rate_is_kept():
    assert rates(Train(scheduler=Scheduler.polynomial, warmup=0), 5, peak=5e-8) == pytest.approx([5e-8] * 5)


def test_shares_that_round_up_to_more_than_the_whole_leave_no_stable_part():
    train = Train(scheduler=Scheduler.wsd, warmup=0.5, decay=0.5, decay_shape=DecayShape.linear)
    assert rates(train, 3, peak=1.0) == pytest.approx([0, 0.5, 1.0])


def test_more_decay_than_there_are_steps_is_refused(ftrun):
    with pytest.raises(ConfigError, match="90 steps of decay and 20 of warm-up are more than"):
        schedule.curve(Train(scheduler=Scheduler.wsd, warmup=20, decay=90), 1e-3, 100)
    done = ftrun("model=tiny", "train.max_steps=4", "train.scheduler=wsd", "train.decay=9", "train.warmup=0").sees(2)
    assert "train.decay: 9 steps of decay" in done.err


def test_a_plateau_lowers_the_rate_after_too_many_evaluations_that_are_no_better():
    train = Train(scheduler=Scheduler.reduce_lr_on_plateau, plateau_patience=1, plateau_factor=0.5, min_lr_ratio=0.2)
    plateau = schedule.Plateau(train, 2, ObjectiveMode.min)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, min_lr=0.2)
    found, expected = [], []
    for value in (3, 2, 2, 1.9999, 1.5, 1.6, math.nan, 1.7, 1.7, 1.7, 1.7):
        plateau.observe(value)
        theirs.step(value)
        found.append(plateau(5))
        expected.append(optimizer.param_groups[0]["lr"])
    assert found == expected
    assert found[-1] == 0.2
    assert [plateau(step) for step in range(3)] == pytest.approx([0, 0.1, 0.2])


def test_a_plateau_of_an_objective_that_should_rise():
    train = Train(scheduler=Scheduler.reduce_lr_on_plateau, plateau_patience=0)
    plateau = schedule.Plateau(train, 0, ObjectiveMode.max)
    found = []
    for value in (1, 2, 2, 3, 1):
        plateau.observe(value)
        found.append(plateau(0))
    assert found == [1, 1, 0.5, 0.5, 0.25]


# At a rate this small no weight moves, so no evaluation is better than the first.
PLATEAU = (
    "model=tiny", "data.rows=24", "data.eval_size=4", "train.max_steps=9", "train.log_every=1", "optimizer.lr=1e-30",
    "train.scheduler=reduce_lr_on_plateau", "train.warmup=2", "train.eval_every=2", "train.plateau_patience=1",
    "train.plateau_factor=0.1", "stage.num_samples=0",
)  # fmt: skip


def test_a_plateau_in_a_run_and_after_it_was_resumed(ftrun):
    whole = ftrun(*PLATEAU, "train.save_every=1", "train.keep_checkpoints=99").sees(0)
    rates = [line["lr"] for line in whole.metrics if "lr" in line]
    # Evaluated after 2 (the best), 4, 6 (too many: down), 8.
    assert rates == pytest.approx([0, 5e-31, *[1e-30] * 4, *[1e-31] * 3], rel=1e-9)
    for step in (5, 7):
        copy = whole.folder.with_name(f"from{step}")
        shutil.copytree(whole.folder, copy)
        shutil.rmtree(copy / "model")
        for checkpoint in record.checkpoints(copy):
            if record.step_of(checkpoint) > step:
                shutil.rmtree(checkpoint)
        result = json.loads((copy / "result.json").read_text())
        (copy / "result.json").write_text(json.dumps(result | {"status": "interrupted", "holder": None}))
        resumed = ftrun("resume", copy.name).sees(0)
        assert [line["lr"] for line in resumed.metrics if "lr" in line] == rates


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.power=2",), "train.power: train.scheduler=cosine does not read it"),
        (("train.scheduler=constant", "train.min_lr_ratio=0.1"), "train.min_lr_ratio: train.scheduler=constant"),
        (("train.scheduler=wsd", "train.decay=0.8", "train.warmup=0.3"), "train.decay: 0.8 of all steps"),
        (("train.scheduler=wsd", "train.decay=1.5"), "train.decay: 1.5 is neither a share nor a count"),
        (("train.scheduler=reduce_lr_on_plateau",), "train.scheduler: it goes by how evaluations come out"),
    ],
)
def test_what_a_scheduler_cannot_use_is_refused(words, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        config.compose(["model=tiny", *words])
