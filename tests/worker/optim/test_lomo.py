"""LOMO and AdaLOMO against their formulas, in the backward pass."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from ftrun.worker.optim.lomo import AdaLomo, Lomo
from ftrun.worker.optim.ruled import Layerwise, Rule, Ruled

LR, DECAY = 0.05, 0.1


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 6)).to(dtype)


def loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    ids, wanted = torch.randint(20, (12,), generator=generator), torch.randn(12, 6, generator=generator)
    return (model(ids).float() - wanted).square().mean()


def layerwise(model: nn.Module, rule: Rule, *, lr: float = LR, weight_decay: float = DECAY, norm: float = 0.0) -> Ruled:
    group = {"params": list(model.parameters()), "lr": lr, "weight_decay": weight_decay, "rule": "it"}
    optimizer = Ruled([group], {"it": rule})
    optimizer.layerwise = Layerwise(optimizer, norm)
    return optimizer


def take(model: nn.Module, optimizer: Ruled, steps: range) -> None:
    for step in steps:
        loss(model, step).backward()
        assert all(weight.grad is None for weight in model.parameters())
        optimizer.step()


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    return [grad.double() for grad in torch.autograd.grad(loss(model, step), list(model.parameters()))]


def close(one: nn.Module, other: nn.Module, within: float) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(float((a.detach() - b.detach()).abs().max()) <= within for a, b in pairs)


@pytest.mark.parametrize("norm", [0.0, 0.1])
def test_lomo_goes_against_the_gradient_clipped_by_its_own_norm(norm):
    model, plain = network(), network()
    optimizer = layerwise(model, Lomo(), norm=norm)
    for step in range(50):
        take(model, optimizer, range(step, step + 1))
        for weight, grad in zip(plain.parameters(), gradients(plain, step), strict=True):
            scale = min(1.0, norm / (float(grad.norm()) + 1e-6)) if norm else 1.0
            with torch.no_grad():
                weight.copy_(weight.double() - LR * DECAY * weight.double() - LR * scale * grad)
        assert close(model, plain, 1e-5)
    assert not close(model, network(), 0.1)


@pytest.mark.parametrize("rule", [AdaLomo(), AdaLomo(decay_rate=0.5, clip_threshold=0.5, eps=0.2)])
def test_adalomo_is_what_the_paper_says(rule):
    model, plain = network(), network()
    optimizer = layerwise(model, rule)
    squares: dict[int, list[Tensor]] = {}
    for step in range(50):
        take(model, optimizer, range(step, step + 1))
        beta = 1 - (step + 1) ** -rule.decay_rate
        grads = gradients(plain, step)
        for n, (weight, grad) in enumerate(zip(plain.parameters(), grads, strict=True)):
            square = grad * grad + 1e-30
            new = [square.sum(1), square.sum(0)] if grad.ndim == 2 else [square]
            old = squares.get(n, [torch.zeros_like(one) for one in new])
            kept = squares[n] = [beta * was + (1 - beta) * one for was, one in zip(old, new, strict=True)]
            v = torch.outer(kept[0], kept[1]) / kept[0].sum() if grad.ndim == 2 else kept[0]
            u = grad / v.sqrt()
            theta = weight.detach().double()
            u = u / max(1.0, float(u.square().mean().sqrt()) / rule.clip_threshold)
            u = u * max(rule.eps, float(theta.square().mean().sqrt()))
            with torch.no_grad():
                weight.copy_(theta - LR * DECAY * theta - LR * u)
        assert close(model, plain, 1e-5)
    assert not close(model, network(), 0.1)


@pytest.mark.parametrize("rule", [Lomo(), AdaLomo()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_resume(rule, dtype):
    model = network(dtype)
    optimizer = layerwise(model, rule)
    take(model, optimizer, range(5))
    saved = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), saved)
    take(model, optimizer, range(5, 9))
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    again = network(dtype)
    again.load_state_dict(weights)
    resumed = layerwise(again, rule)
    resumed.load_state_dict(state)
    take(again, resumed, range(5, 9))
    assert close(again, model, 0.0)


@pytest.mark.parametrize("rule", [Lomo(), AdaLomo()])
def test_a_step_of_weights_of_few_bits_is_rounded_once(rule):
    """Decay and step are added up in float32: one after the other in bfloat16 they would both be lost."""
    weight = torch.full((4, 4), 1.0, dtype=torch.bfloat16)
    exact, grad = weight.float(), torch.full((4, 4), 1.0)
    for one, its in ((weight, grad.bfloat16()), (exact, grad.clone())):
        state = rule.start(one)
        rule.update([one], [its], [state], lr=1.5e-3, weight_decay=1.0)
    assert bool((weight == exact.bfloat16()).all())
    assert bool((weight < 1).all())


@pytest.mark.parametrize("rule", [Lomo(), AdaLomo()])
def test_a_rate_of_zero_leaves_all_alone(rule):
    model = network()
    take(model, layerwise(model, rule, lr=0.0), range(3))
    assert close(model, network(), 0.0)


def test_what_is_kept_is_nothing_or_a_number_a_row_and_a_column():
    for rule, numbers in ((Lomo(), {}), (AdaLomo(), {(7, 3): 7 + 3, (5,): 5, (2, 7, 3): 2 * (7 + 3), (): 1})):
        for shape in ((7, 3), (5,), (2, 7, 3), ()):
            state = rule.start(torch.zeros(shape, dtype=torch.bfloat16))
            kept = [value for value in state.values() if isinstance(value, Tensor)]
            assert sum(value.nbytes for value in kept) == 4 * numbers.get(shape, 0)


def test_a_stack_of_matrices_is_factored_one_by_one():
    """But for the size of the step, which is that of the whole stack."""
    torch.manual_seed(0)
    rule, stack = AdaLomo(clip_threshold=1e9), torch.randn(3, 4, 5)
    stack /= stack.square().mean((1, 2), keepdim=True).sqrt()
    single, grad = [one.clone() for one in stack], torch.randn(3, 4, 5)
    rule.update([stack], [grad.clone()], [rule.start(stack)], lr=0.1, weight_decay=0.0)
    rule.update(single, [*grad.clone()], [rule.start(one) for one in single], lr=0.1, weight_decay=0.0)
    assert torch.allclose(stack, torch.stack(single), atol=1e-6)


def test_rows_without_a_gradient_stay():
    weight, grad = torch.ones(4, 3), torch.zeros(4, 3)
    grad[0] = 1.0
    rule = AdaLomo()
    rule.update([weight], [grad], [rule.start(weight)], lr=0.1, weight_decay=0.0)
    assert bool((weight[1:] == 1).all())
    assert bool((weight[0] < 1).all())
    before = weight.clone()
    rule.update([weight], [torch.zeros(4, 3)], [rule.start(weight)], lr=0.1, weight_decay=0.0)
    assert bool((weight == before).all())
