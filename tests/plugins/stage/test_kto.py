"""kto through the command line: values against a second computation, batches, resumption, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ftrun.data.tokens import IGNORED
from tests.ended import comparable, weights

SMALL = ("stage=kto", "model=tiny", "data.rows=16", "train.log_every=1", "optimizer.lr=1e-2", "adapter=full")
TWO = [
    {"prompt": "What is the capital of Greece?", "completion": "It is Athens.", "label": True},
    {"prompt": "Who are you?", "completion": "I do not know that, and I shall not tell.", "label": False},
]


def rows_of(ftrun: Any, path: Path) -> list[dict[str, list[int]]]:
    """The rows as they are trained on, by the command that shows them."""
    done = ftrun("preview", "stage=kto", "model=tiny", f"data.path={path}", "--json", "--rows", "9").sees(0)
    return [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]


def logprob(net: Any, prompt: list[int], reply: list[int]) -> float:
    """The summed log-probability of a reply, in float64."""
    with torch.no_grad():
        logits = net(torch.tensor([prompt + reply])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) + place - 1, token]) for place, token in enumerate(reply))


def computed(ftrun: Any, path: Path, policy: Path, reference: Path) -> dict[str, float]:
    """The metrics of two rows of different prompts, of which each takes the other's reply."""
    from transformers import AutoModelForCausalLM

    policies, references = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (policy, reference))
    halves = []
    for row in rows_of(ftrun, path):
        begin = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
        halves.append((row["input_ids"][:begin], learned))
    (good_prompt, good_reply), (bad_prompt, bad_reply) = halves
    logp = {
        name: (logprob(policies, *pair), logprob(references, *pair))
        for name, pair in {
            "good": (good_prompt, good_reply), "bad": (bad_prompt, bad_reply),
            "good with bad": (good_prompt, bad_reply), "bad with good": (bad_prompt, good_reply),
        }.items()
    }  # fmt: skip
    ratios = {name: policy - other for name, (policy, other) in logp.items()}
    kl = max(0.0, (ratios["good with bad"] + ratios["bad with good"]) / 2)
    of_good = 1.5 * (1 - 1 / (1 + math.exp(-0.2 * (ratios["good"] - kl))))
    of_bad = 0.5 * (1 - 1 / (1 + math.exp(-0.2 * (kl - ratios["bad"]))))
    nll = -logp["good"][0] / len(good_reply)
    return {
        "loss": (of_good + of_bad) / 2 + 0.3 * nll, "kl": kl, "nll_chosen": nll,
        "logps_chosen": logp["good"][0], "logps_rejected": logp["bad"][0],
        "rewards_chosen": 0.2 * ratios["good"], "rewards_rejected": 0.2 * ratios["bad"],
        "rewards_margins": 0.2 * (ratios["good"] - ratios["bad"]),
    }  # fmt: skip


