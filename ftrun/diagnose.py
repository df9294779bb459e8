"""What is wrong with a composed tree, or with one that cannot be composed: Hydra's exceptions as problems."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path

from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from ftrun import options, plugin
from ftrun.errors import Problem, did_you_mean


def wrong_value(base: DictConfig, override: Override) -> Iterator[Problem]:
    """Yield what is wrong with setting one value in the tree that the choices give."""
    key, node = override.key_or_group, base.copy()
    try:
        OmegaConf.update(node, key, override.value(), merge=True)
    except (ConfigAttributeError, ConfigKeyError):
        yield _unknown_key(base, key)
    except ValidationError as error:
        yield _wrong_type(base, key, error)
    except (OmegaConfBaseException, AssertionError, TypeError) as error:
        yield Problem(key, str(error).splitlines()[0], f"`ftrun show` prints the tree; {key} is not a place in it")


def _unknown_key(base: DictConfig, key: str) -> Problem:
    """Say that a key is not in the tree, with the nearest ones, and those of the same last name elsewhere."""
    group, _, rest = key.partition(".")
    if group in options.OPTIONAL_GROUPS:
        message = f"{group} is a choice of whole recipes and has no keys of its own"
        return Problem(key, message, f"{group}=OPTION, and the keys it sets")
    if group == "tracker" and (name := rest.partition(".")[0]) in options.names("tracker"):
        return Problem(key, f"tracker={name} is not chosen in this run", f"tracker={name} {key}=...")
    known = sorted(_leaves(base))
    last = key.rpartition(".")[2]
    same_name = [other for other in known if other.rpartition(".")[2] == last]
    near = list(dict.fromkeys([*same_name, *difflib.get_close_matches(key, known, n=3, cutoff=0.6)]))[:3]
    near += difflib.get_close_matches(key, options.GROUPS, n=1, cutoff=0.6) if "." not in key else []
    chosen = f" of {group}={base[group].name}" if group in plugin.GROUPS and group != "tracker" else ""
    meant = f"; did you mean {', '.join(near)}?" if near else ""
    listing = f"`ftrun list {group}` lists its keys" if group in options.GROUPS else "`ftrun show` prints the tree"
    return Problem(key, f"is not a key{chosen}{meant}", f"{near[0]}=..." if near else listing)


_TYPE_NAMES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}


def _wrong_type(base: DictConfig, key: str, error: ValidationError) -> Problem:
    text = str(error).splitlines()[0]
    if found := re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", text):
        known = found[2].split(", ")
        message = f"{found[1]} is none of its values{did_you_mean(found[1], known)}"
        return Problem(key, message, f"{key}= one of {', '.join(known)}")
    if found := re.search(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+)", text):
        now = OmegaConf.select(base, key, throw_on_missing=False)
        example = now if isinstance(now, int | float | str) and not isinstance(now, Enum) else "VALUE"
        return Problem(key, f"'{found[1]}' is not {_TYPE_NAMES.get(found[2], found[2])}", f"{key}={example}")
    return Problem(key, text, f"`ftrun show` prints what {key} is now")


def broken_plugin(error: plugin.PluginError, chosen: Sequence[Override]) -> Problem:
    """Say that a chosen plugin does not work."""
    words = (f"{override.key_or_group}={override.value()}" for override in chosen)
    at_fault = next((word for word in words if word in str(error)), "plugins")
    return Problem(at_fault, str(error), "mend the plugin, or choose another option")


def broken_file(error: Exception, chosen: Sequence[Override]) -> Problem:
    """Say what is wrong with a YAML file that the choices lead to."""
    root = error.__context__ if isinstance(error.__context__, OmegaConfBaseException | YAMLError) else error
    text = str(root).splitlines()[0] if str(root) else repr(root)
    if isinstance(root, YAMLError):
        mark = getattr(root, "problem_mark", None)
        place = f"{mark.name}:{mark.line + 1}" if mark else "a YAML file"
        return Problem(place, f"is not YAML: {getattr(root, 'problem', root)}", "mend the line")
    if isinstance(error, MissingConfigException):
        return _missing_option(error, chosen)
    option = next(iter(re.findall(r"In '([^']+)'", str(error))), "")
    file = str(options.yaml_file(option) or option or "config")
    key = str(getattr(root, "full_key", None) or getattr(root, "key", None) or "")
    if isinstance(root, ConfigKeyError | ConfigAttributeError) and key:
        return _unknown_key_in_file(file, key, root)
    if isinstance(root, ValidationError) and key:
        return dataclasses.replace(_wrong_type(OmegaConf.create(), key, root), key=f"{file}: {key}")
    return Problem(file, text, "mend the file, or choose another option")


def _unknown_key_in_file(file: str, key: str, error: OmegaConfBaseException) -> Problem:
    group = key.partition(".")[0]
    cls = error.object_type
    if group in plugin.GROUPS and cls is plugin.GROUPS[group]:
        known = plugin.names(group)
        message = f"sets {key} without saying of which {group} (an option of a plugin group starts from a plugin)"
        return Problem(
            file, message, f"begin the file with `defaults: [{known[0]}, _self_]`, or another of {', '.join(known)}"
        )
    names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    near = did_you_mean(key.rpartition(".")[2], names)
    return Problem(file, f"{key} is not a key{near}", f"one of {', '.join(names)}")


def _missing_option(error: MissingConfigException, chosen: Sequence[Override]) -> Problem:
    """Say which option is missing, and which of the chosen files asks for it: Hydra does not know."""
    missing = (error.missing_cfg_file or "").strip("/")
    group, _, name = missing.rpartition("/")
    known = sorted(str(option) for option in error.options or ())
    files = [options.yaml_file(f"{override.key_or_group}/{override.value()}") for override in chosen]
    asking: list[Path] = [file for file in files if file and name in file.read_text(encoding="utf-8")]
    place = str(asking[-1]) if asking else "config"
    message = f"asks for {group}={name}, which does not exist{did_you_mean(name, known)}"
    return Problem(place, message, f"one of {', '.join(known)}" if known else "an option that exists")


def unknown_keys(node: DictConfig, prefix: str = "") -> Iterator[Problem]:
    """Yield the keys that ``+`` or ``++`` put into the tree past the schema."""
    cls = OmegaConf.get_type(node)
    known = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else None
    for name in map(str, node):
        key, child = f"{prefix}{name}", _tree(node, name)
        if known is not None and name not in known:
            near = did_you_mean(key, [f"{prefix}{other}" for other in known])
            yield Problem(key, f"is not a key, and + cannot make it one{near}", f"leave {key} out")
        elif child is not None:
            yield from unknown_keys(child, f"{key}.")


def unset(node: DictConfig, prefix: str = "") -> Iterator[Problem]:
    """Yield the keys without a value, and the references that lead nowhere."""
    for name in map(str, node):
        key, raw = f"{prefix}{name}", node._get_node(name)
        if raw is None:
            continue
        if raw._is_missing():
            yield Problem(key, "has no value", f"{key}=...")
        elif raw._is_interpolation():
            try:
                node[name]
            except OmegaConfBaseException as error:
                message = str(error).splitlines()[0]
                yield Problem(key, message, f"{key}= a value, or a reference to a key that has one")
        elif (child := _tree(node, name)) is not None:
            yield from unset(child, f"{key}.")


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield the keys that can be typed."""
    for name in map(str, node):
        child = _tree(node, name)
        if child is not None:
            yield from _leaves(child, f"{prefix}{name}.")
        elif name not in ("name", "schema_version"):
            yield f"{prefix}{name}"


def _tree(node: DictConfig, name: str) -> DictConfig | None:
    """Return what hangs below a key, if that is a tree."""
    child = node._get_node(name)
    if not isinstance(child, DictConfig) or child._is_none() or child._is_missing() or child._is_interpolation():
        return None
    return child
