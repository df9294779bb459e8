"""What users of Hydra rely on: recipes, presets that derive from one another, lists, references; and who wins."""

from __future__ import annotations

import os

import pytest

from ftrun import config, options, plugin
from ftrun.config import Config
from ftrun.errors import ConfigError

GLOBAL = "# @package _global_\n"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """Compose in a folder without a conf/."""
    monkeypatch.chdir(tmp_path)


def composed(*overrides: str) -> Config:
    return config.compose(overrides)


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.compose(overrides)
    return [str(problem) for problem in caught.value.problems]


def test_without_a_word_the_defaults_are_those_of_the_primary_config():
    cfg = composed()
    assert (cfg.stage.name, cfg.adapter.name, cfg.quant.name, cfg.optimizer.name) == ("sft", "lora", "none", "adamw")
    assert list(cfg.tracker) == ["none"]
    assert cfg.model.path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert cfg.data.path == "demo:identity"
    assert (cfg.seed, cfg.objective, cfg.output_dir, cfg.plugins) == (42, None, None, [])


@pytest.mark.parametrize("group", ["method", "experiment", "debug"])
def test_a_recipe_sets_options_and_values_and_the_command_line_wins(group, write):
    write(
        f"conf/{group}/mine.yaml",
        GLOBAL + "defaults:\n  - override /stage: dpo\n  - override /adapter: full\n  - override /hardware: cpu\n"
        "train:\n  epochs: 7\n  warmup: 0.2\noptimizer:\n  lr: 0.125\nseed: 5\n",
    )
    cfg = composed(f"{group}=mine")
    assert (cfg.stage.name, cfg.adapter.name, cfg.hardware.device) == ("dpo", "full", "cpu")
    assert (cfg.train.epochs, cfg.train.warmup, cfg.optimizer.lr, cfg.seed) == (7, 0.2, 0.125, 5)
    assert cfg.data.path == "demo:preferences", "the default data is the stage's"

    for order in (1, -1):
        typed = (f"{group}=mine", "stage=sft", "adapter=lora", "train.epochs=2", "seed=6")[::order]
        cfg = composed(*typed)
        assert (cfg.stage.name, cfg.adapter.name, cfg.hardware.device) == ("sft", "lora", "cpu")
        assert (cfg.train.epochs, cfg.train.warmup, cfg.optimizer.lr, cfg.seed) == (2, 0.2, 0.125, 6)


def test_later_recipes_win_over_earlier_ones(write):
    for group, epochs in (("method", 3), ("experiment", 4), ("debug", 5)):
        write(f"conf/{group}/mine.yaml", f"{GLOBAL}train:\n  epochs: {epochs}\n  log_every: {epochs}0\n")
    write("conf/debug/mine.yaml", f"{GLOBAL}train:\n  log_every: 50\n")
    cfg = composed("debug=mine", "experiment=mine", "method=mine")
    assert (cfg.train.epochs, cfg.train.log_every) == (4, 50), "method, then experiment, then debug, however typed"


def test_a_recipe_wins_over_a_preset_that_it_does_not_choose(write):
    write("conf/experiment/mine.yaml", f"{GLOBAL}train:\n  micro_batch_size: 2\n")
    write("conf/train/big.yaml", "micro_batch_size: 64\nepochs: 9\n")
    cfg = composed("experiment=mine", "train=big")
    assert (cfg.train.micro_batch_size, cfg.train.epochs) == (2, 9)


def test_several_recipes_of_one_group(write):
    write("conf/debug/one.yaml", f"{GLOBAL}train:\n  max_steps: 3\nseed: 1\n")
    write("conf/debug/two.yaml", f"{GLOBAL}seed: 2\n")
    cfg = composed("debug=[one,two]")
    assert (cfg.train.max_steps, cfg.seed) == (3, 2)


