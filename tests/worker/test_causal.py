"""The loss and its gradient: the same as the plain formula, however rows are batched, packed or weighted."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from ftrun.data.tokens import IGNORED
from ftrun.worker import batches, causal, head, pack


def row_of(size: int) -> Any:
    ids = np.arange(5, 5 + size, dtype=np.int32)
    return {"input_ids": ids, "labels": np.where(np.arange(size) < size // 3, IGNORED, ids).astype(np.int32)}


class Rows(list[Any]):
    @property
    def lengths(self) -> Any:
        return np.array([len(row["input_ids"]) for row in self], np.int32)


ROWS = Rows(row_of(size) for size in (12, 7, 20, 9, 2))


def packed(rows: Rows, max_length: int = 32) -> list[Any]:
    joined = pack.PackedRows(rows, pack.best_fit(rows.lengths, max_length), apart=True)
    assert len(joined) > 1 or len(rows) < 3
    return [joined[index] for index in range(len(joined))]


BATCHES = {
    "padded": lambda rows: batches.pad(rows, 0),
    "padding_free": batches.flatten,
    "packed": lambda rows: batches.stack(packed(rows), 0),
    "packed_in_one_row": lambda rows: batches.flatten(packed(rows)),
}


def model(family: str = "llama", attention: str | None = None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def alone(net: Any, row: Any) -> torch.Tensor:
    """The logits of one row, alone and unpadded."""
    return net(torch.tensor(row["input_ids"])[None].long()).logits[0].float()


def formula(net: Any, row: Any) -> torch.Tensor:
    """The summed loss of one row, alone and unpadded."""
    targets = torch.tensor(row["labels"]).long()
    return functional.cross_entropy(alone(net, row)[:-1], targets[1:], ignore_index=IGNORED, reduction="sum")


def total(net: Any, batch: batches.Batch) -> torch.Tensor:
    def score(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor]:
        return (causal.nll(logits, targets) * weights,)

    found = head.Head(net).scores(net, batch, score, further=[causal.labelled_weights(batch)], summed=True)
    return found[0]


def gradient(net: Any, loss: torch.Tensor) -> torch.Tensor:
    net.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def logits_by_row(net: Any, batch: batches.Batch) -> dict[tuple[int, ...], torch.Tensor]:
    """The logits of each row of a batch, under its tokens."""
    logits = net(**batches.model_inputs(batch), use_cache=False).logits.flatten(0, 1)
    ids, number = batch["input_ids"].flatten(), batches.sequence_of_tokens(batch).flatten()
    real = batch.get("token_mask", batch.get("attention_mask", torch.ones_like(batch["input_ids"]))).bool().flatten()
    pieces = [(number == one) & real for one in number.unique()]
    return {tuple(ids[piece].tolist()): logits[piece] for piece in pieces if piece.any()}


def assert_logits_as_alone(net: Any, batch: batches.Batch) -> None:
    found = logits_by_row(net, batch)
    assert len(found) == len(ROWS)
    for row in ROWS:
        torch.testing.assert_close(found[tuple(row["input_ids"].tolist())], alone(net, row), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", BATCHES)
def test_equals_the_formula_row_by_row(family, attention, kind):
    net = model(family, attention)
    batch = BATCHES[kind](ROWS)
    assert_logits_as_alone(net, batch)
    expected = sum(formula(net, row) for row in ROWS)
    torch.testing.assert_close(total(net, batch), expected, rtol=1e-5, atol=1e-5)
    labels = float(causal.label_weight(batch))
    found = gradient(net, total(net, batch) / labels)
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found, gradient(net, expected / labels), rtol=1e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padding_free", "packed"])
def test_flex_attention_keeps_rows_apart(kind):
    net = model("llama", "flex_attention").eval()
    try:
        with torch.no_grad():
            found = logits_by_row(net, BATCHES[kind](ROWS))
    except Exception as error:
        if "ompil" in f"{type(error)}{error}":
            pytest.skip(f"flex attention does not compile here: {error}")
        raise
    plain = model("llama", "sdpa")
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        for row in ROWS:
            expected = alone(plain, row)
            torch.testing.assert_close(found[tuple(row["input_ids"].tolist())], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["padding_free", "packed_in_one_row"])
def test_flash_attention_is_told_the_borders_of_rows(kind, monkeypatch):
    """With the kernels replaced by ones that run here: what transformers hands to them must keep rows apart."""
    from transformers import modeling_flash_attention_utils as flash

    borders = []

    def attend(q: Any, k: Any, v: Any, softmax_scale: float, causal: bool, **_: Any) -> Any:
        swapped = [tensor.transpose(-3, -2) for tensor in (q, k, v)]
        out = functional.scaled_dot_product_attention(*swapped, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        return out.transpose(-3, -2)

    def attend_each(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **others: Any) -> Any:
        assert cu_seqlens_q.dtype == torch.int32
        assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist()
        borders.append(cu_seqlens_q.tolist())
        sizes = cu_seqlens_q.diff().tolist()
        assert int(others.pop("max_seqlen_q")) == max(sizes)
        rows = zip(*(tensor.split(sizes) for tensor in (q, k, v)), strict=True)
        return torch.cat([attend(*(tensor[None] for tensor in row), **others)[0] for row in rows])

    def arguments(is_causal: bool, softmax_scale: float, **others: Any) -> dict[str, Any]:
        kept = {name: value for name, value in others.items() if name.startswith("max_seqlen")}
        return {"causal": is_causal, "softmax_scale": softmax_scale, **kept}

    kernels = (attend, attend_each, None, None, None), (arguments, None)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_: kernels)
    net = model("llama", "sdpa")
    net.config._attn_implementation = "flash_attention_2"
    batch = BATCHES[kind](ROWS)
    with torch.no_grad():
        assert_logits_as_alone(net, batch)
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    assert borders == [[*starts, batch["input_ids"].numel()]] * 2  # layers


@pytest.mark.parametrize("kind", ["padding_free", "packed", "packed_in_one_row"])
def test_packed_rows_do_not_see_each_other(kind):
    net = model("llama", "sdpa")
    first, second = ROWS[:2]
    changed = {"input_ids": first["input_ids"] + 60, "labels": first["labels"]}
    logits = []
    for row in (first, changed):
        found = logits_by_row(net, BATCHES[kind](Rows([row, second])))
        logits.append(found[tuple(second["input_ids"].tolist())])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", BATCHES)
def test_a_token_counts_as_much_as_its_weight(kind):
    net = model()
    weights = [np.linspace(0, 2, len(row["input_ids"]), dtype=np.float32) for row in ROWS]
    rows = Rows(row | {"weights": weight} for row, weight in zip(ROWS, weights, strict=True))
    del rows[1]["weights"]  # weighs 1 a token
    weights[1] = np.ones_like(weights[1])
    expected, weight = torch.tensor(0.0), 0.0
    for row, each in zip(rows, weights, strict=True):
        targets = torch.tensor(row["labels"]).long()[1:]
        losses = functional.cross_entropy(alone(net, row)[:-1], targets, ignore_index=IGNORED, reduction="none")
        expected = expected + (losses * torch.tensor(each[1:])).sum()
        weight += float((each[1:] * (targets.numpy() != IGNORED)).sum())
    batch = BATCHES[kind](rows)
    torch.testing.assert_close(total(net, batch), expected, rtol=1e-5, atol=1e-5)
    assert float(causal.label_weight(batch)) == pytest.approx(weight, rel=1e-6)


def trainer_of(steps: list[list[batches.Batch]]) -> list[float]:
    """What each step's loss is divided by."""
    here = types.SimpleNamespace(accelerator=types.SimpleNamespace(reduce=lambda tensor: tensor))
    count = causal.CausalTrainer._get_num_items_in_batch
    return [float(count(here, step, torch.device("cpu"))) for step in steps]  # type: ignore[arg-type]


def test_a_step_is_divided_by_its_weights_and_never_by_zero():
    plain = batches.pad(ROWS[:2], 0)
    labels = sum(int((row["labels"][1:] != IGNORED).sum()) for row in ROWS[:2])
    halved = batches.pad([row | {"weights": np.full(len(row["input_ids"]), 0.5)} for row in ROWS[:2]], 0)
    nothing = batches.pad([], 0)
    assert trainer_of([[plain], [plain, halved], [nothing], [plain, nothing]]) == [labels, 1.5 * labels, 1.0, labels]


@pytest.mark.parametrize(
    "batch",
    [
        batches.pad([], 0),
        batches.stack([], 0),
        batches.flatten([]),
        batches.pad([{"input_ids": [5], "labels": [5]}], 0),
    ],
)
def test_a_batch_without_labels_has_no_loss_and_no_gradient(batch):
    net = model()
    loss = total(net, batch)
    assert loss.item() == 0.0
    assert float(gradient(net, loss).abs().sum()) == 0.0
