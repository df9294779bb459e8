"""The rehearsal of a step: its bytes and operations against what can be counted by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ftrun import config, hardware, launch
from ftrun.config import Config
from ftrun.estimate import Estimate
from ftrun.worker import estimate

HIDDEN, INTER, LAYERS, VOCABULARY = 64, 128, 2, 1024
MATRICES = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * INTER)


def settled(*words: str) -> Config:
    cfg = config.compose(["model=tiny", "hardware=cpu", "output_dir=outlined", *words])
    hardware.settle(cfg.hardware, cfg.train, cfg.model.dtype)
    launch.settle(cfg)
    return cfg


def estimated(*words: str, rows: int = 2, length: int = 256) -> Estimate:
    found = Estimate(rows=rows, length=length)
    estimate._look_at_model(found, settled(*words))
    return found


def test_memory_is_that_of_all_tensors_that_are_alive():
    memory = estimate._Memory()
    with memory:
        first = torch.zeros(1000)
        view = first[:10].view(2, 5)
        second = first + 1
        assert memory.now == 8000
        del second
        assert (memory.now, memory.peak) == (4000, 8000)
        del first
        assert memory.now == 4000  # the view holds it
        del view
    assert memory.now == 0


def test_a_step_of_a_linear_map_is_what_it_is_by_hand():
    memory = estimate._Memory()
    layer, rows = nn.Linear(30, 20, bias=False), torch.zeros(10, 30)
    with memory:
        layer(rows).sum().backward()
    assert memory.flops == 2 * (2 * 10 * 30 * 20)  # forward, and the gradient of the weights


def test_weights_gradients_and_state_are_exact():
    full, lora = estimated("adapter=full"), estimated("adapter=lora")
    assert full.weights == full.gradients == 4 * full.parameters == 4 * (MATRICES + 2 * VOCABULARY * HIDDEN + 5 * 64)
    assert full.state == 2 * full.weights + 21 * 4  # and the count of steps of each
    assert lora.saved == lora.gradients == 4 * lora.trained
    assert (lora.is_adapter, full.is_adapter) == (True, False)
    assert full.checkpoint == full.saved + full.state


def test_operations_are_six_for_a_weight_and_a_token_and_four_where_it_is_frozen():
    attention = 14 * LAYERS * HIDDEN * 256  # two products forward, and five backward
    full, frozen = estimated("adapter=full"), estimated("adapter=lora", "adapter.rank=1")
    again = estimated("adapter=full", "train.gradient_checkpointing=true")
    assert full.flops == pytest.approx(6 * (MATRICES + VOCABULARY * HIDDEN) + attention, rel=0.01)
    assert frozen.flops == pytest.approx(4 * (MATRICES + VOCABULARY * HIDDEN) + attention, rel=0.1)
    twice = MATRICES - LAYERS * HIDDEN * INTER  # a layer's last product is not needed again
    assert again.flops - full.flops == pytest.approx(2 * twice + attention * 2 / 7, rel=0.01)


def test_activations_grow_with_rows_and_length_and_are_few_with_checkpointing():
    small, wide, long = (
        estimated("adapter=full"),
        estimated("adapter=full", rows=4),
        estimated("adapter=full", length=512),
    )
    assert wide.activations == pytest.approx(2 * small.activations, rel=0.1)
    masks = {
        length: 2 * length**2 * (1 + 4 * LAYERS) for length in (256, 512)
    }  # one of bytes, and numbers in each layer
    of_tokens = [one.activations - masks[one.length] for one in (small, long)]
    assert of_tokens[1] == pytest.approx(2 * of_tokens[0], rel=0.07)
    kept = estimated("adapter=full", "train.gradient_checkpointing=true")
    assert kept.activations < small.activations / 3
    assert kept.peak < small.peak
    eager = estimated("adapter=full", "model.attention=eager")
    scores = LAYERS * 4 * 2 * 256 * 256 * 4  # layers, heads, rows, length, length, float32
    masks_of_layers = LAYERS * 2 * 256 * 256 * 4  # which the other attention keeps as numbers
    assert eager.activations - small.activations == pytest.approx(scores - masks_of_layers, rel=0.02)


def test_half_precision_takes_less_and_accumulating_more():
    whole, half = estimated("adapter=full"), estimated("adapter=full", "train.precision=bf16")
    assert half.activations < whole.activations
    twice = estimated("adapter=full", "train.grad_accumulation=2")
    assert twice.activations == pytest.approx(whole.activations, rel=0.02)
    assert twice.peak - whole.peak == pytest.approx(whole.gradients, rel=0.5)


def test_optimizers_that_hold_fewer_gradients_need_less():
    full = estimated("adapter=full", rows=1, length=8)
    lomo = estimated("adapter=full", "optimizer=lomo", rows=1, length=8)
    badam = estimated("adapter=full", "optimizer=badam", rows=1, length=8)
    assert full.peak > full.weights + full.state + full.gradients
    assert lomo.state == 0
    assert lomo.peak < full.peak - full.state - full.gradients / 3
    assert badam.gradients < full.gradients / 2
    galore = estimated("adapter=full", "optimizer=galore", "optimizer.rank=8", rows=1, length=8)
    assert galore.state < full.state


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (("stage=dpo", "adapter=full"), 0),
        (("stage=dpo", "adapter=full", "stage.reference=copy"), 4 * 205_120),
        (("stage=sft", "adapter=full"), 0),
        (("stage=sft", "adapter=full", "stage.loss=asft"), 4 * 205_120),
        (("stage=sft", "adapter=lora", "stage.loss=asft"), 0),
        (("stage=distill", "adapter=lora", "stage.teacher_path=builtin:tiny"), 4 * 205_120),
    ],
)
def test_a_reference_is_counted_where_a_stage_holds_one(words, size):
    assert estimated(*words, rows=2, length=16).reference == size


def test_what_cannot_be_known_says_why():
    assert "nobody knows how long" in estimated("stage=grpo").unknown["memory"]
    found = Estimate(rows=1, length=8)
    with estimate._or_unknown(found, "memory"):
        raise RuntimeError("no such thing\nat all")
    assert found.unknown == {"memory": "RuntimeError: no such thing"}


@pytest.mark.parametrize("stage", ["pt", "rm", "dpo", "kto", "orpo", "cpo", "simpo", "sft", "distill"])
def test_every_stage_that_knows_its_rows_is_rehearsed(stage):
    words = ["stage.teacher_path=builtin:tiny"] if stage == "distill" else []
    found = estimated(f"stage={stage}", *words, rows=2, length=16)
    assert found.unknown == {}
    assert found.peak > found.weights


def test_sharing_out_divides_what_is_shared():
    words = ("adapter=full", "hardware.num_processes=4")
    one, ddp = estimated("adapter=full"), estimated(*words)
    assert ddp.peak - one.peak == pytest.approx(one.gradients, rel=0.01)  # what DDP sends
    shared = estimated(*words, "hardware.sharding=fsdp2")
    assert (shared.weights, shared.state) == (one.weights // 4, one.state // 4)
    assert shared.is_shared_out
    assert shared.peak < one.peak


def test_steps_are_exact_where_rows_are_tokenised_and_about_where_they_are_many(tmp_path, monkeypatch):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * n}]}
        for n in range(1, 41)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = settled(f"data.path={file}", "train.epochs=2", "train.micro_batch_size=4")
    exact, about = Estimate(), Estimate()
    monkeypatch.setattr(estimate, "_SMALL", 0)
    monkeypatch.setattr(estimate, "_SAMPLE", 20)
    estimate._look_at_rows(about, cfg)
    monkeypatch.setattr(estimate, "_SMALL", 10**6)
    estimate._look_at_rows(exact, cfg)
    assert (exact.steps, about.steps) == (20, 20)
    assert (exact.is_exact, about.is_exact) == (True, False)
    assert about.how == "40 rows are counted, and the first 20 tokenised"
    assert about.length < exact.length
    monkeypatch.setattr(estimate, "_SMALL", 0)
    again = Estimate()
    estimate._look_at_rows(again, cfg)
    assert (again.is_exact, again.tokens) == (True, exact.tokens)  # what was tokenised is found


def test_the_longest_rows_come_first_in_a_probe():
    import numpy as np

    from ftrun.worker.dataset import Selected

    store = SimpleNamespace(lengths=np.array([3, 9, 5]), report=SimpleNamespace(weighted=False))
    rows = Selected([store], np.zeros(3, np.int16), np.arange(3))
    found = estimate._longest_first(rows, settled("train.micro_batch_size=2"))
    assert found.index.tolist() == [1, 2, 0, 1]
