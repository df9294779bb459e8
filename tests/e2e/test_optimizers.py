"""A run that is cut off and resumed is the run that was not, with every optimizer."""

from __future__ import annotations

import shutil

import pytest

from ftrun import plugin
from tests.ended import comparable, cut_off, weights

RUN = (
    "model=tiny", "hardware=cpu", "adapter=full", "data.rows=16", "stage.num_samples=0", "train.micro_batch_size=2",
    "train.max_steps=7", "train.log_every=1", "train.save_every=3", "train.keep_checkpoints=9",
)  # fmt: skip

TURNS = ("optimizer.update_interval=2", "optimizer.lr=1e-2", "optimizer.groups=[{weights: bias|norm, lr_scale: 0.5}]")
PROJECTED = ("optimizer.update_interval=2", "optimizer.rank=4", "optimizer.lr=1e-2")

WORDS = {
    "galore": (*PROJECTED, "optimizer.inner=adamw8bit"),
    "apollo": (*PROJECTED, "train.grad_accumulation=2"),
    "fira": (*PROJECTED, "optimizer.layerwise=true"),
    "badam": TURNS,
    "badam_ratio": TURNS,
    "lisa": (*TURNS, "optimizer.n_layers=1"),
    "loraplus": ("adapter=lora", "optimizer.lr=2e-3"),
    "muon": ("optimizer.lr=3e-3", "train.grad_accumulation=2"),
    "lomo": ("optimizer.lr=0.3",),
    "adalomo": ("optimizer.lr=0.1",),
    "adamw": ("optimizer.lr=1e-2", "optimizer.layerwise=true"),
    "schedule_free": ("optimizer.lr=1e-2", "train.scheduler=constant", "data.eval_size=2", "train.eval_every=1"),
    "torch": ("optimizer.lr=1e-2", "optimizer.cls=torch.optim.RAdam", "optimizer.args.betas=[0.8, 0.9]"),
    "hf": ("optimizer.lr=1e-2", "optimizer.optim=ademamix"),
    "sgd": ("optimizer.lr=0.1", "optimizer.momentum=0.9"),
}
"""What those need that do not go with the default, or would not lower the loss in seven steps."""

CASES = [
    *((name, WORDS.get(name, ("optimizer.lr=1e-2",))) for name in plugin.names("optimizer")),
    ("galore", (*PROJECTED, "optimizer.layerwise=true")),
    ("badam", (*TURNS, "model.dtype=bfloat16", "train.precision=bf16", "optimizer.layerwise=true")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), CASES, ids=[f"{name}-{len(words)}" for name, words in CASES])
def test_a_resumed_run_is_the_run_that_was_not_stopped(name, words, ftrun):
    whole = ftrun(*RUN, f"optimizer={name}", *words).sees(0)
    assert whole.losses[-1] < whole.losses[0]
    copy = whole.folder.with_name("stopped")
    shutil.copytree(whole.folder, copy)
    cut_off(copy, 3)
    ftrun("resume", copy.name).sees(0)
    assert comparable(copy) == comparable(whole.folder)
    assert weights(copy) == weights(whole.folder)
