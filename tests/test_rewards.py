"""Rewards are chosen like trackers, several at a time; their stage names one where nothing is said."""

from __future__ import annotations

import pytest
import torch
import yaml

from ftrun import config, plugin
from ftrun.completion import candidates
from ftrun.completions import Completion
from ftrun.config import Config
from ftrun.errors import ConfigError, RunFailed
from ftrun.plugin import PluginError, Reward
from ftrun_plugins.reward.count import Count, Measure
from ftrun_plugins.reward.exact import Exact

JUDGED = '''
"""A stage for tests."""

from dataclasses import dataclass
from typing import ClassVar

from ftrun.plugin import Stage, register


@register
@dataclass(kw_only=True)
class Judged(Stage):
    """Judge a reply to each row, and train nothing."""

    name: str = "judged"
    default_data: ClassVar[str] = "demo:questions"
    default_reward: ClassVar[str] = "DEFAULT"
    rows: ClassVar[str] = "questions"
    reads: ClassVar[tuple[str, ...]] = ("model.*", "template.*", "data.*", "train.*")

    def run(self, cfg):
        from ftrun.completions import Completion
        from ftrun.record import Result
        from ftrun.worker import training
        from ftrun.worker.rewarding import Rewards

        model, run = training.prepare(cfg)
        replies = []
        for row in run.rows.train:
            extra = row["extra"]
            text = f"The answer is {extra['answer']}."
            ids = run.tokenizer.encode(text, add_special_tokens=False)
            replies.append(Completion(prompt=extra["prompt"], answer=extra["answer"], text=text, finished=True,
                                      prompt_ids=list(row["input_ids"]), ids=ids))
        total, raw = Rewards(cfg.reward, run, model)(replies)
        metrics = {"total": float(total.mean())} | {name: float(values.mean()) for name, values in raw.items()}
        return Result(metrics=metrics)
'''.lstrip()

WORDS = ("plugins=[judged.py]", "stage=judged", "model=tiny", "hardware=cpu", "data.rows=8")


@pytest.fixture(autouse=True)
def _stage(write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write("judged.py", JUDGED.replace("DEFAULT", "math"))
    yield
    plugin.forget_files()


def reply(text: str = "", answer: object = None, ids: tuple[int, ...] = ()) -> Completion:
    return Completion(prompt=[], answer=answer, text=text, prompt_ids=[], ids=list(ids), finished=True)


# the config


def test_a_stage_that_has_replies_judged_names_a_reward():
    assert list(config.compose(WORDS).reward) == ["math"]
    assert list(config.compose([*WORDS, "reward=null"]).reward) == ["math"]


def test_several_rewards_have_their_keys_side_by_side():
    cfg = config.compose(
        [*WORDS, "reward=[format,count]", "reward.format.weight=0.5", "reward.count.text=ab", "reward.count.weight=-1"]
    )
    assert list(cfg.reward) == ["format", "count"]
    assert [reward.weight for reward in cfg.reward.values()] == [0.5, -1.0]
    assert cfg.reward["count"] == Count(text="ab", weight=-1.0)
    assert [*cfg.reward.values()] == cfg.chosen[-2:]


def test_rewards_are_frozen_and_read_back(tmp_path):
    for words in (WORDS, (*WORDS, "reward=[exact,format]", "reward.exact.ignore_case=false")):
        cfg = config.compose(words)
        cfg.save(tmp_path / "run.yaml")
        again = Config.load(tmp_path / "run.yaml")
        assert again.to_yaml() == cfg.to_yaml()
        assert again.reward == cfg.reward
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())["reward"]
    assert {name: keys["name"] for name, keys in written.items()} == {"exact": "exact", "format": "format"}
    assert written["exact"]["ignore_case"] is False
    assert written["exact"]["weight"] == 1.0


def test_a_damaged_run_file_is_refused(tmp_path):
    config.compose(WORDS).save(tmp_path / "run.yaml")
    text = (tmp_path / "run.yaml").read_text()
    for old, new, why in (
        ("reward:\n  math:", "reward:\n  maths:", "no plugin reward=maths is installed"),
        ("    tolerance: 0.0", "    tolerance: a bit", "is damaged: reward.math.tolerance"),
        (
            "reward:\n  math:\n    name: math\n    weight: 1.0\n    tolerance: 0.0",
            "reward: []",
            "reward is not NAME: KEYS",
        ),
    ):
        assert old in text
        (tmp_path / "run.yaml").write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=why):
            Config.load(tmp_path / "run.yaml")