def test_a_recipe_that_derives_from_another(write):
    write(
        "conf/experiment/base.yaml", f"{GLOBAL}defaults:\n  - override /adapter: full\nseed: 1\ntrain:\n  epochs: 4\n"
    )
    write("conf/experiment/more.yaml", f"{GLOBAL}defaults:\n  - base\n  - _self_\nseed: 2\n")
    cfg = composed("experiment=more")
    assert (cfg.adapter.name, cfg.seed, cfg.train.epochs) == ("full", 2, 4)


def test_a_preset_that_derives_from_a_plugin_is_that_plugin(write):
    write("conf/optimizer/mine.yaml", "defaults: [adamw, _self_]\nbeta2: 0.95\nlr: 1.0e-3\n")
    write("conf/optimizer/sharper.yaml", "defaults: [mine, _self_]\nlr: 2.0e-3\n")
    cfg = composed("optimizer=mine")
    assert type(cfg.optimizer) is plugin.get("optimizer", "adamw")
    assert (cfg.optimizer.name, cfg.optimizer.beta2, cfg.optimizer.lr) == ("adamw", 0.95, 1e-3)
    cfg = composed("optimizer=sharper", "optimizer.beta1=0.5")
    assert (cfg.optimizer.beta1, cfg.optimizer.beta2, cfg.optimizer.lr) == (0.5, 0.95, 2e-3)


def test_a_preset_of_another_plugin_brings_its_keys(write):
    write("conf/adapter/top.yaml", "defaults: [freeze, _self_]\nlayers: 1\nextra: [lm_head]\n")
    cfg = composed("adapter=top", "adapter.modules=[mlp]")
    assert (cfg.adapter.name, cfg.adapter.layers, cfg.adapter.extra, cfg.adapter.modules) == (
        "freeze", 1, ["lm_head"], ["mlp"],
    )  # fmt: skip
    assert "adapter.rank: is not a key" in problems("adapter=top", "adapter.rank=4")[0]


def test_a_preset_of_a_tracker(write):
    write(
        "conf/tracker/board.yaml",
        "# @package tracker.tensorboard\ndefaults: [tensorboard, _self_]\nfolder: elsewhere\n",
    )
    cfg = composed("tracker=board")
    assert {name: tracker.folder for name, tracker in cfg.tracker.items()} == {"tensorboard": "elsewhere"}


def test_several_trackers_have_their_keys_side_by_side(write):
    write("loud.py", _tracker_file("loud", "volume: int = 3"))
    cfg = composed(
        "plugins=[loud.py]", "tracker=[tensorboard,loud]", "tracker.loud.volume=11", "tracker.tensorboard.folder=x"
    )
    assert list(cfg.tracker) == ["tensorboard", "loud"]
    assert cfg.tracker["tensorboard"].folder == "x"
    assert cfg.tracker["loud"].volume == 11
    assert [option.name for option in cfg.chosen][-2:] == ["tensorboard", "loud"]


def _tracker_file(name: str, body: str) -> str:
    return (
        "from dataclasses import dataclass\nfrom ftrun.plugin import Tracker, register\n\n@register\n"
        f'@dataclass(kw_only=True)\nclass Mine(Tracker):\n    name: str = "{name}"\n    {body}\n'
    )


def test_a_plugin_file_may_stand_behind_the_option_it_defines(write):
    write("calm.py", _tracker_file("calm", "volume: int = 3"))
    for typed in (("plugins=[calm.py]", "tracker=calm"), ("tracker=calm", "plugins=[calm.py]")):
        assert composed(*typed).tracker["calm"].volume == 3


def test_a_presets_own_size_is_the_default_and_another_can_be_typed():
    assert composed("model=qwen2").model.path == "Qwen/Qwen2-0.5B-Instruct"
    cfg = composed("model=qwen2", "model.size=7B")
    assert (cfg.model.path, cfg.model.size, cfg.model.sizes) == ("Qwen/Qwen2-7B-Instruct", "7B", {})
    assert composed("model=qwen2", "model.path=somewhere/else").model.path == "somewhere/else"


