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
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ftrun import fields, model, plugin, record, template
from ftrun.data import Data, keys
from ftrun.errors import ConfigError, Problem, did_you_mean
from ftrun.fields import MISSING
from ftrun.hardware import Hardware
from ftrun.model import Model
from ftrun.plugin import Adapter, Optimizer, Plugin, Quant, Reward, Stage, Tracker
from ftrun.template import Template
from ftrun.train import Train

SCHEMA_VERSION = 1
"""Version of ``run.yaml``; a change of a key's name or meaning raises it."""


class ObjectiveMode(StrEnum):
    """Which end of the objective is good."""

    auto = "auto"
    min = "min"
    max = "max"

    @classmethod
    def of(cls, metric: str) -> ObjectiveMode:
        """Return which end of a metric is good: the high one of accuracies, rewards and scores, else the low one."""
        return cls.max if any(word in metric for word in _BETTER_WHEN_HIGH) else cls.min


_BETTER_WHEN_HIGH = ("accurac", "reward", "logps_chosen", "predict_")


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
    reward: dict[str, Reward] = field(default_factory=dict)

    seed: int = fields.ranged(42, ge=0, lt=2**32)
    """Seed of everything random: initial weights, the order of rows, dropout."""

    objective: str | None = None
    """The metric that says how good the run is. Default: the stage's own, on held-out rows where there are any."""

    objective_mode: ObjectiveMode = ObjectiveMode.auto
    """Whether a low or a high objective is good. Default: high for accuracies, rewards and scores of predictions."""

    output_dir: str | None = None
    """The run's folder. Default: outputs/STAGE/DATE_TIME."""

    plugins: list[str] = field(default_factory=list)
    """Python files of your own that register plugins: ``plugins=[my_optimizer.py]``."""

    schema_version: int = SCHEMA_VERSION
    """Version of this tree's keys; not to be typed."""

    @property
    def chosen(self) -> list[Plugin]:
        """The chosen plugins of all groups."""
        each = [self.stage, self.adapter, self.quant, self.optimizer]
        return [*each, *self.tracker.values(), *self.reward.values()]

    @property
    def folder(self) -> Path:
        """The run's folder, once the config is frozen."""
        assert self.output_dir is not None
        return Path(self.output_dir)

    def to_yaml(self) -> str:
        """Return the whole tree as YAML, every default written out."""
        return fields.to_yaml(self.plain())

    def plain(self) -> dict[str, Any]:
        """Return the whole tree as plain dicts, lists and values."""
        return cast("dict[str, Any]", fields.plain(self))

    def save(self, path: Path, *, sync: bool = True) -> None:
        """Write the whole tree; see `ftrun.record.write_whole`."""
        record.write_whole(path, self.to_yaml(), sync=sync)

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read a saved tree; each plugin's ``name`` says which class it is.

        Raises:
            ConfigError: The file is damaged or of another version, or a plugin in it is not installed here.
        """
        saved = _read(path)
        try:
            for file in saved.plugins:
                plugin.load_file(path.parent / file)
            schema: DictConfig = OmegaConf.structured(cls)
            for group in _CHOSEN:
                schema[group] = plugin.get(group, str(saved[group].name))
            for group in plugin.SEVERAL:
                for name in map(str, saved[group]):
                    schema[group][name] = plugin.get(group, name)
            return cast(Config, OmegaConf.to_object(OmegaConf.merge(schema, saved)))
        except OmegaConfBaseException as error:
            message, fix = f"is damaged: {error.full_key or ''}: {str(error).splitlines()[0]}", _ANOTHER_COPY
        except LookupError as error:
            message, fix = f"no plugin {error} is installed here", "install what provides it"
        except plugin.PluginError as error:
            message, fix = str(error), "mend the plugin, or install what it needs"
        raise ConfigError([Problem(str(path), message, fix)])


def changed(path: Path, overrides: Sequence[str]) -> Config:
    """Return a saved tree with what may change in the middle of a run: where it goes on, and how a step is divided.

    Raises:
        ConfigError: With everything that is wrong.
    """
    from ftrun import diagnose, words

    node: DictConfig = OmegaConf.structured(Config.load(path))
    problems: list[Problem] = []
    for override in [override for word in overrides for override in words.parse(word, problems)]:
        key = override.key_or_group
        if not key.startswith("hardware.") and key not in _DIVIDE_A_STEP:
            message = "is what the run has been about so far, and cannot change in its middle"
            fix = f"a run of its own; here, hardware.* and {', '.join(_DIVIDE_A_STEP)}"
            problems.append(Problem(key, message, fix))
        elif wrong := list(diagnose.wrong_value(node, override)):
            problems += wrong
        else:
            OmegaConf.update(node, key, override.value())
    cfg = cast(Config, OmegaConf.to_object(node))
    if problems := problems or judge_object(cfg, overrides):
        raise ConfigError(problems)
    return cfg


_DIVIDE_A_STEP = ("train.micro_batch_size", "train.grad_accumulation")


def hardware_of(path: Path) -> Hardware:
    """Return what a saved tree is computed on, without looking at the rest of it.

    Raises:
        ConfigError: The file is damaged.
    """
    saved = _read(path)
    return cast(Hardware, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Hardware), saved.hardware)))


_CHOSEN = tuple(group for group in plugin.GROUPS if group not in plugin.SEVERAL)
"""The groups of which a run has one plugin each."""

_ANOTHER_COPY = "another copy of the file, or a new run with the words in manifest.json"


def _read(path: Path) -> DictConfig:
    """Read a saved tree as it stands there.

    Raises:
        ConfigError: It cannot be read, is damaged, of another version, or not whole.
    """
    fix = _ANOTHER_COPY
    try:
        saved = cast(DictConfig, OmegaConf.load(path))
        why = _damage(saved)
        if not why and (found := saved.get("schema_version")) != SCHEMA_VERSION:
            why = f"is of version {found}, and this ftrun reads version {SCHEMA_VERSION}"
            fix = "the ftrun that wrote it (its version is in manifest.json)"
        why = why or _lack(saved)
    except UnicodeDecodeError as error:
        why = f"is damaged: byte {error.start} is not UTF-8 text"
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        why = f"is damaged: it is not YAML{where} ({str(getattr(error, 'problem', error)).splitlines()[0]})"
    except OSError as error:
        why = f"cannot be read: {error.strerror or error}"
    except OmegaConfBaseException as error:
        why = f"is damaged: {str(error).splitlines()[0]}"
    if why:
        raise ConfigError([Problem(str(path), why, fix)])
    return saved


def _damage(saved: DictConfig | ListConfig) -> str:
    """Say in what a saved tree is none of any version. One that was cut off has no version, which is its last line."""
    if not isinstance(saved, DictConfig):
        return "is damaged: it is not KEY: VALUE"
    if not saved:
        return "is empty"
    if saved.get("schema_version") is None:
        return "is not whole: it has no schema_version, which is its last line"
    return ""


def _lack(saved: DictConfig) -> str:
    """Say what a saved tree of this version lacks."""
    if lacking := [key.name for key in dataclasses.fields(Config) if key.name not in saved]:
        return f"is not whole: it has no {lacking[0]}"
    for group in _CHOSEN:
        if not isinstance(saved[group], DictConfig) or "name" not in saved[group]:
            return f"is not whole: it does not say which {group} it is"
    several = [(group, DictConfig, "NAME: KEYS") for group in plugin.SEVERAL]
    for key, kind, text in (("plugins", ListConfig, "a list"), *several):
        if not isinstance(saved[key], kind):
            return f"is damaged: {key} is not {text}"
    return ""


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

    Raises:
        ConfigError: The words are one text, and not a list of them.
    """
    from ftrun import compose as hydra_side

    if isinstance(overrides, str):
        words = ", ".join(repr(word) for word in overrides.split())
        raise ConfigError([Problem("overrides", "is one text, and a list of words is wanted", f"[{words}]")])
    node, problems = hydra_side.compose_tree(overrides, Config)
    if node is None:
        return None, problems
    cfg, found = judge(node, overrides)
    return cfg, [*problems, *found]


