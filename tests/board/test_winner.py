"""The winner as an experiment: composing it gives the config that won."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from ftrun import board, config, hardware, launch
from ftrun.board import winner
from ftrun.config import Config
from ftrun.errors import ConfigError


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def settled(*words: str) -> Config:
    cfg = config.compose(words)
    hardware.settle(cfg.hardware, cfg.train, cfg.model.dtype)
    launch.settle(cfg)
    return cfg


@pytest.fixture
def frozen(sweep):
    """Write a sweep of one job for words and a point, with the config that they give."""

    def freeze(words: str, point: str, plugins: str = "") -> Config:
        folder = sweep.job(point, 1.5, seed=3)
        cfg = settled(*words.split(), *point.split(), "seed=3", *([plugins] if plugins else []))
        cfg.output_dir = str(folder)
        cfg.save(folder / "run.yaml")
        ask = [{"words": [*words.split(), *([plugins] if plugins else [])], "cwd": "/", "time": ""}]
        (sweep.folder / "sweep.yaml").write_text(yaml.safe_dump(ask))
        return cfg

    return freeze


def plain(cfg: Config) -> dict:
    tree = yaml.safe_load(cfg.to_yaml())
    return {key: value for key, value in tree.items() if key not in ("seed", "output_dir")}


CASES = [
    ("model=tiny hardware=cpu train.max_steps=4", "optimizer.lr=0.001 adapter.rank=4"),
    ("model=tiny train.precision=fp32", "optimizer=galore optimizer.rank=8 adapter=full"),
    ("model=tiny", "optimizer=apollo_mini adapter=full"),
    ("model=tiny stage=dpo stage.beta=0.3", "stage.loss=ipo data.max_length=512"),
    ("model=tiny", "method=rslora"),
    ("model=tiny experiment=identity debug=smoke", "train=one_epoch"),
    ("model=tiny template=chatml tracker=tensorboard", "data.train_on=last adapter.targets=[q_proj,v_proj]"),
    ("model=tiny", "data=text stage=pt"),
    ("model=tiny data.columns.prompt=question", "train.warmup=3"),
]


@pytest.mark.parametrize(("words", "point"), CASES)
def test_the_experiment_gives_the_winners_config_but_for_the_seed(frozen, sweep, tmp_path, words, point):
    won = frozen(words, point)
    (path,) = winner.write(board.load(sweep.folder), tmp_path / "conf")
    assert path == tmp_path / "conf" / "experiment" / "best_grid.yaml"
    again = settled("experiment=best_grid")
    assert plain(again) == plain(won)
    assert again.seed == 42


def test_it_chooses_options_and_sets_only_what_differs(frozen, sweep, tmp_path):
    frozen("model=tiny", "optimizer=galore optimizer.rank=8 adapter=full")
    (path,) = winner.write(board.load(sweep.folder), tmp_path / "conf")
    tree = yaml.safe_load(path.read_text())
    assert {"override /optimizer": "galore"} in tree["defaults"]
    assert {"override /model": "tiny"} in tree["defaults"]
    assert {name: value for name, value in tree.items() if name != "defaults"} == {"optimizer": {"rank": 8}}
    assert (
        path.read_text().splitlines()[1] == "# Written by ftrun: the winner of a sweep, grid: eval_loss 1.5, one seed."
    )


def test_a_plugin_file_is_named_in_the_command(frozen, sweep, write, tmp_path):
    write(
        "mine.py",
        "from dataclasses import dataclass\nfrom ftrun.plugin import register\n"
        "from ftrun_plugins.optimizer.adamw import AdamW\n"
        '@register\n@dataclass(kw_only=True)\nclass Mine(AdamW):\n    """Mine."""\n    name: str = "mine"\n',
    )
    frozen("model=tiny", "optimizer=mine", plugins="plugins=[mine.py]")
    folder = sweep.folder / "optimizer=mine,seed=3"
    shutil.copy(tmp_path / "mine.py", folder / "mine.py")
    (path,) = winner.write(board.load(sweep.folder), tmp_path / "conf")
    assert f"# ftrun plugins=['{folder / 'mine.py'}'] experiment=best_grid" in path.read_text().splitlines()
    assert settled(f"plugins=['{folder / 'mine.py'}']", "experiment=best_grid").optimizer.name == "mine"


def test_a_file_of_the_users_own_is_never_overwritten(frozen, sweep, write, tmp_path):
    frozen("model=tiny", "optimizer.lr=0.001")
    mine = write("conf/experiment/best_grid.yaml", "# @package _global_\nseed: 1\n")
    with pytest.raises(ConfigError, match="a file that ftrun did not write"):
        winner.write(board.load(sweep.folder), tmp_path / "conf")
    assert mine.read_text().endswith("seed: 1\n")
    mine.unlink()
    winner.write(board.load(sweep.folder), tmp_path / "conf")
    winner.write(board.load(sweep.folder), tmp_path / "conf")


def test_there_is_none_without_a_result(sweep, tmp_path):
    sweep.job("a=1", status="failed", reason="bad")
    assert winner.write(board.load(sweep.folder), tmp_path / "conf") == []
    assert not (tmp_path / "conf").exists()


def test_the_name_is_one_that_can_be_typed(tmp_path):
    assert winner.name_of(tmp_path / "optimizer.lr,adapter-3f2a") == "best_optimizer_lr_adapter_3f2a"
    assert json.dumps(winner.name_of(tmp_path / "ä b")) == '"best_b"'
