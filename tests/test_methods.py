"""Every method composes, sets what its source says, and runs; one that changes the base is right again when loaded."""

from __future__ import annotations

import functools
import json
import math
import re
from typing import Any

import pytest

from ftrun import config, options

BATCH_OF_128 = {"train.micro_batch_size": 4, "train.grad_accumulation": 32}
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

METHODS: dict[str, dict[str, Any]] = {
    "lora": {
        "adapter.rank": 64, "adapter.alpha": 16, "adapter.dropout": 0.1, "adapter.targets": ["all-linear"],
        "optimizer.lr": 2e-4, "train.scheduler": "constant", "train.max_grad_norm": 0.3,
        "train.micro_batch_size": 4, "train.grad_accumulation": 4,
    },
    "qv_lora": {
        "adapter.rank": 4, "adapter.alpha": 32, "adapter.dropout": 0.1, "adapter.targets": ["q_proj", "v_proj"],
        "optimizer.lr": 2e-4, "optimizer.weight_decay": 0.01, "train.scheduler": "linear", "train.warmup": 500,
        "train.epochs": 5, "train.micro_batch_size": 8, "train.grad_accumulation": 1, "train.max_grad_norm": 0,
    },
    "rslora": {
        "adapter.rank": 128, "adapter.use_rslora": True, "optimizer.lr": 5e-5, "train.scheduler": "constant",
    },
    "dora": {
        "adapter.rank": 32, "adapter.alpha": 64, "adapter.dropout": 0.05, "adapter.use_dora": True,
        "adapter.targets": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], "optimizer.lr": 1e-4,
        "train.epochs": 3, "train.scheduler": "linear", "train.warmup": 100,
        "train.micro_batch_size": 4, "train.grad_accumulation": 4,
    },
    "pissa": BATCH_OF_128 | {
        "adapter.rank": 128, "adapter.alpha": 128, "adapter.dropout": 0, "adapter.init": "pissa_niter_16",
        "adapter.targets": ["all-linear"], "optimizer.lr": 2e-5, "train.epochs": 1, "train.scheduler": "cosine",
        "train.warmup": 0.03,
    },
    "olora": {
        "adapter.rank": 32, "adapter.alpha": 16, "adapter.dropout": 0.05, "adapter.init": "olora",
        "adapter.targets": ["q_proj", "v_proj"], "optimizer.lr": 3e-4, "train.epochs": 1, "train.scheduler": "linear",
        "train.warmup": 100, "train.micro_batch_size": 16, "train.grad_accumulation": 1,
    },
    "eva": {
        "adapter.rank": 16, "adapter.alpha": 1, "adapter.dropout": 0, "adapter.init": "eva", "optimizer.lr": 5e-4,
        "train.epochs": 1, "train.scheduler": "cosine", "train.warmup": 0.03,
        "train.micro_batch_size": 4, "train.grad_accumulation": 2,
    },
    "lora_ga": BATCH_OF_128 | {
        "adapter.rank": 32, "adapter.alpha": 8, "adapter.init": "lora_ga", "adapter.init_batches": 32,
        "optimizer.lr": 2e-5, "train.epochs": 1, "train.scheduler": "cosine", "train.warmup": 0.03,
    },
    "lora_without_regret": {
        "adapter.rank": 256, "adapter.alpha": 32, "adapter.targets": ["all-linear"], "optimizer.lr": 10 * 5e-5,
        "train.scheduler": "constant", "train.micro_batch_size": 4, "train.grad_accumulation": 4,
    },
    "freeze": {"adapter.name": "freeze", "adapter.layers": 8, "adapter.modules": []},
    "neftune": BATCH_OF_128 | {
        "adapter.name": "full", "train.neftune": 5, "optimizer.lr": 5e-5, "train.epochs": 3,
    },
    "alpaca": BATCH_OF_128 | {
        "adapter.name": "full", "optimizer.lr": 2e-5, "optimizer.weight_decay": 0, "data.max_length": 512,
        "train.epochs": 3, "train.scheduler": "cosine", "train.warmup": 0.03,
    },
    "zephyr_sft": BATCH_OF_128 | {
        "adapter.name": "full", "optimizer.lr": 2e-5, "data.max_length": 2048, "data.train_on": "all",
        "train.epochs": 1, "train.scheduler": "cosine", "train.warmup": 0.1,
    },
    "zephyr_dpo": BATCH_OF_128 | {
        "stage.name": "dpo", "stage.beta": 0.01, "adapter.name": "full", "optimizer.lr": 5e-7,
        "data.max_length": 1024, "train.epochs": 1, "train.scheduler": "cosine", "train.warmup": 0.1,
    },
    "tulu3_sft": {
        "adapter.name": "full", "optimizer.lr": 5e-6, "optimizer.weight_decay": 0, "data.max_length": 4096,
        "train.epochs": 2, "train.scheduler": "linear", "train.warmup": 0.03,
        "train.micro_batch_size": 1, "train.grad_accumulation": 128,
    },
    "dpo": {
        "stage.name": "dpo", "stage.beta": 0.1, "adapter.name": "full", "optimizer.lr": 1e-6, "data.max_length": 512,
        "train.epochs": 1, "train.scheduler": "constant", "train.warmup": 150, "train.max_grad_norm": 10,
        "train.micro_batch_size": 4, "train.grad_accumulation": 16,
    },
}  # fmt: skip

