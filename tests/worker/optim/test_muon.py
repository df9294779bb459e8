"""Muon's steps are those of torch's own, which takes one matrix at a time, and of the formulas."""

from __future__ import annotations

import pytest
import torch

from ftrun.worker.optim import muon
from ftrun.worker.optim.muon import Muon
from ftrun_plugins.optimizer.muon import Matching

SHAPES = [(48, 16), (16, 48), (16, 48), (32, 32), (16, 48), (8, 8), (8, 120)]


def weights_of(shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def gradients(shapes, step, dtype=torch.float32):
    torch.manual_seed(100 + step)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def trained(rule, shapes, steps, dtype=torch.float32, lr=0.01, weight_decay=0.1):
    weights = weights_of(shapes, dtype)
    states = [rule.start(weight) for weight in weights]
    for step in range(steps):
        rule.update(weights, gradients(shapes, step, dtype), states, lr=lr, weight_decay=weight_decay)
    return weights


def plain(shape, steps, momentum, nesterov, factor, lr=0.01, weight_decay=0.1):
    """One matrix in float64: the mean of gradients, five iterations, a step."""
    a, b, c = 3.4445, -4.7750, 2.0315
    weight = weights_of([shape])[0].double()
    mean = torch.zeros_like(weight)
    for step in range(steps):
        grad = gradients([shape], step)[0].double()
        mean = momentum * mean + (1 - momentum) * grad
        x = (1 - momentum) * grad + momentum * mean if nesterov else mean
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = a * x + b * gram @ x + c * gram @ gram @ x
        weight = weight - lr * weight_decay * weight - lr * factor * x
    return weight


@pytest.mark.parametrize("matching", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_the_steps_of_torch(matching, nesterov, dtype):
    if dtype is torch.bfloat16 and not nesterov:
        pytest.skip("torch then orthogonalises its momentum in place, which the formulas do not say")
    weights = [torch.nn.Parameter(weight) for weight in weights_of(SHAPES, dtype)]
    torchs = torch.optim.Muon(weights, lr=0.01, nesterov=nesterov, adjust_lr_fn=matching, weight_decay=0.1)
    for step in range(50):
        for weight, grad in zip(weights, gradients(SHAPES, step, dtype), strict=True):
            weight.grad = grad
        torchs.step()
    ours = trained(Muon(nesterov=nesterov, factor=Matching(matching).factor), SHAPES, 50, dtype)
    # A CPU without instructions for bfloat16 rounds less than torch does, which iterates in it anyway.
    off = 1e-4 if muon._dtype("cpu") is torch.bfloat16 and dtype is torch.float32 else 0.03
    for one, other in zip(ours, weights, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=off)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64)])
@pytest.mark.parametrize("matching", Matching)
def test_is_the_formulas(monkeypatch, shape, nesterov, matching):
    monkeypatch.setattr(muon, "_dtype", lambda _: torch.float32)
    rows, columns = shape
    factor = {
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        "original": max(1, rows / columns) ** 0.5,
        "none": 1,
    }[matching.value]
    (ours,) = trained(Muon(momentum=0.9, nesterov=nesterov, factor=matching.factor), [shape], 50)
    torch.testing.assert_close(ours.double(), plain(shape, 50, 0.9, nesterov, factor), rtol=0, atol=1e-5)


def test_in_bfloat16_momentum_stays_a_mean_of_gradients_without_nesterov():
    rule, shape = Muon(nesterov=False), (16, 48)
    weight, mean = weights_of([shape], torch.bfloat16)[0], torch.zeros(shape, dtype=torch.bfloat16)
    state = rule.start(weight)
    for step in range(5):
        (grad,) = gradients([shape], step, torch.bfloat16)
        mean.lerp_(grad, 1 - 0.95)
        rule.update([weight], [grad], [state], lr=0.01, weight_decay=0.0)
    assert torch.equal(state["momentum"], mean)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (48, 48)])
def test_singular_values_come_near_to_one_and_vectors_stay(shape):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (found,) = muon.orthogonal([grad], 5)
    values = torch.linalg.svdvals(found.float())
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.25
    (exact,) = muon.orthogonal([grad], 30, (2.0, -1.5, 0.5))
    u, _, v = torch.linalg.svd(grad, full_matrices=False)
    torch.testing.assert_close(exact.float(), u @ v, rtol=0, atol=0.02)


def test_each_expert_has_its_own_step():
    (stacked,) = trained(Muon(), [(2, 3, 16, 24)], 10)
    states = [{"momentum": torch.zeros(16, 24)} for _ in range(6)]
    weights = list(weights_of([(2, 3, 16, 24)])[0].flatten(0, 1))
    for step in range(10):
        grads = list(gradients([(2, 3, 16, 24)], step)[0].flatten(0, 1))
        Muon().update(weights, grads, states, lr=0.01, weight_decay=0.1)
    torch.testing.assert_close(stacked.flatten(0, 1), torch.stack(weights), rtol=0, atol=1e-5)


def test_how_many_go_together_changes_nothing(monkeypatch):
    shapes = [(16, 48)] * 5 + [(3, 48, 16)] * 2
    usual = trained(Muon(), shapes, 10)
    counts = []
    together = muon.orthogonal
    monkeypatch.setattr(muon, "orthogonal", lambda some, *rest: counts.append(len(some)) or together(some, *rest))
    for elements, expected in ((1, [1] * 11), (2 * 16 * 48, [2, 2, 1, 2, 2, 2]), (2**18, [5, 6])):
        monkeypatch.setitem(muon._TOGETHER, "cpu", elements)
        counts.clear()
        for one, other in zip(trained(Muon(), shapes, 10), usual, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
        assert counts == expected * 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_one_number_for_an_element(dtype):
    for shape in ((16, 48), (4, 8, 8)):
        (weight,) = weights_of([shape], dtype)
        state = Muon().start(weight)
        assert sum(kept.nbytes for kept in state.values()) == weight.nbytes
        assert state["momentum"].dtype is dtype


def test_without_a_gradient_it_only_decays():
    (weight,) = weights_of([(16, 48)])
    before, state = weight.clone(), Muon().start(weight)
    Muon().update([weight], [torch.zeros_like(weight)], [state], lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(weight, before * (1 - 0.1 * 0.5))
    (still,) = trained(Muon(), [(16, 48)], 3, lr=0.0)
    assert torch.equal(still, weights_of([(16, 48)])[0])


def test_a_matrix_that_is_a_view_is_updated_in_place():
    grads = gradients([(16, 48)], 0)
    weight = weights_of([(16, 48)])[0]
    view = weight.mT.contiguous().mT
    for one in (weight, view):
        Muon().update([one], [grads[0].clone()], [Muon().start(one)], lr=0.1, weight_decay=0.0)
    assert torch.equal(weight, view)
    assert not torch.equal(view, weights_of([(16, 48)])[0])
