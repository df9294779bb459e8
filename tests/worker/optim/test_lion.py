"""Lion: the paper's program, line by line."""

from __future__ import annotations

import pytest
import torch

from ftrun.worker.optim.lion import Lion
from ftrun.worker.optim.ruled import Ruled

SHAPES = ((6, 20), (20, 6), (5,))


def weights(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    made = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=made).to(dtype)) for shape in SHAPES]


def ours(found: list[torch.nn.Parameter], weight_decay: float = 0.3, **settings: float) -> Ruled:
    groups = [{"params": found, "lr": 0.01, "weight_decay": weight_decay, "rule": "lion"}]
    return Ruled(groups, {"lion": Lion(**settings)})


def train(optimizer: torch.optim.Optimizer, found: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        made = torch.Generator().manual_seed(100 + step)
        for weight in found:
            weight.grad = torch.randn(weight.shape, generator=made).to(weight.dtype)
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)  # as a schedule does
        optimizer.step()


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.99), (0.95, 0.98)])
def test_it_takes_the_steps_of_the_paper(beta1, beta2):
    found = weights()
    optimizer = ours(found, beta1=beta1, beta2=beta2)
    expected = [weight.detach().double() for weight in found]
    momenta = [torch.zeros_like(weight) for weight in expected]
    for step in range(50):
        train(optimizer, found, range(step, step + 1))
        lr = 0.01 / (1 + step)
        for index, weight in enumerate(found):
            grad = weight.grad.double()
            update = torch.sign(beta1 * momenta[index] + (1 - beta1) * grad)
            momenta[index] = beta2 * momenta[index] + (1 - beta2) * grad
            expected[index] = expected[index] - lr * (update + 0.3 * expected[index])
            torch.testing.assert_close(weight.detach().double(), expected[index], atol=1e-5, rtol=0)


def test_it_takes_the_steps_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    mine, theirs = weights(), weights()
    train(ours(mine), mine, range(50))
    train(bitsandbytes.optim.Lion(theirs, lr=0.01, weight_decay=0.3), theirs, range(50))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_where_it_was(dtype):
    whole, first, second = weights(dtype), weights(dtype), weights(dtype)
    train(ours(whole), whole, range(7))
    stopped, resumed = ours(first), ours(second)
    train(stopped, first, range(3))
    for ended, begins in zip(first, second, strict=True):
        begins.data.copy_(ended)
    resumed.load_state_dict(stopped.state_dict())
    train(resumed, second, range(3, 7))
    assert all(torch.equal(one, other) for one, other in zip(whole, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_half_of_what_adam_does(dtype):
    found = weights(dtype)
    optimizer = ours(found)
    train(optimizer, found, range(1))
    kept = [value for state in optimizer.state.values() for value in state.values()]
    assert sum(value.nbytes for value in kept) == sum(weight.nbytes for weight in found)


def test_a_gradient_of_zero_leaves_only_the_decay():
    found = weights()
    before = [weight.detach().clone() for weight in found]
    for weight in found:
        weight.grad = torch.zeros_like(weight)
    ours(found).step()
    for weight, was in zip(found, before, strict=True):
        torch.testing.assert_close(weight.detach(), was * (1 - 0.01 * 0.3), atol=1e-7, rtol=0)
