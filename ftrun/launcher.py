"""What launchers share: each gets one override per job, ``run=PATH_OF_RUN_YAML``, and says how it went in its folder.

Hydra's own launchers, and other people's, work as well: `do` is what they call for each job.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher as HydraLauncher
from hydra.plugins.plugin import Plugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from ftrun import fields, words
from ftrun.errors import ConfigError, FtrunError, Problem, RunFailed
from ftrun.fields import MISSING
from ftrun.record import Result, Status


@dataclass(kw_only=True)
class JobConfig:
    """All that a launcher's job is told."""

    run: str = MISSING
    """Path of a frozen ``run.yaml``."""


def override(folder: Path) -> str:
    """Return the one override of a job."""
    return f"run={words.as_text(str(folder / 'run.yaml'))}"


@dataclass(kw_only=True)
class Settings:
    """Base of what a launcher or a sweeper can be told below ``hydra.launcher`` and ``hydra.sweeper``."""

    @classmethod
    def read(cls, given: dict[str, Any], prefix: str) -> Self:
        """Return typed settings.

        Raises:
            ConfigError: With everything that is wrong with them.
        """
        settings = cast(Self, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), given)))
        if problems := [*fields.out_of_range(settings, prefix), *settings.check()]:
            raise ConfigError(problems)
        return settings

    def check(self) -> Iterator[Problem]:
        """Yield what cannot be."""
        yield from ()


class Launcher(HydraLauncher):
    """Base of ftrun's own launchers."""

    settings_class: ClassVar[type[Settings]]
    """What can be told to it, registered in Hydra by `register`."""

    slots: int = 1
    """How many jobs share this machine's CPUs."""

    told: Status | None = None
    """What it was told while it worked: to save and stop."""

    is_stopped: bool = False
    """Whether it stopped before all was done."""

    def __init__(self, **given: Any) -> None:
        self._given = given
        self.on_end: Callable[[], None] = lambda: None
        """Called now and then after jobs have ended, to look at their folders."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Read the settings; the jobs' folders say the rest.

        Raises:
            ConfigError: With everything that is wrong with them.
        """
        self.settings: Any = self.settings_class.read(self._given, "hydra.launcher.")

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Bring each job to its end, or as far as the launcher goes."""
        folders = [_folder(given) for given in job_overrides]
        self.work(folders)
        return [_returned(folder, given) for folder, given in zip(folders, job_overrides, strict=True)]

    @abstractmethod
    def work(self, folders: Sequence[Path]) -> None:
        """Bring the frozen runs in these folders to their end; how each went is in its ``result.json``."""


def do(cfg: DictConfig) -> dict[str, Any]:
    """Do a job, in this process' place: the task function for launchers that are not ftrun's.

    A run that is under way already, from before the driver died, is waited for.
    """
    from ftrun import launch

    folder = Path(cfg.run).parent
    while (result := Result.load(folder)).status is Status.running:
        time.sleep(1.0)
    if result.status is not Status.completed:
        try:
            result = launch.start(folder)
        except FtrunError as error:
            if not isinstance(error, RunFailed):
                Result(status=Status.failed, reason=str(error)).save(folder)
            result = Result.load(folder)
    return {"status": result.status.value, "objective": result.objective}


def register(group: str, name: str, cls: type[Plugin], settings_class: type[Settings]) -> None:
    """Tell Hydra of a launcher or a sweeper: ``hydra/launcher=NAME``, with its settings as its keys."""
    node = OmegaConf.structured(settings_class)
    OmegaConf.set_struct(node, False)
    node._target_ = f"{cls.__module__}.{cls.__name__}"
    OmegaConf.set_struct(node, True)
    ConfigStore.instance().store(group=group, name=name, node=node, provider="ftrun")


def _folder(given: Sequence[str]) -> Path:
    overrides = OverridesParser.create().parse_overrides(list(given))
    return next(Path(str(each.value())).parent for each in overrides if each.key_or_group == "run")


def _returned(folder: Path, given: Sequence[str]) -> JobReturn:
    result = Result.load(folder)
    returned = JobReturn(overrides=given, working_dir=str(folder))
    failed = result.status is Status.failed
    returned.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
    returned.return_value = RunFailed(f"{folder}: {result.reason}") if failed else result.objective
    return returned
