"""Help pages and listings, made from the docstrings; the plain ones import neither Hydra nor any plugin."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from ftrun import fields, options, plugin
from ftrun.display import console
from ftrun.errors import ConfigError, Problem, did_you_mean

_FORMAT_KEY = plugin.KEYED[plugin.Format.group][1]

_COMMANDS = {
    "ftrun [KEY=VALUE ...]": "train; without a word, fine-tunes a small model on rows that ship with ftrun",
    "ftrun -m [KEY=VALUE,VALUE ...]": "a run for each combination of the values, and a leaderboard",
    "ftrun list [GROUP[=OPTION]]": "the groups, a group's options, or an option's keys",
    "ftrun show [KEY=VALUE ...]": "the whole config as YAML, every default written out; runs nothing",
    "ftrun check [-m] [KEY=VALUE ...]": "all that is wrong, before it starts; memory, time and disk",
    "ftrun preview [KEY=VALUE ...]": "rows as they will be trained on: what is masked, cut, skipped",
    "ftrun prepare [KEY=VALUE ...]": "fetch the model and tokenise the rows ahead of a run",
    "ftrun cache": "the tokenised rows that are kept, and deleting them",
    "ftrun runs [FOLDER]": "the runs so far: status, loss, time",
    "ftrun compare FOLDER ...": "in what runs differ, and what came of it; a sweep's leaderboard",
    "ftrun diff FOLDER FOLDER": "all in which two runs differ",
    "ftrun cancel FOLDER": "stop a run or a sweep, which saves first",
    "ftrun resume FOLDER": "go on with a run or a sweep that was stopped",
    "ftrun env": "versions and hardware, for bug reports",
    "ftrun completion SHELL": "completion for bash, zsh or fish",
}

_EXAMPLES = {
    "ftrun": "see it work",
    "ftrun model=qwen3 model.size=0.6B data.path=rows.jsonl": "your rows, another model",
    "ftrun adapter=full optimizer.lr=1e-5 train.epochs=1": "train every weight",
    "ftrun method=dora data.path=rows.csv data.eval_size=0.1": "a published recipe, a tenth held out",
    "ftrun model=tiny debug=smoke": "two steps that need nothing from outside",
    "ftrun -m model=tiny adapter=lora,full seed=1,2": "a grid of four runs",
    "ftrun -m sweep=lora_rank": "a grid from a file",
    "ftrun model.path=outputs/sft/RUN": "start from what an earlier run ended with",
    "ftrun stage=sft --help": "every key of this choice, with its meaning",
}


def show_help(command: str | None, overrides: Sequence[str]) -> None:
    """Print the page for a command, for a choice of options, or the main page."""
    if overrides or command in ("show", "check"):
        _show_keys(overrides)
    else:
        _show_main()


def _show_main() -> None:
    console.print("[bold]ftrun[/]: the experiment runner for fine-tuning language models\n")
    _section("Commands", _COMMANDS)
    console.print("[bold]Groups[/]  choose an option with GROUP=OPTION; `ftrun list GROUP` says what each is")
    table = _plain_table()
    for group, about in options.GROUPS.items():
        table.add_row(f"[cyan]{group}[/]", f"{about}\n[dim]{escape(', '.join(options.names(group)))}[/]")
    console.print(Padding(table, (0, 0, 1, 2)))
    console.print(f"[bold]Sweeps[/]  `ftrun -m sweep=NAME`: {', '.join(options.sweeps())}\n")
    console.print(
        "[bold]Keys[/]  set a value with GROUP.KEY=VALUE; `ftrun list train` and `ftrun OPTIONS --help` list them\n"
    )
    _section("Examples", _EXAMPLES)


def _section(title: str, rows: dict[str, str]) -> None:
    console.print(f"[bold]{title}[/]")
    table = _plain_table()
    for left, right in rows.items():
        table.add_row(f"[cyan]{escape(left)}[/]", escape(right))
    console.print(Padding(table, (0, 0, 1, 2)))


def _plain_table(columns: int = 2) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for _ in range(columns - 1):
        table.add_column(overflow="fold")  # of the choices of a key and of an address, every letter counts
    return table


def _show_keys(overrides: Sequence[str]) -> None:
    """Print every key of the composed tree: its value, type, range and meaning."""
    from ftrun import config

    cfg = config.compose(overrides)
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if f.name in plugin.SEVERAL:
            for name, option in value.items():
                _show_node(plugin.place(f.name, name), option, title=f"{f.name}={name}")
        elif dataclasses.is_dataclass(value):
            _show_node(f.name, value)
    top = {
        f.name: f
        for f in dataclasses.fields(cfg)
        if f.name in ("seed", "objective", "objective_mode", "output_dir", "plugins")
    }
    console.print("[bold]the run[/]")
    console.print(Padding(_key_table(config.Config, top, cfg, ""), (0, 0, 1, 2)))


def _show_node(prefix: str, node: Any, title: str = "") -> None:
    title = title or (f"{prefix}={node.name}" if isinstance(node, plugin.Plugin) else prefix)
    console.print(f"[bold]{title}[/]  {escape(fields.summary(type(node).__doc__))}")
    shown = {f.name: f for f in dataclasses.fields(node) if f.name not in ("name", "sizes")}
    if shown:
        console.print(Padding(_key_table(type(node), shown, node, f"{prefix}."), (0, 0, 1, 2)))


def _key_table(cls: type, shown: dict[str, dataclasses.Field[Any]], node: Any, prefix: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_column(overflow="fold")
    docs, hints = fields.docs(cls), typing.get_type_hints(cls)
    for name, f in shown.items():
        value = text_of(getattr(node, name))
        kind = type_text(hints[name])
        bounds = f" {fields.range_text(f)}" if fields.range_text(f) else ""
        about = escape(_line(docs.get(name, "")))
        table.add_row(f"[cyan]{prefix}{name}[/]", escape(value), f"{about} [dim]({escape(kind + bounds)})[/]")
    return table


def _line(text: str) -> str:
    """Return a docstring as one paragraph, which the terminal wraps."""
    return " ".join(text.split())


def text_of(value: Any) -> str:
    """Return a value as one would type it."""
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(text_of(item) for item in value)}]"
    return str(value)


def type_text(hint: Any) -> str:
    """Return a field's type as a person reads it."""
    if isinstance(hint, types.UnionType):
        return " or ".join(type_text(part) for part in typing.get_args(hint) if part is not types.NoneType)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "|".join(str(member.value) for member in hint)
    if typing.get_origin(hint) is list:
        return f"list of {type_text(typing.get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        return "{" + ", ".join(f.name for f in dataclasses.fields(hint)) + "}"
    names = {int: "whole number", float: "number", str: "text", bool: "true|false"}
    return names.get(hint, str(hint))