@pytest.mark.parametrize("kept_close", [True, False])
def test_the_first_step_equals_a_second_computation(ftrun, write, kept_close):
    """Policy and reference are two models, so that neither the log-ratios nor the divergence are 0."""
    path = write("two.jsonl", TWO)
    sft = ("stage=sft", "model=tiny", "adapter=full", "optimizer.lr=1e-2", "train.log_every=1")
    for name, steps in (("less", 2), ("more", 12)):
        ftrun(*sft, f"train.max_steps={steps}", f"output_dir={name}").sees(0)
    policy, other = ("more", "less") if kept_close else ("less", "more")
    done = ftrun(
        "stage=kto", f"model.path={policy}", "stage.reference=model", f"stage.reference_path={other}", "adapter=full",
        f"data.path={path}", f"data.eval_path={path}", "train.micro_batch_size=2", "train.max_steps=1",
        "stage.beta=0.2", "stage.desirable_weight=1.5", "stage.undesirable_weight=0.5", "stage.ftx=0.3",
    ).sees(0)  # fmt: skip
    expected = computed(ftrun, path, path.with_name(policy) / "model", path.with_name(other) / "model")
    assert abs(expected["rewards_margins"]) > 0.1
    assert (expected["kl"] > 0) == kept_close
    evaluated, step = done.metrics[0], done.metrics[1]
    for name, value in expected.items():
        assert step[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
        assert evaluated[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize(("loss", "reference"), [("kto", "auto"), ("kto", "copy"), ("apo_zero_unpaired", "auto")])
def test_the_batch_can_be_split(ftrun, loss, reference):
    """Also into batches of one row, whose mismatched reply is then in no batch with its own prompt."""
    found = []
    for size in (8, 4, 1):
        batch = (f"train.micro_batch_size={size}", f"train.grad_accumulation={8 // size}", "train.max_steps=4")
        words = (f"stage.loss={loss}", f"stage.reference={reference}", "stage.ftx=0.1", "seed=2")
        found.append(ftrun(*SMALL, *batch, *words).sees(0).metrics)
    steps = [[line for line in metrics if "loss" in line] for metrics in found]
    assert len({round(line["loss"], 4) for line in steps[0]}) == 4
    if loss == "kto":
        assert max(line["kl"] for line in steps[0]) > 0.01
    for other in steps[1:]:
        for one, two in zip(steps[0], other, strict=True):
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
            for name in set(one) - {"time", "tokens_per_second"}:
                assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize("where", ["train.padding_free=true", "train.micro_batch_tokens=300", "adapter=lora"])
def test_before_the_first_step_every_reply_counts_half(ftrun, where):
    done = ftrun(*SMALL, where, "data.max_length=128", "train.max_steps=1", "data.eval_size=4").sees(0)
    evaluated, step = done.metrics[0], done.metrics[1]
    assert step["loss"] == evaluated["eval_loss"] == pytest.approx(0.5, abs=1e-5)
    assert evaluated["eval_kl"] == pytest.approx(0.0, abs=1e-4)


def test_what_is_resumed_goes_on_as_if_nothing_had_been(ftrun):
    """With dropout and noise, accumulation, and a log interval between whose lines a checkpoint falls."""
    words = (
        *SMALL, "adapter=lora", "adapter.dropout=0.2", "train.neftune=5", "train.micro_batch_size=2",
        "train.grad_accumulation=2", "train.max_steps=10", "train.log_every=3", "train.eval_every=5",
        "train.save_every=4", "train.keep_checkpoints=9",
    )  # fmt: skip
    whole, other = ftrun(*words).sees(0), ftrun(*words, "output_dir=other").sees(0)
    assert max(line.get("kl", 0.0) for line in whole.metrics) > 0
    shutil.rmtree(other.folder / "checkpoints" / "step-8")
    shutil.rmtree(other.folder / "model")
    result = json.loads((other.folder / "result.json").read_text())
    (other.folder / "result.json").write_text(json.dumps(result | {"status": "interrupted"}))
    ftrun("resume", "other").sees(0)
    assert comparable(other.folder) == comparable(whole.folder)
    assert weights(other.folder) == weights(whole.folder)


def test_rewards_of_both_kinds_come_apart(ftrun):
    done = ftrun(*SMALL, "data.rows=48", "train.micro_batch_size=8", "train.max_steps=20", "optimizer.lr=3e-3").sees(0)
    first, last = (line for line in (done.metrics[0], done.metrics[-1]))
    assert first["eval_rewards_margins"] == pytest.approx(0.0, abs=1e-4)
    assert last["eval_rewards_margins"] > 0.2
    assert last["eval_loss"] < 0.45


def test_one_kind_only_is_said(ftrun, write):
    path = write("good.jsonl", [row | {"label": True} for row in TWO])
    words = ("stage=kto", "model=tiny", f"data.path={path}", "train.micro_batch_size=1", "train.max_steps=2")
    done = ftrun(*words).sees(0)
    assert "all 2 replies are good: nothing pushes any of them down" in done.out
    assert "rewards_rejected" not in done.result.metrics
    assert "rewards_margins" not in done.result.metrics
    assert all(math.isfinite(value) for value in done.result.metrics.values())
    assert "nothing pushes" not in ftrun(*SMALL, "train.max_steps=1").sees(0).out


def test_what_cannot_be_is_refused(driver):
    done = driver("check", "stage=kto", "model=tiny", "stage.desirable_weight=0", "stage.undesirable_weight=0")
    assert done.code == 2
    assert "both weights are 0" in done.err + done.out
    done = driver("check", "stage=kto", "model=tiny", "data.packing=best_fit")
    assert done.code == 2
    assert "data.packing" in done.err + done.out
