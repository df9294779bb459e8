"""``hydra/launcher=ray``: jobs as tasks of a Ray cluster, or of a Ray that is started on this machine for them.

No annotations from the future here: Hydra runs this file before dataclasses could look up what they mean.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun import plugin
from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.launcher import Launcher, Settings, register


@dataclass(kw_only=True)
class RaySettings(Settings):
    """Which Ray does the jobs, and when to give up; what each job gets is ``hardware``."""

    address: str | None = None
    """A cluster that runs: ``auto`` (the one this machine belongs to), HOST:PORT or ray://HOST:10001. Default: none; a
    Ray of this machine alone is started for the jobs and stopped after them."""

    num_cpus: int | None = ranged(None, ge=1)
    """CPUs that jobs share on this machine, without ``address``. Default: all."""

    max_failures: int | None = ranged(5, ge=1)
    """Stop once so many jobs have failed for one reason and none has completed; null never stops."""

    def check(self) -> Iterator[Problem]:
        """Yield what cannot be."""
        if not plugin.is_installed("ray"):
            yield Problem(
                "hydra/launcher", "ray needs the package ray, which is not installed", "pip install 'ftrun[ray]'"
            )
        if self.address is not None and self.num_cpus is not None:
            message = "is of a Ray that is started here, and the one at hydra.launcher.address runs already"
            yield Problem("hydra.launcher.num_cpus", message, "leave one of the two out")


class Ray(Launcher):
    """Jobs as Ray's tasks."""

    settings_class = RaySettings
    reads = ("memory_gb",)

    def setup(self, **given: Any) -> None:
        """Read the settings."""
        from ftrun.hardware import usable_cpus

        super().setup(**given)
        if self.settings.address is None:  # one job for each four CPUs, as the local launcher has it
            self.slots = max(1, (self.settings.num_cpus or usable_cpus()) // 4)

    def work(self, folders: Sequence[Path]) -> None:
        """Bring jobs to their end, each in a task of its own."""
        from ftrun.on_ray import Tasks

        tasks = Tasks(self.settings.address, self.settings.num_cpus, self.settings.max_failures, self.on_end)
        self.is_stopped = not tasks.work(folders)
        self.told = tasks.told


register("hydra/launcher", "ray", Ray, RaySettings)
