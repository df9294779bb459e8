"""``ftrun check`` says which weights train, in which groups, and what the optimizer keeps of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from ftrun.worker import builtin

TINY = 2 * 1024 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
"""Parameters of the built-in model's matrices: embeddings, head, and those of two layers."""

NORMS = 5 * 64


def table(out: str) -> dict[str, list[str]]:
    """Return the rows of the table by their first cell."""
    rows = [line.split("  ") for line in out.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1:] for row in cells if len(row) > 3}


def test_every_weight_is_in_a_group_with_its_rate_and_decay(ftrun):
    out = ftrun("check", "model=tiny", "adapter=full", "optimizer.lr=1e-3", "optimizer.weight_decay=0.1").sees(0).out
    assert out.strip().endswith("no problems")
    found = table(out)
    assert found["matrices"] == ["adamw", "16", f"{TINY:,}", "0.001", "0.1", "1.6 MiB"]
    assert found["vectors"] == ["adamw", "5", f"{NORMS:,}", "0.001", "0", "2.5 KiB"]
    assert found["in all"][:2] == ["21", f"{TINY + NORMS:,}"]


def test_groups_of_ones_own_and_embeddings_are_apart(ftrun):
    groups = "optimizer.groups=[{weights: 'layers\\.0\\..*proj', lr_scale: 0.5, weight_decay: 0.2}]"
    out = ftrun("check", "model=tiny", "adapter=full", "optimizer.lr=1e-3", "optimizer.embedding_lr=1e-4", groups).out
    found = table(out)
    assert found["embeddings"][:4] == ["adamw", "1", f"{1024 * 64:,}", "0.0001"]
    assert found["layers\\.0\\..*proj"][:5] == [
        "adamw",
        "7",
        f"{2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128:,}",
        "0.0005",
        "0.2",
    ]
    assert found["in all"][1] == f"{TINY + NORMS:,}"


def test_an_adapter_is_counted_without_the_weights_that_it_starts_from(ftrun):
    out = ftrun("check", "model=tiny", "adapter=lora", "adapter.rank=4", "adapter.init=pissa").sees(0).out
    size = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert table(out)["matrices"][:3] == ["adamw", "28", f"{size:,}"]


def test_a_pattern_that_fits_nothing_is_a_problem_with_its_key(ftrun):
    done = ftrun("check", "model=tiny", "optimizer.groups=[{weights: nothing, lr: 1}]").sees(2)
    assert "optimizer.groups.0: no weight that trains has 'nothing' in its name" in done.err
    assert "no problems" not in done.out


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("{lr: 1}", "optimizer.groups.0.weights: has no value"),
        ("{weights: '('}", "optimizer.groups.0.weights: is no regular expression"),
        ("{weights: a}", "optimizer.groups.0: sets nothing"),
    ],
)
def test_a_group_that_cannot_be_is_refused(group, message, driver):
    assert message in driver("check", "model=tiny", f"optimizer.groups=[{group}]").sees(2).err


def test_quick_starts_no_worker(driver, monkeypatch):
    monkeypatch.setattr("ftrun.launch.watch", lambda *_: pytest.fail("a worker was started"))
    assert driver("check", "--quick", "model=tiny").sees(0).out.strip() == "no problems"


def test_a_model_is_outlined_from_its_config_alone(ftrun, tmp_path: Path):
    tokenizer = builtin.tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"")
    words = ("check", f"model.path={folder}", "adapter=full")
    trained = json.dumps(sum(weight.numel() for weight in model.parameters()))
    assert table(ftrun(*words).sees(0).out)["in all"][1].replace(",", "") == trained
    head, score = len(tokenizer) * 32, 32
    scoring = ftrun(*words, "stage=rm").sees(0).out
    assert table(scoring)["in all"][1].replace(",", "") == str(int(trained) - head + score)


def test_what_a_stage_adds_to_the_model_is_counted(ftrun):
    words = ("check", "model=tiny", "adapter=full", "stage=ppo", "reward=count")
    shared, separate = (ftrun(*words, f"stage.value_model={kind}").sees(0).out for kind in ("shared", "separate"))
    head, value = 1024 * 64, 64 + 1
    assert table(shared)["in all"][:2] == ["23", f"{TINY + NORMS + value:,}"]
    assert table(separate)["in all"][1] == f"{2 * (TINY + NORMS) - head + value:,}"


def test_keys_for_weights_of_which_none_trains_are_problems(ftrun):
    done = ftrun("check", "model=tiny", "adapter=lora", "optimizer.embedding_lr=1").sees(2)
    assert "optimizer.embedding_lr: no embedding trains" in done.err
    shadowed = "optimizer.groups=[{weights: layers, lr: 1}, {weights: 'layers.0', lr: 1}]"
    assert (
        "optimizer.groups.1: every weight that 'layers.0' fits is in a group before it"
        in ftrun("check", "model=tiny", shadowed).sees(2).err
    )
