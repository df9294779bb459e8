"""Every registered option keeps its group's protocol, by being registered."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftrun import forkserver, plugin
from ftrun.conformance import SUITES


@pytest.fixture(autouse=True)
def _forked_workers(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forkserver.VARIABLE, server)


OVERRIDES = {
    ("reward", "code"): ("reward.code.allow_execution=true",),
    **{("stage", name): ("stage.max_new_tokens=8",) for name in ("ppo", "grpo", "rloo", "online_dpo")},
}
"""What options need besides being chosen."""

ELSEWHERE = {("reward", name): f"reward/test_{name}.py" for name in ("http", "model", "adapter")}
"""Options that need a server or another run: the tests of each, which inherit the suite."""

DIVISIONS = {("stage", "online_dpo"): ((8, 1), (4, 2), (2, 4))}
"""Options whose batches cannot be divided as others can: it counts replies, of which a pair belongs together."""

for _group, _suite in SUITES.items():
    for _name in plugin.names(_group):
        if (_group, _name) not in ELSEWHERE:
            _test, _needs = f"Test_{_group}_{_name}", OVERRIDES.get((_group, _name), _suite.overrides)
            _own = {"divisions": DIVISIONS[_group, _name]} if (_group, _name) in DIVISIONS else {}
            globals()[_test] = type(_test, (_suite,), {"option": _name, "overrides": _needs, **_own})


def test_every_group_has_a_suite():
    assert set(SUITES) == {*plugin.GROUPS, *plugin.KEYED}


def test_every_option_inherits_it_somewhere():
    for (group, name), file in ELSEWHERE.items():
        text = (Path(__file__).parent / file).read_text()
        assert f"({SUITES[group].__name__})" in text
        assert f'option = "{name}"' in text
