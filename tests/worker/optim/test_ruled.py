"""The optimizer that applies rules: loading a state, and using gradients up in the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ftrun import config
from ftrun.errors import ConfigError, RunFailed
from ftrun.train import Precision
from ftrun.worker.optim.adamw import AdamW
from ftrun.worker.optim.ruled import Layerwise, Ruled, keep_types


def optimizer(*weights: nn.Parameter, lr: float = 0.1) -> Ruled:
    return Ruled([{"params": list(weights), "lr": lr, "weight_decay": 0.0, "rule": "adamw"}], {"adamw": AdamW()})


def test_a_state_is_loaded_to_the_weights_device_all_of_it():
    """A fused kernel reads the count of steps on its own device, and a checkpoint may be read to the CPU."""
    weight = nn.Parameter(torch.ones(3))
    saved = optimizer(weight)
    weight.grad = torch.ones(3)
    saved.step()
    elsewhere = nn.Parameter(torch.ones(3, device="meta"))
    loaded = optimizer(elsewhere)
    loaded.load_state_dict(saved.state_dict())
    assert {name: value.device.type for name, value in loaded.state[elsewhere].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "meta"
    )


def test_a_state_is_loaded_in_the_types_that_it_was_saved_in():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    kept = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    keep_types(kept)
    state = {
        "state": {0: {"momentum_buffer": torch.full((3,), 1 / 3)}},
        "param_groups": kept.state_dict()["param_groups"],
    }
    kept.load_state_dict(state)
    assert torch.equal(kept.state[weight]["momentum_buffer"], torch.full((3,), 1 / 3))


def test_each_gradient_is_clipped_by_its_own_norm_and_the_norm_told_is_that_of_all():
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    made = Ruled([{"params": weights, "lr": 1.0, "weight_decay": 0.0, "rule": "plain"}], {"plain": Plain()})
    made.layerwise = Layerwise(made, max_norm=1.0)
    (3 * weights[0] + 0.5 * weights[1]).sum().backward()
    assert [float(weight) for weight in weights] == pytest.approx([-1.0, -0.5], abs=1e-5)
    assert float(made.layerwise.norm) == pytest.approx((3**2 + 0.5**2) ** 0.5)
    assert all(weight.grad is None for weight in weights)
    made.step()
    assert float(made.layerwise.norm) == 0


class Plain(AdamW):
    """The gradient itself."""

    def start(self, weight, number=0):
        return {}

    def update(self, weights, grads, states, *, lr, weight_decay):
        for weight, grad in zip(weights, grads, strict=True):
            weight.sub_(lr * grad)


def test_going_backward_twice_in_a_step_is_an_error():
    weight = nn.Parameter(torch.ones(2))
    made = optimizer(weight)
    made.layerwise = Layerwise(made, 0.0)
    weight.sum().backward()
    with pytest.raises(RunFailed, match="backward twice"):
        weight.sum().backward()


def test_what_is_known_late_is_refused_late():
    cfg = config.compose(["model=tiny", "hardware=cpu", "optimizer.layerwise=true"])
    cfg.optimizer.settle(cfg)
    cfg.train.precision = Precision.fp16
    with pytest.raises(ConfigError, match="fp16 scales the loss"):
        cfg.optimizer.settle(cfg)
