"""Every registered option keeps its group's protocol, by being registered."""

from __future__ import annotations

import pytest

from ftrun import forkserver, plugin
from ftrun.conformance import SUITES


@pytest.fixture(autouse=True)
def _forked_workers(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forkserver.VARIABLE, server)


for _group, _suite in SUITES.items():
    for _name in plugin.names(_group):
        _test = f"Test_{_group}_{_name}"
        globals()[_test] = type(_test, (_suite,), {"option": _name})


def test_every_group_has_a_suite():
    assert set(SUITES) == {*plugin.GROUPS, *plugin.KEYED}
