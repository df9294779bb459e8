"""Optimizers that need whole weights are not given shards of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ftrun import config
from ftrun.errors import ConfigError
from ftrun.worker.training import RunTrainer


def refuse(name: str, *, fsdp: bool = False, deepspeed: bool = False) -> None:
    cfg = config.compose(["model=tiny", "adapter=full", f"optimizer={name}"])
    found = SimpleNamespace(run=SimpleNamespace(cfg=cfg), is_fsdp_enabled=fsdp, is_deepspeed_enabled=deepspeed)
    RunTrainer._refuse_shards(found)


@pytest.mark.parametrize("name", ["galore", "muon", "adam_mini", "badam", "adafactor", "adamw_8bit"])
def test_zero_is_refused_to_what_looks_at_whole_weights(name):
    with pytest.raises(ConfigError, match=f"optimizer={name} needs the model's own weights, and ZeRO"):
        refuse(name, deepspeed=True)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_zero_is_given_to_what_goes_element_by_element(name):
    refuse(name, deepspeed=True)


@pytest.mark.parametrize("name", ["adafactor", "adamw_8bit"])
def test_fsdp_is_refused_to_what_has_no_kernel_for_shards(name):
    with pytest.raises(ConfigError, match=f"optimizer={name} looks at whole weights, and FSDP"):
        refuse(name, fsdp=True)


@pytest.mark.parametrize("name", ["adamw", "galore", "muon", "adam_mini", "apollo"])
def test_fsdp_is_given_to_what_gathers(name):
    refuse(name, fsdp=True)
