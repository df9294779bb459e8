"""BAdam's two options: whose turn it is in a run, what is refused, stopping and resuming, several processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ftrun import config
from ftrun_plugins.optimizer._blocks import interval


def run_of(steps_per_epoch, total_steps, *, streaming=False):
    batches = SimpleNamespace(steps_per_epoch=steps_per_epoch)
    cfg = SimpleNamespace(data=SimpleNamespace(streaming=streaming))
    return SimpleNamespace(cfg=cfg, total_steps=total_steps, epoch_batches=batches)


@pytest.mark.parametrize(
    ("chosen", "steps_per_epoch", "total_steps", "expected"),
    [
        (None, 2400, 10_000, 75),  # an epoch divided among the blocks
        (None, 100, 10_000, 50),
        (None, 10_000, 10_000, 100),
        (None, 300, 600, 18),  # a turn for every block
        (None, 10, 20, 1),
        (7, 300, 600, 7),
    ],
)
def test_a_turn_is_as_long_as_the_paper_advises(chosen, steps_per_epoch, total_steps, expected):
    assert interval(chosen, run_of(steps_per_epoch, total_steps), 32) == expected


def test_of_a_stream_the_steps_of_the_run_count():
    assert interval(None, run_of(None, 2400, streaming=True), 32) == 75


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("adapter=lora",), "optimizer"),
        (("optimizer=badam_ratio", "adapter=lora"), "optimizer"),
        (("optimizer=lisa", "adapter=lora"), "optimizer"),
        (("optimizer.start_block=1",), "optimizer.start_block"),
        (("optimizer.order=fixed",), "optimizer.order"),
        (("optimizer.embeddings=false", "optimizer.embedding_lr=1e-4"), "optimizer.embedding_lr"),
        (("optimizer.head=false", "stage=rm"), "optimizer.head"),
        (("optimizer=badam_ratio", "optimizer.ratio=0"), "optimizer.ratio"),
    ],
)
def test_what_cannot_be_is_refused(words, key):
    _, problems = config.examine(["model=tiny", "adapter=full", "optimizer=badam", *words])
    assert [problem.key for problem in problems] == [key]


RUN = (
    "model=tiny", "adapter=full", "optimizer=badam", "optimizer.lr=1e-2", "optimizer.update_interval=2", "data.rows=24",
    "train.max_steps=9", "train.log_every=1", "stage.num_samples=0",
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(ftrun):
    one = ftrun(*RUN, "train.micro_batch_size=8").sees(0)
    two = ftrun(*RUN, "train.micro_batch_size=4", "hardware.num_processes=2").sees(0)
    assert len(two.metrics) == len(one.metrics)
    for ours, expected in zip(two.metrics, one.metrics, strict=True):
        for name in {"loss", "grad_norm", "eval_loss"} & set(expected):
            assert ours[name] == pytest.approx(expected[name], rel=1e-5), name


def test_a_block_that_is_not_there_is_named(ftrun):
    done = ftrun(*RUN, "optimizer.order=fixed", "optimizer.start_block=4").sees(2)
    assert "0 embeddings, 1 model.layers.0, 2 model.layers.1, 3 head" in done.err
