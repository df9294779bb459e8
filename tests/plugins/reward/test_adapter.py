"""A reward model's adapter beside the policy's gives the whole reward model's score, and leaves the policy alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from ftrun import launch, record
from ftrun.conformance import RewardSuite
from ftrun.errors import ConfigError
from ftrun.worker import loading, scoring

POLICY = ("stage=ppo", "model=tiny", "hardware=cpu", "data.rows=8", "train.max_steps=2", "adapter=lora")


class TestAdapter(RewardSuite):
    option = "adapter"

    @pytest.fixture(autouse=True)
    def _path(self, judged):
        type(self).overrides = ("adapter=lora", f"reward.adapter.path={judged['lora']}")


@pytest.mark.parametrize("where", ["run", "folder"])
def test_the_score_is_that_of_the_whole_model(judged, where, policy_run, replies_of):
    path = judged["lora"] if where == "run" else judged["lora"] / record.MODEL
    run = policy_run("adapter=lora", "reward=adapter", f"reward.adapter.path={path}")
    policy = run.cfg.adapter.apply(loading.model(run.cfg, run.tokenizer), run)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)  # a policy that has trained
    asked = replies_of(run.tokenizer, "An apple.", "Stones, and more stones.", "")
    ids = torch.tensor([asked[0].prompt_ids])
    before = policy(ids).logits
    trains = {name for name, weight in policy.named_parameters() if weight.requires_grad}

    reward = run.cfg.reward["adapter"]
    reward.prepare(run, policy)
    found = reward.score(asked)
    whole = scoring.load_scorer(judged["lora"])
    assert found == pytest.approx(whole.scores([[*one.prompt_ids, *one.ids] for one in asked]), abs=1e-4)
    assert torch.equal(policy(ids).logits, before)
    assert {name for name, weight in policy.named_parameters() if weight.requires_grad} == trains
    base = [weight for name, weight in policy.named_parameters() if "lora" not in name]
    alone = loading.model(run.cfg, run.tokenizer)
    assert sum(weight.numel() for weight in base) == sum(weight.numel() for weight in alone.parameters())


def test_a_policy_trains_on_it_and_is_saved_without_it(ftrun, judged, tmp_path):
    words = (*POLICY, "reward=adapter", f"reward.adapter.path={judged['lora']}", "stage.max_new_tokens=8")
    done = ftrun(*words).sees(0)
    assert "rewards_mean" in done.result.metrics
    saved = sorted(path.name for path in (done.folder / record.MODEL).rglob("*adapter_model*"))
    assert saved == ["adapter_model.safetensors"]


def test_a_resumed_policy_is_the_one_that_was_never_stopped(ftrun, judged):
    words = ("reward=adapter", f"reward.adapter.path={judged['lora']}", "stage.max_new_tokens=8", "adapter.dropout=0.2")
    words = (*words, "train.max_steps=4", "train.save_every=1", "train.keep_checkpoints=9")
    whole = ftrun(*(word for word in POLICY if "max_steps" not in word), *words).sees(0).folder
    stopped = whole.with_name("stopped")
    shutil.copytree(whole, stopped)
    for checkpoint in record.checkpoints(stopped)[2:]:
        shutil.rmtree(checkpoint)
    shutil.rmtree(stopped / record.MODEL)
    result = json.loads((stopped / record.RESULT).read_text())
    (stopped / record.RESULT).write_text(json.dumps(result | {"status": "interrupted"}))
    again = ftrun("resume", "stopped").sees(0)
    assert again.losses == [line["loss"] for line in record.read_lines(whole / record.METRICS) if "loss" in line]
    saved = [folder / record.MODEL / "adapter_model.safetensors" for folder in (stopped, whole)]
    assert saved[0].read_bytes() == saved[1].read_bytes()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["adapter=full", "reward.adapter.path={lora}"],
            r"reward: adapter=full changes .*\n +fix: adapter=lora",
        ),
        (["adapter.init=pissa", "reward.adapter.path={lora}"], r"reward: adapter=lora changes the weights"),
        (["reward.adapter.path={full}"], r"reward\.adapter\.path: .* holds no adapter.*\n +fix: reward=model "),
        (["reward.adapter.path=nowhere/at/all"], r"reward\.adapter\.path: there is no folder or file"),
    ],
)
def test_what_cannot_be_put_beside_the_policy_is_refused(words, problem, judged):
    with pytest.raises(ConfigError, match=problem):
        launch.check([*POLICY, "reward=adapter", *(word.format(**judged) for word in words)])


def test_an_adapter_of_another_base_is_refused(judged, policy_run, tmp_path):
    shutil.copytree(judged["lora"] / record.MODEL, tmp_path / "other")
    config = tmp_path / "other" / "adapter_config.json"
    named = config.read_text()
    assert "builtin:tiny" in named
    config.write_text(named.replace("builtin:tiny", "mine/base"))
    run = policy_run("adapter=lora", "reward=adapter", f"reward.adapter.path={tmp_path / 'other'}")
    policy = run.cfg.adapter.apply(loading.model(run.cfg, run.tokenizer), run)
    with pytest.raises(ConfigError, match=r"trained on mine/base, and the policy starts from builtin:tiny"):
        run.cfg.reward["adapter"].prepare(run, policy)
