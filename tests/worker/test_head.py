"""The head in parts: the same values and gradients as all logits at once, and never all of them in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from ftrun.data.tokens import IGNORED
from ftrun.worker import batches, head
from ftrun.worker.head import Head

SIZES = (60, 35, 90, 41, 8)
VOCABULARY = 96


def batch_of(kind: str = "padded") -> batches.Batch:
    rows = []
    for size in SIZES:
        ids = np.random.default_rng(size).integers(5, VOCABULARY, size).astype(np.int32)
        rows.append({"input_ids": ids, "labels": np.where(np.arange(size) < size // 3, IGNORED, ids).astype(np.int32)})
    return batches.flatten(rows) if kind == "flat" else batches.pad(rows, 0)


def model(family: str = "llama", **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=None, eos_token_id=1, initializer_range=0.2,
        **{"tie_word_embeddings": False, **more},
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def log_probabilities(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return -functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def whole(net: Any, batch: batches.Batch) -> torch.Tensor:
    """The log-probability of each label, from all logits at once."""
    logits = net(**batches.model_inputs(batch), use_cache=False).logits.float()
    where = batch["labels"][:, 1:] != IGNORED
    return log_probabilities(logits[:, :-1][where], batch["labels"][:, 1:][where])[0]


def gradients(net: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    net.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in net.named_parameters() if weight.grad is not None}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 16 positions."""
    monkeypatch.setattr(head, "_FEWEST", 16)
    monkeypatch.setattr(head, "CHUNK", 16 * VOCABULARY)


FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0, "tie_word_embeddings": True},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trains", ["all", "all but the head"])
@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("kind", ["padded", "flat"])
def test_equals_all_logits_at_once(small, family, trains, summed, kind):
    net, batch = model(family, **FAMILIES[family]), batch_of(kind)
    if trains != "all":
        net.get_output_embeddings().requires_grad_(False)
    of = Head(net)
    first, right = of.scores(net, batch, log_probabilities, summed=summed)
    assert of._known
    expected = whole(net, batch)
    torch.testing.assert_close(first, expected.sum() if summed else expected, rtol=1e-5, atol=1e-4)
    assert len(right) == len(expected)
    weights = torch.tensor(0.3) if summed else torch.linspace(-1, 2, len(expected))
    found = gradients(net, (first * weights).sum())
    wanted = gradients(net, (whole(net, batch) * weights).sum())
    assert found.keys() == wanted.keys()
    assert max(float(each.abs().max()) for each in wanted.values()) > 1
    for name, each in found.items():
        torch.testing.assert_close(each, wanted[name], rtol=1e-4, atol=2e-4)


def test_further_rows_go_with_their_positions(small):
    net, batch = model(), batch_of()
    count = int((batch["labels"][:, 1:] != IGNORED).sum())
    weights = torch.linspace(0, 1, count)

    def score(logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor]:
        return (log_probabilities(logits, targets)[0] * weight,)

    for summed in (True, False):
        (found,) = Head(net).scores(net, batch, score, further=[weights], summed=summed)
        torch.testing.assert_close(found.sum(), (whole(net, batch) * weights).sum())


@pytest.mark.parametrize("summed", [True, False])
def test_logits_are_never_all_there_and_none_is_computed_where_there_is_no_label(small, summed):
    net, batch = model(), batch_of()
    labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
    of, seen = Head(net), []
    of.scores(net, batch, log_probabilities)  # the first call finds out what the model does to its logits
    net.lm_head.register_forward_hook(lambda *called: seen.append(called[-1].shape[:-1].numel()))
    first, _ = of.scores(net, batch, log_probabilities, summed=summed)
    assert max(seen) == 16
    assert sum(seen) == labelled + 1  # and one position for the model's own code
    seen.clear()
    first.sum().backward()
    assert sum(seen) == (0 if summed else labelled)  # what is computed twice


def test_a_large_batch_is_never_one_part():
    assert head._positions_at_once(10_000, 1_000) == 2_500
    assert head._positions_at_once(100_000, 150_000) == 128
    assert head._positions_at_once(2_000, 50_000) == 335


def test_a_model_that_does_something_else_to_its_logits_is_computed_by_itself(small):
    net, batch = model(), batch_of()
    plain = net.forward

    def odd(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits.relu()
        return output

    net.forward = odd
    of = Head(net)
    first, _ = of.scores(net, batch, log_probabilities)
    assert not of._known
    expected = whole(net, batch)
    torch.testing.assert_close(first, expected)
    found, wanted = gradients(net, first.sum()), gradients(net, whole(net, batch).sum())
    torch.testing.assert_close(found["lm_head.weight"], wanted["lm_head.weight"])


@pytest.mark.parametrize("summed", [True, False])
def test_in_bfloat16_it_is_as_near_as_all_logits_at_once(small, summed):
    net, batch = model(), batch_of()
    exact = gradients(net, whole(net, batch).sum())
    with torch.autocast("cpu", torch.bfloat16):
        first, _ = Head(net).scores(net, batch, log_probabilities, summed=summed)
        at_once = whole(net, batch)
    torch.testing.assert_close(first.sum(), at_once.sum(), rtol=1e-2, atol=0.5)
    for name, each in gradients(net, first.sum()).items():
        error = float((each - exact[name]).norm() / exact[name].norm())
        assert error < 0.05, name


def test_an_adapter_on_the_head_learns(small):
    from peft import LoraConfig, get_peft_model

    net = get_peft_model(model(), LoraConfig(r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"))
    for name, weight in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    batch = batch_of()
    for summed in (True, False):
        first, _ = Head(net).scores(net, batch, log_probabilities, summed=summed)
        found, wanted = gradients(net, first.sum()), gradients(net, whole(net, batch).sum())
        assert any("lm_head.lora_B" in name for name in found)
        for name, each in wanted.items():
            torch.testing.assert_close(found[name], each, rtol=1e-4, atol=1e-4)


def test_nothing_labelled_is_no_loss_and_no_gradient():
    net = model()
    first, _ = Head(net).scores(net, batches.pad([], 0), log_probabilities, summed=True)
    assert first.item() == 0.0
    assert all(float(each.abs().sum()) == 0 for each in gradients(net, first).values())
