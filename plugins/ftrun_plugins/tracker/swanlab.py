"""SwanLab."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from ftrun.errors import Problem
from ftrun.plugin import Tracker, register
from ftrun.secrets import check_name, read

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

    from ftrun.config import Config
    from ftrun.worker.training import Run


class Mode(StrEnum):
    """Where the metrics go."""

    cloud = "cloud"
    local = "local"


@register
@dataclass(kw_only=True)
class SwanLab(Tracker):
    """SwanLab (https://swanlab.cn)."""

    requires: ClassVar[tuple[str, ...]] = ("swanlab",)
    name: str = "swanlab"

    project: str = "ftrun"
    """The project that the run appears in."""

    mode: Mode = Mode.cloud
    """Send metrics to the cloud, or keep them in the run's folder for ``swanlab watch``."""

    key_env: str = "SWANLAB_API_KEY"
    """Name of the environment variable that holds the API key; unset, ``swanlab login``'s is used."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """The key itself must not stand in a config."""
        yield from check_name("tracker.swanlab.key_env", self.key_env)

    def callbacks(self, model: nn.Module, run: Run) -> Sequence[TrainerCallback]:
        """Start the SwanLab experiment and return transformers' callback."""
        if not run.is_main:
            return []
        import swanlab
        from transformers.integrations import SwanLabCallback

        if key := read(self.key_env):
            os.environ["SWANLAB_API_KEY"] = key
        swanlab.init(
            project=self.project, experiment_name=run.name, mode=self.mode.value, logdir=str(run.folder / "swanlab")
        )
        return [SwanLabCallback()]
