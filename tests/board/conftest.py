"""A sweep whose jobs are written, not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_sweep import FakeSweep


@pytest.fixture
def sweep(tmp_path: Path) -> FakeSweep:
    return FakeSweep(tmp_path / "grid")
