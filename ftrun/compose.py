"""From words on the command line to a typed tree, through Hydra; and from Hydra's exceptions to problems.

Hydra finds an option ``<group>=<name>``, in this order, as YAML in ./conf, as YAML in ftrun's own conf/, or as a
plugin, which is imported only if it is chosen.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from ftrun import options, plugin
from ftrun.config import Config
from ftrun.errors import ConfigError, Problem, did_you_mean

ROOT = "ftrun"
"""Name of the primary config, conf/ftrun.yaml."""


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
            cls = Config if name == "schema" else plugin.get(group, name)
        except LookupError as error:
            raise ConfigLoadError(f"no plugin {error}") from None
        package = f"tracker.{name}" if group == "tracker" else None
        return ConfigResult(
            provider=self.provider,
            path=f"ftrun://{config_path}",
            config=OmegaConf.structured(cls),
            header={"package": package},
        )

    def is_group(self, config_path: str) -> bool:
        """Tell whether a path is one of the plugin groups."""
        return config_path in ("", *plugin.GROUPS)

    def is_config(self, config_path: str) -> bool:
        """Tell whether a path is a plugin, without importing it."""
        group, _, name = self._name(config_path).rpartition("/")
        return name == "schema" if not group else group in plugin.GROUPS and plugin.exists(group, name)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List a group's plugins."""
        return (
            plugin.names(config_path) if config_path in plugin.GROUPS and results_filter is not ObjectType.GROUP else []
        )

    @staticmethod
    def _name(config_path: str) -> str:
        return config_path.removesuffix(".yaml")


class SearchPath(SearchPathPlugin):
    """Puts ./conf first, and the plugins last, on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add both places."""
        if (mine := options.working_conf()) is not None:
            search_path.prepend(provider="./conf", path=f"file://{mine}")
        search_path.append(provider="plugins", path="ftrun://plugins")


def compose_tree(overrides: Sequence[str]) -> DictConfig:
    """Compose the tree that the words ask for.

    Raises:
        ConfigError: With everything wrong with the words, the options they choose and the keys they set.
    """
    problems: list[Problem] = []
    parsed = [override for word in overrides for override in _parse(word, problems)]
    _load_plugin_files(parsed, problems)
    misused = {id(override): list(_misused(override)) for override in parsed}
    problems += [problem for found in misused.values() for problem in found]
    chosen, values = _split([override for override in parsed if not misused[id(override)]], problems)
    node = None
    try:
        node = _compose(chosen + values)
    except plugin.PluginError as error:
        problems.append(Problem(_at_fault(str(error), chosen), str(error), "mend the plugin, or choose another option"))
    except (HydraException, OmegaConfBaseException, YAMLError, AssertionError) as error:
        problems += _diagnose(error, chosen, values)
    if node is not None:
        problems += [*_unknown_keys(node), *_unset(node)]
    if problems:
        raise ConfigError(problems)
    assert node is not None
    return node


def _compose(overrides: Sequence[Override]) -> DictConfig:
    registry = Plugins.instance()
    for cls in (PluginSource, SearchPath):
        if cls not in registry.class_name_to_class.values():
            registry.register(cls)
    with initialize_config_dir(str(options.CONF), version_base="1.3", job_name="ftrun"):
        return compose(ROOT, [override.input_line for override in overrides if override.input_line])


def _parse(word: str, problems: list[Problem]) -> list[Override]:
    try:
        return [OverridesParser.create().parse_override(word)]
    except OverrideParseException:
        problems.append(_syntax_problem(word))
        return []


def _syntax_problem(word: str) -> Problem:
    key, equals, value = word.partition("=")
    if not equals:
        near = did_you_mean(word, [*options.GROUPS, *options.COMMANDS])
        return Problem(word, f"is neither a command nor KEY=VALUE{near}", "`ftrun --help` lists both")
    if not key:
        return Problem(word, "has no key before the =", "KEY=VALUE")
    quoted = value.replace("'", "\\'")
    why = "has characters that mean something to the grammar (one of , = : { } [ ] ( ) ' \" or spaces)"
    return Problem(key, f"the value {value!r} {why}", f"quote it inside the shell's quotes: \"{key}='{quoted}'\"")


def _load_plugin_files(parsed: Sequence[Override], problems: list[Problem]) -> None:
    """Import the files of ``plugins=[...]``, so that what they register can be chosen."""
    for override in parsed:
        if override.key_or_group == "plugins" and isinstance(files := override.value(), list):
            for file in files:
                path = Path(str(file)).expanduser().resolve()
                if not path.is_file():
                    problems.append(Problem("plugins", f"there is no file {file}", "plugins=[PATH_OF_A_PYTHON_FILE]"))
                    continue
                try:
                    plugin.load_file(path)
                except plugin.PluginError as error:
                    problems.append(Problem("plugins", str(error), "mend the file"))


