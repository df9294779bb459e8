"""Gradient descent: torch's steps, with a decay of its own."""

from __future__ import annotations

import itertools

import pytest
import torch

from ftrun.worker.optim.ruled import Ruled
from ftrun.worker.optim.sgd import SGD

SHAPES = ((6, 20), (20, 6), (5,))


def weights(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    made = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=made).to(dtype)) for shape in SHAPES]


def ours(found: list[torch.nn.Parameter], rule: SGD, lr: float = 0.1, weight_decay: float = 0.0) -> Ruled:
    return Ruled([{"params": found, "lr": lr, "weight_decay": weight_decay, "rule": "sgd"}], {"sgd": rule})


def give_gradients(found: list[torch.nn.Parameter], step: int) -> None:
    made = torch.Generator().manual_seed(100 + step)
    for weight in found:
        weight.grad = torch.randn(weight.shape, generator=made).to(weight.dtype)


def train(optimizer: torch.optim.Optimizer, found: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)  # as a schedule does
        give_gradients(found, step)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_without_decay_it_takes_the_steps_of_torch(momentum, nesterov, dtype):
    mine, theirs = weights(dtype), weights(dtype)
    train(ours(mine, SGD(momentum=momentum, nesterov=nesterov)), mine, range(50))
    train(torch.optim.SGD(theirs, lr=0.1, momentum=momentum, nesterov=nesterov, foreach=True), theirs, range(50))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.8, False), (0.8, True)])
def test_decay_shrinks_weights_apart_from_the_momentum(momentum, nesterov):
    mine = weights()
    expected = [weight.detach().double() for weight in mine]
    sums = [torch.zeros_like(weight) for weight in expected]
    optimizer = ours(mine, SGD(momentum=momentum, nesterov=nesterov), weight_decay=0.3)
    for step in range(50):
        train(optimizer, mine, range(step, step + 1))
        lr = 0.1 / (1 + step)
        give_gradients(mine, step)  # which the step may have written over
        for index, weight in enumerate(expected):
            grad = mine[index].grad.double()
            sums[index] = momentum * sums[index] + grad
            way = grad + momentum * sums[index] if nesterov else sums[index]
            expected[index] = weight - lr * 0.3 * weight - lr * way
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one.detach().double(), other, atol=1e-5, rtol=0)


def test_it_keeps_nothing_without_momentum_and_one_tensor_with_it():
    for momentum, expected in ((0.0, 0), (0.5, sum(weight.nbytes for weight in weights()))):
        found = weights()
        optimizer = ours(found, SGD(momentum=momentum))
        train(optimizer, found, range(1))
        assert sum(value.nbytes for state in optimizer.state.values() for value in state.values()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_where_it_was(dtype):
    whole, first, second = weights(dtype), weights(dtype), weights(dtype)
    rule = SGD(momentum=0.9, nesterov=True)
    train(ours(whole, rule), whole, range(7))
    stopped, resumed = ours(first, rule), ours(second, rule)
    train(stopped, first, range(3))
    for ended, begins in zip(first, second, strict=True):
        begins.data.copy_(ended)
    resumed.load_state_dict(stopped.state_dict())
    train(resumed, second, range(3, 7))
    assert all(torch.equal(one, other) for one, other in zip(whole, second, strict=True))


def test_weights_without_a_gradient_stay():
    found = weights()
    give_gradients(found, 0)
    before, found[1].grad = found[1].detach().clone(), None
    ours(found, SGD(momentum=0.9), weight_decay=0.5).step()
    assert torch.equal(found[1], before)


def test_one_weight_at_a_time_is_the_same():
    together, apart = weights(), weights()
    train(ours(together, SGD(momentum=0.9)), together, range(5))
    optimizer = ours(apart, SGD(momentum=0.9))
    for step, number in itertools.product(range(5), range(len(apart))):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        give_gradients(apart, step)
        optimizer.update(optimizer.param_groups[0], [apart[number].requires_grad_(False)])
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))