def show_list(what: str | None, *, as_json: bool) -> None:
    """Print the groups, the options of a group, or the keys of an option.

    Raises:
        ConfigError: There is no such group or option.
    """
    rows = list(_listed(what))
    if as_json:
        print(json.dumps(rows, indent=2))  # noqa: T201
        return
    table = _plain_table(len(rows[0]) if rows else 1)
    for row in rows:
        first, *rest = row.values()
        table.add_row(
            f"[cyan]{escape(str(first))}[/]",
            *(escape(", ".join(cell) if isinstance(cell, list) else text_of(cell)) for cell in rest),
        )
    console.print(table)


def _listed(what: str | None) -> Iterator[dict[str, Any]]:
    if what is None:
        for group, about in options.GROUPS.items():
            yield {"group": group, "about": about, "options": options.names(group)}
        return
    group, _, option = what.partition("=")
    if what == "sweep":
        for name, file in options.sweeps().items():
            yield {"option": name, "about": options.comment(file)}
        return
    if group == _FORMAT_KEY:
        yield from _formats(option)
        return
    if group not in options.GROUPS:
        known = [*options.GROUPS, _FORMAT_KEY]
        raise ConfigError([Problem(group, f"is no group{did_you_mean(group, known)}", f"one of {', '.join(known)}")])
    if not option:
        for name in options.names(group):
            yield {"option": name, "about": options.summary(group, name)}
        return
    if option not in (known := options.names(group)):
        raise ConfigError(
            [Problem(group, f"there is no {group} {option}{did_you_mean(option, known)}", f"one of {', '.join(known)}")]
        )
    yield from keys(group, option)


