"""From words on the command line to a typed tree, through Hydra.

Hydra finds an option ``<group>=<name>``, in this order, as YAML in ./conf, as YAML in ftrun's own conf/, or as a
plugin, which is imported only if it is chosen. What is wrong with the words is said by `ftrun.words`, what is wrong
with the tree they lead to by `ftrun.diagnose`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ftrun import diagnose, fields, launcher, model, options, plugin, words
from ftrun.errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    from ftrun.sweeper import Sweeper

ROOT = "ftrun"
"""Name of the primary config, conf/ftrun.yaml."""

_NOTHING = "None"
"""What Hydra calls the option of a group that none is chosen of."""

_CANNOT_COMPOSE = (HydraException, OmegaConfBaseException, YAMLError, AssertionError)
"""What Hydra raises for a wrong key, type, option or file; the AssertionError is for a key below a null group."""


class PluginSource(ConfigSource):
    """Hydra's view of the plugin registry: ``optimizer/galore`` is the class `GaLore`."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider=provider, path=path)

    @staticmethod
    def scheme() -> str:
        """Return the scheme of search-path entries that this class serves."""
        return "ftrun"

    def available(self) -> bool:
        """Tell that there is something here."""
        return True

    def load_config(self, config_path: str) -> ConfigResult:
        """Import the plugin behind ``<group>/<name>`` and return its dataclass as a config."""
        group, _, name = self._name(config_path).rpartition("/")
        try:
            cls = plugin.get(group, name)
        except LookupError as error:
            raise ConfigLoadError(f"no plugin {error}") from None
        try:
            config = OmegaConf.structured(cls)
        except OmegaConfBaseException as error:
            raise plugin.PluginError(
                f"{group}={name} has a field that is wrong: {error.full_key}: {str(error).splitlines()[0]}"
            ) from None
        for key in config:
            if OmegaConf.get_type(config, str(key)) is dict:
                OmegaConf.set_struct(config[key], False)  # its names are the user's own
        package = plugin.place(group, name) if group in plugin.SEVERAL else None
        return ConfigResult(
            provider=self.provider,
            path=f"ftrun://{config_path}",
            config=config,
            header={"package": package},
        )

    def is_group(self, config_path: str) -> bool:
        """Tell whether a path is one of the plugin groups."""
        return config_path in ("", *plugin.GROUPS)

    def is_config(self, config_path: str) -> bool:
        """Tell whether a path is a plugin, without importing it."""
        group, _, name = self._name(config_path).rpartition("/")
        return group in plugin.GROUPS and name != _NOTHING and plugin.exists(group, name)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List a group's plugins."""
        return (
            plugin.names(config_path) if config_path in plugin.GROUPS and results_filter is not ObjectType.GROUP else []
        )

    @staticmethod
    def _name(config_path: str) -> str:
        return config_path.removesuffix(".yaml")


