"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from ftrun.errors import Problem
from ftrun.plugin import Tracker, register
from ftrun.record import Status
from ftrun.secrets import check_name, read

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

    from ftrun.config import Config
    from ftrun.worker.training import Run


class Mode(StrEnum):
    """Where the metrics go."""

    online = "online"
    offline = "offline"


@register
@dataclass(kw_only=True)
class WandB(Tracker):
    """Weights & Biases (https://wandb.ai)."""

    requires: ClassVar[tuple[str, ...]] = ("wandb",)
    name: str = "wandb"

    project: str = "ftrun"
    """The project that the run appears in."""

    entity: str | None = None
    """The user or team that owns the project. Default: your own."""

    mode: Mode = Mode.online
    """Send metrics at once, or keep them in the run's folder for ``wandb sync``."""

    key_env: str = "WANDB_API_KEY"
    """Name of the environment variable that holds the API key; unset, ``wandb login``'s is used."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """The key itself must not stand in a config."""
        yield from check_name("tracker.wandb.key_env", self.key_env)

    def callbacks(self, model: nn.Module, run: Run) -> Sequence[TrainerCallback]:
        """Start the W&B run, or go on with it where this run is resumed, and return transformers' callback."""
        if not run.is_main:
            return []
        import wandb
        from transformers.integrations import WandbCallback

        from ftrun_plugins.tracker._reporter import END_SECONDS, START_SECONDS, reporter, starting

        if key := read(self.key_env):
            os.environ["WANDB_API_KEY"] = key
        os.environ.setdefault("WANDB_INIT_TIMEOUT", str(START_SECONDS))
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(END_SECONDS))
        with starting(self, f"export {self.key_env}=..., or tracker.wandb.mode=offline and `wandb sync` later"):
            wandb.init(
                project=self.project,
                entity=self.entity,
                name=run.name,
                id=run.unique_id,
                resume="allow",
                mode=self.mode.value,
                dir=str(run.folder),
            )

        def end(status: Status) -> None:
            if status is Status.preempted and wandb.run:
                wandb.run.mark_preempting()
            wandb.finish(exit_code=int(status not in (Status.completed, Status.paused)))

        return [reporter(self, WandbCallback(), end)]
