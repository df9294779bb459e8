"""dpo, orpo, simpo and cpo through the command line: what the reference is, batches, resumption, what is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftrun import model
from ftrun.worker import batches, preference
from ftrun.worker.losses.pairs import LOSSES
from ftrun_plugins.stage import dpo
from tests.ended import comparable, cut_off

SMALL = ("model=tiny", "data.rows=16", "train.micro_batch_size=4", "train.log_every=1", "optimizer.lr=1e-2")
LN2 = math.log(2)

ADAPTERS = {
    "lora": ("adapter=lora",),
    "rslora": ("adapter=lora", "adapter.use_rslora=true", "adapter.init=gaussian"),
    "dora": ("adapter=lora", "adapter.use_dora=true"),
    "orthogonal": ("adapter=lora", "adapter.init=orthogonal"),
    "pissa": ("adapter=lora", "adapter.init=pissa"),
    "olora": ("adapter=lora", "adapter.init=olora"),
    "eva": ("adapter=lora", "adapter.init=eva"),
    "lora_ga": ("adapter=lora", "adapter.init=lora_ga"),
    "with the head": ("adapter=lora", "adapter.modules_to_save=[lm_head]"),
    "full": ("adapter=full",),
    "freeze": ("adapter=freeze",),
}


def first(done: Any) -> dict[str, float]:
    """The metrics before any weight has moved: of the evaluation at the start and of the first step."""
    return done.metrics[0] | done.metrics[1]


MATRIX = [
    *(("auto", adapter) for adapter in ADAPTERS),
    *(("copy", adapter) for adapter in ("lora", "pissa", "full", "freeze")),
    *(("adapter_off", adapter) for adapter in ("lora", "orthogonal", "with the head")),
    *(("model", adapter) for adapter in ("pissa", "full")),
]


@pytest.mark.parametrize(("reference", "adapter"), MATRIX)
def test_the_reference_is_the_policy_as_it_was_at_first(ftrun, adapter, reference):
    words = [f"stage.reference={reference}", *ADAPTERS[adapter], "train.max_steps=2", "train.warmup=0"]
    if reference == "model":
        words.append("stage.reference_path=builtin:tiny")
    done = ftrun("stage=dpo", *SMALL, *words).sees(0)
    assert first(done)["loss"] == pytest.approx(LN2, abs=1e-5)
    assert first(done)["eval_loss"] == pytest.approx(LN2, abs=1e-5)
    assert done.metrics[2]["loss"] != pytest.approx(LN2, abs=1e-4)  # it has moved away, and the reference has not


@pytest.mark.parametrize("adapter", ["pissa", "olora", "lora_ga", "full", "freeze"])
def test_an_adapter_that_cannot_be_switched_off_is_not(driver, adapter):
    done = driver("check", "stage=dpo", *SMALL, *ADAPTERS[adapter], "stage.reference=adapter_off").sees(2)
    assert "not what the run starts from" in done.err


@pytest.mark.parametrize(
    ("reference", "adapter"), [("auto", "lora"), ("copy", "pissa"), ("auto", "full"), ("adapter_off", "lora")]
)
def test_the_reference_of_a_run_that_goes_on_from_another_is_that_run(ftrun, adapter, reference):
    ftrun("stage=sft", *SMALL, "train.max_steps=4", "output_dir=sft").sees(0)
    done = ftrun(
        "stage=dpo", *SMALL, "model.path=sft", *ADAPTERS[adapter], "train.max_steps=1",
        f"stage.reference={reference}",
    ).sees(0)  # fmt: skip
    assert first(done)["loss"] == pytest.approx(LN2, abs=1e-5)


@pytest.mark.parametrize("reference", ["auto", "copy", "adapter_off"])
def test_in_bf16_too(ftrun, reference):
    words = ("train.precision=bf16", "train.max_steps=1", f"stage.reference={reference}")
    done = ftrun("stage=dpo", *SMALL, *words).sees(0)
    assert first(done)["loss"] == pytest.approx(LN2, abs=2e-3)


@pytest.mark.parametrize(
    "where", ["train.padding_free=true", "train.micro_batch_tokens=512", "train.group_by_length=true"]
)
def test_in_every_kind_of_batch(ftrun, where):
    done = ftrun("stage=dpo", *SMALL, "data.max_length=128", where, "train.max_steps=1").sees(0)
    assert first(done)["loss"] == pytest.approx(LN2, abs=1e-5)


def losses(ftrun: Any, *words: str) -> list[float]:
    return ftrun(*words).sees(0).losses


SPLIT = {
    "bco": ("stage=dpo", "stage.loss=bco"),
    "aot_unpaired": ("stage=dpo", "stage.loss=aot_unpaired"),
    "kto_pair and its friends": (
        "stage=dpo", "stage.loss=kto_pair", "stage.mix=[aot,sigmoid]", "stage.mix_weights=[0.3,2]", "stage.ftx=0.5",
        "stage.ld_alpha=0.4", "stage.reference=copy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", SPLIT.values(), ids=SPLIT)
def test_losses_that_look_at_other_pairs_look_at_the_whole_step(ftrun, words):
    found = [
        losses(
            ftrun, *words, "model=tiny", "data.rows=16", "train.log_every=1", "train.max_steps=3", "stage.beta=0.5",
            f"train.micro_batch_size={size}", f"train.grad_accumulation={8 // size}", "optimizer.lr=1e-2",
        )
        for size in (8, 4, 1)
    ]  # fmt: skip
    assert found[0][0] != found[0][2]
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize("loss", ["bco", "sigmoid"])
def test_what_is_resumed_goes_on_as_if_nothing_had_been(ftrun, loss):
    words = (
        "stage=dpo", f"stage.loss={loss}", *SMALL, "adapter.init=pissa", "adapter.dropout=0.2", "stage.reference=copy",
        "train.max_steps=8", "train.grad_accumulation=2", "train.save_every=3", "train.eval_every=3",
        "train.keep_checkpoints=9",
    )  # fmt: skip
    whole = ftrun(*words).sees(0)
    other = ftrun(*words, "output_dir=two").sees(0)
    cut_off(other.folder, 3)
    ftrun("resume", "two").sees(0)
    assert comparable(other.folder) == comparable(whole.folder)


def kept() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (model.cache_folder() / "tokens").glob("*/reference-*.npy")}


def test_runs_that_differ_in_beta_loss_and_rate_share_what_the_reference_says(ftrun, write):
    write("pairs.jsonl", [{"prompt": f"q{n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(12)])
    words = ("stage=dpo", "data.path=pairs.jsonl", *SMALL[:1], *SMALL[2:4], "train.max_steps=1", "data.eval_size=4")
    before = kept()
    ftrun(*words).sees(0)
    ((path, content),) = kept().items() - before.items()
    known = np.load(path)
    assert known.shape == (2, 12)
    assert np.isfinite(known).all()
    ftrun(*words, "stage.beta=0.5", "stage.loss=ipo", "optimizer.lr=1e-3", "adapter.rank=4", "seed=7").sees(0)
    assert {**kept(), **before} == {**before, path: content}
    np.save(path, known + np.float32([[2.0], [0.0]]))  # it is really read, and nothing computed anew
    done = ftrun(*words).sees(0)
    assert first(done)["rewards_chosen"] == pytest.approx(-0.2, abs=1e-5)
    assert first(done)["eval_rewards_chosen"] == pytest.approx(-0.2, abs=1e-5)
    ftrun(*words, "adapter.init=pissa").sees(0)  # says nearly the same, but from other weights
    assert len(kept().keys() - before.keys()) == 2


def test_only_what_is_not_known_is_computed(ftrun, write):
    write("pairs.jsonl", [{"prompt": f"q{n}", "chosen": f"Yes, {n}", "rejected": "no"} for n in range(12)])
    words = ("stage=dpo", "data.path=pairs.jsonl", *SMALL[:1], *SMALL[2:4], "train.max_steps=1")
    before = kept()
    ftrun(*words).sees(0)
    ((path, _),) = kept().items() - before.items()
    whole = np.load(path)
    partly = whole.copy()
    partly[:, 4:8] = np.nan
    partly[0, 0] -= 5.0
    np.save(path, partly)
    ftrun(*words).sees(0)
    again = np.load(path)
    assert again[0, 0] == partly[0, 0]
    assert (again[:, 4:8] == whole[:, 4:8]).all()


def test_another_model_is_the_reference(ftrun):
    ftrun("stage=sft", *SMALL, "train.max_steps=6", "output_dir=sft").sees(0)
    words = ("stage=dpo", *SMALL, "train.max_steps=1")
    own = first(ftrun(*words).sees(0))
    other = first(ftrun("stage=dpo", *SMALL, "train.max_steps=1", "model.path=sft").sees(0))
    compared = ftrun(*words, "stage.reference=model", "stage.reference_path=sft").sees(0)
    for side in ("chosen", "rejected"):
        expected = 0.1 * (own[f"eval_logps_{side}"] - other[f"eval_logps_{side}"])
        assert abs(expected) > 0.1
        assert first(compared)[f"eval_rewards_{side}"] == pytest.approx(expected, abs=1e-3)
    saved = (compared.folder / "run.yaml").read_text()
    assert f"reference_path: {compared.folder.parent / 'sft'}" in saved
    assert "reference_source: run" in saved


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage.reference=model"], "stage.reference: there is no other model"),
        (["stage.reference_path=builtin:tiny"], "stage.reference_path: stage.reference=auto does not read it"),
        (["stage.reference=model", "stage.reference_path=./nowhere"], "stage.reference_path: "),
        (["stage.label_smoothing=0.1", "stage.loss=ipo"], "stage.label_smoothing: stage.loss=ipo does not read it"),
        (["stage.loss=exo"], "infinite without smoothing"),
        (["stage.mix=[bco]"], "stage.mix_weights: 1 losses in stage.mix have 0 weights"),
        (["stage.discopop_tau=0.1"], "stage.discopop_tau: stage.loss=sigmoid does not read it"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(driver, words, message):
    assert message in driver("check", "stage=dpo", "model=tiny", *words).sees(2).err


def test_the_names_of_losses_are_those_that_there_are():
    assert {loss.value for loss in dpo.Loss} == {name for name, loss in LOSSES.items() if loss.needs_reference}
    for loss in dpo.Loss:
        assert loss.reads_label_smoothing == ("label_smoothing" in LOSSES[loss].reads)
        assert (loss is dpo.Loss.discopop) == ("tau" in LOSSES[loss].reads)


@pytest.mark.parametrize("loss", [loss for loss in dpo.Loss if loss is not dpo.Loss.sigmoid])
def test_every_loss_trains(ftrun, loss):
    more = ["stage.label_smoothing=1e-3"] if loss is dpo.Loss.exo else []
    done = ftrun("stage=dpo", *SMALL, f"stage.loss={loss}", *more, "train.max_steps=8", "seed=3").sees(0)
    assert done.metrics[-1]["eval_loss"] < done.metrics[0]["eval_loss"]


@pytest.mark.parametrize("stage", ["orpo", "simpo", "cpo"])
def test_without_a_reference(ftrun, stage):
    done = ftrun(f"stage={stage}", *SMALL, "train.max_steps=8").sees(0)
    start = done.metrics[0]
    assert done.metrics[-1]["eval_loss"] < start["eval_loss"]
    if stage == "orpo":
        assert start["eval_loss"] == pytest.approx(start["eval_nll_chosen"] + 0.1 * LN2, abs=0.02)
    if stage == "cpo":
        assert start["eval_loss"] > start["eval_nll_chosen"]


def test_tokens_beyond_the_shorter_reply_count_less():
    rows = [
        {"input_ids": np.arange(size, dtype=np.int32), "labels": np.where(np.arange(size) < 2, -100, np.arange(size))}
        for size in (5, 8, 6, 4)  # learned: 3, 6 of the better ones; 4, 2 of the worse ones
    ]
    for batch in (batches.pad(rows, 0), batches.flatten(rows)):
        found = preference.tail_weights(batch, torch.tensor([[3.0, 6.0], [4.0, 2.0]]), 0.5)
        assert found.tolist() == [1, 1, 1, *[1, 1, 0.5, 0.5, 0.5, 0.5], 1, 1, 1, 0.5, 1, 1]


@pytest.mark.parametrize("words", [(), ("stage.loss=bco", "train.grad_accumulation=2", "train.micro_batch_size=2")])
def test_a_frozen_copy_says_in_bf16_what_was_computed_before(ftrun, words):
    run = (
        "stage=dpo",
        *SMALL,
        "adapter=full",
        "train.precision=bf16",
        "optimizer.lr=1e-3",
        "train.max_steps=3",
        *words,
    )
    kept, copied = (ftrun(*run, f"stage.reference={name}").sees(0) for name in ("precomputed", "copy"))
    assert kept.metrics[-1]["eval_rewards_margins"] > 0.02
    for ours, expected in zip(copied.metrics, kept.metrics, strict=True):
        for name in expected.keys() & {"loss", "eval_loss", "eval_rewards_margins", "rewards_chosen"}:
            assert ours[name] == pytest.approx(expected[name], abs=2e-3), name


def test_tokens_that_count_less_do_so_for_the_reference_too_and_not_in_what_is_reported(ftrun):
    words = ("stage=dpo", *SMALL, "train.max_steps=1")
    plain, less = ftrun(*words).sees(0), ftrun(*words, "stage.ld_alpha=0.3", "stage.ftx=0.0").sees(0)
    assert first(less)["loss"] == pytest.approx(LN2, abs=1e-5)
    for name in ("logps_chosen", "logps_rejected", "nll_chosen", "eval_logps_chosen"):
        assert first(less)[name] == pytest.approx(first(plain)[name], rel=1e-5)


def test_a_reference_with_other_tokens_is_refused(ftrun, tmp_path):
    from ftrun.worker import builtin

    tokenizer = builtin.tokenizer()
    tokenizer.add_tokens(["<of another family>"])
    table = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = table["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    builtin.model({"dtype": torch.float32}).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(table))
    done = ftrun("stage=dpo", *SMALL, "stage.reference=model", "stage.reference_path=other").sees(2)
    assert "stage.reference_path: its tokenizer is another one" in done.err