class WorkingConf(FileConfigSource):
    """The working folder's own ./conf, of which only what lies in ftrun's groups is looked at."""

    groups: ClassVar[tuple[str, ...]] = tuple(options.GROUPS)
    """Those that are composed just now: another application's launchers are no matter of a run's config."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme of search-path entries that this class serves."""
        return "conf"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read an option, and refuse one that Hydra would misunderstand."""
        file = Path(self.path, f"{config_path.removesuffix('.yaml')}.yaml")
        try:
            found = super().load_config(config_path)
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            raise ConfigError([diagnose.unreadable(file, error)]) from error
        group, _, name = config_path.removesuffix(".yaml").rpartition("/")
        if group in options.LAUNCHING:
            return found
        if problems := list(diagnose.misunderstood(file, group, name, found)):
            raise ConfigError(problems)
        return found

    def is_group(self, config_path: str) -> bool:
        """Tell whether a path is one of the groups, and is there."""
        known = ("", *self.groups, *(group.partition("/")[0] for group in self.groups))
        return config_path in known and super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        """Tell whether a path is an option of one of the groups."""
        return config_path.rpartition("/")[0] in self.groups and super().is_config(config_path)


class SearchPath(SearchPathPlugin):
    """Puts ./conf first, and the plugins last, on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add both places."""
        if (mine := options.working_conf()) is not None:
            search_path.prepend(provider="./conf", path=f"{WorkingConf.scheme()}://{mine}")
        search_path.append(provider="plugins", path="ftrun://plugins")


def compose_tree(overrides: Sequence[str], schema: type) -> tuple[DictConfig | None, list[Problem]]:
    """Compose the tree that the words ask for, as far as they can be understood.

    Args:
        overrides: What was typed.
        schema: The dataclass that the whole tree is one of.

    Returns:
        The tree that the good words give, or None if there is none that could be looked at further; and everything
        wrong with the words, the options they choose and the keys they set.
    """
    ConfigStore.instance().store(name="schema", node=schema, provider="ftrun")
    chosen, typed, problems = words.read(overrides)
    values = [override for override in typed if not override.is_sweep_override()]
    node: DictConfig | None
    try:
        node = _compose([*chosen, *values])
    except plugin.PluginError as error:
        return None, [*problems, diagnose.broken_plugin(error, chosen)]
    except ConfigError as error:
        return None, [*problems, *error.problems]
    except _CANNOT_COMPOSE:
        node, found = _without_wrong_values(chosen, values)
        problems += found
    if node is None:
        return None, problems
    problems += [diagnose.several_values(node, override) for override in typed if override.is_sweep_override()]
    unset = list(diagnose.unset(node))
    return None if unset else node, [*problems, *diagnose.unknown_keys(node), *unset]


def sweeper(where: Sequence[str]) -> Sweeper:
    """Make the sweeper, with its launcher, that the words about them ask for.

    Args:
        where: Words about ``hydra/sweeper`` and ``hydra/launcher``; without any, a grid on this machine.

    Raises:
        ConfigError: With everything that is wrong with them.
    """
    from ftrun.sweeper import Sweeper

    cfg, context = _hydra(where)
    made = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=launcher.do, config=cfg)
    if not isinstance(made, Sweeper):
        known = [name for name in _hydra_options("hydra/sweeper") if name != "basic"]
        message = f"{type(made).__name__} does not know of frozen runs"
        raise ConfigError([Problem("hydra/sweeper", message, f"one of {', '.join(known)}")])
    return made


def launcher_alone(where: Sequence[str]) -> launcher.Launcher:
    """Make the launcher that the words ask for, for a single run.

    Raises:
        ConfigError: With everything that is wrong with them.
    """
    if about := [word for word in where if word.lstrip("+~").startswith(("hydra/sweeper", "hydra.sweeper"))]:
        raise ConfigError([Problem(about[0], "is about a sweep, and this is one run", f"ftrun -m {about[0]}")])
    cfg, context = _hydra(where)
    return launcher.adapted(Plugins.instance().instantiate_launcher(context, launcher.do, cfg))


def _hydra(where: Sequence[str]) -> tuple[DictConfig, HydraContext]:
    """Compose Hydra's own part of the tree, for jobs that are told a path and nothing else."""
    ConfigStore.instance().store(name=_JOB, node=launcher.JobConfig(driver=os.getpid()), provider="ftrun")
    problems: list[Problem] = []
    given = [override for word in where for override in words.parse(word, problems)]
    groups = [override for override in given if override.key_or_group in options.LAUNCHING]
    for override in groups:
        known = _hydra_options(override.key_or_group)
        if (name := str(override.value())) not in known:
            message = f"there is no {override.key_or_group} {name}{did_you_mean(name, known)}"
            problems.append(Problem(override.key_or_group, message, f"one of {', '.join(known)}"))
    if problems:
        raise ConfigError(problems)
    typed = {override.key_or_group for override in groups}
    defaults = {"hydra/launcher": "local", "hydra/sweeper": "grid"}
    chosen = [f"{group}={name}" for group, name in defaults.items() if group not in typed]
    # Launchers of others make a folder for each job, which here has one already; submitit's is read on other machines.
    theirs = words.as_text(str(model.cache_folder() / "launchers"))
    apart = [f"hydra.sweep.dir={theirs}", "hydra.output_subdir=null", "hydra/job_logging=none"]
    with _initialized(options.LAUNCHING):
        base = compose(_JOB, [*chosen, *map(_text, groups), *apart], return_hydra_config=True)
        values = [override for override in given if override not in groups]
        if problems := [problem for override in values for problem in diagnose.wrong_value(base, override)]:
            raise ConfigError(problems)
        cfg = compose(_JOB, [*chosen, *map(_text, given), *apart], return_hydra_config=True)
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        OmegaConf.set_struct(cfg.hydra.job, False)
        cfg.hydra.job.config_name = _JOB
        return cfg, HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(cfg))


_JOB = "ftrun_job"
"""Name of the primary config of jobs as launchers see them."""


def _hydra_options(group: str) -> list[str]:
    with _initialized(options.LAUNCHING):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        return sorted(hydra.config_loader.get_group_options(group))


def _text(override: Override) -> str:
    return override.input_line or ""


def _without_wrong_values(
    chosen: Sequence[Override], values: Sequence[Override]
) -> tuple[DictConfig | None, list[Problem]]:
    """Say why the words cannot be composed, by trying the values one by one on the tree of the choices alone."""
    try:
        base = _compose(chosen)
    except plugin.PluginError as error:
        return None, [diagnose.broken_plugin(error, chosen)]
    except _CANNOT_COMPOSE as error:
        return None, [diagnose.broken_file(error, chosen)]
    found = [list(diagnose.wrong_value(base, override)) for override in values]
    good = [override for override, wrong in zip(values, found, strict=True) if not wrong]
    return _compose([*chosen, *good]), [problem for wrong in found for problem in wrong]


@contextlib.contextmanager
def _initialized(groups: Sequence[str] = tuple(options.GROUPS)) -> Iterator[None]:
    """Have Hydra know where the options of these groups are."""
    registry = Plugins.instance()
    for cls in (PluginSource, WorkingConf, SearchPath):
        if cls not in registry.class_name_to_class.values():
            registry.register(cls)
    WorkingConf.groups = tuple(groups)
    with initialize_config_dir(str(options.CONF), version_base="1.3", job_name="ftrun"):
        yield


def _compose(overrides: Sequence[Override]) -> DictConfig:
    with _initialized():
        return compose(ROOT, [_word(override) for override in overrides if override.input_line])


def _word(override: Override) -> str:
    """Return a word as Hydra takes it: below a key that holds names of the user's own, ``++`` lets them in."""
    word, key = override.input_line or "", override.key_or_group
    mine = any(key == open_key or key.startswith(f"{open_key}.") for open_key in _open_keys())
    return f"++{word}" if mine and not word.startswith("+") else word


@functools.cache
def _open_keys() -> frozenset[str]:
    """Return the keys that hold names of the user's own: ``data.columns``, whose type is a dict of texts."""
    schema: Any = ConfigStore.instance().load("schema.yaml").node._metadata.object_type
    return frozenset(fields.open_keys(schema))