def _formats(option: str) -> Iterator[dict[str, Any]]:
    """Yield what ``data.format`` can be, with the kinds of rows that are read from each."""
    from ftrun.data import formats

    if option:
        raise ConfigError([Problem(_FORMAT_KEY, "a format has no keys", f"ftrun list {_FORMAT_KEY}")])
    abouts = {"auto": "the first of these whose columns a row has"}
    abouts |= {name: formats.about(name) for name in formats.LAYOUTS}
    for name in formats.names():
        kinds = [kind for kind, forms in formats.KINDS.items() if name in forms]
        about = abouts.get(name) or options.summary(plugin.Format.group, name)
        yield {"option": name, "rows": " or ".join(kinds) or "any kind", "about": about}


def keys(group: str, option: str) -> Iterator[dict[str, Any]]:
    """Yield the keys of one option: a plugin's fields, a schema's as a preset sets them, or what a recipe sets."""
    if options.yaml_file(f"{group}/{option}") is None:
        yield from keys_of(plugin.get(group, option), f"{plugin.place(group, option)}.")
    elif (cls := schema(group)) is None:
        yield from preset(group, option)
    else:
        set_here = {row["key"]: row["default"] for row in preset(group, option)}
        sizes = ", ".join(key.rpartition("sizes.")[2] for key in set_here if ".sizes." in key)
        for row in keys_of(cls, f"{group}."):
            row["default"] = set_here.get(row["key"], row["default"])
            row["about"] += f" One of {sizes}" if sizes and row["key"] == "model.size" else ""
            yield row


def keys_of(cls: type[Any], prefix: str) -> Iterator[dict[str, Any]]:
    """Yield the fields of a dataclass as keys: default, type with range, meaning."""
    node, docs, hints = cls(), fields.docs(cls), typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.name not in ("name", "sizes"):
            yield {
                "key": f"{prefix}{f.name}",
                "default": text_of(getattr(node, f.name)),
                "type": f"{type_text(hints[f.name])} {fields.range_text(f)}".strip(),
                "about": _line(docs.get(f.name, "")),
            }


def schema(group: str) -> type[Any] | None:
    """Return the schema of a group whose options are YAML only; None for one that sets other groups' keys."""
    from ftrun.config import Config

    return None if group in plugin.GROUPS else typing.get_type_hints(Config).get(group)


def preset(group: str, option: str) -> Iterator[dict[str, Any]]:
    """Yield what a preset sets."""
    from omegaconf import OmegaConf

    file = options.yaml_file(f"{group}/{option}")
    assert file
    prefix = "" if group in options.OPTIONAL_GROUPS else f"{group}."

    def leaves(node: Any, path: str) -> Iterator[dict[str, Any]]:
        for name, value in node.items():
            if name == "defaults":
                for entry in value:
                    if isinstance(entry, dict):
                        yield from (
                            {"key": key.removeprefix("override /"), "default": choice} for key, choice in entry.items()
                        )
            elif isinstance(value, dict):
                yield from leaves(value, f"{path}{name}.")
            else:
                yield {"key": f"{path}{name}", "default": text_of(value)}

    yield from leaves(OmegaConf.to_container(OmegaConf.load(file)), prefix)
