"""What launchers share: each gets one override per job, ``run=PATH_OF_RUN_YAML``, and says how it went in its folder.

Hydra's own launchers, and other people's, work as well: `do` is what they call for each job.
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher as HydraLauncher
from hydra.plugins.plugin import Plugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from ftrun import fields, record, words
from ftrun.errors import ConfigError, FtrunError, Problem, RunFailed
from ftrun.fields import MISSING
from ftrun.hardware import unread_limits
from ftrun.record import Holder, Result, Status

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.launch import Screen


@dataclass(kw_only=True)
class JobConfig:
    """All that a launcher's job is told."""

    run: str = MISSING
    """Path of a frozen ``run.yaml``."""

    driver: int = 0
    """The process that is at the sweep."""


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

    has_nodes: ClassVar[bool] = False
    """Whether it can start one run on several machines."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Which limits of `ftrun.hardware.LIMITS` it asks for."""

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

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield what it cannot start of a run."""
        if cfg.hardware.num_nodes > 1 and not self.has_nodes:
            message = f"{cfg.hardware.num_nodes} machines are no matter for this launcher, which starts a run on one"
            yield Problem("hardware.num_nodes", message, "hydra/launcher=slurm")
        yield from unread_limits(cfg.hardware, self.reads)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Bring each job to its end, or as far as the launcher goes."""
        folders = [_folder(given) for given in job_overrides]
        try:
            self.work(folders)
        except KeyboardInterrupt:  # where nobody looks after signals
            self.told, self.is_stopped = Status.interrupted, True
        return [_returned(folder, given) for folder, given in zip(folders, job_overrides, strict=True)]

    def close(self) -> None:
        """Give back what it has kept between one batch of jobs and the next."""

    @abstractmethod
    def work(self, folders: Sequence[Path]) -> None:
        """Bring the frozen runs in these folders to their end; how each went is in its ``result.json``."""


class Foreign(Launcher):
    """A launcher of others, which knows of Hydra's jobs and nothing else: it calls `do` for each."""

    def __init__(self, theirs: HydraLauncher) -> None:
        super().__init__()
        self._theirs = theirs
        self._count = 0

    def work(self, folders: Sequence[Path]) -> None:
        """Have it launch them."""
        first, self._count = self._count, self._count + len(folders)
        self._theirs.launch([[override(folder)] for folder in folders], first)


def adapted(made: HydraLauncher) -> Launcher:
    """Return a launcher, whoever's it is, as one of ftrun's."""
    return made if isinstance(made, Launcher) else Foreign(made)


def do(cfg: DictConfig) -> dict[str, Any]:
    """Do a job, in this process' place: the task function for launchers that are not ftrun's.

    A run that is under way already, from before the driver died, is waited for.

    Raises:
        KeyboardInterrupt: The driver, whose process this is, was told to stop: no other job is to start.
    """
    from rich.markup import escape

    from ftrun.display import Display, print_line

    folder, is_driver = Path(cfg.run).parent, cfg.driver == os.getpid()
    while (result := Result.load(folder)).status is Status.running:
        time.sleep(1.0)
    if result.status is not Status.completed:
        if not is_driver:
            print_line(f"started {escape(folder.name)}")
        result = bring(folder, Display(folder) if is_driver else Silent())
        if not is_driver:
            print_line(escape(" ".join([result.status, folder.name, *result.reason.splitlines()[:1]])))
    if is_driver and result.status in (Status.interrupted, Status.preempted):
        raise KeyboardInterrupt
    return {"status": result.status.value, "objective": result.objective}


class Silent:
    """A screen for a run whose driver has others, or is somewhere else."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave nothing."""

    def show(self, event: dict[str, Any]) -> None:
        """Show nothing."""

    def stopping(self, interrupted: bool, again: bool) -> None:
        """Say nothing."""


def bring(folder: Path, screen: Screen) -> Result:
    """Bring a frozen run to its end from this process; whatever happens, its folder says how it went.

    A run that another process has come to hold meanwhile is left to that, and returned as running.
    """
    from ftrun import launch

    try:
        return launch.watch(folder, screen)
    except KeyboardInterrupt:  # before there was anything to pass it on to
        if Result.load(folder).holder == Holder.me():
            Result(status=Status.interrupted, reason="before it started", **record.so_far(folder)).save(folder)
        raise
    except Exception as error:
        result = Result.load(folder)
        is_theirs = result.status is Status.running and result.holder != Holder.me()
        if not is_theirs and not result.problems:  # with problems, the worker has said it all
            reason = str(error) if isinstance(error, FtrunError) else f"{type(error).__name__}: {error}"
            result = record.conclude(folder, Status.failed, reason)
        return result


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
