"""grpo, rloo and online_dpo through the command: rewards rise, runs resume exactly, the reference is the start."""

from __future__ import annotations

import shutil

import pytest

from ftrun import record
from tests.ended import comparable, cut_off, weights

REWARD = '''
from dataclasses import dataclass
from ftrun.plugin import Reward, register

@register
@dataclass(kw_only=True)
class Letters(Reward):
    """How many letters e a reply has, to a token."""

    name: str = "letters"

    def score(self, completions):
        return [one.text.count("e") / len(one.ids) for one in completions]
'''

STAGES = ("grpo", "rloo", "online_dpo")
SMALL = (
    "model=tiny", "hardware=cpu", "plugins=[letters.py]", "reward=letters", "stage.max_new_tokens=6",
    "train.micro_batch_size=8", "train.log_every=1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _reward(write):
    write("letters.py", REWARD)


def of(done, name: str) -> list[float]:
    return [line[name] for line in done.metrics if name in line]


@pytest.mark.parametrize("stage", STAGES)
def test_rewards_rise_on_a_task_that_can_be_learned(ftrun, stage):
    learn = ("adapter=full", "optimizer.lr=1e-2", "train.warmup=0", "train.max_steps=40", "stage.top_k=200")
    done = ftrun(f"stage={stage}", *SMALL, *learn, "train.micro_batch_size=16").sees(0)
    rewards = of(done, "rewards_mean")
    assert sum(rewards[-8:]) > 1.5 * sum(rewards[:8])
    before, after = of(done, "eval_rewards_mean")
    assert after > 1.5 * before
    assert done.result.objective == after


def test_a_line_of_metrics_says_what_became_of_the_replies(ftrun):
    done = ftrun("stage=grpo", *SMALL, "train.max_steps=2", "stage.beta=0.1", "data.rows=8").sees(0)
    first, line = done.metrics[0], done.metrics[2]
    assert {"loss", "lr", "grad_norm", "rewards_mean", "rewards_std", "rewards_letters", "rewards_tied"} <= set(line)
    assert {"kl", "entropy", "clip_fraction", "completion_length", "completions_truncated", "tokens"} <= set(line)
    assert line["rewards_letters"] == pytest.approx(line["rewards_mean"])
    assert not {name for name in line if "/" in name or name in ("step_time", "reward", "num_tokens")}
    assert set(first) >= {"eval_rewards_mean", "eval_rewards_letters", "eval_completion_length"}
    (shown, *_) = record.read_lines(done.folder / record.SAMPLES)
    assert set(shown) == {"step", "prompt", "reply", "reward"}


# Dropout, so that the random generator's state counts; replies for two micro batches, trained on twice, so that a
# checkpoint after an odd step lies within a batch of them; an epoch of 4 steps.
RESUMED = (
    "train.max_steps=10", "stage.steps_per_generation=2", "stage.num_iterations=2", "stage.beta=0.1", "data.rows=4",
    "optimizer.lr=1e-2", "train.save_every=1", "train.keep_checkpoints=99", "train.log_every=3", "train.eval_every=5",
)  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "adapter"),
    [
        ("grpo", ("adapter=lora", "adapter.dropout=0.2")),
        ("rloo", ("adapter=full",)),
        ("online_dpo", ("adapter.init=pissa", "stage.eval_temperature=1")),
    ],
)
def test_resumed_within_a_batch_of_replies_equals_uninterrupted(ftrun, stage, adapter):
    whole = ftrun(f"stage={stage}", *SMALL, *RESUMED, *adapter).sees(0)
    for step in (5, 8):  # within a batch of replies; at its end and the epoch's
        copy = whole.folder.with_name(f"from{step}")
        shutil.copytree(whole.folder, copy)
        cut_off(copy, step)
        ftrun("resume", copy.name).sees(0)
        assert comparable(copy) == comparable(whole.folder), step
        assert weights(copy) == weights(whole.folder), step


@pytest.mark.slow
def test_two_processes_share_groups_and_resume(ftrun):
    two = ("hardware.num_processes=2", "train.micro_batch_size=2", "data.rows=8", "train.max_steps=7")
    whole = ftrun("stage=grpo", *SMALL, *RESUMED, *two).sees(0)
    copy = whole.folder.with_name("copy")
    shutil.copytree(whole.folder, copy)
    cut_off(copy, 3)
    ftrun("resume", copy.name).sees(0)
    assert comparable(copy) == comparable(whole.folder)
    assert weights(copy) == weights(whole.folder)


ADAPTERS = (
    ("adapter=full",), ("adapter=lora",), ("adapter=lora", "stage.reference=copy"), ("adapter.init=pissa",),
    ("adapter.init=olora",), ("adapter.use_dora=true",), ("adapter.modules_to_save=[lm_head]",),
    ("adapter.dropout=0.3",),
)  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "adapter"),
    [*(("grpo", adapter) for adapter in ADAPTERS), ("rloo", ADAPTERS[3]), ("online_dpo", ADAPTERS[3])],
)
def test_the_reference_is_the_policy_as_it_starts(ftrun, stage, adapter):
    words = (*SMALL, *adapter, "stage.beta=0.1", "optimizer.lr=1e-2", "train.warmup=0", "data.rows=8")
    done = ftrun(f"stage={stage}", *words, "train.max_steps=3").sees(0)
    first, *_, last = of(done, "kl")
    # Dropout is a part of the policy that trains, and of nothing that it is compared with.
    assert abs(first) < (1e-2 if adapter == ("adapter.dropout=0.3",) else 1e-6)
    assert abs(last) > 1e-5
    if stage == "online_dpo":
        decided = 1 - of(done, "rewards_tied")[0]
        assert of(done, "loss")[0] == pytest.approx(0.693147 * decided, abs=1e-5)


