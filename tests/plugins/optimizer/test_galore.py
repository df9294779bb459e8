"""GaLore as an option: what is projected, what is refused, and a run that resumes."""

from __future__ import annotations

from importlib import metadata

import pytest
from torch import nn

from ftrun import config
from ftrun.errors import ConfigError
from ftrun.worker.parameters import Role, Weight
from ftrun_plugins.optimizer.galore import GaLore

TINY = ("model=tiny", "adapter=full", "optimizer=galore", "optimizer.rank=8")


def problems(*words):
    return {problem.key: problem for problem in config.examine([*TINY, *words])[1]}


def rule_of(name, *shape, role=Role.matrix, **keys):
    return GaLore(**keys).rule_of(Weight(name, nn.Parameter(nn.Linear(1, 1).weight.new_empty(shape)), role))


def test_targets_that_are_larger_than_their_projection_are_projected():
    name = "model.layers.0.self_attn.q_proj.weight"
    assert rule_of(name, 256, 512) == "projected"
    assert rule_of(name, 256, 512, rank=256) == "adamw"
    assert rule_of(name, 3, 256, 512, rank=255) == "projected"
    assert rule_of(name, 256, 512, role=Role.head) == "adamw"
    assert rule_of(name, 256, 512, targets=["q_proj"]) == "projected"
    assert rule_of(name, 256, 512, targets=["layers.0.self_attn.q_proj"]) == "projected"
    assert rule_of(name, 256, 512, targets=["proj", "k_proj", "self_attn"]) == "adamw"


def test_adapters_that_train_factors_are_refused():
    assert "low rank already" in problems("adapter=lora")["optimizer"].message
    assert not problems("adapter=freeze")


def test_nothing_to_project_is_refused():
    assert "names nothing" in problems("optimizer.targets=[]")["optimizer.targets"].message


def test_eight_bits_need_their_package(monkeypatch):
    assert not problems("optimizer.inner=adamw8bit")

    def version(distribution):
        raise metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr("ftrun.plugin.version", version)
    assert "pip install bitsandbytes" in problems("optimizer.inner=adamw8bit")["optimizer.inner"].fix
    assert not problems()


def test_a_name_that_is_nowhere_is_told_with_those_that_are():
    model = nn.ModuleDict({"q_proj": nn.Linear(20, 30), "up_proj": nn.Linear(20, 30)})
    with pytest.raises(ConfigError) as raised:
        GaLore(lr=1e-3, targets=["q_proj", "qproj"]).build(model, None)
    (problem,) = raised.value.problems
    assert problem.key == "optimizer.targets"
    assert "qproj; did you mean q_proj" in problem.message
    assert "q_proj, up_proj" in problem.fix
