"""Schedule-free AdamW in a run: what is refused, what is evaluated and saved, and that it resumes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_model

from ftrun import config, record
from ftrun.config import Config
from ftrun.worker import loading
from ftrun.worker.parameters import groups
from tests.ended import comparable, cut_off, weights

CHOSEN = ("model=tiny", "adapter=full", "optimizer=schedule_free")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ((), "train.scheduler"),
        (("train.scheduler=reduce_lr_on_plateau", "train.eval_every=1"), "train.scheduler"),
        (("train.scheduler=constant", "train.warmup=0", "optimizer.weight_lr_power=1"), "optimizer.weight_lr_power"),
        (("train.scheduler=constant", "optimizer.beta1=0"), "optimizer.beta1"),
    ],
)
def test_what_it_cannot_do_is_refused(words, key):
    assert [problem.key for problem in config.examine([*CHOSEN, *words])[1]] == [key]


def test_a_constant_rate_is_all_that_it_takes():
    assert not config.examine([*CHOSEN, "train.scheduler=constant"])[1]


RUN = (
    *CHOSEN, "optimizer.lr=5e-3", "train.scheduler=constant", "train.warmup=4", "train.max_steps=16",
    "train.micro_batch_size=2", "train.log_every=1", "data.rows=32", "data.eval_size=4", "train.eval_every=3",
    "train.save_every=6", "train.keep_checkpoints=9", "stage.num_samples=0",
)  # fmt: skip


def test_the_average_is_what_counts_and_training_does_not_notice(ftrun):
    """The best evaluation is made to be the first, whose weights the run then ends with."""
    whole = ftrun(*RUN, "train.keep_best=true", "objective_mode=max").sees(0).folder
    cfg = Config.load(whole / record.RUN)
    best = whole / "checkpoints/step-3"
    assert json.loads((best / "ftrun_state.json.0").read_text())["best"]["step"] == 3
    model, ended = (loading.model(cfg, loading.tokenizer(cfg)) for _ in range(2))
    load_model(model, best / "model.safetensors")
    load_model(ended, whole / "model/model.safetensors")
    state = torch.load(best / "optimizer.pt", weights_only=True)["state"]
    ordered = [weight for group in groups(model, cfg.optimizer) for weight in group["params"]]
    names = {id(weight): name for name, weight in model.named_parameters()}
    for number, weight in enumerate(ordered):
        x = (weight - 0.1 * state[number]["z"]) / 0.9
        found = ended.get_parameter(names[id(weight)])
        assert torch.allclose(found, x, atol=1e-6, rtol=0)
        assert not torch.allclose(found, weight, atol=1e-6, rtol=0)

    copy = whole.with_name("from6")  # saved right after an evaluation
    shutil.copytree(whole, copy)
    cut_off(copy, 6)
    ftrun("resume", copy.name).sees(0)
    assert comparable(copy) == comparable(whole)
    assert weights(copy) == weights(whole)
