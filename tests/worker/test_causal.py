"""The loss and its gradient: the same as the plain formula, however rows are batched or packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from ftrun.worker import batches, builtin, causal, encode

ROWS: list[Any] = [
    {"input_ids": list(range(5, 5 + n)), "labels": [encode.IGNORED] * (n // 3) + list(range(5 + n // 3, 5 + n))}
    for n in (12, 7, 20, 9)
]


def model(attention: str | None = None) -> Any:
    return builtin.model({"dtype": torch.float32, "attn_implementation": attention})


def formula(net: Any, row: Any) -> torch.Tensor:
    """The summed loss of one row, alone and unpadded."""
    logits = net(torch.tensor([row["input_ids"]])).logits[0].float()
    targets = torch.tensor(row["labels"])
    return functional.cross_entropy(logits[:-1], targets[1:], ignore_index=encode.IGNORED, reduction="sum")


def total(net: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits, targets = causal.labelled_logits(net, net, batch)
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def gradient(net: Any, loss: torch.Tensor) -> torch.Tensor:
    net.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch", ["padded", "packed"])
def test_equals_the_formula_row_by_row(attention, batch):
    net = model(attention)
    expected = sum(formula(net, row) for row in ROWS)
    made = batches.pad(ROWS, 0) if batch == "padded" else batches.flatten(encode.pack(ROWS, 32))
    found = total(net, made)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradient(net, total(net, made)), gradient(net, sum(formula(net, row) for row in ROWS)), rtol=1e-4, atol=1e-5
    )


def test_packed_rows_do_not_see_each_other():
    net = model("sdpa")
    (first, second) = ROWS[:2]
    changed = {"input_ids": [t + 100 for t in first["input_ids"]], "labels": first["labels"]}
    logits = []
    for row in (first, changed):
        batch = batches.flatten(encode.pack([row, second], 32))
        batch.pop("labels")
        logits.append(net(**batch, use_cache=False).logits[0, len(row["input_ids"]) :])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-6, atol=1e-6)


def test_the_head_is_computed_for_labelled_positions_only():
    net = model()
    seen = []
    handle = net.lm_head.register_forward_hook(lambda *called: seen.append(tuple(called[-1].shape)))
    batch = batches.pad(ROWS, 0)
    total(net, batch)
    handle.remove()
    assert seen == [(1, int((batch["labels"][:, 1:] != encode.IGNORED).sum()), 1024)]


def test_a_batch_without_labels_has_no_loss_and_no_gradient():
    net = model()
    batch = batches.pad([{"input_ids": [5, 6, 7], "labels": [encode.IGNORED] * 3}], 0)
    loss = total(net, batch)
    assert loss.item() == 0.0
    assert float(gradient(net, loss).abs().sum()) == 0.0


def test_dpo_loss_by_value():
    from ftrun.worker.preference import dpo_loss

    chosen, rejected = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([0.0, -1.0, 3.0])
    # ln 2; -ln s(0.3) with s(0.3) = 0.574443; -ln s(-0.4) with s(-0.4) = 0.401312
    torch.testing.assert_close(dpo_loss(chosen, rejected, 0.1), torch.tensor([0.693147, 0.554355, 0.913015]))
    # 0.9 * 0.554355 + 0.1 * 0.854355
    assert dpo_loss(chosen, rejected, 0.1, 0.1)[1].item() == pytest.approx(0.584355, abs=1e-6)