def test_a_preset_of_a_reward(write):
    write("conf/reward/strict.yaml", "# @package reward.exact\ndefaults: [exact, _self_]\nignore_case: false\n")
    assert config.compose([*WORDS, "reward=strict"]).reward == {"exact": Exact(ignore_case=False)}
    write("conf/reward/strict.yaml", "defaults: [exact, _self_]\nignore_case: false\n")
    with pytest.raises(
        ConfigError, match=r"would set keys of all rewards\n +fix: begin it with # @package reward\.exact"
    ):
        config.compose([*WORDS, "reward=strict"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["stage=sft", "reward=math"], r"reward: stage=sft writes no replies, .*\n +fix: leave reward=\.\.\. out"),
        ([*WORDS, "reward=maths"], r"reward: there is no reward maths; did you mean math"),
        ([*WORDS, "reward=[math,frmat]"], r"reward: there is no reward frmat; did you mean format"),
        ([*WORDS, "reward.format.pattern=x"], r"reward\.format\.pattern: reward=format is not chosen in this run\n"
                                              r" +fix: reward=format reward\.format\.pattern="),
        ([*WORDS, "reward.fromat.pattern=x"], r"there is no reward fromat; did you mean format"),
        ([*WORDS, "reward=math", "reward.math.tolerence=1"], r"is not a key of reward=math; did you mean"),
        ([*WORDS, "reward=math", "reward.math.tolerance=-1"], r"reward\.math\.tolerance: -1\.0 is out of range"),
        ([*WORDS, "reward=math", "reward.math.name=x"], r"reward\.math\.name: is set by what is chosen"),
        ([*WORDS, "reward=http"], r"reward\.http\.url: has no value"),
        ([*WORDS, "reward=format", "reward.format.pattern='('"], r"reward\.format\.pattern: is no regular expression"),
        ([*WORDS, "reward=count", "reward.count.most=3"], r"reward\.count\.most: is not read with measure=share"),
        ([*WORDS, "reward=overlong"], r"reward\.overlong\.max_tokens: stage=judged does not say how long"),
    ],
)  # fmt: skip
def test_mistakes_are_named(words, problem):
    with pytest.raises(ConfigError, match=problem):
        config.compose(words)


def test_a_stage_on_questions_needs_a_reward(write):
    write("judged.py", JUDGED.replace("DEFAULT", ""))
    with pytest.raises(
        ConfigError, match=r"reward: stage=judged learns from what its replies are worth.*\n +fix: reward="
    ):
        config.compose(WORDS)


# what prints it


def test_help_and_listings_know_rewards(driver):
    page = driver(*WORDS, "reward=[math,count]", "--help").sees(0).out
    assert "reward=math  1 for a reply whose result is the row's answer" in page
    assert "reward.count.text" in page
    assert "reward.count.weight" in driver("list", "reward=count").sees(0).out
    assert "count" in driver("list", "reward").sees(0).out
    assert "reward" in driver("--help").sees(0).out
    shown = yaml.safe_load(driver("show", *WORDS).sees(0).out)
    assert shown["reward"]["math"] == {"name": "math", "weight": 1.0, "tolerance": 0.0}
    assert yaml.safe_load(driver("show").sees(0).out)["reward"] == {}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["reward=rep"], ["reward=repetition"]),
        (["reward=math", "reward."], ["reward.math.tolerance=", "reward.math.weight="]),
        (["reward=[math,format]", "reward.format.p"], ["reward.format.pattern="]),
        (["reward=count", "reward.count.measure=n"], ["reward.count.measure=number"]),
        (["reward.nothing.x="], []),
    ],
)
def test_completion_knows_rewards(words, found):
    assert candidates(words) == found


# a reward of one's own, and the sum

SHORT = '''
"""Rewards of somebody's own."""

from dataclasses import dataclass

from ftrun.plugin import Reward, register


@register
@dataclass(kw_only=True)
class Short(Reward):
    """Half a point for a reply of at most so many words; nothing is said of one without a word."""

    name: str = "short"

    words: int = 3
    """How many."""

    def score(self, completions):
        return [None if not c.text else 0.5 * (len(c.text.split()) <= self.words) for c in completions]
'''.lstrip()


def test_a_reward_from_a_file_of_ones_own(ftrun, write):
    write("short.py", SHORT)
    words = ("plugins=[judged.py,short.py]", *WORDS[1:], "reward=[math,short]", "reward.short.words=4")
    done = ftrun(*words, "reward.short.weight=-2").sees(0)
    assert done.result.metrics == {"total": 0.0, "math": 1.0, "short": 0.5}
    assert Config.load(done.folder / "run.yaml").reward["short"].weight == -2


def test_the_sum_of_rewards():
    from ftrun.worker.rewarding import Rewards

    rewards = {"exact": Exact(weight=2.0), "count": Count(text="a", measure=Measure.number, weight=-0.5)}
    total, raw = Rewards(rewards, None, None)([reply("aba", "aba"), reply("aba", None), reply("b", "a")])
    assert total.dtype == raw["exact"].dtype == torch.float32
    assert total.tolist() == [1.0, -1.0, 0.0]
    assert raw["exact"].tolist()[::2] == [1.0, 0.0]
    assert raw["exact"][1].isnan()
    assert raw["count"].tolist() == [2.0, 2.0, 0.0]
    empty, raw = Rewards(rewards, None, None)([])
    assert empty.shape == raw["exact"].shape == (0,)


@pytest.mark.parametrize(
    ("values", "why"),
    [([1.0], r"reward=bad gives 1 values for 2 replies"), ([1.0, float("nan")], r"reward=bad gives nan for a reply")],
)
def test_a_reward_that_says_nonsense_ends_the_run(values, why):
    from ftrun.worker.rewarding import Rewards

    class Bad(Reward):
        def score(self, completions):
            return values

    with pytest.raises(RunFailed, match=why):
        Rewards({"bad": Bad(name="bad")}, None, None)([reply(), reply()])


def test_rewards_are_prepared_once():
    from ftrun.worker.rewarding import Rewards

    seen = []

    class Seen(Reward):
        def prepare(self, run, model):
            seen.append((run, model))

        def score(self, completions):
            return [0.0] * len(completions)

    judge = Rewards({"seen": Seen(name="seen")}, "run", "model")
    judge([reply()])
    judge([reply()])
    assert seen == [("run", "model")]


def test_a_reward_in_a_file_needs_a_name(write):
    path = write("short.py", SHORT.replace('    name: str = "short"\n', ""))
    with pytest.raises(PluginError, match="has no name"):
        plugin.load_file(path)
