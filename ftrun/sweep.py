"""A grid of runs, one after another: ``ftrun -m optimizer.lr=1e-4,5e-4 seed=1,2,3``.

Every point is checked before the first one starts. A job that fails does not stop the others. The same words with the
same ``output_dir`` go on with what is unfinished.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ftrun import compose, config, events, forkserver, launch, options, record
from ftrun.config import Config
from ftrun.display import console
from ftrun.errors import ConfigError, Problem, RunFailed, did_you_mean
from ftrun.fields import MISSING
from ftrun.record import Result, Status


@dataclass(frozen=True)
class Job:
    """One point of a grid."""

    words: tuple[str, ...]
    """Everything that is typed for it."""

    point: tuple[str, ...]
    """The words in which it differs from the others."""

    @property
    def name(self) -> str:
        """The name of its folder: the point, so that the same point is the same job."""
        name = re.sub(r"[^\w.=,+-]+", "_", ",".join(self.point)) or "all"
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return name if len(name) <= 100 else f"{name[:90]}-{digest}"


def run(words: Sequence[str]) -> tuple[Path, list[Result]]:
    """Run a grid, and return its folder and the results of the jobs that came to one.

    Raises:
        ConfigError: A point is wrong; with everything that is, before anything starts.
    """
    jobs = check(words)
    folder = _folder(words)
    results: list[Result] = []
    with _server():
        for number, job in enumerate(jobs, 1):
            console.print(f"[bold]{number} of {len(jobs)}[/]  {' '.join(job.point)}")
            try:
                results.append(_do(job, folder / job.name))
            except RunFailed as error:
                console.print(f"[red]failed[/] {error}", soft_wrap=True)
                results.append(Result.load(folder / job.name))
            if results[-1].status in (Status.interrupted, Status.preempted):
                break
    return folder, results


def check(words: Sequence[str]) -> list[Job]:
    """Return the jobs of a grid, each of which is known to compose.

    Raises:
        ConfigError: With everything that is wrong with any of them, once.
    """
    jobs = list(grid(words))
    examined, on_disk = _Examined(), _OnDisk()
    problems: dict[Problem, None] = {}
    repeated = 0
    for job in jobs:
        cfg, found = examined.examine(job)
        found = [*found, *(on_disk.problems(cfg) if cfg else ())]
        is_new = any(problem not in problems for problem in found)
        problems |= dict.fromkeys(found)
        repeated = 0 if is_new else repeated + bool(found)
        if repeated == _REPEATED:
            break
    if problems:
        raise ConfigError(list(problems))
    return jobs


MOST_JOBS = 10_000
"""A grid of more runs is a slip of the keyboard."""

_MOST_VALUES = 200_000
"""Of one word, more are not even counted."""

_REPEATED = 20
"""After so many points that are wrong in ways that are known, the others are not looked at."""


class _Examined:
    """The points of one grid as configs; the tree is composed only where more than plain values differ."""

    def __init__(self) -> None:
        self._trees: dict[tuple[str, ...], DictConfig] = {}
        self._parsed: dict[str, Override] = {}

    def examine(self, job: Job) -> tuple[Config | None, list[Problem]]:
        """Return what `ftrun.config.examine` does for a job's words."""
        words = [word for word in job.words if not word.startswith("output_dir=")]
        values = [override for word in job.point if (override := self._plain(word))]
        # Every point of a grid sets the same keys, so nothing of the last one stays behind.
        shape = tuple(word for word in job.point if self._plain(word) is None)
        if (known := self._trees.get(shape)) is not None:
            try:
                for override in values:
                    OmegaConf.update(known, override.key_or_group, override.value(), merge=True)
                return config.judge(known, words)
            except OmegaConfBaseException:
                pass  # said below, where the tree is composed
        node, problems = compose.compose_tree(words, Config)
        if node is None:
            return None, problems
        if not problems:
            self._trees[shape] = node
        cfg, found = config.judge(node, words)
        return cfg, [*problems, *found]

    def _plain(self, word: str) -> Override | None:
        """Return a word that sets a key to one plain value, as it is parsed."""
        if word not in self._parsed:
            self._parsed[word] = OverridesParser.create().parse_override(word)
        override = self._parsed[word]
        is_key = override.package is None and override.key_or_group not in options.GROUPS
        value = override.value() if is_key and override.type is OverrideType.CHANGE else None
        is_plain = isinstance(value, int | float | str) and "${" not in str(value) and value != MISSING
        return override if is_plain else None


