"""Grids: every combination once, and each the config that its words give."""

from __future__ import annotations

import pytest

from ftrun import compose, config
from ftrun.errors import ConfigError
from ftrun.sweep import freeze, run
from ftrun.sweep.points import Point, expand, grid


def every(*words: str) -> list[Point]:
    return list(grid(expand(words)).points())


def points(*words: str) -> list[tuple[str, ...]]:
    return [point.overrides for point in every(*words)]


def test_every_combination_once_the_last_word_fastest():
    assert points("adapter=lora,full", "model=tiny", "seed=range(1,3)") == [
        ("adapter=lora", "seed=1"), ("adapter=lora", "seed=2"), ("adapter=full", "seed=1"), ("adapter=full", "seed=2"),
    ]  # fmt: skip
    assert points("optimizer.lr=choice(1e-4,5e-4)") == [("optimizer.lr=0.0001",), ("optimizer.lr=0.0005",)]
    assert points("adapter=glob(f*)") == [("adapter=freeze",), ("adapter=full",)]
    assert points("adapter.targets=[q_proj],[k_proj,v_proj]") == [
        ("adapter.targets=[q_proj]",), ("adapter.targets=[k_proj,v_proj]",),
    ]  # fmt: skip
    assert points("model=tiny") == [()]


def test_a_file_gives_the_grid_and_what_is_typed_wins():
    assert len(points("sweep=lora_rank")) == 9
    assert points("sweep=lora_rank", "seed=7") == [("adapter.rank=4",), ("adapter.rank=16",), ("adapter.rank=64",)]
    (point,) = every("sweep=lora_rank", "seed=7", "adapter.rank=8")
    assert point.words == ("seed=7", "adapter.rank=8", "adapter.alpha=32")


@pytest.mark.parametrize("name", ["lora_rank", "learning_rate"])
def test_every_shipped_sweep_is_free_of_problems(name):
    assert run.check([f"sweep={name}", "model=tiny"])


def test_the_working_folders_own_sweeps_are_found_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "lora_rank.yaml").write_text("adapter.rank: 2,3\n")
    assert points("sweep=lora_rank") == [("adapter.rank=2",), ("adapter.rank=3",)]


VARIED = [
    ("adapter=lora,full", "seed=range(1,4)", "optimizer.lr=1e-4,null", "train.scheduler=cosine,linear"),
    ("data.columns.prompt=a,b", "seed=${data.max_length},7", "adapter.targets=[q_proj],[k_proj,v_proj]"),
    ("model=tiny,qwen2", "train.epochs=1,2", "data.sources.0.rows=4,5", "data.sources=[{path:a.jsonl}]"),
    ("++seed=1,2", "objective='a b','c,d'", "train.shuffle=true,false"),
]


@pytest.mark.parametrize("words", VARIED, ids=" ".join)
def test_a_point_is_the_config_that_its_words_give(words):
    """The tree is not composed for each point, which would take a hundred times longer."""
    examined = freeze.Examined()
    for point in every(*words):
        assert examined._examine(point) == config.examine(point.words), point.words


def test_a_large_grid_is_checked_by_composing_once(monkeypatch):
    composed = []
    compose_tree = compose.compose_tree

    def counted(*words):
        composed.append(words)
        return compose_tree(*words)

    monkeypatch.setattr(compose, "compose_tree", counted)
    assert run.check(["model=tiny", "adapter=lora,full", "seed=range(0,50)", "optimizer.lr=1e-4,2e-4"]).count == 200
    assert len(composed) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep=lora_ran"], "did you mean lora_rank"),
        (["optimizer.lr=interval(0,1)"], "has no end"),
        (["adapter=lora,nope", "seed=x,1"], "there is no adapter nope"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_starts(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run.run(words)
    assert list(tmp_path.iterdir()) == []
