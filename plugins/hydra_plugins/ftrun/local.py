"""``hydra/launcher=local``: jobs on this machine, as many at once as there are slots.

No annotations from the future here: Hydra runs this file before dataclasses could look up what they mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.fields import ranged
from ftrun.launcher import Launcher, Settings, register


@dataclass(kw_only=True)
class LocalSettings(Settings):
    """How many jobs at once, and when to give up."""

    slots: int | None = ranged(None, ge=1)
    """On CPU, jobs at once (default: one for each four CPUs); on accelerators, jobs on each (default: one)."""

    max_failures: int | None = ranged(5, ge=1)
    """Stop once so many jobs have failed for one reason and none has completed; null never stops."""


class Local(Launcher):
    """Jobs on this machine."""

    settings_class = LocalSettings

    def setup(self, **given: Any) -> None:
        """Read the settings."""
        from ftrun.hardware import usable_cpus

        super().setup(**given)
        self._server: Any = None
        self.slots = self.settings.slots or max(1, usable_cpus() // 4)

    def work(self, folders: Sequence[Path]) -> None:
        """Bring jobs to their end, each in processes of its own."""
        from ftrun.pool import ForkServer, Pool

        self._server = self._server or ForkServer()  # from the second batch on, it is there
        pool = Pool(self._server, self.slots, self.settings.slots or 1, self.settings.max_failures, self.on_end)
        self.is_stopped = not pool.work(folders)
        self.told = pool.told

    def close(self) -> None:
        """End the fork server."""
        if self._server:
            self._server.close()


register("hydra/launcher", "local", Local, LocalSettings)