def test_values_refer_to_other_keys(write):
    assert composed("seed=7", "train.max_steps=${seed}").train.max_steps == 7
    assert composed("stage=dpo", "output_dir=runs/${stage.name}_${optimizer.beta1}").output_dir == "runs/dpo_0.9"
    write(
        "conf/train/mine.yaml", "micro_batch_size: ${hardware.data_workers}\ngrad_accumulation: ${.micro_batch_size}\n"
    )
    cfg = composed("train=mine", "hardware.data_workers=3")
    assert (cfg.train.micro_batch_size, cfg.train.grad_accumulation) == (3, 3)


def test_values_refer_to_the_environment(monkeypatch):
    monkeypatch.setenv("FTRUN_TEST_FOLDER", "there")
    assert composed("output_dir=${oc.env:FTRUN_TEST_FOLDER}/run").output_dir == "there/run"
    assert composed("output_dir=${oc.env:FTRUN_TEST_NOT_SET,here}").output_dir == "here"


def test_a_reference_is_checked_as_what_it_refers_to():
    assert problems("seed=0", "train.max_steps=${seed}") == problems("train.max_steps=0")


def test_several_sources_of_rows():
    cfg = composed("data.sources=[{path:a.jsonl,weight:2},{path:'demo:identity',rows:3},{path:org/name}]")
    assert [(source.path, source.weight, source.rows) for source in cfg.data.sources] == [
        ("a.jsonl", 2.0, None), ("demo:identity", 1.0, 3), ("org/name", 1.0, None),
    ]  # fmt: skip
    assert cfg.data.path is None, "the stage's own data is not put beside the user's"


def test_sources_in_a_preset(write):
    write("conf/data/mix.yaml", "sources:\n  - path: demo:identity\n  - {path: demo:questions, weight: 0.5}\n")
    cfg = composed("data=mix", "data.max_length=64")
    assert [source.weight for source in cfg.data.sources] == [1.0, 0.5]
    assert cfg.data.max_length == 64


def test_lists_replace_lists(write):
    assert composed("adapter.targets=[q_proj,v_proj]").adapter.targets == ["q_proj", "v_proj"]
    assert composed("adapter.targets=[]").adapter.targets == []
    write("conf/adapter/mine.yaml", "defaults: [lora, _self_]\ntargets: [k_proj]\n")
    assert composed("adapter=mine").adapter.targets == ["k_proj"]
    assert composed("adapter=mine", "adapter.targets=[q_proj]").adapter.targets == ["q_proj"]


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ("stage=sft adapter=full", 5e-5),
        ("stage=sft adapter=lora", 5e-4),
        ("stage=pt adapter=freeze", 5e-5),
        ("stage=dpo adapter=full", 1e-6),
        ("stage=dpo adapter=lora", 1e-5),
        ("stage=dpo adapter=lora optimizer.lr=3e-6", 3e-6),
        ("stage=dpo optimizer.lr=null", 1e-5),
    ],
)
def test_the_learning_rate_is_the_stages_times_the_adapters(words, rate):
    assert composed(*words.split()).optimizer.lr == pytest.approx(rate, rel=1e-12)


def test_a_default_learning_rate_is_a_round_number():
    assert "lr: 1.0e-05\n" in composed("stage=dpo", "adapter=lora").to_yaml()


def test_a_preset_of_ones_own_may_offer_sizes(write):
    write("conf/model/mine.yaml", "size: small\nsizes:\n  small: org/small\n  large: org/large\n")
    assert composed("model=mine").model.path == "org/small"
    assert composed("model=mine", "model.size=large").model.path == "org/large"


def test_text_may_be_quoted_and_may_hold_anything(write):
    for text in ("a b", "a,b", "a=b", "[a]", "{a: b}", "ä", "it's", 'say "x"', "null", "3", "true", "a: b", "#x", "$x"):
        quoted = text.replace("'", "\\'")
        assert composed(f"output_dir='{quoted}'").output_dir == text
    assert composed("data.path=a b/c d.jsonl").data.path == "a b/c d.jsonl"
    assert composed("output_dir=2026-01-02").output_dir == "2026-01-02"
    assert composed("objective=null").objective is None


