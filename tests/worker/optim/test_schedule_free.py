"""Schedule-free AdamW against its formulas, with x, y and z all written out."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from ftrun.worker.optim.schedule_free import Averaging, ScheduleFree

SHAPES = ((4, 9), (9, 4), (5,))


def started(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def made(weights: list[Tensor], rule: ScheduleFree, *, lr: float = 0.02, weight_decay: float = 0.0) -> Averaging:
    return Averaging([{"params": weights, "lr": lr, "weight_decay": weight_decay, "rule": "it"}], {"it": rule})


def gradient(weight: Tensor, step: int) -> Tensor:
    """Return the gradient of a bowl around 1, with noise that is the same at each step whoever asks."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
    return (weight.detach().float() - 1 + noise).to(weight.dtype)


def take(optimizer: Averaging, weights: list[Tensor], steps: range) -> None:
    for step in steps:
        for weight in weights:
            weight.grad = gradient(weight, step)
        optimizer.step()


def warming(step: int) -> float:
    return 0.02 * min(1.0, step / 5)


@pytest.mark.parametrize(
    ("rule", "weight_decay"),
    [
        (ScheduleFree(), 0.0),
        (ScheduleFree(beta1=0.95, beta2=0.99, eps=1e-3, r=1.0, weight_lr_power=1.0), 0.1),
        (ScheduleFree(weight_lr_power=0.0), 0.1),
    ],
)
def test_it_is_what_the_paper_says(rule, weight_decay):
    weights = started()
    optimizer = made(weights, rule, weight_decay=weight_decay)
    plain = [weight.detach().double() for weight in weights]
    x, z, v = plain, [one.clone() for one in plain], [torch.zeros_like(one) for one in plain]
    total, highest = 0.0, 0.0
    for step in range(50):
        lr = optimizer.param_groups[0]["lr"] = warming(step)
        take(optimizer, weights, range(step, step + 1))
        highest = max(highest, lr)
        counts = (step + 1) ** rule.r * highest**rule.weight_lr_power
        total += counts
        c = counts / total if total else 0.0
        for n in range(len(weights)):
            y = (1 - rule.beta1) * z[n] + rule.beta1 * x[n]
            g = gradient(y, step)
            v[n] = rule.beta2 * v[n] + (1 - rule.beta2) * g * g
            root = (v[n] / (1 - rule.beta2 ** (step + 1))).sqrt() + rule.eps
            z[n] = z[n] - lr * g / root - lr * weight_decay * y
            x[n] = (1 - c) * x[n] + c * z[n]
            assert torch.allclose(weights[n].double(), (1 - rule.beta1) * z[n] + rule.beta1 * x[n], atol=1e-5, rtol=0)
        with optimizer.averaged():
            assert all(torch.allclose(w.double(), x_, atol=1e-5, rtol=0) for w, x_ in zip(weights, x, strict=True))
    assert all(float((one - start.detach()).abs().max()) > 0.2 for one, start in zip(x, started(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_at_the_average_changes_nothing_and_steps_resume(dtype):
    weights, looked = started(dtype), started(dtype)
    optimizer, looking = made(weights, ScheduleFree()), made(looked, ScheduleFree())
    with looking.averaged():
        assert all(bool((one == start).all()) for one, start in zip(looked, started(dtype), strict=True))
    for step in range(12):
        take(optimizer, weights, range(step, step + 1))
        take(looking, looked, range(step, step + 1))
        before = [weight.detach().clone() for weight in looked]
        with looking.averaged():  # the first step weighs all there is, so that x, y and z are one
            assert (step > 1) <= any(bool((one != was).any()) for one, was in zip(looked, before, strict=True))
        assert all(bool((one == other).all()) for one, other in zip(looked, weights, strict=True))
        saved = io.BytesIO()
        torch.save((looking.state_dict(), [weight.detach() for weight in looked]), saved)
        saved.seek(0)
        state, values = torch.load(saved, weights_only=True)
        looked = [value.requires_grad_() for value in values]
        looking = made(looked, ScheduleFree())
        looking.load_state_dict(state)
        with looking.averaged(), optimizer.averaged():
            assert all(bool((one == other).all()) for one, other in zip(looked, weights, strict=True))


def test_weights_of_few_bits_are_averaged_as_exactly_as_others():
    weights, exact = started(torch.bfloat16), [one.detach().float().requires_grad_() for one in started(torch.bfloat16)]
    optimizer, other = made(weights, ScheduleFree(), lr=1e-4), made(exact, ScheduleFree(), lr=1e-4)
    for step in range(300):
        for few, many in zip(weights, exact, strict=True):
            few.grad = gradient(many, step).bfloat16()
            many.grad = few.grad.float()
        optimizer.step()
        other.step()
    with optimizer.averaged(), other.averaged():
        for few, many in zip(weights, exact, strict=True):
            assert bool((few == many.bfloat16()).all())


def test_its_state_is_two_copies_in_float32_and_one_more_beside_weights_of_few_bits():
    for dtype, copies in ((torch.float32, 2), (torch.bfloat16, 3)):
        weights = started(dtype)
        optimizer = made(weights, ScheduleFree())
        take(optimizer, weights, range(1))
        for weight in weights:
            kept = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
            assert sum(value.nbytes for value in kept) == 4 * copies * weight.numel()


def test_a_weight_without_gradients_is_left_alone():
    weights = started()
    optimizer = made(weights, ScheduleFree(), weight_decay=0.1)
    take(optimizer, weights[:2], range(3))
    with optimizer.averaged():
        assert bool((weights[2] == started()[2]).all())


def test_a_rate_of_zero_leaves_all_alone():
    weights = started()
    optimizer = made(weights, ScheduleFree(), lr=0.0, weight_decay=0.1)
    take(optimizer, weights, range(3))
    assert all(bool((one == start).all()) for one, start in zip(weights, started(), strict=True))
    with optimizer.averaged():
        assert all(bool((one == start).all()) for one, start in zip(weights, started(), strict=True))
