"""SwanLab."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
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

    cloud = "cloud"
    local = "local"
    offline = "offline"


_STATES = {Status.completed: "success", Status.failed: "crashed"}


@register
@dataclass(kw_only=True)
class SwanLab(Tracker):
    """SwanLab (https://swanlab.cn)."""

    requires: ClassVar[tuple[str, ...]] = ("swanlab",)
    name: str = "swanlab"

    project: str = "ftrun"
    """The project that the run appears in."""

    mode: Mode = Mode.cloud
    """Send metrics at once (cloud), or keep them in the run's folder for ``swanlab watch`` (local) or
    ``swanlab sync`` (offline)."""

    key_env: str = "SWANLAB_API_KEY"
    """Name of the environment variable that holds the API key; unset, ``swanlab login``'s is used."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """The key itself must not stand in a config, and the local dashboard is a package of its own."""
        yield from check_name("tracker.swanlab.key_env", self.key_env)
        if self.mode is Mode.local and find_spec("swanlab") and not find_spec("swanboard"):
            why = "local keeps metrics for SwanLab's dashboard, which is not installed"
            fix = "pip install 'swanlab[dashboard]', or tracker.swanlab.mode=offline"
            yield Problem("tracker.swanlab.mode", why, fix)

    def callbacks(self, model: nn.Module, run: Run) -> Sequence[TrainerCallback]:
        """Start the experiment, or go on with it where this run is resumed, and return transformers' callback."""
        if not run.is_main:
            return []
        import swanlab
        from transformers.integrations import SwanLabCallback

        from ftrun_plugins.tracker._reporter import END_SECONDS, START_SECONDS, reporter, starting, within

        if key := read(self.key_env):
            os.environ["SWANLAB_API_KEY"] = key

        def start() -> None:
            swanlab.init(
                project=self.project,
                experiment_name=run.name,
                id=f"ftrun{run.unique_id}",
                resume="allow",
                mode=self.mode.value,
                logdir=str(run.folder / "swanlab"),
            )

        # Not in the main thread: there SwanLab takes Ctrl-C for itself, and it waits without end for a lost network.
        with starting(self, f"export {self.key_env}=..., or tracker.swanlab.mode=offline and `swanlab sync` later"):
            within(START_SECONDS, start)

        def end(status: Status) -> None:
            state = _STATES.get(status, "aborted")
            error = "the run failed" if status is Status.failed else None
            within(END_SECONDS, lambda: swanlab.finish(state=state, error=error))

        return [reporter(self, SwanLabCallback(), end)]
