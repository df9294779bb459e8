"""What is wrong with a composed tree, or with one that cannot be composed: Hydra's exceptions as problems."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from ftrun import options, plugin, words
from ftrun.errors import Problem, did_you_mean


def unreadable(file: Path, error: Exception) -> Problem:
    """Say why a preset cannot be read."""
    if isinstance(error, UnicodeDecodeError):
        return Problem(str(file), "is not UTF-8 text", f"iconv -f LATIN1 -t UTF-8 {file} (or what its encoding is)")
    if isinstance(error, YAMLError):
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        return Problem(place, f"is not YAML: {getattr(error, 'problem', error)}", "mend the line")
    if isinstance(error, OmegaConfBaseException):
        return Problem(f"{file}: {error.full_key}", str(error).splitlines()[0], "a value, or ${KEY}")
    return Problem(str(file), str(error), "# @package _global_ in the first line")


def misunderstood(file: Path, group: str, name: str, found: ConfigResult) -> Iterator[Problem]:
    """Yield what Hydra would read otherwise than it was meant."""
    config, package = found.config, found.header.get("package")
    if not isinstance(config, DictConfig):
        yield Problem(str(file), "is a list, not KEY: VALUE", "KEY: VALUE on each line")
        return
    defaults = list(config.get("defaults", []))
    if group in options.OPTIONAL_GROUPS and package != "_global_":
        yield Problem(str(file), f"would set keys below {group}, which has none", "begin it with # @package _global_")
    if name in defaults:
        fix = "another name: the preset hides what it would derive from"
        yield Problem(str(file), "derives from itself", fix)
    if group in plugin.GROUPS and not any(isinstance(entry, str) and entry != "_self_" for entry in defaults):
        known = ", ".join(plugin.names(group))
        message = f"does not say which {group} it is (an option of a plugin group starts from a plugin)"
        yield Problem(str(file), message, f"begin it with `defaults: [NAME, _self_]`, NAME one of {known}")
    if group in plugin.GROUPS and "name" in config:
        yield Problem(str(file), "name is set by what is chosen", "leave name out")
    if group in plugin.SEVERAL and package is None and set(config) - {"defaults"}:
        for base in [entry for entry in defaults if entry in plugin.names(group)][:1]:
            fix = f"begin it with # @package {plugin.place(group, base)}"
            yield Problem(str(file), f"would set keys of all {group}s", fix)
    if group in options.OPTIONAL_GROUPS:
        for entry in defaults:
            key = next(iter(entry), "") if isinstance(entry, DictConfig) else ""
            bare = str(key).removeprefix("override ").strip("/")
            if key and not str(key).startswith("override ") and bare in options.GROUPS:
                yield Problem(str(file), f"chooses {bare} a second time", f"override /{bare}: {entry[key]}")
            elif key and bare not in options.GROUPS:
                near = did_you_mean(bare, list(options.GROUPS))
                yield Problem(str(file), f"{bare} is no group{near}", f"one of {', '.join(options.GROUPS)}")
        for key in config:
            if key in options.GROUPS and isinstance(config[key], str):
                fix = f"in its defaults: override /{key}: {config[key]}"
                yield Problem(str(file), f"sets {key} to a text, and it is a group", fix)


def several_values(base: DictConfig, override: Override) -> Problem:
    """Say that a run takes one value, and how to type a list or a text."""
    key, value = override.key_or_group, (override.input_line or "").partition("=")[2]
    hint = _hint(base, key)
    if hint is None and key not in _leaves(base):
        return _unknown_key(base, key)
    if typing.get_origin(hint) is list:
        return words.several_values(override, f"; a list is {key}=[{value}]")
    is_text = hint is str or str in typing.get_args(hint)
    return words.several_values(override, f"; text is {words.quoted(key, value)}" if is_text else "")


def _hint(base: DictConfig, key: str) -> Any:
    """Return the type of a key's value."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(base, parent) if parent else base
    cls = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
    return typing.get_type_hints(cls).get(last) if cls and dataclasses.is_dataclass(cls) else None


def wrong_value(base: DictConfig, override: Override) -> Iterator[Problem]:
    """Yield what is wrong with setting one value in the tree that the choices give."""
    key, node = override.key_or_group, base.copy()
    if parent := _value_above(base, key):
        yield Problem(key, f"is not a key: {parent} is a value", f"{parent}=...")
        return
    try:
        wrong = list(_wrong_kind(key, _hint(base, key), override.value(), OmegaConf.select(base, key)))
    except OmegaConfBaseException:
        wrong = []
    if wrong:
        yield from wrong
        return
    try:
        OmegaConf.update(node, key, override.value(), merge=True)
    except (ConfigAttributeError, ConfigKeyError):
        yield _unknown_key(base, key)
    except ValidationError as error:
        yield _wrong_type(base, key, error)
    except (OmegaConfBaseException, AssertionError, TypeError) as error:
        yield Problem(key, str(error).splitlines()[0], f"`ftrun show` prints the tree; {key} is not a place in it")


