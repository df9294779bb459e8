"""A reward model gives the score that transformers computes from its files, with its own template or the policy's."""

from __future__ import annotations

import pytest
import torch

from ftrun import config, launch, record
from ftrun.config import Config
from ftrun.conformance import RewardSuite
from ftrun.errors import ConfigError
from ftrun.worker import builtin, loading, scoring
from ftrun_plugins.reward._learned import Judge


class TestModel(RewardSuite):
    option = "model"

    @pytest.fixture(autouse=True)
    def _path(self, judged):
        type(self).overrides = (f"reward.model.path={judged['lora']}",)


POLICY = ("stage=ppo", "model=tiny", "hardware=cpu", "data.rows=8", "train.max_steps=2")


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_score_is_what_the_files_give(judged, adapter, policy_run, replies_of):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    run = policy_run("reward=model", f"reward.model.path={judged[adapter]}")
    reward, asked = run.cfg.reward["model"], replies_of(run.tokenizer, "An apple.", "Stones, and more stones.", "")
    reward.prepare(run, loading.model(run.cfg, run.tokenizer))
    found = reward.score(asked)

    files, causal = judged[adapter] / record.MODEL, builtin.model({"dtype": torch.float32})
    model = AutoModelForSequenceClassification.from_pretrained(files if adapter == "full" else judged["full"] / "model")
    if adapter == "lora":
        model.model.load_state_dict(causal.model.state_dict())
        model = PeftModel.from_pretrained(model, files)
    wanted = []
    for one in asked:  # one at a time, so that transformers cannot take padding for the end
        ids = torch.tensor([[*one.prompt_ids, *one.ids]])
        with torch.no_grad():
            hidden = model.eval()(ids, output_hidden_states=True).hidden_states[-1][0, -1]
            wanted.append(float(model.score(hidden)))
    assert found == pytest.approx(wanted, abs=1e-4)
    assert len({round(value, 4) for value in found}) == 3


def test_replies_are_read_through_the_reward_models_own_template(judged, replies_of):
    scorer = scoring.load_scorer(judged["lora"])
    policy = builtin.tokenizer()
    asked, seen = replies_of(policy, "An apple."), []
    scorer.scores = lambda sequences, _: seen.extend(sequences) or [0.0]  # type: ignore[method-assign]
    Judge(scorer, scorer.tokenizer, policy, "key").scores(asked, 4)
    assert seen.pop() == [*asked[0].prompt_ids, *asked[0].ids]

    own = builtin.tokenizer()
    own.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    Judge(scorer, own, policy, "key").scores(asked, 4)
    assert own.decode(seen.pop()).split() == ["[user]", "Name", "a", "fruit.", "[assistant]", "An", "apple."]

    other = builtin.tokenizer()
    other.add_tokens(["zzz"])
    other.chat_template = None
    with pytest.raises(ConfigError, match=r"reward\.model\.path: its tokenizer is not the policy's"):
        Judge(scorer, other, policy, "reward.model.path")


def test_where_it_is_found_is_settled(judged, tmp_path, monkeypatch):
    monkeypatch.chdir(judged["lora"].parent)
    words = [*POLICY, "reward=model", "reward.model.path=lora", f"output_dir={tmp_path / 'policy'}"]
    cfg = Config.load(launch.freeze(launch.check(words), words) / record.RUN)
    assert cfg.reward["model"].path == str(judged["lora"])
    assert cfg.reward["model"].source == "run"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["reward.model.path=nowhere/at/all"], r"reward\.model\.path: there is no folder or file nowhere/at/all"),
        (["reward.model.path={sft}"], r"reward\.model\.path: .* is a run of stage=sft, which trains no score head"),
        (["reward.model.path={lora}", "reward.model.revision=abc"], r"reward\.model\.revision: .* is not on the hub"),
        (["reward.model.path=''"], r"reward\.model\.path: has no value"),
    ],
)
def test_what_is_no_reward_model_is_refused_before_anything_is_loaded(words, problem, judged, tmp_path):
    cfg = config.compose(["stage=sft", "model=tiny", f"output_dir={tmp_path / 'sft'}"])
    (tmp_path / "sft" / "model").mkdir(parents=True)
    cfg.save(tmp_path / "sft" / record.RUN)
    for file in (judged["full"] / record.MODEL).iterdir():
        (tmp_path / "sft" / "model" / file.name).symlink_to(file)
    places = {"sft": tmp_path / "sft", "lora": judged["lora"]}
    with pytest.raises(ConfigError, match=problem):
        launch.check([*POLICY, "reward=model", *(word.format(**places) for word in words)])


def test_a_causal_model_is_no_reward_model(policy_run, tmp_path):
    builtin.model({"dtype": torch.float32}).save_pretrained(tmp_path / "causal")
    builtin.tokenizer().save_pretrained(tmp_path / "causal")
    run = policy_run("reward=model", f"reward.model.path={tmp_path / 'causal'}")
    with pytest.raises(ConfigError, match=r"reward\.model\.path: .* has no score head"):
        run.cfg.reward["model"].prepare(run, loading.model(run.cfg, run.tokenizer))


def test_a_policy_trains_on_it(ftrun, judged):
    words = (*POLICY, "reward=[model,length]", f"reward.model.path={judged['full']}", "stage.max_new_tokens=8")
    metrics = ftrun(*words, "data.eval_size=2").sees(0).result.metrics
    assert {"rewards_mean", "rewards_model", "rewards_length"} <= set(metrics)