class _OnDisk:
    """What is wrong with the files that the points of a grid name, each looked at once."""

    def __init__(self) -> None:
        self._known: dict[str, list[Problem]] = {}

    def problems(self, cfg: Config) -> list[Problem]:
        """Return what `ftrun.launch.wrong_on_disk` does."""
        key = repr((cfg.model, cfg.stage, cfg.template, cfg.data))
        if key not in self._known:
            self._known[key] = launch.wrong_on_disk(cfg)
        return self._known[key]


def grid(words: Sequence[str]) -> Iterator[Job]:
    """Yield every combination of the values that the words give, the last word's changing fastest.

    Raises:
        ConfigError: A word gives no values, or there are too many combinations.
    """
    axes: list[list[str]] = []
    if len(sweeps := [word for word in words if word.startswith("sweep=")]) > 1:
        raise ConfigError([Problem("sweep", f"is typed {len(sweeps)} times", f"one of them: ftrun -m {sweeps[-1]}")])
    fixed = [word for word in words if not _axis(word, axes) and not word.startswith("sweep=")]
    typed = {axis[0].partition("=")[0] for axis in axes} | {word.partition("=")[0] for word in fixed}
    for word in sweeps:
        for line in _sweep_file(word.partition("=")[2]):
            if line.partition("=")[0] not in typed and not _axis(line, axes):
                fixed.append(line)
    count = math.prod(len(axis) for axis in axes)
    if count > MOST_JOBS:
        known = "at least " if any(len(axis) == _MOST_VALUES for axis in axes) else ""
        message = f"the grid has {known}{count:,} runs, and no more than {MOST_JOBS:,} are started at once"
        raise ConfigError([Problem("-m", message, "fewer values, or several grids")])
    for point in itertools.product(*axes):
        yield Job(words=(*fixed, *point), point=point)


def _axis(word: str, axes: list[list[str]]) -> bool:
    """Add a word that gives several values to the axes, as one word for each."""
    try:
        override = OverridesParser.create().parse_override(word) if not word.startswith("=") else None
    except HydraException:
        return False  # said with the rest, when the words are checked
    if override is None or not override.is_sweep_override():
        return False
    key = override.key_or_group
    if key == "output_dir":
        raise ConfigError([Problem(key, "is the folder of the whole grid, and not swept", "output_dir=FOLDER")])
    if not (values := _values(override)):
        raise ConfigError([Problem(key, f"{override.input_line} gives no value", f"{key}=VALUE,VALUE")])
    axes.append([f"{key}={value}" for value in values])
    return True


def _values(override: Override) -> list[str]:
    key, value = override.key_or_group, override.value()
    if isinstance(value, Glob):
        return value.filter(options.names(key) if key in options.GROUPS else [])
    if not override.is_discrete_sweep():
        message = f"{override.input_line} has no end: a grid needs single values"
        raise ConfigError([Problem(key, message, f"{key}=VALUE,VALUE or {key}=range(START,STOP)")])
    return list(itertools.islice(override.sweep_string_iterator(), _MOST_VALUES))


def _sweep_file(name: str) -> list[str]:
    """Return the words of ``sweeps/NAME.yaml``.

    Raises:
        ConfigError: There is no such file.
    """
    known = options.sweeps()
    if name not in known:
        message = f"there is no sweep {name}{did_you_mean(name, list(known))}"
        raise ConfigError([Problem("sweep", message, f"one of {', '.join(known)}")])
    try:
        content = OmegaConf.to_container(OmegaConf.load(known[name]))
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        from ftrun import diagnose

        raise ConfigError([diagnose.unreadable(known[name], error)]) from None
    if not isinstance(content, dict):
        raise ConfigError([Problem(str(known[name]), "is a list, not KEY: VALUE", "KEY: VALUE,VALUE on each line")])
    return [f"{key!s}={value}" for key, value in content.items()]


def _folder(words: Sequence[str]) -> Path:
    given = [word.partition("=")[2] for word in words if word.startswith("output_dir=")]
    name = given[-1] if given else f"outputs/sweeps/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    return Path(name).expanduser().resolve()


def _do(job: Job, folder: Path) -> Result:
    """Run a job, go on with it, or take its result if it has one."""
    if not record.is_run(folder):
        words = [word for word in job.words if not word.startswith("output_dir=")]
        return launch.run([*words, f"output_dir='{folder}'"])
    done = Result.load(folder)
    return done if done.status is Status.completed else launch.resume(folder)


@contextlib.contextmanager
def _server() -> Iterator[None]:
    """Have a fork server for the jobs, unless there is one already."""
    if os.environ.get(forkserver.VARIABLE):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ftrun-", dir=events.socket_parent()) as folder:
        address = str(Path(folder) / "server")
        server = forkserver.start(address)
        os.environ[forkserver.VARIABLE] = address
        try:
            yield
        finally:
            del os.environ[forkserver.VARIABLE]
            server.terminate()
            server.wait()
