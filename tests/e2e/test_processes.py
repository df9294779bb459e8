"""Several processes: the same losses as one, records written once, failures and signals of one reach all."""

from __future__ import annotations

import os
import signal
import time

import pytest

from ftrun import record

pytestmark = pytest.mark.slow

RUN = (
    "model=tiny",
    "adapter=full",
    "train.max_steps=6",
    "train.log_every=1",
    "train.save_every=3",
    "stage.num_samples=0",
)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_processes_train_as_one_with_twice_the_batch(ftrun, stage):
    run = [word for word in RUN if stage == "sft" or not word.startswith("stage.")]
    one = ftrun(f"stage={stage}", *run, "train.micro_batch_size=8").sees(0)
    two = ftrun(f"stage={stage}", *run, "train.micro_batch_size=4", "hardware.num_processes=2").sees(0)
    assert len(two.metrics) == len(one.metrics)
    for a, b in zip(one.metrics, two.metrics, strict=True):
        assert a["step"] == b["step"]
        for name in set(a) - {"step", "epoch", "time", "lr", "tokens_per_second"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name
    assert two.out.count("loading the model") == 1


def test_a_run_of_two_processes_resumes(forked, ftrun, tmp_path):
    whole = ftrun(*RUN, "train.max_steps=100", "hardware.num_processes=2", "output_dir=whole").sees(0)
    process = forked(*RUN, "train.max_steps=100", "hardware.num_processes=2", "output_dir=stopped")
    while not any(line["step"] >= 5 for line in record.read_lines(tmp_path / "stopped" / "metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    ftrun("resume", "stopped").sees(0)
    losses = [line["loss"] for line in record.read_lines(tmp_path / "stopped" / "metrics.jsonl") if "loss" in line]
    assert losses == whole.losses


def test_torchrun_starts_them_where_no_server_is(start, ftrun, tmp_path):
    words = [*RUN, "hardware=cpu", "hardware.num_processes=2", "hardware.sharding=fsdp2", "train.max_steps=2"]
    forked = ftrun(*words).sees(0)
    process = start(*words, f"output_dir={tmp_path / 'cold'}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    lines = record.read_lines(tmp_path / "cold" / "metrics.jsonl")
    assert [line["loss"] for line in lines if "loss" in line] == forked.losses


def test_a_process_that_fails_fails_the_run(ftrun, write):
    plugin = write(
        "explode.py",
        """
from dataclasses import dataclass
import os
from ftrun.plugin import Optimizer, register

@register
@dataclass(kw_only=True)
class Explode(Optimizer):
    \"\"\"Fails on the second process.\"\"\"
    name: str = "explode"

    def build(self, model, run):
        import torch
        if os.environ["RANK"] == "1":
            raise RuntimeError("the second process is out of luck")
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
""",
    )
    done = ftrun(*RUN, f"plugins=[{plugin}]", "optimizer=explode", "hardware.num_processes=2").sees(1)
    assert "the second process is out of luck" in done.err
    assert done.result.status == "failed"


def test_a_worker_refuses_another_number_of_processes_than_frozen(ftrun, tmp_path):
    import subprocess
    import sys

    done = ftrun(*RUN, "output_dir=two", "hardware.num_processes=2", "train.max_steps=1").sees(0)
    for leftover in ("result.json", "model"):
        path = done.folder / leftover
        path.rename(tmp_path / leftover)
    ended = subprocess.run(
        [sys.executable, "-m", "ftrun.worker", str(done.folder / "run.yaml")],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert ended.returncode == 1
    assert "2 processes, and 1 were started" in ended.stderr
