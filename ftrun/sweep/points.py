"""From words to points: ``optimizer.lr=1e-4,5e-4 seed=1,2,3`` is six, each a run of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ftrun import options
from ftrun.errors import ConfigError, Problem, did_you_mean

MOST_POINTS = 10_000
"""A grid of more runs is a slip of the keyboard."""

_MOST_VALUES = 200_000
"""Of one word, more are not even counted."""


@dataclass(frozen=True)
class Point:
    """One of the runs that the words of a sweep stand for."""

    words: tuple[str, ...]
    """Everything that is typed for it, but the folder."""

    overrides: tuple[str, ...]
    """The words in which it differs from the others."""


@dataclass(frozen=True)
class Grid:
    """Words of a sweep as they are understood: what every run has, and what is tried."""

    fixed: tuple[str, ...]
    axes: tuple[tuple[str, ...], ...]
    """For each swept key a word for each of its values."""

    @property
    def swept(self) -> tuple[str, ...]:
        """The keys that are swept."""
        return tuple(axis[0].partition("=")[0] for axis in self.axes)

    def points(self) -> Iterator[Point]:
        """Yield every combination, the last word's values changing fastest."""
        for overrides in itertools.product(*self.axes):
            yield Point((*self.fixed, *overrides), overrides)


def grid(words: Sequence[str]) -> Grid:
    """Understand words as a grid.

    Raises:
        ConfigError: A word gives no values, or there are too many combinations.
    """
    axes: list[tuple[str, ...]] = []
    fixed = []
    for word in words:
        if values := _axis(word):
            axes.append(values)
        else:
            fixed.append(word)
    keys = [word.lstrip("+").partition("=")[0] for word in words]
    for key in sorted({axis[0].partition("=")[0] for axis in axes}):
        if (times := keys.count(key)) > 1:
            raise ConfigError([Problem(key, f"is typed {times} times", f"{key}=VALUE,VALUE once")])
    count = math.prod(len(axis) for axis in axes)
    if count > MOST_POINTS:
        known = "at least " if any(len(axis) == _MOST_VALUES for axis in axes) else ""
        message = f"the grid has {known}{count:,} runs, and no more than {MOST_POINTS:,} are started at once"
        raise ConfigError([Problem("-m", message, "fewer values, or several grids")])
    return Grid(tuple(fixed), tuple(axes))


def expand(words: Sequence[str]) -> list[str]:
    """Return the words with those of a sweep file in place of ``sweep=NAME``; what is typed goes before.

    Raises:
        ConfigError: There is no such file, or it cannot be read.
    """
    sweeps = [word for word in words if word.startswith("sweep=")]
    if len(sweeps) > 1:
        raise ConfigError([Problem("sweep", f"is typed {len(sweeps)} times", f"one of them: ftrun -m {sweeps[-1]}")])
    typed = [word for word in words if word not in sweeps]
    keys = {word.lstrip("+").partition("=")[0] for word in typed}
    lines = _sweep_file(sweeps[0].partition("=")[2]) if sweeps else []
    return [*typed, *(line for line in lines if line.partition("=")[0] not in keys)]


def parse(word: str) -> Override | None:
    """Return a word as Hydra understands it, or None where it does not: that is said when the words are checked."""
    if word.startswith("="):
        return None
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _axis(word: str) -> tuple[str, ...]:
    """Return a word that gives several values as one word for each."""
    override = parse(word)
    if override is None or not override.is_sweep_override():
        return ()
    key = override.key_or_group
    if not (values := _values(override)):
        raise ConfigError([Problem(key, f"{override.input_line} gives no value", f"{key}=VALUE,VALUE")])
    return tuple(f"{key}={value}" for value in values)


def _values(override: Override) -> list[str]:
    key, value = override.key_or_group, override.value()
    if isinstance(value, Glob):
        return value.filter(options.names(key) if key in options.GROUPS else [])
    if not override.is_discrete_sweep():
        message = f"{override.input_line} has no end: a grid needs single values"
        fix = f"{key}=VALUE,VALUE or {key}=range(START,STOP); hydra/sweeper=optuna searches intervals"
        raise ConfigError([Problem(key, message, fix)])
    return list(itertools.islice(override.sweep_string_iterator(), _MOST_VALUES))


def _sweep_file(name: str) -> list[str]:
    """Return the words of ``sweeps/NAME.yaml``.

    Raises:
        ConfigError: There is no such file, or it cannot be read.
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
