"""optimizer=hf: the names of transformers, over our groups; what goes wrong there is refused here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ftrun.config import compose
from ftrun.errors import ConfigError
from ftrun_plugins.optimizer.hf import HF


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear = nn.Embedding(500, 16), nn.Linear(16, 300)

    def give_gradients(self, step: int) -> None:
        made = torch.Generator().manual_seed(step)
        for weight in self.parameters():
            weight.grad = torch.randn(weight.shape, generator=made)


def built(model: nn.Module, optim: str, **keys: Any) -> torch.optim.Optimizer:
    return HF(optim=optim, **{"lr": 0.01, **keys}).build(model, None)  # type: ignore[arg-type]


def train(model: Small, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model.give_gradients(step)
        optimizer.step()


def test_it_takes_the_steps_of_the_class_with_the_settings_typed():
    mine, theirs = Small(), Small()
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    train(mine, built(mine, "adamw_torch", args=settings, weight_decay=0.2), range(50))
    groups = [
        {"params": [theirs.embedding.weight, theirs.linear.weight], "weight_decay": 0.2},
        {"params": [theirs.linear.bias], "weight_decay": 0.0},
    ]
    train(theirs, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6), range(50))
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("optim", ["adafactor", "adagrad", "ademamix", "lion_32bit", "rmsprop", "sgd"])
def test_each_steps(optim):
    model = Small()
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer = built(model, optim, weight_decay=0.1)
    train(model, optimizer, range(2))
    assert all(not torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


def test_with_eight_bits_embeddings_keep_32():
    model = Small()
    optimizer = built(model, "ademamix_8bit")
    train(model, optimizer, range(1))
    assert optimizer.state[model.embedding.weight]["state1"].dtype == torch.float32
    assert optimizer.state[model.linear.weight]["state1"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("optim", "args", "said"),
    [
        ("ademamx", {}, "transformers knows no ademamx; did you mean ademamix"),
        ("ademamix", {"alfa": 8}, "alfa=8 changes nothing"),
        ("sgd", {"adam_beta1": 0.8}, "adam_beta1=0.8 changes nothing"),
        ("sgd", {"momentum": "much"}, "transformers cannot make sgd of this"),
        ("adamw_torch_xla", {}, "torch_xla"),
    ],
)
def test_what_would_be_ignored_is_refused(optim, args, said):
    with pytest.raises(ConfigError) as refused:
        built(Small(), optim, args=args)
    assert said in str(refused.value)


def test_numbers_arrive_as_numbers():
    optimizer = built(Small(), "rmsprop_bnb", args={"alpha": 0.8})
    assert optimizer.param_groups[0]["betas"][0] == 0.8


@pytest.mark.parametrize(
    ("optim", "instead"),
    [
        ("galore_adamw_8bit_layerwise", "optimizer=galore"),
        ("apollo_adamw", "optimizer=apollo"),
        ("lomo", "optimizer=lomo"),
        ("adalomo", "optimizer=adalomo"),
        ("schedule_free_radam", "optimizer=schedule_free"),
        ("paged_lion_8bit", "optimizer.optim=lion_8bit"),
    ],
)
def test_names_that_go_wrong_are_refused_with_what_to_type_instead(optim, instead):
    with pytest.raises(ConfigError) as refused:
        compose(["model=tiny", "hardware=cpu", "optimizer=hf", f"optimizer.optim={optim}"])
    assert f"fix: {instead}" in str(refused.value)


def test_a_run_trains_with_it(ftrun):
    small = ("model=tiny", "hardware=cpu", "adapter=full", "train.max_steps=10", "train.log_every=1")
    done = ftrun(*small, "optimizer=hf", "optimizer.optim=ademamix", "optimizer.lr=1e-2").sees(0)
    assert done.losses[-1] < 0.85 * done.losses[0]
