"""A forked worker does what a cold one does, and starts at once."""

from __future__ import annotations

import pytest

RUN = (
    "model=tiny",
    "adapter=full",
    "train.max_steps=4",
    "train.log_every=1",
    "train.micro_batch_size=8",
    "stage.num_samples=0",
)


@pytest.mark.slow
def test_a_cold_worker_and_a_forked_one_compute_the_same(ftrun, start, tmp_path):
    forked = ftrun(*RUN).sees(0)
    cold = start(*RUN, "output_dir=cold")
    out, err = cold.communicate(timeout=300)
    assert cold.returncode == 0, out + err
    from ftrun import record

    lines = record.read_lines(tmp_path / "cold" / "metrics.jsonl")
    assert [line["loss"] for line in lines if "loss" in line] == forked.losses
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "cold", forked.folder)]
    assert weights[0] == weights[1]


def test_other_import_settings_get_a_fresh_interpreter(ftrun):
    """The Hugging Face libraries read their variables once, when imported: a fork could not follow a change."""
    done = ftrun(*RUN, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_TELEMETRY="1")
    done.sees(0)
    assert done.losses


def test_jobs_do_not_share_anything(ftrun):
    first = ftrun(*RUN, "train.max_steps=2").sees(0)
    ftrun(*RUN, "seed=5", "optimizer.lr=1.0").sees(0)
    again = ftrun(*RUN, "train.max_steps=2").sees(0)
    assert first.losses == again.losses