def test_the_metrics_of_an_evaluation_set_may_be_the_objective(write):
    words = ("data.eval_sets={math: held_out.jsonl}", "objective=eval_math_loss")
    assert composed(*words).objective == "eval_math_loss"
    assert composed("data.eval_sets.math=held_out.jsonl", words[1]).data.eval_sets == {"math": "held_out.jsonl"}


def test_the_last_of_two_wins():
    cfg = composed("seed=1", "stage=dpo", "seed=2", "stage=sft")
    assert (cfg.seed, cfg.stage.name) == (2, "sft")


def test_plus_plus_sets_a_key_that_there_is():
    cfg = composed("++seed=3", "++optimizer.beta1=0.5")
    assert (cfg.seed, cfg.optimizer.beta1) == (3, 0.5)


def _other_app(write) -> None:
    """Lay out the conf/ of another Hydra application, as templates for training networks have it."""
    write("conf/config.yaml", "defaults:\n  - model: resnet\n  - hydra: default\n  - _self_\nbatch: 3\n")
    write("conf/model/resnet.yaml", "_target_: torchvision.models.resnet18\nlayers: 18\n")
    write("conf/db/mysql.yaml", "host: localhost\n")
    write("conf/hydra/default.yaml", "run:\n  dir: ${paths.log_dir}\n")
    write("conf/hydra/job_logging/default.yaml", "version: ${nothing.there}\n")
    write("conf/hydra/launcher/basic.yaml", "nonsense: 1\n")
    write("conf/hydra/output/default.yaml", "run: nonsense\n")
    write("conf/broken.yaml", "a: [\n")


def test_another_apps_conf_does_no_harm(write):
    plain = composed("model=tiny").to_yaml()
    _other_app(write)
    assert composed("model=tiny").to_yaml() == plain
    assert (options.CONF / "model" / "qwen2.yaml").exists()
    assert composed("model=qwen2").model.path == "Qwen/Qwen2-0.5B-Instruct"
    (problem,) = problems("model=resnet")
    assert "conf/model/resnet.yaml" in problem, "what cannot be meant is refused by its file's name"


@pytest.mark.parametrize("name", ["ftrun", "schema", "config"])
def test_another_apps_primary_config_may_have_the_name_of_ours(name, write):
    plain = composed("model=tiny").to_yaml()
    write(f"conf/{name}.yaml", "batch: 3\n")
    assert composed("model=tiny").to_yaml() == plain


def test_a_file_in_the_place_of_conf_does_no_harm(write):
    write("conf", "not a folder")
    assert composed("model=tiny").model.path == "builtin:tiny"


def test_ftruns_own_checkout_is_no_working_conf(monkeypatch):
    monkeypatch.chdir(options.CONF.parent)
    assert options.working_conf() is None
    assert options.conf_folders() == [options.CONF]
    assert composed("model=tiny").model.path == "builtin:tiny"


def test_composing_leaves_no_trace(write):
    """A driver composes many times in one process, in one folder and another."""
    first = composed("stage=dpo", "adapter=full", "seed=3").to_yaml()
    write("conf/train/default.yaml", "epochs: 9\n")
    assert composed().train.epochs == 9
    os.remove("conf/train/default.yaml")
    assert composed().train.epochs == 3
    problems("stage=nothing")
    problems("train.epochs=many")
    assert composed("stage=dpo", "adapter=full", "seed=3").to_yaml() == first


def test_a_config_is_given_as_far_as_it_goes_beside_what_is_wrong():
    cfg, found = config.examine(["seed=many", "train.epochs=2", "optimizer.nothing=1", "data.rows=4"])
    assert [problem.key for problem in found] == ["seed", "optimizer.nothing"]
    assert cfg is not None
    assert (cfg.seed, cfg.train.epochs, cfg.data.rows) == (42, 2, 4)
