"""AdaLOMO in a run that resumes."""

from __future__ import annotations

import shutil

from tests.ended import comparable, cut_off, weights

RUN = (
    "model=tiny", "adapter=full", "optimizer=adalomo", "optimizer.lr=0.05", "train.micro_batch_size=2",
    "train.log_every=1", "train.max_steps=8", "data.rows=16", "train.save_every=4", "train.keep_checkpoints=9",
    "stage.num_samples=0",
)  # fmt: skip


def test_a_run_learns_and_resumes(ftrun):
    whole = ftrun(*RUN).sees(0)
    assert whole.losses[-1] < whole.losses[0] - 0.05
    copy = whole.folder.with_name("from4")
    shutil.copytree(whole.folder, copy)
    cut_off(copy, 4)
    ftrun("resume", copy.name).sees(0)
    assert comparable(copy) == comparable(whole.folder)
    assert weights(copy) == weights(whole.folder)
