"""AdaLOMO in a run that resumes."""

from __future__ import annotations

RUN = (
    "model=tiny", "adapter=full", "optimizer=adalomo", "optimizer.lr=0.05", "train.micro_batch_size=2",
    "train.log_every=1", "train.max_steps=8", "data.rows=16", "train.save_every=4", "train.keep_checkpoints=9",
    "stage.num_samples=0",
)  # fmt: skip
