"""Grids: every combination once, checked before the first starts, and gone on with."""

from __future__ import annotations

import json

import pytest

from ftrun import compose, config, sweep
from ftrun.errors import ConfigError


def points(*words: str) -> list[tuple[str, ...]]:
    return [job.point for job in sweep.grid(words)]


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
    (job,) = sweep.grid(["sweep=lora_rank", "seed=7", "adapter.rank=8"])
    assert job.words == ("seed=7", "adapter.rank=8", "adapter.alpha=32")


@pytest.mark.parametrize("name", ["lora_rank", "learning_rate"])
def test_every_shipped_sweep_is_free_of_problems(name):
    assert sweep.check([f"sweep={name}", "model=tiny"])


def test_the_working_folders_own_sweeps_are_found_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "lora_rank.yaml").write_text("adapter.rank: 2,3\n")
    assert points("sweep=lora_rank") == [("adapter.rank=2",), ("adapter.rank=3",)]


VARIED = [
    ("adapter=lora,full", "seed=range(1,4)", "optimizer.lr=1e-4,null", "train.scheduler=cosine,linear"),
    ("data.columns.prompt=a,b", "seed=${data.max_length},7", "adapter.targets=[q_proj],[k_proj,v_proj]"),
    ("model=tiny,qwen2", "train.epochs=1,2", "data.sources.0.rows=4,5", "data.sources=[{path:a.jsonl}]"),
    ("++seed=1,2", "output_dir=x", "objective='a b','c,d'", "train.shuffle=true,false"),
]


@pytest.mark.parametrize("words", VARIED, ids=" ".join)
def test_a_point_is_the_config_that_its_words_give(words):
    """The tree is not composed for each point, which would take a hundred times longer."""
    examined = sweep._Examined()
    for job in sweep.grid(words):
        cfg, problems = examined.examine(job)
        alone, alone_problems = config.examine([word for word in job.words if not word.startswith("output_dir=")])
        assert (cfg, problems) == (alone, alone_problems), job.words


def test_a_large_grid_is_checked_by_composing_once(monkeypatch):
    composed = []
    compose_tree = compose.compose_tree

    def counted(*words):
        composed.append(words)
        return compose_tree(*words)

    monkeypatch.setattr(compose, "compose_tree", counted)
    assert len(sweep.check(["model=tiny", "adapter=lora,full", "seed=range(0,50)", "optimizer.lr=1e-4,2e-4"])) == 200
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
        sweep.run(words)
    assert list(tmp_path.iterdir()) == []


def test_a_grid_runs_survives_a_failure_and_goes_on(ftrun, write, tmp_path):
    plugin = write(
        "moody.py",
        """
from dataclasses import dataclass
from pathlib import Path
from ftrun.plugin import register
from ftrun_plugins.optimizer.adamw import AdamW

@register
@dataclass(kw_only=True)
class Moody(AdamW):
    \"\"\"Fails while there is a file named broken.\"\"\"
    name: str = "moody"
    broken: str = ""
    \"\"\"The file.\"\"\"

    def build(self, model, run):
        if run.cfg.seed == 2 and Path(self.broken).exists():
            raise RuntimeError("in a bad mood")
        return super().build(model, run)
""",
    )
    broken = write("broken", "")
    words = ("-m", "model=tiny", "debug=smoke", f"plugins=[{plugin}]", "optimizer=moody", f"optimizer.broken={broken}")
    words = (*words, "seed=1,2,3", "stage.num_samples=0", "output_dir=grid")
    first = ftrun(*words)
    assert first.code == 1
    assert "in a bad mood" in first.out
    table = json.loads(ftrun("runs", "grid", "--json").out)
    assert [row["status"] for row in table] == ["completed", "failed", "completed"]
    broken.unlink()
    again = ftrun(*words)
    assert again.code == 0, again.out + again.err
    after = json.loads(ftrun("runs", "grid", "--json").out)
    assert [row["status"] for row in after] == ["completed"] * 3
    assert [row["started"] for row in after] == [row["started"] for row in table]
    assert after[0]["wall_seconds"] == table[0]["wall_seconds"]  # not run again
    assert len({row["metrics"]["loss"] for row in after}) == 3
