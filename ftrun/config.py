"""The config tree of one run: what was typed becomes typed objects, or a list of everything wrong with it.

The driver composes the tree with Hydra (`ftrun.compose`) and freezes it as ``run.yaml``; the worker reads that file
back with `Config.load` and never sees Hydra.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from ftrun import fields, model, plugin, record, template
from ftrun.data import Data, keys
from ftrun.errors import ConfigError, Problem, did_you_mean
from ftrun.fields import MISSING
from ftrun.hardware import Hardware
from ftrun.model import Model
from ftrun.plugin import Adapter, Optimizer, Plugin, Quant, Stage, Tracker
from ftrun.template import Template
from ftrun.train import Train

SCHEMA_VERSION = 1
"""Version of ``run.yaml``; a change of a key's name or meaning raises it."""


class ObjectiveMode(StrEnum):
    """Which end of the objective is good."""

    min = "min"
    max = "max"


@dataclass(kw_only=True)
class Config:
    """Everything one run needs to know."""

    stage: Stage = MISSING
    model: Model = field(default_factory=Model)
    template: Template = field(default_factory=Template)
    data: Data = field(default_factory=Data)
    adapter: Adapter = MISSING
    quant: Quant = MISSING
    optimizer: Optimizer = MISSING
    train: Train = field(default_factory=Train)
    hardware: Hardware = field(default_factory=Hardware)
    tracker: dict[str, Tracker] = field(default_factory=dict)

    seed: int = fields.ranged(42, ge=0, lt=2**32)
    """Seed of everything random: initial weights, the order of rows, dropout."""

    objective: str | None = None
    """The metric that says how good the run is. Default: the stage's own, on held-out rows where there are any."""

    objective_mode: ObjectiveMode = ObjectiveMode.min
    """Whether a low or a high objective is good."""

    output_dir: str | None = None
    """The run's folder. Default: outputs/STAGE/DATE_TIME."""

    plugins: list[str] = field(default_factory=list)
    """Python files of your own that register plugins: ``plugins=[my_optimizer.py]``."""

    schema_version: int = SCHEMA_VERSION
    """Version of this tree's keys; not to be typed."""

    @property
    def chosen(self) -> list[Plugin]:
        """The chosen plugins of all groups."""
        return [self.stage, self.adapter, self.quant, self.optimizer, *self.tracker.values()]

    @property
    def folder(self) -> Path:
        """The run's folder, once the config is frozen."""
        assert self.output_dir is not None
        return Path(self.output_dir)

    def to_yaml(self) -> str:
        """Return the whole tree as YAML, every default written out."""
        return OmegaConf.to_yaml(OmegaConf.structured(self))

    def save(self, path: Path) -> None:
        """Write the whole tree."""
        record.write_whole(path, self.to_yaml())

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read a saved tree; each plugin's ``name`` says which class it is.

        Raises:
            ConfigError: The file is of another version, or a plugin in it is not installed here.
        """
        saved = cast(DictConfig, OmegaConf.load(path))
        if (found := saved.get("schema_version")) != SCHEMA_VERSION:
            message = f"is of version {found}, and this ftrun reads version {SCHEMA_VERSION}"
            raise ConfigError(
                [Problem(str(path), message, "the ftrun that wrote it (its version is in manifest.json)")]
            )
        for file in saved.plugins:
            plugin.load_file(path.parent / file)
        schema: DictConfig = OmegaConf.structured(cls)
        try:
            for group in ("stage", "adapter", "quant", "optimizer"):
                schema[group] = plugin.get(group, saved[group].name)
            for name in saved.tracker:
                schema.tracker[name] = plugin.get("tracker", name)
        except LookupError as error:
            raise ConfigError(
                [Problem(str(path), f"no plugin {error} is installed here", "install what provides it")]
            ) from None
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(schema, saved)))


def compose(overrides: Sequence[str]) -> Config:
    """Turn what was typed into a checked config.

    Raises:
        ConfigError: With everything that is wrong.
    """
    cfg, problems = examine(overrides)
    if problems or cfg is None:
        raise ConfigError(problems)
    return cfg


def examine(overrides: Sequence[str]) -> tuple[Config | None, list[Problem]]:
    """Turn what was typed into a config as far as it goes, and find everything wrong with it.

    Returns:
        The config, or None if the words give none; it can be looked at further, but not run if there are problems.
    """
    from ftrun import compose as hydra_side

    node, problems = hydra_side.compose_tree(overrides, Config)
    if node is None:
        return None, problems
    cfg = cast(Config, OmegaConf.to_object(node))
    problems += [*model.pick_size(cfg.model), *fields.out_of_range(cfg)]
    if cfg.data.path == "":
        problems.append(Problem("data.path", "has no value", "data.path=FILE"))
    if cfg.data.path is None and not cfg.data.sources:
        cfg.data.path = cfg.stage.default_data or None
    if cfg.optimizer.lr is None:
        cfg.optimizer.lr = cfg.stage.default_lr * cfg.adapter.lr_scale * cfg.optimizer.lr_scale
    problems += [*_missing_packages(cfg), *_contradictions(cfg), *_unread(cfg)]
    for option in cfg.chosen:
        problems += option.check(cfg)
    return cfg, problems


def _missing_packages(cfg: Config) -> Iterator[Problem]:
    for option in cfg.chosen:
        for distribution in option.requires:
            try:
                version(distribution)
            except PackageNotFoundError:
                what = f"{option.group}={option.name}"
                yield Problem(
                    option.group,
                    f"{what} needs the package {distribution}, which is not installed",
                    f"pip install {distribution}",
                )


def _contradictions(cfg: Config) -> Iterator[Problem]:
    """Yield what the groups without a plugin of their own cannot work with."""
    yield from cfg.train.check()
    yield from cfg.train.check_lengths(cfg.data, 2 if cfg.stage.rows == "pairs" else 1)
    yield from cfg.hardware.check(cfg.train)
    yield from template.check(cfg.template)
    yield from keys.check(cfg)
    if cfg.objective and cfg.stage.metrics and cfg.objective not in cfg.stage.metrics:
        known = list(cfg.stage.metrics)
        yield Problem(
            "objective",
            f"stage={cfg.stage.name} has no metric {cfg.objective}{did_you_mean(cfg.objective, known)}",
            f"one of {', '.join(known)}",
        )


_CORE_READS = ("model.size", "model.sizes.*", "hardware.*")


def _unread(cfg: Config) -> Iterator[Problem]:
    """Yield each key of the shared groups that is off its default and that nothing in this run reads."""
    patterns = [*_CORE_READS, *(pattern for option in cfg.chosen for pattern in option.reads)]
    for group in ("model", "template", "data", "train"):
        changed = any(value != default for _, value, default in _leaves(getattr(cfg, group), group))
        if changed and not any(pattern.startswith(f"{group}.") for pattern in patterns):
            message = f"stage={cfg.stage.name} does not read it, so it would change nothing"
            yield Problem(group, message, f"leave {group}=... and its keys out")
            continue
        for key, value, default in _leaves(getattr(cfg, group), group):
            if value != default and not any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns):
                yield Problem(
                    key, f"stage={cfg.stage.name} does not read it, so it would change nothing", f"leave {key} out"
                )


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    default = type(node)()
    for f in dataclasses.fields(node):
        yield f"{prefix}.{f.name}", getattr(node, f.name), getattr(default, f.name)
