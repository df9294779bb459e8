"""Whole runs through the command line: what they leave, and that it is right."""

from __future__ import annotations

import json

import pytest
import yaml

TINY = ("model=tiny", "train.micro_batch_size=8", "train.log_every=1")


def test_a_run_leaves_what_its_folder_promises(ftrun):
    done = ftrun(*TINY, "train.max_steps=4", "data.rows=32").sees(0)
    assert {path.name for path in done.folder.iterdir()} == {
        "run.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl", "log.txt", "checkpoints", "model", "plots",
        "result.json",
    }  # fmt: skip
    assert [line["step"] for line in done.metrics] == [0, 1, 2, 3, 4, 4]
    assert {"step", "epoch", "time", "loss", "lr", "grad_norm", "tokens", "tokens_per_second"} <= set(done.metrics[1])
    assert (done.folder / "plots" / "loss.png").stat().st_size > 1000
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in (done.folder / "model").iterdir()
    }
    result = done.result
    assert (result.status, result.step, result.reason) == ("completed", 4, "")
    assert result.metrics["loss"] == pytest.approx(sum(done.losses) / 4)
    assert result.objective == result.metrics["eval_loss"] == done.metrics[-1]["eval_loss"]
    assert (result.peak_memory_bytes or 0) > 2**20
    assert "completed" in done.out
    assert "held-out loss" in done.out


def test_the_frozen_config_says_everything(ftrun):
    done = ftrun(*TINY, "train.max_steps=1", "seed=7").sees(0)
    frozen = yaml.safe_load((done.folder / "run.yaml").read_text())
    assert frozen["seed"] == 7
    assert frozen["hardware"]["device"] == "cpu"
    assert frozen["hardware"]["num_processes"] == frozen["hardware"]["num_threads"] == 1
    assert frozen["train"]["precision"] == "fp32"
    assert frozen["model"]["source"] == "builtin"
    assert frozen["optimizer"] == {
        "name": "adamw", "lr": 5e-4, "weight_decay": 0.0, "embedding_lr": None, "groups": [], "layerwise": False,
        "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
    }  # fmt: skip
    assert frozen["output_dir"] == str(done.folder)
    assert done.manifest["overrides"][:1] == ["model=tiny"]
    assert "torch" in done.manifest["versions"]
    assert done.manifest["data"]["train"]["rows"] == 132


def test_full_fine_tuning_learns_its_rows_by_heart(ftrun):
    done = ftrun(
        *TINY, "adapter=full", "optimizer.lr=5e-3", "data.rows=4", "train.max_steps=150", "train.micro_batch_size=4",
        "train.log_every=50", "stage.sample_prompts=['Who are you?']",
    ).sees(0)  # fmt: skip
    assert done.losses[0] > 6.5
    assert done.losses[-1] < 0.2


def test_the_seed_decides(ftrun):
    run = (*TINY, "adapter=full", "train.max_steps=3")
    first, again, other = ftrun(*run), ftrun(*run), ftrun(*run, "seed=1")
    assert first.losses == again.losses
    assert first.losses != other.losses


def test_a_second_run_in_the_same_folder_is_refused(ftrun):
    ftrun(*TINY, "train.max_steps=1", "output_dir=here").sees(0)
    again = ftrun(*TINY, "train.max_steps=1", "output_dir=here").sees(2)
    assert "holds another run" in again.err
    assert "Traceback" not in again.err


def test_a_run_starts_from_what_another_ended_with(ftrun):
    first = ftrun(*TINY, "optimizer.lr=1e-2", "train.max_steps=20", "train.log_every=20").sees(0)
    second = ftrun("model.path=run1", *TINY[1:], "train.max_steps=1").sees(0)
    assert second.metrics[0]["eval_loss"] == pytest.approx(first.result.metrics["eval_loss"], rel=1e-4)
    third = ftrun("model.path=run2", *TINY[1:], "adapter=full", "train.max_steps=1").sees(0)
    assert third.metrics[0]["eval_loss"] == pytest.approx(second.result.metrics["eval_loss"], rel=1e-4)
    assert (third.folder / "model" / "model.safetensors").exists()


def test_python_does_what_the_shell_does(server, tmp_path, monkeypatch):
    import ftrun

    monkeypatch.setenv("FTRUN_FORK_SERVER", server)
    result = ftrun.run([*TINY, "train.max_steps=2", f"output_dir={tmp_path / 'run'}"])
    assert result.status == "completed"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"] == result.metrics


def test_preference_training_starts_at_ln_2_and_moves_apart(ftrun):
    done = ftrun(
        "stage=dpo", *TINY, "adapter=full", "optimizer.lr=1e-3", "train.max_steps=20", "data.rows=8",
        "train.log_every=5",
    ).sees(0)  # fmt: skip
    assert done.losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert done.metrics[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert done.metrics[-2]["rewards_margins"] > 0.5
    assert done.metrics[-2]["rewards_accuracies"] == 1.0


def test_packing_trains_on_every_token_once(ftrun):
    padded = ftrun(*TINY, "train.epochs=1", "train.shuffle=false").sees(0)
    packed = ftrun(*TINY, "train.epochs=1", "data.packing=best_fit", "data.max_length=256").sees(0)
    assert padded.metrics[-2]["tokens"] == packed.metrics[-2]["tokens"] == padded.manifest["data"]["train"]["tokens"]
    report = packed.manifest["data"]["train"]
    assert report["packing_efficiency"] > 0.95
    assert packed.metrics[0]["eval_loss"] == pytest.approx(padded.metrics[0]["eval_loss"])


def test_a_loss_that_is_no_number_ends_the_run(ftrun):
    done = ftrun(*TINY, "adapter=full", "optimizer.lr=1e20", "train.max_grad_norm=0", "train.max_steps=50").sees(1)
    assert "the loss is nan" in done.err or "the loss is inf" in done.err
    assert done.result.status == "failed"
    assert done.result.step < 50