SHORT = (
    "model=tiny", "train.max_steps=2", "train.micro_batch_size=2", "train.grad_accumulation=1", "train.log_every=1",
)  # fmt: skip

UNSEEN = {name: ("stage.num_samples=0",) for name in METHODS if not name.endswith("dpo")}
"""Words for runs whose sample replies nobody looks at, where the stage writes any."""

# What model=tiny is too small for: 64 dimensions, two layers.
SMALLER = {
    name: ("adapter.layers=1",) if name == "freeze" else ("adapter.rank=8",)
    for name, values in METHODS.items()
    if "adapter.rank" in values or name == "freeze"
}

# What peft finds in the saved adapter. One that took its start out of the base is saved as the difference from that
# start, which has twice the rank and starts like any other.
SAVED: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": LINEARS},
    "qv_lora": {"r": 8, "lora_alpha": 32, "target_modules": {"q_proj", "v_proj"}},
    "rslora": {"r": 8, "use_rslora": True, "target_modules": LINEARS},
    "dora": {
        "r": 8, "lora_alpha": 64, "use_dora": True,
        "target_modules": {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"},
    },
    "pissa": {"r": 16, "lora_alpha": 256, "init_lora_weights": True, "target_modules": LINEARS},
    "olora": {"r": 16, "lora_alpha": 32, "init_lora_weights": True, "target_modules": {"q_proj", "v_proj"}},
    "eva": {"r": 8, "lora_alpha": 1, "target_modules": LINEARS},
    "lora_ga": {"r": 16, "lora_alpha": 16, "init_lora_weights": True, "target_modules": LINEARS},
    "lora_without_regret": {"r": 8, "lora_alpha": 32, "target_modules": LINEARS},
}  # fmt: skip


def value(cfg: config.Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), cfg)


def test_every_method_has_its_values_here():
    assert set(METHODS) == {path.stem for path in (options.CONF / "method").glob("*.yaml")}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_sets_what_its_source_says(name):
    cfg = config.compose([f"method={name}"])
    found = {key: value(cfg, key) for key in METHODS[name]}
    assert found == {key: pytest.approx(v) if isinstance(v, float) else v for key, v in METHODS[name].items()}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_where_it_is_from_and_how_it_is_run(name):
    package, summary, source, *_ = (options.CONF / "method" / f"{name}.yaml").read_text().splitlines()
    assert package == "# @package _global_"
    assert re.match(rf"# .+ \(https://[^)]+\).*\. `ftrun method={name}[^`]*`$", summary)
    assert "Source: " in source


@pytest.mark.parametrize("name", METHODS)
def test_what_is_typed_outranks_the_method(name):
    cfg = config.compose([f"method={name}", "optimizer.lr=0.25", "train.epochs=7"])
    assert (cfg.optimizer.lr, cfg.train.epochs) == (0.25, 7)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs(ftrun, name):
    done = ftrun(f"method={name}", *SHORT, *UNSEEN.get(name, ()), *SMALLER.get(name, ())).sees(0)
    assert len(done.losses) == 2
    assert all(math.isfinite(loss) for loss in done.losses)
    file = done.folder / "model" / "adapter_config.json"
    assert file.exists() == (name in SAVED)
    if name in SAVED:
        saved = json.loads(file.read_text())
        saved["target_modules"] = {target.rpartition(".")[2] for target in saved["target_modules"]}
        assert {key: saved[key] for key in SAVED[name]} == SAVED[name]


@pytest.mark.parametrize("name", SAVED)
def test_the_saved_adapter_fits_the_base_it_was_trained_on(ftrun, name):
    learn = ("optimizer.lr=5e-3", "train.max_steps=15", "train.warmup=0", "train.log_every=15", "adapter.dropout=0")
    first = ftrun(f"method={name}", *SHORT, *UNSEEN[name], *SMALLER[name], *learn).sees(0)
    start, end = first.metrics[0]["eval_loss"], first.metrics[-1]["eval_loss"]
    assert end < start - 0.05
    again = (f"model.path={first.folder}", "adapter=full", "train.max_steps=1")
    second = ftrun(*SHORT[1:], *UNSEEN[name], *again).sees(0)
    assert second.metrics[0]["eval_loss"] == pytest.approx(end, rel=1e-4)
