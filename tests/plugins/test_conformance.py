"""Every registered option keeps its group's protocol, by being registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftrun import forkserver, plugin
from ftrun.conformance import SUITES


@pytest.fixture(autouse=True)
def _forked_workers(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forkserver.VARIABLE, server)


PROJECTED = {
    "overrides": ("adapter=full", "optimizer.rank=8", "optimizer.update_interval=4"),
    "others": {"targets": [["q_proj"], ["mlp.up_proj"]]},
}

OWN: dict[tuple[str, str], dict[str, Any]] = {
    ("optimizer", "galore"): PROJECTED,
    ("optimizer", "fira"): PROJECTED,
    ("optimizer", "apollo"): PROJECTED | {"others": {"scale": [1.0], "targets": [["q_proj"]]}},
    # Ten steps reach every block.
    ("optimizer", "badam"): {
        "overrides": ("adapter=full", "optimizer.order=ascending", "optimizer.update_interval=3"),
        "others": {"start_block": [1]},
        "lr": 2e-2,
    },
    ("optimizer", "badam_ratio"): {
        "overrides": ("adapter=full", "optimizer.ratio=0.5"),
        "others": {"update_interval": [3]},
    },
    ("optimizer", "lisa"): {"overrides": ("adapter=full", "optimizer.n_layers=1", "optimizer.update_interval=2")},
    ("optimizer", "muon"): {"others": {"ns_coefficients": [[2.0, -1.5, 0.5]]}},
    ("optimizer", "lomo"): {"lr": 0.3},
    ("optimizer", "sgd"): {"lr": 0.1, "overrides": ("optimizer.momentum=0.9",)},
    ("optimizer", "lion"): {"lr": 2e-3},
    ("optimizer", "lion_8bit"): {"lr": 2e-3, "others": {"min_8bit_size": [100_000]}},
    ("optimizer", "adamw_8bit"): {"others": {"min_8bit_size": [100_000]}},
    ("optimizer", "adafactor"): {"lr": 5e-2, "others": {"eps1": [1e-2], "eps2": [0.5]}},
    ("optimizer", "torch"): {
        "overrides": ("optimizer.cls=torch.optim.RAdam",),
        "others": {"cls": ["torch.optim.NAdam"], "args": [{"betas": [0.5, 0.9]}]},
    },
    ("optimizer", "hf"): {
        "overrides": ("optimizer.optim=ademamix",),
        "others": {"optim": ["rmsprop"], "args": [{"alpha": 8}]},
    },
    # An embedding has to train, or a rate of its own would change nothing.
    ("optimizer", "loraplus"): {"adapter": "lora", "overrides": ("adapter.modules_to_save=[embed_tokens,lm_head]",)},
    ("optimizer", "adalomo"): {"lr": 0.1, "others": {"eps": [0.1]}},
    # Without a warm-up, the power of the rate that a step counts by is refused: it would change nothing.
    ("optimizer", "schedule_free"): {"overrides": ("train.scheduler=constant", "train.warmup=0")},
    ("reward", "code"): {"overrides": ("reward.code.allow_execution=true",)},
    **{("stage", name): {"overrides": ("stage.max_new_tokens=8",)} for name in ("ppo", "grpo", "rloo")},
    # It counts replies, of which a pair belongs together, so its batches cannot be divided as others can.
    ("stage", "online_dpo"): {"overrides": ("stage.max_new_tokens=8",), "divisions": ((8, 1), (4, 2), (2, 4))},
}
"""What the suites of some options have that others have not: what they need besides being chosen, for one."""

ELSEWHERE = {("reward", name): f"reward/test_{name}.py" for name in ("http", "model", "adapter")}
"""Options that need a server or another run: the tests of each, which inherit the suite."""

for _group, _suite in SUITES.items():
    for _name in plugin.names(_group):
        if (_group, _name) not in ELSEWHERE:
            _test = f"Test_{_group}_{_name}"
            globals()[_test] = type(_test, (_suite,), {"option": _name, **OWN.get((_group, _name), {})})


def test_every_group_has_a_suite():
    assert set(SUITES) == {*plugin.GROUPS, *plugin.KEYED}


def test_every_option_inherits_it_somewhere():
    for (group, name), file in ELSEWHERE.items():
        text = (Path(__file__).parent / file).read_text()
        assert f"({SUITES[group].__name__})" in text
        assert f'option = "{name}"' in text
