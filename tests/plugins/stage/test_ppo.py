"""ppo through the command: rewards rise, runs resume exactly, a batch can be split, the value head is kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftrun import record
from tests.ended import comparable, cut_off

REWARD = '''
import random
from dataclasses import dataclass
from ftrun.plugin import Reward, register

@register
@dataclass(kw_only=True)
class Letters(Reward):
    """How many letters e a reply has, to a token."""

    name: str = "letters"

    def score(self, completions):
        return [one.text.count("e") / len(one.ids) for one in completions]

@register
@dataclass(kw_only=True)
class Moody(Reward):
    """A number that depends on nothing; of a long reply nothing."""

    name: str = "moody"

    def score(self, completions):
        return [None if len(one.ids) > 5 else random.random() for one in completions]
'''

SMALL = (
    "stage=ppo", "model=tiny", "hardware=cpu", "plugins=[letters.py]", "stage.max_new_tokens=6", "train.log_every=1",
    "stage.num_samples=1",
)  # fmt: skip
LETTERS = "reward=letters"


@pytest.fixture(autouse=True)
def _reward(write):
    write("letters.py", REWARD)


def of(done, name: str) -> list[float]:
    return [line[name] for line in done.metrics if name in line]


@pytest.mark.parametrize("value_model", ["shared", "separate"])
def test_rewards_rise_on_a_task_that_can_be_learned(ftrun, value_model):
    learn = (
        "adapter=full", "optimizer.lr=3e-3", "train.warmup=0", "train.max_steps=60", "train.micro_batch_size=16",
        "stage.minibatches=2", "stage.ppo_epochs=2", "stage.top_k=200",
    )  # fmt: skip
    done = ftrun(*SMALL, *learn, LETTERS, f"stage.value_model={value_model}").sees(0)
    rewards = of(done, "rewards_mean")
    assert sum(rewards[-8:]) > 1.5 * sum(rewards[:8])
    before, after = of(done, "eval_rewards_mean")
    assert after > 1.5 * before
    assert done.result.objective == after
    errors = of(done, "value_loss")
    assert sum(errors[-8:]) / 8 < errors[0]  # of values that are 0


def test_lines_of_metrics_say_what_became_of_replies_and_of_the_policy(ftrun):
    done = ftrun(*SMALL, "reward=[letters,moody]", "reward.moody.weight=-0.5", "train.max_steps=3").sees(0)
    evaluation, first, *_ = done.metrics
    assert set(first) >= {
        "loss", "lr", "grad_norm", "tokens", "rewards_mean", "rewards_std", "rewards_letters", "rewards_moody", "kl",
        "kl_coef", "policy_loss", "value_loss", "entropy", "clip_fraction", "approx_kl", "value_explained_variance",
        "completion_length", "completions_truncated",
    }  # fmt: skip
    assert set(evaluation) >= {
        "eval_rewards_mean", "eval_rewards_letters", "eval_kl", "eval_completion_length", "eval_completions_truncated",
    }  # fmt: skip
    assert "loss" not in evaluation
    # The first step trains the policy that wrote the replies, which is the reference, and whose values are 0.
    assert (first["kl"], evaluation["eval_kl"]) == pytest.approx((0, 0), abs=1e-5)
    assert (first["clip_fraction"], first["approx_kl"]) == pytest.approx((0, 0), abs=1e-6)
    assert first["policy_loss"] == pytest.approx(0, abs=1e-6)  # minus the mean of whitened advantages
    assert first["loss"] == pytest.approx(first["policy_loss"] + 0.1 * first["value_loss"], abs=1e-6)
    assert (first["entropy"], first["kl_coef"]) == (pytest.approx(6.93, abs=0.1), 0.05)  # ln 1024 for random weights
    (shown,) = (line for line in record.read_lines(done.folder / record.SAMPLES) if line["step"] == 0)
    assert set(shown) == {"step", "prompt", "reply", "reward"}


@pytest.mark.parametrize(
    "keys",
    [
        ("stage.minibatches=2",),
        ("stage.whiten_rewards=true", "stage.score_norm=true", "stage.missing_end_penalty=1"),
        ("stage.value_model=separate", "stage.whiten_advantages=false", "stage.kl_estimator=k3"),
    ],
)
def test_a_batch_can_be_split(ftrun, keys):
    """Replies do not depend on how many are trained on at once, nor does any number, and a last rollout is not full."""
    runs = []
    for size, accumulation in ((8, 1), (1, 8), (4, 2))[: 3 if keys[0] == "stage.minibatches=2" else 2]:
        batch = (f"train.micro_batch_size={size}", f"train.grad_accumulation={accumulation}", "train.epochs=1")
        few = ("data.rows=20", "stage.ppo_epochs=2", "optimizer.lr=1e-2")
        runs.append(ftrun(*SMALL, LETTERS, *batch, *few, *keys, "train.save_every=1").sees(0))
    names = ("loss", "rewards_mean", "completion_length", "kl", "value_loss", "grad_norm")
    whole, *split = [[[line[name] for name in names] for line in run.metrics if "loss" in line] for run in runs]
    assert len(whole) == (8 if "stage.minibatches=2" in keys else 6)
    for lines in split:
        for found, expected in zip(lines, whole, strict=True):
            assert found == pytest.approx(expected, abs=2e-5)
    assert whole[-1][3] != 0


# Dropout, so that the random generator's state counts, and a reward that draws from it; rollouts of four steps, so that
# most checkpoints lie within one; an epoch of 12 steps. The weight of the KL and the moments of scores move.
RESUMED = (
    "reward=[letters,moody]", "train.max_steps=16", "stage.minibatches=2", "stage.ppo_epochs=2", "data.rows=18",
    "train.micro_batch_size=3", "optimizer.lr=1e-2", "train.save_every=1", "train.keep_checkpoints=99",
    "train.log_every=3", "train.eval_every=5", "stage.kl_target=0.1", "stage.kl_horizon=50", "stage.score_norm=true",
)  # fmt: skip


def weights(folder: Path) -> list[bytes]:
    return [
        next((folder / "model").glob("*.safetensors")).read_bytes(),
        (folder / "value_head.safetensors").read_bytes(),
    ]


@pytest.mark.parametrize(
    "keys",
    [
        ("adapter.dropout=0.2",),
        ("adapter.init=pissa", "stage.value_model=separate", "adapter.dropout=0.1"),
        ("adapter=full", "stage.value_model=separate"),
    ],
)
def test_resumed_from_any_checkpoint_equals_uninterrupted(ftrun, keys):
    whole = ftrun(*SMALL, *RESUMED, *keys).sees(0)
    assert len(set(of(whole, "kl_coef"))) > 1
    for step in (1, 7, 12):  # early and late within a rollout, and at the end of one and of an epoch
        copy = whole.folder.with_name(f"from{step}")
        shutil.copytree(whole.folder, copy)
        cut_off(copy, step)
        (copy / "value_head.safetensors").unlink()
        ftrun("resume", copy.name).sees(0)
        assert comparable(copy) == comparable(whole.folder), step
        assert weights(copy) == weights(whole.folder), step


@pytest.mark.parametrize("keys", [("adapter=full",), ("adapter=lora",), ("adapter=lora", "adapter.init=pissa")])
@pytest.mark.parametrize("reference", ["auto", "copy"])
def test_the_reference_is_the_policy_as_it_was(ftrun, keys, reference):
    """The KL is 0 in the first rollout, and is not after the policy has moved."""
    few = (
        "train.max_steps=2",
        "stage.ppo_epochs=1",
        "optimizer.lr=1e-2",
        "train.warmup=0",
        f"stage.reference={reference}",
    )
    done = ftrun(*SMALL, LETTERS, *few, *keys).sees(0)
    first, second = of(done, "kl")
    assert first == pytest.approx(0, abs=1e-4)
    assert abs(second) > 1e-3


def test_another_model_can_be_the_reference(ftrun):
    made = ftrun("stage=sft", "model=tiny", "train.max_steps=3", "adapter=full", "optimizer.lr=1e-2").sees(0)
    keys = ("stage.reference=model", f"stage.reference_path={made.folder}", "train.max_steps=1")
    assert abs(of(ftrun(*SMALL, LETTERS, *keys).sees(0), "kl")[0]) > 0.01


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_policy_is_saved_alone_and_the_value_head_beside_it(ftrun, adapter):
    done = ftrun(*SMALL, LETTERS, f"adapter={adapter}", "train.max_steps=2", "optimizer.lr=1e-2").sees(0)
    head = load_file(done.folder / "value_head.safetensors")
    assert {name: tuple(weight.shape) for name, weight in head.items()} == {"weight": (64,), "bias": (1,)}
    assert head["weight"].abs().max() > 0
    (file,) = (done.folder / "model").glob("*.safetensors")
    assert not [name for name in load_file(file) if "value" in name]
    again = ftrun("stage=sft", f"model.path={done.folder}", "train.max_steps=1", "stage.num_samples=0").sees(0)
    assert again.result.status == "completed"


def test_a_separate_value_model_has_weights_of_its_own_that_train(ftrun):
    keys = ("stage.value_model=separate", "adapter=lora", "train.max_steps=3", "optimizer.lr=1e-2")
    done = ftrun(*SMALL, LETTERS, *keys).sees(0)
    saved = load_file(done.folder / "value_head.safetensors")
    trunk = {name: weight for name, weight in saved.items() if name.startswith("trunk.")}
    assert trunk
    assert all("lora_" in name for name in trunk)
    (file,) = (done.folder / "model").glob("*.safetensors")
    policy = load_file(file)
    same = [
        name
        for name, weight in trunk.items()
        for other in policy
        if other.endswith(name.removeprefix("trunk.").replace(".default", "")) and torch.equal(weight, policy[other])
    ]
    assert len(same) < len(trunk)


def test_questions_and_replies_must_fit_into_the_model(ftrun):
    done = ftrun(*SMALL, LETTERS, "stage.max_new_tokens=8190", "train.max_steps=1").sees(2)
    assert "stage.max_new_tokens: a question of" in done.err


def test_without_a_kl_there_is_no_reference(ftrun):
    done = ftrun(*SMALL, LETTERS, "stage.kl_coef=0", "train.max_steps=1").sees(0)
    assert not [name for line in done.metrics for name in line if "kl" in name and name != "approx_kl"]


def test_the_best_evaluation_is_kept_with_its_value_head(ftrun):
    keys = (
        "train.keep_best=true",
        "train.eval_every=1",
        "objective_mode=max",
        "train.max_steps=3",
        "optimizer.lr=1e-2",
    )
    done = ftrun(*SMALL, LETTERS, *keys, "train.keep_checkpoints=9", "train.save_every=1").sees(0)
    best = int(done.result.metrics["best_step"])
    if best < 3:  # the last step has no checkpoint to compare with
        kept = done.folder / "checkpoints" / f"step-{best}" / "value_head.safetensors"
        assert kept.read_bytes() == (done.folder / "value_head.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("keys", "key", "says"),
    [
        (("stage.kl_coef=0", "stage.kl_target=6"), "stage.kl_target", "leaves the reference out"),
        (("stage.kl_coef=0", "stage.reference=copy"), "stage.reference", "leaves the reference out"),
        (("stage.kl_horizon=5",), "stage.kl_horizon", "fixed"),
        (("stage.reference=precomputed",), "stage.reference", "only written while training"),
        (("stage.reference=model",), "stage.reference", "no other model"),
        (("adapter=full", "stage.reference=adapter_off"), "stage.reference", "not what the run starts from"),
        (("train.neftune=5",), "train.neftune", "does not read it"),
        (("train.padding_free=true",), "train.padding_free", "does not read it"),
        (("data.packing=best_fit",), "data.packing", "does not read it"),
        (("stage.lam=1.5",), "stage.lam", "out of range"),
        (("train.keep_best=true", "train.eval_every=1", "objective_mode=min"), "objective_mode", "look for the lowest"),
    ],
)
def test_what_cannot_be_is_refused(driver, keys, key, says):
    done = driver("check", "stage=ppo", "model=tiny", *keys)
    assert done.code == 2
    assert f"{key}:" in done.err
    assert says in done.err
