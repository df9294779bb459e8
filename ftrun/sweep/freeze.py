"""From points to frozen jobs: every point is checked, and written as ``run.yaml``, before the first job starts.

The tree is composed once for each choice of options. Points that differ in plain values only are set on a copy of it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftrun import compose, config, environment, launch, options, record
from ftrun.config import Config
from ftrun.errors import ConfigError, Problem
from ftrun.fields import MISSING
from ftrun.sweep.ledger import Job, Ledger
from ftrun.sweep.points import Point, parse

_REPEATED = 6
"""After so many points that are wrong in ways that are known, the others are not looked at."""


Also = Callable[[Config], Iterable[Problem]]


def _nothing(_: Config) -> Iterable[Problem]:
    return ()


def check(points: Iterable[Point], also: Also = _nothing) -> Iterator[tuple[Point, Config]]:
    """Yield the config of each point that gives one; of those that are the same job, the first.

    Args:
        points: What to look at.
        also: Yields what else is wrong with a config: what the launcher cannot start.

    Raises:
        ConfigError: At the end, with everything that is wrong with any of them, once.
    """
    examined = Examined(also)
    seen = set()
    for point in points:
        cfg = examined.config(point)
        if cfg is not None and (key := keys_of(cfg)[0]) not in seen:
            seen.add(key)
            yield point, cfg
    examined.raise_problems()


def freeze(points: Iterable[Point], ledger: Ledger, slots: int, also: Also = _nothing) -> list[Job]:
    """Return the job of each point, newly frozen or known already; points with equal configs are one job.

    Args:
        points: What to freeze.
        ledger: The sweep's folder.
        slots: How many jobs share this machine, where they run on its CPUs.
        also: As of `check`.

    Raises:
        ConfigError: With everything that is wrong with any of the points; nothing has been frozen then.
    """
    known = {job.key: job for job in ledger.jobs()}
    examined, facts = Examined(also), environment.facts()
    jobs: dict[str, Job] = {}
    made: list[Path] = []
    try:
        for point in points:
            cfg = examined.config(point)
            if cfg is None or examined.problems:
                continue
            key, arm = keys_of(cfg)
            job = jobs.get(key) or known.get(key)
            if job is None:
                folder = _new_folder(ledger.folder, _name(point), key)
                job = Job(len(known) + len(made), point.overrides, key, folder, arm)
                made.append(folder)
            if not (job.folder / record.RUN).exists():
                launch.freeze_job(cfg, point.words, job.folder, facts, slots)
            jobs[key] = job
        examined.raise_problems()
    except BaseException:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if made:
        os.sync()  # once for all of them, before anybody is told that they are there
        ledger.add([job for job in jobs.values() if job.key not in known])
    return list(jobs.values())


def _new_folder(parent: Path, name: str, key: str) -> Path:
    """Return a folder for a job that is not known yet, which is nobody else's."""
    for folder in (parent / name, parent / f"{name}-{key[:8]}", parent / f"{name}-{key}"):
        if record.is_run(folder) and not (folder / record.RESULT).exists():
            shutil.rmtree(folder)  # left over from a driver that was killed before it had frozen everything
        if not folder.exists():
            return folder
    message = "holds something that this sweep knows nothing of"
    raise ConfigError([Problem(str(parent / name), message, "another output_dir, or move it away")])


def keys_of(cfg: Config) -> tuple[str, str]:
    """Return what tells a job, and what tells its arm, from others.

    Both are hashes of its config before anything of this machine is in it; that of the arm leaves out the seed.
    """
    plain = cfg.plain() | {"output_dir": None}
    texts = (json.dumps(each, sort_keys=True) for each in (plain, plain | {"seed": None}))
    job, arm = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts)
    return job, arm


