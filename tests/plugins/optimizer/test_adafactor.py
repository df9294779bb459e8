"""Adafactor: the formulas of torch's documentation, in groups of ours."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from ftrun_plugins.optimizer.adafactor import Adafactor


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 4)
        self.wide, self.tall = nn.Linear(4, 12), nn.Linear(12, 4, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 4, 5))

    def give_gradients(self, step: int) -> None:
        made = torch.Generator().manual_seed(step)
        for weight in self.parameters():
            weight.grad = torch.randn(weight.shape, generator=made).to(weight.dtype) * 10.0 ** (step % 3 - 1)


def built(model: nn.Module, **keys: Any) -> torch.optim.Optimizer:
    return Adafactor(**{"lr": 0.05, "weight_decay": 0.1, **keys}).build(model, None)  # type: ignore[arg-type]


def train(model: Small, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model.give_gradients(step)
        optimizer.step()


@pytest.mark.parametrize(
    "keys", [{}, {"beta2_decay": -0.5}, {"eps1": 1e-2}, {"eps2": 0.7}, {"d": 1.5}, {"weight_decay": 0.0}, {"lr": 0.9}]
)
def test_it_takes_the_steps_of_the_formulas(keys):
    model = Small()
    lr, decay, power = keys.get("lr", 0.05), keys.get("weight_decay", 0.1), keys.get("beta2_decay", -0.8)
    eps1, eps2, d = keys.get("eps1", torch.finfo(torch.float32).eps), keys.get("eps2", 1e-3), keys.get("d", 1.0)
    expected = [weight.detach().double() for weight in model.parameters()]
    rows: list[Any] = [0.0] * len(expected)
    columns: list[Any] = [0.0] * len(expected)
    optimizer = built(model, **keys)
    for step in range(50):
        train(model, optimizer, range(step, step + 1))
        t = step + 1
        newest = t**power
        for index, (weight, was) in enumerate(zip(model.parameters(), expected, strict=True)):
            grad = weight.grad.double()
            size = max(eps2, was.square().mean().sqrt()) * min(lr, 1 / math.sqrt(t))
            if was.ndim > 1:
                rows[index] = (1 - newest) * rows[index] + newest * grad.square().mean(-1, keepdim=True)
                columns[index] = (1 - newest) * columns[index] + newest * grad.square().mean(-2, keepdim=True)
                moment = rows[index] @ columns[index] / rows[index].mean(-2, keepdim=True).clamp(min=eps1)
            else:
                moment = rows[index] = (1 - newest) * rows[index] + newest * grad.square()
            way = grad / moment.sqrt().clamp(min=eps1)
            way = way / max(1.0, way.square().mean().sqrt() / d)
            expected[index] = was * (1 - lr * (decay if was.ndim > 1 else 0.0)) - size * way
            torch.testing.assert_close(weight.detach().double(), expected[index], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_where_it_was(dtype):
    whole, first, second = Small().to(dtype), Small().to(dtype), Small().to(dtype)
    train(whole, built(whole), range(7))
    stopped, resumed = built(first), built(second)
    train(first, stopped, range(3))
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    train(second, resumed, range(3, 7))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), second.parameters(), strict=True))


def test_it_keeps_a_row_and_a_column_of_each_matrix():
    model = Small()
    optimizer = built(model)
    train(model, optimizer, range(1))
    kept = sum(value.numel() for state in optimizer.state.values() for name, value in state.items() if name != "step")
    assert kept == (9 + 4) + (12 + 4) + 12 + (4 + 12) + 3 * (4 + 5)