def _value_above(base: DictConfig, key: str) -> str:
    """Return the key of a value that ``key`` would lie below, if there is one."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        above = ".".join(parts[:count])
        if above in _leaves(base):
            return above
    return ""


def _wrong_kind(key: str, hint: Any, value: Any, now: Any) -> Iterator[Problem]:
    """Yield a problem if a list is given for one value or the reverse, or null for a value that must be there."""
    if hint is None:
        return
    allows_null = type(None) in typing.get_args(hint)
    if value is None and not allows_null and not dataclasses.is_dataclass(hint):
        yield Problem(key, "cannot be null", f"{key}={_typed(now)}")
    elif typing.get_origin(hint) is list and value is not None:
        (item,) = typing.get_args(hint)
        if not isinstance(value, list):
            if not (isinstance(value, str) and value.startswith("${")):
                yield Problem(key, f"'{value}' is not a list", f"{key}=[{value}]")
        elif dataclasses.is_dataclass(item):
            for index, entry in enumerate(value):
                yield from _wrong_entry(f"{key}.{index}", item, entry)
    elif typing.get_origin(hint) is dict:
        kind = "text" if typing.get_args(hint)[1] is str else "value"
        if not isinstance(value, dict) or (kind == "text" and not all(isinstance(one, str) for one in value.values())):
            yield Problem(key, f"'{value}' is not a set of names and {kind}s", f"{key}={{NAME: {kind.upper()}}}")
    elif isinstance(value, list | dict) and (hint is str or str in typing.get_args(hint)):
        sources = "data.sources=[{path: ...}, ...] for several" if key == "data.path" else f"{key}=VALUE"
        yield Problem(key, f"takes one text, not a {type(value).__name__}", sources)


def _wrong_entry(key: str, cls: Any, entry: Any) -> Iterator[Problem]:
    names = [f.name for f in dataclasses.fields(cls)]
    if not isinstance(entry, dict):
        yield Problem(key, f"'{entry}' is not a set of {', '.join(names)}", f"{{{names[0]}: {entry}}}")
        return
    for name in map(str, entry):
        if name not in names:
            yield Problem(f"{key}.{name}", f"is not a key{did_you_mean(name, names)}", f"one of {', '.join(names)}")


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


ELSEWHERE = {
    "model_name_or_path": "model.path", "base_model": "model.path", "torch_dtype": "model.dtype",
    "flash_attn": "model.attention", "attn_implementation": "model.attention", "dataset": "data.path",
    "datasets": "data.sources", "train_file": "data.path", "max_samples": "data.rows", "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length", "sequence_len": "data.max_length", "sample_packing": "data.packing",
    "val_size": "data.eval_size", "val_set_size": "data.eval_size", "eval_dataset": "data.eval_path",
    "finetuning_type": "adapter", "lora_rank": "adapter.rank", "lora_r": "adapter.rank", "r": "adapter.rank",
    "lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout", "lora_target": "adapter.targets",
    "target_modules": "adapter.targets", "use_dora": "adapter.use_dora", "use_rslora": "adapter.use_rslora",
    "use_galore": "optimizer=galore", "use_apollo": "optimizer=apollo", "use_badam": "optimizer=badam",
    "use_muon": "optimizer=muon", "use_adam_mini": "optimizer=adam_mini", "use_loraplus": "optimizer=loraplus",
    "loraplus_lr_ratio": "optimizer=loraplus optimizer.ratio", "galore_rank": "optimizer.rank",
    "galore_scale": "optimizer.scale", "galore_target": "optimizer.targets", "galore_layerwise": "optimizer.layerwise",
    "galore_proj_type": "optimizer.projection", "galore_update_interval": "optimizer.update_interval",
    "apollo_rank": "optimizer.rank", "apollo_scale": "optimizer.scale", "apollo_target": "optimizer.targets",
    "apollo_scale_type": "optimizer.scaling", "apollo_proj": "optimizer.projection",
    "apollo_proj_type": "optimizer.side", "apollo_layerwise": "optimizer.layerwise",
    "apollo_update_interval": "optimizer.update_interval", "badam_switch_mode": "optimizer.order",
    "badam_switch_interval": "optimizer.update_interval", "badam_start_block": "optimizer.start_block",
    "badam_update_ratio": "optimizer=badam_ratio optimizer.ratio", "badam_mask_mode": "optimizer.mask",
    "optim": "optimizer", "learning_rate": "optimizer.lr", "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2", "num_train_epochs": "train.epochs", "num_epochs": "train.epochs",
    "batch_size": "train.micro_batch_size", "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.grad_accumulation", "lr_scheduler_type": "train.scheduler",
    "lr_scheduler": "train.scheduler", "warmup_steps": "train.warmup", "warmup_ratio": "train.warmup",
    "bf16": "train.precision", "fp16": "train.precision", "neftune_noise_alpha": "train.neftune",
    "logging_steps": "train.log_every", "eval_steps": "train.eval_every", "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints", "report_to": "tracker", "pref_beta": "stage.beta",
    "reward_funcs": "reward", "reward_model": "reward.model.path",
    "trust_remote_code": "model.trust_remote_code", "chat_template": "template",
}  # fmt: skip
"""What keys of transformers, TRL, LLaMA-Factory and axolotl are called here."""


def _unknown_key(base: DictConfig, key: str) -> Problem:
    """Say that a key is not in the tree, with the nearest ones, and those of the same last name elsewhere."""
    group, _, rest = key.partition(".")
    if group in options.OPTIONAL_GROUPS:
        message = f"{group} is a choice of whole recipes and has no keys of its own"
        return Problem(key, message, f"{group}=OPTION, and the keys it sets")
    if group in plugin.SEVERAL and (name := rest.partition(".")[0]) not in base[group]:
        if name in (known := options.names(group)):
            return Problem(key, f"{group}={name} is not chosen in this run", f"{group}={name} {key}=...")
        message = f"there is no {group} {name}{did_you_mean(name, known)}"
        return Problem(key, message, f"{group}.NAME.KEY=..., NAME one of {', '.join(known)}")
    if group in plugin.GROUPS and (owners := _owners(group, rest)):
        message = f"is not a key of {group}={base[group].name}, but of {', '.join(f'{group}={n}' for n in owners)}"
        return Problem(key, message, f"{group}={owners[0]} {key}=..., or leave {key} out")
    if here := ELSEWHERE.get(key):
        # Of what was a switch there, the whole word is known.
        is_whole = "=" in here.rpartition(" ")[2]
        return Problem(key, f"is called {here} here", here if is_whole else f"{here}=...")
    known = sorted(_leaves(base))
    last = key.rpartition(".")[2]
    same_name = [other for other in known if other.rpartition(".")[2] == last]
    same_name += [other for other in known if other == key.lower()]
    near = list(dict.fromkeys([*same_name, *difflib.get_close_matches(key, known, n=3, cutoff=0.6)]))[:3]
    near += difflib.get_close_matches(key, options.GROUPS, n=1, cutoff=0.6) if "." not in key else []
    name = rest.partition(".")[0] if group in plugin.SEVERAL else base[group].name if group in plugin.GROUPS else ""
    chosen = f" of {group}={name}" if name else ""
    meant = f"; did you mean {', '.join(near)}?" if near else ""
    listing = f"`ftrun list {group}` lists its keys" if group in options.GROUPS else "`ftrun show` prints the tree"
    return Problem(key, f"is not a key{chosen}{meant}", f"{near[0]}=..." if near else listing)


def _owners(group: str, name: str) -> list[str]:
    """Return the plugins of a group that have a field of that name, importing none."""
    found = []
    for other in plugin.names(group):
        file = plugin.source(group, other)
        if file and re.search(rf"^    {re.escape(name)}: ", file.read_text(encoding="utf-8"), re.MULTILINE):
            found.append(other)
    return found


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
        return Problem(key, f"'{found[1]}' is not {_TYPE_NAMES.get(found[2], found[2])}", f"{key}={_typed(example)}")
    return Problem(key, text, f"`ftrun show` prints what {key} is now")


def broken_plugin(error: plugin.PluginError, chosen: Sequence[Override]) -> Problem:
    """Say that a chosen plugin does not work."""
    typed = (f"{override.key_or_group}={override.value()}" for override in chosen)
    at_fault = next((word for word in typed if word in str(error)), "plugins")
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
    internal = ("name", "schema_version", "sizes")
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    names = [f.name for f in fields if f.name not in internal]
    near = did_you_mean(key.rpartition(".")[2], names)
    return Problem(file, f"{key} is not a key{near}", f"one of {', '.join(names)}")


def _missing_option(error: MissingConfigException, chosen: Sequence[Override]) -> Problem:
    """Say which option is missing, and which of the chosen files asks for it: Hydra does not know."""
    missing = (error.missing_cfg_file or "").strip("/")
    group, _, name = missing.rpartition("/")
    known = options.names(group) if group in options.GROUPS else []
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
            if prefix == "" and name in options.OPTIONAL_GROUPS:
                yield from (_unknown_key(node, f"{name}.{below!s}") for below in (child or {}))
                continue
            near = did_you_mean(key, [f"{prefix}{other}" for other in known - {"name"}])
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
        elif isinstance(raw, ListConfig) and not raw._is_none() and not raw._is_interpolation():
            for index, entry in enumerate(raw):
                if isinstance(entry, DictConfig):
                    yield from unset(entry, f"{key}.{index}.")
        elif raw._is_interpolation():
            try:
                node[name]
            except OmegaConfBaseException as error:
                yield _broken_reference(key, error)
        elif (child := _tree(node, name)) is not None:
            yield from unset(child, f"{key}.")


def _broken_reference(key: str, error: OmegaConfBaseException) -> Problem:
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).splitlines()[0])
    fix = f"{key}= a value, or a reference to a key that has one"
    if found := re.search(r"'(\$\{.*\})': Value '(.*)' of type '.*' could not be converted to (\w+)", text):
        text = f"{found[1]} is '{found[2]}', which is not {_TYPE_NAMES.get(found[3], found[3])}"
    return Problem(key, text, fix)


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