def _misused(override: Override) -> Iterator[Problem]:
    """Yield what is wrong with a well-formed word before anything is looked up."""
    key = override.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        yield Problem(
            key,
            "ftrun starts runs itself, so Hydra's own settings would change nothing",
            "output_dir=FOLDER for the run's folder",
        )
    elif override.is_delete():
        yield Problem(f"~{key}", "no key can be taken out of the tree", f"{key}=null, or {key}= another value")
    elif override.is_sweep_override():
        value = (override.input_line or "").partition("=")[2]
        yield Problem(
            key,
            f"{value} is several values, and a run takes one",
            f"a list is {key}=[...]; text with a comma is \"{key}='...'\"",
        )
    elif key == "schema_version" or (
        key.count(".") >= 1 and key.endswith(".name") and key.split(".")[0] in plugin.GROUPS
    ):
        group = key.split(".")[0]
        yield Problem(
            key, "is set by what is chosen and cannot be typed", f"{group}=OPTION" if "." in key else f"leave {key} out"
        )


def _split(parsed: Sequence[Override], problems: list[Problem]) -> tuple[list[Override], list[Override]]:
    """Split words into those that choose an option, each of which must exist, and those that set a value."""
    chosen, values = [], []
    for override in parsed:
        group = override.key_or_group
        if group not in options.GROUPS:
            values.append(override)
            continue
        found = list(_wrong_choice(override, group))
        problems += found
        if not found:
            chosen.append(override)
    return chosen, values


def _wrong_choice(override: Override, group: str) -> Iterator[Problem]:
    value = override.value()
    if override.is_add():
        yield Problem(f"+{group}", f"{group} is always there and has one choice", f"{group}={value}")
        return
    if value is None:
        if group not in options.OPTIONAL_GROUPS:
            known = options.names(group)
            neutral = next((name for name in ("none", "auto", "default", "full") if name in known), known[0])
            yield Problem(group, "cannot be null", f"{group}={neutral}")
        return
    if isinstance(value, list) and group not in ("tracker", "method", "experiment", "debug"):
        yield Problem(group, "takes one option, not a list", f"{group}={value[0] if value else 'OPTION'}")
        return
    known = options.names(group)
    for name in value if isinstance(value, list) else [value]:
        if str(name) not in known:
            listing = ", ".join(known)
            yield Problem(group, f"there is no {group} {name}{did_you_mean(str(name), known)}", f"one of {listing}")


def _diagnose(error: Exception, chosen: Sequence[Override], values: Sequence[Override]) -> list[Problem]:
    """Find everything that made composing fail: values are tried one by one on the tree of the choices alone."""
    try:
        base = _compose(chosen)
    except plugin.PluginError as broken:
        return [Problem(_at_fault(str(broken), chosen), str(broken), "mend the plugin, or choose another option")]
    except (HydraException, OmegaConfBaseException, YAMLError, AssertionError) as inner:
        return [_from_file(inner, chosen)]
    problems = [problem for override in values for problem in _try_value(base, override)]
    return problems or [
        Problem("config", _root(error).args[0] if _root(error).args else repr(error), "see `ftrun show --help`")
    ]


def _try_value(base: DictConfig, override: Override) -> Iterator[Problem]:
    key, node = override.key_or_group, base.copy()
    try:
        if (
            override.is_add()
            and not override.is_force_add()
            and OmegaConf.select(base, key, throw_on_missing=False) is not None
        ):
            yield Problem(f"+{key}", "is a key of the tree already", f"{key}=...")
            return
        OmegaConf.update(node, key, override.value(), merge=True)
    except (ConfigAttributeError, ConfigKeyError):
        yield _unknown_key(base, key)
    except ValidationError as error:
        yield _wrong_type(base, key, error)
    except (OmegaConfBaseException, AssertionError, TypeError) as error:
        yield Problem(key, str(error).splitlines()[0], f"`ftrun show` prints the tree; {key} is not a place in it")


def _unknown_key(base: DictConfig, key: str) -> Problem:
    """Say that a key is not in the tree, with the nearest ones, and those of the same last name elsewhere."""
    known = sorted(_keys(base))
    group = key.split(".")[0]
    if group in options.OPTIONAL_GROUPS:
        return Problem(
            key,
            f"{group} is a choice of whole recipes and has no keys of its own",
            f"{group}=OPTION, and the keys it sets",
        )
    if group == "tracker":
        name = [*key.split("."), ""][1]
        if name in options.names("tracker"):
            return Problem(key, f"tracker={name} is not chosen in this run", f"tracker={name} {key}=...")
    here = (
        f"; {group}={base[group].name} has no such key"
        if group in plugin.GROUPS and "name" in (base.get(group) or {})
        else ""
    )
    last = key.rpartition(".")[2]
    same_name = [other for other in known if other.rpartition(".")[2] == last]
    near = list(dict.fromkeys([*same_name, *difflib.get_close_matches(key, known, n=3, cutoff=0.6)]))[:4]
    if last in options.GROUPS or key in options.GROUPS:
        near.insert(0, last)
    fix = (
        f"{near[0]}=..."
        if near
        else f"`ftrun list {group}=OPTION` lists an option's keys; `ftrun show` prints the tree"
    )
    meant = f"; did you mean {', '.join(near)}?" if near else ""
    return Problem(key, f"is not a key{here}{meant}", fix)


