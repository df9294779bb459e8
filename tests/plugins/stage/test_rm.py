"""Reward models through the command line: what they learn, reload with, resume to and start from."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ftrun import model, record
from ftrun.config import Config
from ftrun.worker import dataset, loading, scoring

SMALL = ("stage=rm", "model=tiny", "train.micro_batch_size=8", "train.log_every=1", "optimizer.lr=1e-3")
STILL = ("optimizer.lr=1e-30", "train.max_steps=1", "stage.predict=true")
"""A run whose weights stay as they are, so that what it predicts is what its loss is made of."""

ADAPTERS: dict[str, tuple[str, ...]] = {
    "full": ("adapter=full",),
    "freeze": ("adapter=freeze", "adapter.layers=1"),
    "lora": ("adapter=lora",),
    "pissa": ("adapter=lora", "adapter.init=pissa"),
    "eva": ("adapter=lora", "adapter.init=eva"),
}


def predicted(folder: Path) -> list[tuple[float, float]]:
    lines = record.read_lines(folder / record.PREDICTIONS)
    return [(line["chosen"], line["rejected"]) for line in lines]


def eval_rows(folder: Path) -> Any:
    cfg = Config.load(folder / record.RUN)
    return dataset.load(cfg, loading.tokenizer(cfg)).evals[""]


def flat(values: list[tuple[float, float]]) -> list[float]:
    return [value for pair in values for value in pair]


def scored(scorer: scoring.Scorer, rows: Any) -> list[float]:
    """The scores of all pairs of a data set, the better and the worse one by turns."""
    ids = [rows[at][side]["input_ids"].tolist() for at in range(len(rows)) for side in ("chosen", "rejected")]
    return scorer.scores(ids, batch_size=5)


def evaluations(done: Any) -> list[dict[str, float]]:
    return [line for line in done.metrics if "eval_loss" in line]


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_it_learns_a_preference_that_can_be_learned(ftrun, adapter):
    done = ftrun(*SMALL, *ADAPTERS[adapter], "train.max_steps=40", "optimizer.lr=5e-3").sees(0)
    before, after = evaluations(done)
    assert before["eval_accuracy"] < 0.9 < after["eval_accuracy"]
    assert after["eval_rewards_margins"] > 1
    last = done.metrics[-2]
    assert last["accuracy"] > 0.9
    assert last["rewards_margins"] == pytest.approx(last["rewards_chosen"] - last["rewards_rejected"], abs=1e-5)
    assert done.result.objective == after["eval_loss"]
    assert "gets a new one, drawn with seed=42" in done.out


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_a_run_leaves_gives_the_same_scores(ftrun, adapter):
    done = ftrun(*SMALL, *ADAPTERS[adapter], "train.max_steps=3", "optimizer.lr=1e-2", "stage.predict=true").sees(0)
    scores = scored(scoring.load_scorer(done.folder), eval_rows(done.folder))
    assert scores == pytest.approx(flat(predicted(done.folder)), abs=1e-6)


def test_transformers_gives_the_same_scores(ftrun):
    done = ftrun(*SMALL, "adapter=full", "train.max_steps=3", "stage.predict=true").sees(0)
    net, rows = AutoModelForSequenceClassification.from_pretrained(done.folder / "model"), eval_rows(done.folder)
    assert net.config.num_labels == 1
    for at, (chosen, _) in enumerate(predicted(done.folder)):
        ids = torch.tensor(rows[at]["chosen"]["input_ids"])[None].long()
        assert net(ids).logits.item() == pytest.approx(chosen, abs=1e-6)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_model_of_tied_embeddings_whose_padding_is_its_end_is_saved_too(ftrun, tmp_path, adapter):
    ftrun("stage=sft", "model=tiny", "adapter=full", "train.max_steps=1", "output_dir=plain").sees(0)
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "plain/model")
    net.config.tie_word_embeddings = True
    net.tie_weights()
    shutil.copytree(tmp_path / "plain/model", tmp_path / "tied")
    net.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied/model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tied")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "tied")
    words = ("model.path=tied", *ADAPTERS[adapter], "train.max_steps=2", "optimizer.lr=1e-2", "stage.predict=true")
    done = ftrun(*SMALL, *words, "train.save_every=1").sees(0)
    scores = scored(scoring.load_scorer(done.folder), eval_rows(done.folder))
    assert scores == pytest.approx(flat(predicted(done.folder)), abs=1e-6)
    if adapter == "full":  # transformers must not take the end of a reply for padding
        assert json.loads((done.folder / "model/config.json").read_text())["pad_token_id"] is None


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_in_bfloat16_the_head_keeps_its_bits(ftrun, adapter):
    words = (*ADAPTERS[adapter], "model.dtype=bfloat16", "train.precision=bf16", "train.max_steps=2")
    done = ftrun(*SMALL, *words).sees(0)
    (file,) = (done.folder / "model").glob("*.safetensors")
    (saved,) = [weight for name, weight in load_file(file).items() if name.endswith("score.weight")]
    assert saved.dtype is torch.float32
    loaded = loading.as_saved(model.locate(model.Model(path=str(done.folder))), {"dtype": torch.bfloat16})
    assert torch.equal(loaded.score.weight, saved)
    assert loaded.model.embed_tokens.weight.dtype is torch.bfloat16


def test_the_batch_can_be_split_and_laid_out_in_any_way(ftrun):
    losses = []
    for size in (8, 4, 1):
        words = (f"train.micro_batch_size={size}", f"train.grad_accumulation={8 // size}", "train.max_steps=4")
        done = ftrun(*SMALL, *words, "stage.center_rewards_coefficient=0.1").sees(0)
        losses.append([line[name] for name in ("loss", "eval_loss") for line in done.metrics if name in line])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_without_padding_the_losses_are_the_same(ftrun):
    padded, free = (ftrun(*SMALL, "train.max_steps=3", *words).sees(0) for words in ((), ("train.padding_free=true",)))
    assert free.losses == pytest.approx(padded.losses, abs=1e-5)
    assert evaluations(free)[-1]["eval_loss"] == pytest.approx(evaluations(padded)[-1]["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("adapter", [("adapter=lora", "adapter.dropout=0.2"), ("adapter=full",)])
def test_resumed_equals_uninterrupted(ftrun, adapter):
    run = (
        "stage=rm", "model=tiny", "data.rows=24", "train.micro_batch_size=2", "train.grad_accumulation=2",
        "train.max_steps=8", "train.log_every=3", "train.eval_every=3", "train.neftune=5", "optimizer.lr=1e-2",
        "optimizer.weight_decay=0.1",
    )  # fmt: skip
    whole = ftrun(*run, *adapter, "train.save_every=4").sees(0)
    copy = whole.folder.with_name("copy")
    shutil.copytree(whole.folder, copy)
    shutil.rmtree(copy / "model")
    result = json.loads((copy / "result.json").read_text())
    gone = {"host": "elsewhere", "pid": 1, "started": 1.0}
    (copy / "result.json").write_text(json.dumps(result | {"status": "interrupted", "holder": gone}))
    ftrun("resume", "copy").sees(0)
    timed = ("time", "tokens_per_second")
    lines = [
        [{name: value for name, value in line.items() if name not in timed} for line in record.read_lines(file)]
        for file in (whole.folder / "metrics.jsonl", copy / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]
    weights = [next((folder / "model").glob("*.safetensors")).read_bytes() for folder in (whole.folder, copy)]
    assert weights[0] == weights[1]


def test_it_goes_on_from_an_sft_run_and_from_a_reward_model(ftrun):
    ftrun("stage=sft", "model=tiny", "train.max_steps=1", "output_dir=sft").sees(0)
    first = ftrun(*SMALL, "model.path=sft", "train.max_steps=4", "optimizer.lr=1e-2", "output_dir=first").sees(0)
    assert "gets a new one" in first.out
    second = ftrun(*SMALL, "adapter=full", "model.path=first", "train.max_steps=2", "seed=1").sees(0)
    assert "gets a new one" not in second.out
    assert evaluations(second)[0]["eval_loss"] == pytest.approx(evaluations(first)[-1]["eval_loss"], abs=1e-5)
    assert evaluations(second)[-1]["eval_loss"] < evaluations(first)[-1]["eval_loss"]
    refused = ftrun("stage=sft", "model=tiny", "model.path=first", "train.max_steps=1").sees(2)
    assert "has no head that predicts tokens" in refused.err


def test_the_head_of_llamafactory_is_the_start(ftrun, tmp_path):
    ftrun("stage=sft", "model=tiny", "adapter=full", "train.max_steps=1", "output_dir=plain").sees(0)
    shutil.copytree(tmp_path / "plain/model", tmp_path / "theirs")
    weight = torch.linspace(-1, 1, 64)[None]
    head = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([0.25])}
    save_file(head, tmp_path / "theirs/value_head.safetensors")
    done = ftrun(*SMALL, *STILL, "adapter=full", "model.path=theirs").sees(0)
    assert "starts from value_head.safetensors; its bias of 0.25 is left out" in done.out
    assert torch.equal(load_file(done.folder / "model/model.safetensors")["score.weight"], weight)
    scores = scored(scoring.load_scorer(tmp_path / "theirs"), eval_rows(done.folder))
    assert scores == pytest.approx(flat(predicted(done.folder)), abs=1e-6)
    other = dict.fromkeys(("v_head.summary.weight",), torch.ones(1, 8))
    save_file(other, tmp_path / "theirs/value_head.safetensors")
    assert "is of shape (1, 8), and here (1, 64) is wanted" in ftrun(*SMALL, "model.path=theirs").sees(2).err


def test_margin_centring_and_ranked_replies_by_value(ftrun, write):
    rows = [
        {"prompt": "Say a word.", "chosen": "Yes.", "rejected": "No, never.", "margin": 2.0},
        {"prompt": "Say another.", "ranked": ["The best of all.", "A good one.", "A bad one."]},
        {"prompt": "And now?", "responses": ["Low.", "The high one."], "scores": [1.0, 4.5]},
    ]
    write("rows.jsonl", rows)
    margins, shares = [2.0, 0.0, 0.0, 0.0, 3.5], [1.0, 1 / 3, 1 / 3, 1 / 3, 1.0]
    words = ("data.path=rows.jsonl", "data.eval_path=rows.jsonl", *STILL)

    def mean(pairs: list[tuple[float, float]], margins: list[float], shares: list[float], weight: float) -> float:
        each = [
            math.log1p(math.exp(-(chosen - rejected - margin))) + weight * (chosen + rejected) ** 2
            for (chosen, rejected), margin in zip(pairs, margins, strict=True)
        ]
        return sum(share * one for share, one in zip(shares, each, strict=True)) / sum(shares)

    first = ftrun(*SMALL, *words).sees(0)
    pairs = predicted(first.folder)
    assert first.losses[0] == pytest.approx(mean(pairs, margins, shares, 0.0), abs=1e-5)
    cases = [
        (("stage.use_margin=false", "stage.average_over=pairs"), mean(pairs, [0.0] * 5, [1.0] * 5, 0.0)),
        (("stage.center_rewards_coefficient=0.5",), mean(pairs, margins, shares, 0.5)),
    ]
    for options, expected in cases:
        done = ftrun(*SMALL, *words, *options).sees(0)
        assert flat(predicted(done.folder)) == pytest.approx(flat(pairs), abs=1e-6)
        assert done.losses[0] == pytest.approx(expected, abs=1e-5), options
        assert evaluations(done)[0]["eval_loss"] == pytest.approx(expected, abs=1e-5), options


def test_predictions_say_which_row_they_are_of(ftrun, write):
    row = {"prompt": "Say a word.", "chosen": "Yes.", "rejected": "No."}
    write("one.jsonl", [row])
    write("two.jsonl", [row, row])
    words = ("data.path=two.jsonl", "data.eval_sets={a: one.jsonl, b: two.jsonl}", *STILL)
    done = ftrun(*SMALL, *words).sees(0)
    lines = record.read_lines(done.folder / record.PREDICTIONS)
    assert [(line["set"], line["index"], Path(line["source"]).name) for line in lines] == [
        ("a", 0, "one.jsonl:1"), ("b", 0, "two.jsonl:1"), ("b", 1, "two.jsonl:2"),
    ]  # fmt: skip
    refused = ftrun(*SMALL, "data.path=two.jsonl", "stage.predict=true").sees(2)
    assert "no evaluation rows to score" in refused.err


def test_what_cannot_be_is_refused(driver):
    assert "adapter.init" in driver("check", *SMALL, "adapter=lora", "adapter.init=lora_ga").sees(2).err
    assert "data.packing" in driver("check", *SMALL, "data.packing=best_fit").sees(2).err