def test_the_reference_can_be_another_model(ftrun):
    words = ("stage=grpo", *SMALL, "train.max_steps=3", "optimizer.lr=1e-2", "train.warmup=0", "data.rows=8")
    ended = ftrun(*words, "adapter=full").sees(0)
    other = ("stage.beta=0.1", "stage.reference=model", f"stage.reference_path={ended.folder}")
    assert of(ftrun(*words, *other).sees(0), "kl")[0] > 1e-5
    again = ftrun(*words, *other, f"model.path={ended.folder}").sees(0)
    assert abs(of(again, "kl")[0]) < 1e-6


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("grpo", ("stage.loss=grpo",)), ("grpo", ("stage.loss=dr_grpo", "stage.beta=0.1")),
    ],
)  # fmt: skip
def test_the_batch_can_be_split(ftrun, stage, more):
    words = (*SMALL, *more, "optimizer.lr=1e-2", "train.warmup=0", "train.max_steps=3", "adapter=full", "data.rows=8")
    sizes = (8, 2) if more or stage != "grpo" else (8, 4, 1)
    batches = [(f"train.micro_batch_size={size}", f"train.grad_accumulation={8 // size}") for size in sizes]
    runs = [ftrun(f"stage={stage}", *words, *batch).sees(0) for batch in batches]
    for done in runs[1:]:
        for name in ("loss", "grad_norm", "rewards_mean"):
            assert of(done, name) == pytest.approx(of(runs[0], name), abs=1e-5), name


def test_gradient_checkpointing_changes_nothing(ftrun):
    words = ("stage=grpo", *SMALL, "train.max_steps=2", "optimizer.lr=1e-2", "train.warmup=0", "data.rows=8")
    usual, checkpointed = ftrun(*words).sees(0), ftrun(*words, "train.gradient_checkpointing=true").sees(0)
    for name in ("loss", "grad_norm", "rewards_mean"):
        assert of(checkpointed, name) == pytest.approx(of(usual, name), abs=1e-6)


def test_every_row_is_asked_in_an_epoch(ftrun):
    done = ftrun("stage=grpo", *SMALL, "data.rows=7", "train.epochs=2").sees(0)
    assert done.result.step == 8  # two questions a step: four steps an epoch, the last one filled up


def test_a_stopped_run_goes_on(ftrun, write):
    stopper = REWARD.replace("return [", "self.stop(); return [").replace(
        "    def score",
        "    def stop(self):\n"
        "        import os, signal\n"
        "        self.asked = getattr(self, 'asked', 0) + 1\n"
        "        if self.asked == 4: os.kill(os.getpid(), signal.SIGTERM)\n\n"
        "    def score",
    )
    write("letters.py", stopper)
    words = ("stage=rloo", *SMALL, "train.max_steps=12", "stage.steps_per_generation=3", "output_dir=stopped")
    stopped = ftrun(*words).sees(75)
    assert 0 < stopped.result.step < 12
    assert ftrun("resume", "stopped").sees(0).result.step == 12


@pytest.mark.parametrize(
    ("words", "key", "fix"),
    [
        (("train.micro_batch_size=6",), "train.micro_batch_size", "train.micro_batch_size=8"),
        (("train.grad_accumulation=3", "stage.steps_per_generation=2"), "stage.steps_per_generation", "3, or"),
        (("stage.loss=cispo",), "stage.epsilon_high", "stage.epsilon_high=5"),
        (("stage.loss=luspo",), "stage.importance_sampling_level", "sequence"),
        (("stage.importance_sampling_level=sequence",), "stage.loss", "stage.loss=grpo"),
        (("stage.sapo_temperature_pos=2",), "stage.sapo_temperature_pos", "stage.loss=sapo"),
        (("train.neftune=5",), "train.neftune", "leave train.neftune out"),
        (("train.padding_free=true",), "train.padding_free", "leave train.padding_free out"),
        (("train.group_by_length=true",), "train.group_by_length", "leave train.group_by_length out"),
        (("train.micro_batch_tokens=4096",), "train.micro_batch_tokens", "leave train.micro_batch_tokens out"),
        (("data.packing=best_fit",), "data.packing", "leave data.packing out"),
        (("stage=online_dpo", "train.micro_batch_size=7"), "train.micro_batch_size", "train.micro_batch_size=8"),
        (("stage.reference=copy",), "stage.reference", "stage.beta= more than 0"),
        (("train.keep_best=true", "train.eval_every=1", "objective_mode=min"), "objective_mode", "objective_mode=max"),
        (("stage=rloo", "stage.reward_clip_range=[1]"), "stage.reward_clip_range", "[LOWEST,HIGHEST]"),
    ],
)
def test_what_would_go_wrong_is_refused(driver, words, key, fix):
    given = words if words[0].startswith("stage=") else ("stage=grpo", *words)
    done = driver("check", *SMALL, *given).sees(2)
    assert key in done.out + done.err
    assert fix in done.out + done.err


def test_the_best_evaluation_is_kept(ftrun):
    best = ("train.keep_best=true", "train.eval_every=2", "objective_mode=max", "optimizer.lr=1e-2", "adapter=full")
    done = ftrun("stage=grpo", *SMALL, *best, "train.max_steps=6").sees(0)
    assert done.result.status == "completed"


def test_an_adapter_on_the_head_is_refused(ftrun):
    done = ftrun("stage=grpo", *SMALL, "adapter.targets=[q_proj,lm_head]").sees(2)
    assert "adapter.targets" in done.err