_TYPE_NAMES = {
    "Integer": "a whole number",
    "Float": "a number",
    "Boolean": "true or false",
    "Enum": "one of its options",
}


def _wrong_type(base: DictConfig, key: str, error: ValidationError) -> Problem:
    text = str(error).splitlines()[0]
    if expected := re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", text):
        known = expected[2].split(", ")
        return Problem(
            key,
            f"{expected[1]} is none of its values{did_you_mean(expected[1], known)}",
            f"{key}= one of {', '.join(known)}",
        )
    if converted := re.search(r"Value '(.*)' of type '.*' could not be converted to (\w+)", text):
        now = OmegaConf.select(base, key, throw_on_missing=False)
        example = now if now is not None and not isinstance(now, Enum) else "VALUE"
        return Problem(
            key, f"'{converted[1]}' is not {_TYPE_NAMES.get(converted[2], converted[2])}", f"{key}={example}"
        )
    return Problem(key, text, f"`ftrun show` prints what {key} is now")


def _from_file(error: Exception, chosen: Sequence[Override]) -> Problem:
    """Say what is wrong with a YAML file that the choices lead to."""
    root = _root(error)
    if isinstance(error, YAMLError) or isinstance(root, YAMLError):
        mark = getattr(root, "problem_mark", None)
        where = f"{mark.name}:{mark.line + 1}" if mark else "a YAML file"
        return Problem(where, f"is not YAML: {getattr(root, 'problem', root)}", "mend the line")
    option = next(iter(re.findall(r"In '([^']+)'", str(error))), "")
    where = str(options.yaml_file(option) or option or _at_fault("", chosen))
    if isinstance(error, MissingConfigException):
        missing = (error.missing_cfg_file or "").strip("/")
        known = sorted(str(name) for name in error.options or ())
        near = did_you_mean(missing.rpartition("/")[2], known)
        return Problem(
            where,
            f"asks for {missing}, which is no option{near}",
            f"one of {', '.join(known)}" if known else "an option that exists",
        )
    key = getattr(root, "full_key", None) or getattr(root, "key", None)
    text = str(root).splitlines()[0] if str(root) else repr(root)
    if isinstance(root, ConfigKeyError | ConfigAttributeError) and key:
        known_keys = sorted(
            {f"{g}.{k}" for g in plugin.GROUPS for k in options.keys_of(g, chosen)}
            | set(_keys(OmegaConf.structured(Config)))
        )
        return Problem(
            where,
            f"{key} is not a key{did_you_mean(str(key), known_keys)}",
            "mend the file: `ftrun show` prints the tree's keys",
        )
    if isinstance(root, ValidationError) and key:
        return dataclasses.replace(_wrong_type(OmegaConf.create(), str(key), root), key=f"{where}: {key}")
    return Problem(where, text, "mend the file, or choose another option")


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _at_fault(text: str, chosen: Sequence[Override]) -> str:
    """Return the word that chose the option a message names, as best as can be told."""
    for override in chosen:
        if f"{override.key_or_group}={override.value()}" in text:
            return override.key_or_group
    return chosen[-1].key_or_group if chosen else "config"


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, node):
        yield f"{prefix}{name}"
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing() or child._is_interpolation()):
            yield from _keys(child, f"{prefix}{name}.")


def _unknown_keys(node: DictConfig, prefix: str = "") -> Iterator[Problem]:
    """Yield the keys that ``+`` or ``++`` put into the tree past the schema."""
    cls = OmegaConf.get_type(node)
    known = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else None
    for name in map(str, node):
        child = node._get_node(name)
        if known is not None and name not in known:
            key = f"{prefix}{name}"
            near = did_you_mean(key, [f"{prefix}{k}" for k in known])
            yield Problem(key, f"is not a key, and + cannot make it one{near}", f"leave {key} out")
        elif isinstance(child, DictConfig) and not (
            child._is_none() or child._is_missing() or child._is_interpolation()
        ):
            yield from _unknown_keys(child, f"{prefix}{name}.")


def _unset(node: DictConfig, prefix: str = "") -> Iterator[Problem]:
    """Yield the keys without a value, and the references that lead nowhere."""
    for name in map(str, node):
        key, child = f"{prefix}{name}", node._get_node(name)
        if child is None:
            continue
        if child._is_missing():
            yield Problem(key, "has no value", f"{key}=...")
        elif child._is_interpolation():
            try:
                node[name]
            except OmegaConfBaseException as error:
                yield Problem(key, str(error).splitlines()[0], f"{key}= a value, or a reference to a key that has one")
        elif isinstance(child, DictConfig) and not child._is_none():
            yield from _unset(child, f"{key}.")