def _name(point: Point) -> str:
    """Return the name of a job's folder, which says what it is."""
    name = re.sub(r"[^\w.=,+-]+", "_", ",".join(point.overrides)) or "all"
    if len(name.encode()) <= 100:
        return name
    short = name.encode()[:90].decode(errors="ignore")
    return f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class Examined:
    """The points of one sweep as configs, and everything wrong with them."""

    def __init__(self, also: Also = _nothing) -> None:
        self._also = also
        self.problems: dict[Problem, None] = {}
        self._repeated = 0
        self._trees: dict[tuple[str, ...], tuple[DictConfig, Config]] = {}
        self._plain: dict[str, tuple[str, Any] | None] = {}
        self._on_disk: dict[str, list[Problem]] = {}

    def config(self, point: Point, *, to_run: bool = True) -> Config | None:
        """Return a point's config, or None if its words give none or enough is known to be wrong with all of them."""
        if self._repeated >= _REPEATED:
            return None
        cfg, found = self._examine(point)
        if cfg is not None:
            key = repr((cfg.model, cfg.stage, cfg.template, cfg.data))
            if key not in self._on_disk:
                self._on_disk[key] = launch.wrong_on_disk(cfg, to_run=to_run)
            found = [*found, *self._on_disk[key], *self._also(cfg)]
        is_new = any(problem not in self.problems for problem in found)
        self.problems |= dict.fromkeys(found)
        self._repeated = 0 if is_new else self._repeated + bool(found)
        return cfg

    def raise_problems(self) -> None:
        """Raise what is wrong with any point looked at so far.

        Raises:
            ConfigError: Something is.
        """
        if self.problems:
            raise ConfigError(list(self.problems))

    def _examine(self, point: Point) -> tuple[Config | None, list[Problem]]:
        values = [value for word in point.overrides if (value := self._plain_value(word))]
        # Every point of a sweep sets the same keys, so nothing of the last one stays behind.
        shape = tuple(word for word in point.words if word not in point.overrides or not self._plain_value(word))
        if (known := self._trees.get(shape)) is not None:
            try:
                return self._judge(*known, values, point.words)
            except OmegaConfBaseException:
                pass  # said below, where the tree is composed
        node, problems = compose.compose_tree(point.words, Config)
        if node is None:
            return None, problems
        # Keys that point at others take their values when the tree is read: such a tree is composed for each point.
        if not problems and "${" not in OmegaConf.to_yaml(node):
            self._trees[shape] = node, cast(Config, OmegaConf.to_object(node))
        cfg, found = config.judge(node, point.words)
        return cfg, [*problems, *found]

    @staticmethod
    def _judge(
        node: DictConfig, known: Config, values: list[tuple[str, Any]], words: tuple[str, ...]
    ) -> tuple[Config, list[Problem]]:
        """Judge a composed tree with other values; OmegaConf says of each whether its key takes it, and as what."""
        cfg = copy.deepcopy(known)
        for key, value in values:
            OmegaConf.update(node, key, value, merge=True)
            _set(cfg, key.split("."), OmegaConf.select(node, key))
        return cfg, config.judge_object(cfg, words)

    def _plain_value(self, word: str) -> tuple[str, Any] | None:
        """Return key and value of a word that sets a key to one plain value."""
        if word not in self._plain:
            override = parse(word)
            is_plain = False
            if override and override.package is None and override.key_or_group not in options.GROUPS:
                is_change = not (override.is_add() or override.is_force_add() or override.is_delete())
                value = override.value() if is_change and not override.is_sweep_override() else None
                is_plain = isinstance(value, int | float | str) and "${" not in str(value) and value != MISSING
            self._plain[word] = (override.key_or_group, value) if override and is_plain else None
        return self._plain[word]


def _set(owner: Any, path: list[str], value: Any) -> None:
    """Set what a path of names and indices leads to."""
    name, *rest = path
    if isinstance(owner, list):
        _set(owner[int(name)], rest, value)  # an entry of a list is a config of its own
    elif isinstance(owner, dict):
        _set(owner[name], rest, value) if rest else owner.__setitem__(name, value)
    else:
        _set(getattr(owner, name), rest, value) if rest else setattr(owner, name, value)
