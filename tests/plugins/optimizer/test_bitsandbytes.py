"""adamw_8bit and lion_8bit: what they keep in eight bits, what in 32, and what they refuse."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftrun.config import compose
from ftrun.errors import ConfigError
from ftrun.hardware import Device
from ftrun.worker.optim.adamw import AdamW
from ftrun.worker.optim.lion import Lion
from ftrun.worker.optim.ruled import Ruled

bitsandbytes = pytest.importorskip("bitsandbytes")
BLOCK = 256
SETTINGS = {"adamw_8bit": {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6}, "lion_8bit": {"beta1": 0.8, "beta2": 0.95}}


class Small(nn.Module):
    """Two matrices with several blocks, of which one is the embedding, and a vector; the last block is not full."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear = nn.Embedding(70, 10), nn.Linear(30, 21)

    def give_gradients(self, step: int) -> None:
        made = torch.Generator().manual_seed(step)
        for weight in self.parameters():
            weight.grad = torch.randn(weight.shape, generator=made).to(weight.dtype)


def built(name: str, model: nn.Module, **keys: Any) -> Any:
    from ftrun import plugin

    chosen: Any = plugin.get("optimizer", name)(**{"lr": 0.01, "min_8bit_size": 100, **SETTINGS[name], **keys})
    return chosen.build(model, None)


def train(model: Small, optimizer: Any, steps: range) -> None:
    for step in steps:
        model.give_gradients(step)
        optimizer.step()


def rounded(values: Tensor, codes: Tensor) -> Tensor:
    """Return values as eight bits give them back: of each block, the nearest codes times the largest magnitude."""
    blocks = nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    shares = (blocks / largest).nan_to_num()
    nearest = (shares.unsqueeze(-1) - codes).abs().argmin(-1)
    return (codes[nearest] * largest).flatten()[: values.numel()].view_as(values)


def decoded(state: Tensor, largest: Tensor, codes: Tensor) -> Tensor:
    """Return what a state in eight bits stands for."""
    return (codes[state.flatten().long()] * largest.repeat_interleave(BLOCK)[: state.numel()]).view(state.shape)


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_of_matrices_the_state_is_rounded_after_each_step(name):
    model = Small()
    optimizer = built(name, model, weight_decay=0.1)
    beta1, beta2 = SETTINGS[name]["beta1"], SETTINGS[name]["beta2"]
    signed = bitsandbytes.functional.create_dynamic_map(signed=True)
    unsigned = bitsandbytes.functional.create_dynamic_map(signed=False)
    weight = model.linear.weight.detach().clone()
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(50):
        train(model, optimizer, range(step, step + 1))
        grad = model.linear.weight.grad
        weight = weight * (1 - 0.01 * 0.1)
        if name == "lion_8bit":
            weight = weight - 0.01 * torch.sign(beta1 * mean + (1 - beta1) * grad)
            mean = beta2 * mean + (1 - beta2) * grad
        else:
            mean, square = beta1 * mean + (1 - beta1) * grad, beta2 * square + (1 - beta2) * grad**2
            root = square.sqrt() / math.sqrt(1 - beta2 ** (step + 1)) + 1e-6
            weight = weight - 0.01 / (1 - beta1 ** (step + 1)) * mean / root
        torch.testing.assert_close(model.linear.weight.detach(), weight, atol=1e-5, rtol=0)
        state = optimizer.state[model.linear.weight]
        for number, exact, codes in ((1, mean, signed), (2, square, unsigned)):
            if f"state{number}" in state:  # its search for the nearest code is not exact
                kept = decoded(state[f"state{number}"], state[f"absmax{number}"], codes)
                assert torch.isclose(kept, rounded(exact, codes)).float().mean() > 0.9
                exact.copy_(kept)


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_embeddings_and_small_weights_keep_32_bits(name):
    mine, plain = Small(), Small()
    optimizer = built(name, mine, weight_decay=0.1)
    groups = [
        {"params": [plain.embedding.weight], "lr": 0.01, "weight_decay": 0.1, "rule": "plain"},
        {"params": [plain.linear.bias], "lr": 0.01, "weight_decay": 0.0, "rule": "plain"},
    ]
    rule = (AdamW if name == "adamw_8bit" else Lion)(**SETTINGS[name])
    expected = Ruled(groups, {"plain": rule})
    train(mine, optimizer, range(50))
    train(plain, expected, range(50))
    torch.testing.assert_close(mine.embedding.weight, plain.embedding.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine.linear.bias, plain.linear.bias, atol=1e-5, rtol=0)
    kinds = {name: optimizer.state[weight]["state1"].dtype for name, weight in mine.named_parameters()}
    assert kinds == {
        "embedding.weight": torch.float32,
        "linear.weight": torch.uint8,
        "linear.bias": torch.float32,
    }
    assert {group["rule"]: group["name"] for group in optimizer.param_groups if group["weight_decay"]} == {
        "32bit": "matrices",
        "8bit": "matrices",
    }


def test_no_weight_of_a_later_model_is_taken_for_an_embedding():
    built("adamw_8bit", Small())
    assert not bitsandbytes.optim.GlobalOptimManager.get_instance().pid2config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_it_goes_on_where_it_was(name, dtype):
    whole, first, second = Small().to(dtype), Small().to(dtype), Small().to(dtype)
    train(whole, built(name, whole), range(7))
    stopped, resumed = built(name, first), built(name, second)
    train(first, stopped, range(3))
    second.load_state_dict(first.state_dict())
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(second, resumed, range(3, 7))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("name", "states"), [("adamw_8bit", 2), ("lion_8bit", 1)])
def test_a_value_is_a_byte_and_its_share_of_a_scale(name, states):
    model = Small()
    optimizer = built(name, model)
    train(model, optimizer, range(1))
    state = optimizer.state[model.linear.weight]
    kept = [value.nbytes for key, value in state.items() if key.startswith(("state", "absmax"))]
    assert sum(kept) == states * (30 * 21 + 4 * math.ceil(30 * 21 / BLOCK))


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_paging_is_refused_where_there_is_none(name):
    words = ["model=tiny", f"optimizer={name}", "optimizer.paged=true"]
    with pytest.raises(ConfigError, match=r"hardware\.device=cpu has no paged memory"):
        compose([*words, "hardware.device=cpu"])
    for device in ("cuda", "auto"):
        cfg = compose([*words, f"hardware.device={device}"])
    cfg.hardware.device = Device.cpu
    with pytest.raises(ConfigError, match=r"optimizer\.paged=false"):
        cfg.optimizer.settle(cfg)
    cfg.hardware.device = Device.rocm
    cfg.optimizer.settle(cfg)