def judge(node: DictConfig, overrides: Sequence[str]) -> tuple[Config, list[Problem]]:
    """Turn a composed tree into a config, and find what is wrong with its values.

    Args:
        node: What `ftrun.compose.compose_tree` returns; left as it is.
        overrides: What was typed.
    """
    cfg = cast(Config, OmegaConf.to_object(node))
    return cfg, judge_object(cfg, overrides)


def judge_object(cfg: Config, overrides: Sequence[str]) -> list[Problem]:
    """Settle in place what a config leaves to the options chosen, and find what is wrong with its values."""
    problems = [*model.pick_size(cfg.model), *fields.out_of_range(cfg), *_typed(cfg, overrides)]
    if cfg.data.path == "":
        problems.append(Problem("data.path", "has no value", "data.path=FILE"))
    if cfg.data.path is None and not cfg.data.sources:
        cfg.data.path = cfg.stage.default_data or None
    if not cfg.reward and cfg.stage.default_reward:
        cfg.reward[cfg.stage.default_reward] = _default_reward(cfg.stage.default_reward)
    if cfg.optimizer.lr is None:
        rate = cfg.stage.default_lr * cfg.adapter.lr_scale * cfg.optimizer.lr_scale
        cfg.optimizer.lr = float(f"{rate:.6g}")  # 1e-6 times 10 is 9.999999999999999e-06
    if cfg.objective_mode is ObjectiveMode.auto:
        cfg.objective_mode = ObjectiveMode.of(cfg.objective or next(iter(cfg.stage.metrics), ""))
    problems += [*_missing_packages(cfg), *_contradictions(cfg), *_unread(cfg)]
    for option in cfg.chosen:
        problems += option.check(cfg)
    return problems


