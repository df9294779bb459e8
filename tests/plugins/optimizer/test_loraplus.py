"""LoRA+: which weights have the higher rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ftrun.config import compose
from ftrun.errors import ConfigError
from ftrun.plugin import WeightGroup
from ftrun_plugins.optimizer.loraplus import LoRAPlus


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.norm, self.head = (
            nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2),
        )  # fmt: skip


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["embedding", "hidden"], modules_to_save=["head"], r=2, use_dora=False)
    return get_peft_model(Small(), config)  # type: ignore[arg-type]


def built(model: nn.Module, **keys: Any) -> torch.optim.Optimizer:
    return LoRAPlus(**{"lr": 0.01, "weight_decay": 0.1, **keys}).build(model, None)  # type: ignore[arg-type]


def rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    of = {
        weight: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for weight in group["params"]
    }
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    return {name.removeprefix("base_model.model.").replace(".default", ""): of[weight] for name, weight in trained}


def test_only_the_b_factors_of_linear_layers_have_it():
    model = adapted()
    assert rates(model, built(model, ratio=4.0)) == {
        "embedding.lora_embedding_A": (0.01, 0.1),
        "embedding.lora_embedding_B": (0.01, 0.1),
        "hidden.lora_A.weight": (0.01, 0.1),
        "hidden.lora_B.weight": (0.04, 0.1),
        "head.modules_to_save.weight": (0.01, 0.1),
        "head.modules_to_save.bias": (0.01, 0.0),
    }


def test_the_usual_rate_is_the_one_that_is_logged():
    assert built(adapted()).param_groups[0]["lr"] == 0.01


def test_a_rate_that_a_group_is_given_is_its_rate_and_a_scale_comes_on_top():
    model = adapted()
    given = rates(model, built(model, groups=[WeightGroup(weights="lora_B", lr=0.003)]))
    assert given["hidden.lora_B.weight"][0] == 0.003
    scaled = rates(model, built(model, ratio=4.0, groups=[WeightGroup(weights="lora_B", lr_scale=0.5)]))
    assert scaled["hidden.lora_B.weight"][0] == pytest.approx(0.02)


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_each_takes_the_steps_of_adamw_at_its_rate(ratio):
    mine, theirs = adapted(), adapted()
    optimizer = built(mine, ratio=ratio, beta2=0.95)
    trained = [(name, weight) for name, weight in theirs.named_parameters() if weight.requires_grad]
    groups = [
        {
            "params": [weight],
            "lr": 0.01 * (ratio if ".lora_B." in name else 1),
            "weight_decay": 0.1 if weight.ndim > 1 else 0.0,
        }
        for name, weight in trained
    ]
    expected = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(50):
        for model, one in ((mine, optimizer), (theirs, expected)):
            made = torch.Generator().manual_seed(step)
            for weight in (weight for weight in model.parameters() if weight.requires_grad):
                weight.grad = torch.randn(weight.shape, generator=made)
            one.step()
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_an_adapter_without_two_factors_is_refused():
    with pytest.raises(ConfigError, match="adapter=full has no factors A and B"):
        compose(["model=tiny", "adapter=full", "optimizer=loraplus"])
    assert compose(["model=tiny", "adapter=lora", "optimizer=loraplus"]).optimizer.lr == pytest.approx(1.25e-4)
