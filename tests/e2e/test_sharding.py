"""FSDP2 on two processes: what DDP comes to, checkpoints of both forms, and going on with other processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

RUN = (
    "model=tiny", "hardware=cpu", "hardware.num_processes=2", "adapter=full", "optimizer.lr=1e-3", "data.rows=64",
    "data.eval_size=9", "train.max_steps=6", "train.save_every=3", "train.log_every=1", "stage.num_samples=0",
)  # fmt: skip
"""Of the nine rows to evaluate on, one process has two batches and the other one."""

FSDP = "hardware.sharding=fsdp2"


def curve(done: Any) -> list[dict[str, float]]:
    left_out = {"time", "tokens_per_second"}
    return [{name: value for name, value in line.items() if name not in left_out} for line in done.metrics]


def weights(done: Any) -> dict[str, torch.Tensor]:
    (file,) = (done.folder / "model").glob("*.safetensors")
    return load_file(file)


def assert_like(one: Any, other: Any, *, rel: float = 1e-5, atol: float = 1e-6) -> None:
    """The same lines of metrics and the same weights, but for the order in which numbers are added up."""
    assert len(one.metrics) == len(other.metrics)
    for a, b in zip(curve(one), curve(other), strict=True):
        assert a == pytest.approx(b, rel=rel, abs=1e-7)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=atol)


def stopped(done: Any, name: str, **keys: Any) -> Path:
    """Return a copy of a run that has come no further than its checkpoint, with other keys."""
    folder = done.folder.with_name(name)
    shutil.copytree(done.folder, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "model")
    text = (folder / "run.yaml").read_text()
    for key, value in keys.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"  {key}: "))
        text = text.replace(line, f"  {key}: {value}")
    (folder / "run.yaml").write_text(text)
    return folder


ONE = {"num_processes": 1, "sharding": "none", "checkpoint": "whole", "grad_accumulation": 2}
"""What makes of two processes one, with the same rows to a step."""


def test_it_comes_to_what_ddp_comes_to_and_goes_on_exactly(ftrun):
    ddp = ftrun(*RUN, "output_dir=ddp").sees(0)
    whole = ftrun(*RUN, FSDP, "output_dir=whole").sees(0)
    assert_like(whole, ddp)
    names = {path.name for path in (whole.folder / "checkpoints" / "step-3").iterdir()}
    assert names == {path.name for path in (ddp.folder / "checkpoints" / "step-3").iterdir()}

    again = ftrun("resume", stopped(whole, "again").name).sees(0)
    assert curve(again) == curve(whole)
    assert all(torch.equal(weights(again)[name], weight) for name, weight in weights(whole).items())

    for name, of, keys in (("one", whole, ONE), ("ddp_cut", ddp, {"sharding": "fsdp2"})):
        assert_like(ftrun("resume", stopped(of, name, **keys).name).sees(0), ddp)


def test_shards_go_on_exactly_and_on_one_process(ftrun):
    done = ftrun(*RUN, FSDP, "hardware.checkpoint=sharded", "output_dir=shards").sees(0)
    saved = done.folder / "checkpoints" / "step-3"
    assert len(list((saved / "shards").glob("*.distcp"))) == 2
    assert not (saved / "model.safetensors").exists()
    again = ftrun("resume", stopped(done, "again").name).sees(0)
    assert curve(again) == curve(done)
    assert all(torch.equal(weights(again)[name], weight) for name, weight in weights(done).items())
    assert_like(ftrun("resume", stopped(done, "one", **ONE).name).sees(0), done)


def test_two_go_on_where_one_was(ftrun):
    one = ftrun(*RUN, "hardware.num_processes=1", "train.grad_accumulation=2", "output_dir=one").sees(0)
    keys = {"num_processes": 2, "sharding": "fsdp2", "grad_accumulation": 1}
    assert_like(ftrun("resume", stopped(one, "two", **keys).name).sees(0), one)
    done = ftrun("resume", stopped(one, "other", num_processes=2).name).sees(2)
    assert "train.grad_accumulation: a step was of 8 rows so far, and would now be of 16" in done.err
    assert "fix: train.grad_accumulation=1" in done.err


def test_lora_with_accumulation_clipping_recomputing_and_pieces_by_size(ftrun):
    keys = ("adapter=lora", "train.grad_accumulation=2", "train.max_grad_norm=0.1", "train.gradient_checkpointing=true")
    ddp = ftrun(*RUN, *keys).sees(0)
    cut = ("hardware.wrap=size", "hardware.wrap_min_parameters=10000", "hardware.reshard_after_forward=false")
    done = ftrun(*RUN, *keys, FSDP, *cut, "output_dir=cut").sees(0)
    assert_like(done, ddp)
    again = ftrun("resume", stopped(done, "again").name).sees(0)
    assert curve(again) == curve(done)


def test_a_rule_that_needs_whole_weights_goes_on_exactly(ftrun):
    keys = ("optimizer=galore", "optimizer.rank=4", "optimizer.update_interval=2")
    for form in ("whole", "sharded"):
        done = ftrun(*RUN, *keys, FSDP, f"hardware.checkpoint={form}", f"output_dir={form}").sees(0)
        again = ftrun("resume", stopped(done, f"{form}_again").name).sees(0)
        assert curve(again) == curve(done)


def test_the_best_weights_are_taken_back(ftrun):
    first_is_best = ("objective=eval_loss", "objective_mode=max", "train.keep_best=true", "train.eval_every=2")
    ddp = ftrun(*RUN, *first_is_best).sees(0)
    for form in ("whole", "sharded"):
        done = ftrun(*RUN, *first_is_best, FSDP, f"hardware.checkpoint={form}").sees(0)
        assert done.result.metrics["best_step"] == 2
        assert_like(done, ddp)


def test_bf16_is_gathered_in_half_the_bytes(ftrun):
    ddp = ftrun(*RUN, "train.precision=bf16").sees(0)
    done = ftrun(*RUN, "train.precision=bf16", FSDP).sees(0)
    assert done.losses != ddp.losses
    assert done.losses == pytest.approx(ddp.losses, rel=1e-3)


@pytest.mark.parametrize(
    "keys",
    [
        ("stage=dpo", "adapter=full"),
        ("stage=dpo", "adapter=full", "stage.reference=copy", "train.grad_accumulation=2"),
        ("stage=rm", "adapter=lora"),
        ("stage=distill", "adapter=full", "stage.on_policy=0.5", "stage.max_new_tokens=2"),
    ],
    ids=" ".join,
)
def test_stages_come_to_the_same(ftrun, keys):
    """The reference that distillation and a copy compare with is the model as it was, whose weights are swapped in."""
    words = [word for word in RUN if not word.startswith(("stage.", "adapter="))]
    assert_like(*(ftrun(*keys, *words, *more).sees(0) for more in ([FSDP], [])), rel=1e-4, atol=1e-5)


def test_replies_are_the_same(ftrun):
    words = (*RUN, "stage.num_samples=2", "stage.predict=true", "stage.max_new_tokens=4", "train.max_steps=2")
    cut, ddp = (ftrun(*words, *more).sees(0) for more in ([FSDP], []))
    for name in ("samples.jsonl", "predictions.jsonl"):
        assert (cut.folder / name).read_text() == (ddp.folder / name).read_text()


def test_a_launcher_that_says_otherwise_is_refused(ftrun):
    done = ftrun(*RUN, FSDP, ACCELERATE_USE_FSDP="true", FSDP_VERSION="1").sees(2)
    assert "run.yaml says FSDP_VERSION=2, and what started this process says FSDP_VERSION=1" in done.err
    done = ftrun(*RUN, ACCELERATE_USE_FSDP="true").sees(2)
    assert "run.yaml says hardware.sharding=none, and what started this process says ACCELERATE_USE_FSDP" in done.err


def test_a_launcher_that_says_the_same_does_not_cut_a_second_time(ftrun):
    done = ftrun(*RUN, FSDP, "train.max_steps=1", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2").sees(0)
    assert done.result.step == 1


def test_accelerate_launch_starts_a_run_by_hand(ftrun, tmp_path):
    """On a CPU it starts one process whatever it is told, and the worker refuses to be one of two."""
    one = ftrun(*RUN, "hardware.num_processes=1", "train.max_steps=1", "output_dir=one").sees(0)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "ftrun.worker"]
    folder = stopped(one, "by_hand")
    subprocess.run([*launch, str(folder / "run.yaml")], check=True, capture_output=True, cwd=tmp_path)
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["metrics"]["loss"]) == ("completed", one.result.metrics["loss"])