def _default_reward(name: str) -> Reward:
    return cast(Reward, OmegaConf.to_object(OmegaConf.structured(plugin.get(Reward.group, name))))


def _typed(cfg: Config, overrides: Sequence[str]) -> Iterator[Problem]:
    """Yield what may stand in a preset or a recipe, and is wrong where it is typed."""
    keys = {word.lstrip("+").partition("=")[0] for word in overrides}
    for key in sorted(key for key in keys if f"{key}.".startswith("model.sizes.")):
        message = "is what presets offer model.size to choose from, and cannot be typed"
        yield Problem(key, message, "model.path=FOLDER_OR_ID, or a preset of your own in conf/model")
    steps, warmup = cfg.train.max_steps, cfg.train.warmup
    if {"train.warmup", "train.max_steps"} <= keys and steps is not None and 1 <= steps < warmup:
        message = f"{warmup:g} steps of warm-up are more than train.max_steps={steps}, so it would never end"
        yield Problem("train.warmup", message, f"train.warmup= a share below 1, or up to {steps} steps")


def _missing_packages(cfg: Config) -> Iterator[Problem]:
    for option in cfg.chosen:
        for distribution in option.requires:
            if not plugin.is_installed(distribution):
                message = f"{option.group}={option.name} needs the package {distribution}, which is not installed"
                yield Problem(option.group, message, f"pip install {distribution}")


def _contradictions(cfg: Config) -> Iterator[Problem]:
    """Yield what the groups without a plugin of their own cannot work with."""
    yield from cfg.train.check()
    yield from cfg.train.check_lengths(cfg.data, 2 if cfg.stage.rows == "pairs" else 1)
    yield from cfg.train.check_with(cfg)
    yield from cfg.hardware.check(cfg.train)
    yield from cfg.hardware.check_with(cfg)
    yield from template.check(cfg.template)
    yield from keys.check(cfg)
    yield from _rewards(cfg)
    known = _metrics(cfg)
    if cfg.objective and known and cfg.objective not in known:
        yield Problem(
            "objective",
            f"stage={cfg.stage.name} has no metric {cfg.objective}{did_you_mean(cfg.objective, known)}",
            f"one of {', '.join(known)}",
        )


def _rewards(cfg: Config) -> Iterator[Problem]:
    """Yield whether rewards and the stage do not go together."""
    stage = f"stage={cfg.stage.name}"
    if cfg.reward and not cfg.stage.default_reward:
        fix = "leave reward=... out, or a stage that has replies judged (`ftrun list stage`)"
        yield Problem("reward", f"{stage} writes no replies, so there is nothing that a reward could judge", fix)
    elif cfg.stage.rows == "questions" and not cfg.reward:
        fix = f"reward=NAME, NAME one of {', '.join(plugin.names(Reward.group))}"
        yield Problem("reward", f"{stage} learns from what its replies are worth, and nothing judges them", fix)


def _metrics(cfg: Config) -> list[str]:
    """Return the metrics that a run may end with: those of its stage, and those of each evaluation set with a name."""
    ours = list(cfg.stage.metrics)
    of_sets = [metric.partition("_") for metric in ours if metric.startswith(("eval_", "predict_"))]
    return ours + [f"{kind}_{name}_{metric}" for name in cfg.data.eval_sets for kind, _, metric in of_sets]


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
