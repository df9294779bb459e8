"""The option reference in docs/reference, written from the docstrings, one page a group.

python -m ftrun.reference            # write it
python -m ftrun.reference --check    # name the pages that are stale; exit code 1 if there are any

Only what ships with ftrun is described, whatever else is installed or lies in the working folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from ftrun import help as described
from ftrun import options, plugin
from ftrun.config import Config
from ftrun.data.formats import KINDS
from ftrun.fields import MISSING

ROOT = options.CONF.parent
"""The checkout; an installed ftrun has no docs/."""

FOLDER = ROOT / "docs" / "reference"

_NOTE = "<!-- Written by `python -m ftrun.reference` from the docstrings: change those, and run it again. -->\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages, or compare them with what would be written."""
    parser = argparse.ArgumentParser(prog="python -m ftrun.reference", description="Write docs/reference.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail and name the pages that are stale")
    asked = parser.parse_args(argv)
    with contextlib.chdir(ROOT):  # where ./conf is ftrun's own
        wanted = pages()
        stale = [name for name, text in wanted.items() if _content(name) != text]
        stale += [path.name for path in sorted(FOLDER.glob("*.md")) if path.name not in wanted]
        if not asked.check:
            _write(wanted)
    for name in stale:
        print(f"docs/reference/{name} {'is stale' if asked.check else 'changed'}")  # noqa: T201
    return int(asked.check and bool(stale))


def _content(name: str) -> str | None:
    path = FOLDER / name
    return path.read_text(encoding="utf-8") if path.exists() else None


def _write(wanted: dict[str, str]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Return the text of every page by its file's name."""
    made = {"README.md": _index(), **{f"{group}.md": _page(group) for group in options.GROUPS}}
    return {name: "\n".join([_NOTE, *lines]).rstrip() + "\n" for name, lines in made.items()}


def _index() -> Iterator[str]:
    yield "# Options\n"
    yield "A run is put together from one option of each group: `stage=dpo adapter=lora`. Each option brings keys,"
    yield "which are set as `adapter.rank=64`. `ftrun list` prints what stands here, `ftrun show` the whole of a run.\n"
    yield from _table("group", "what it is about", "default", "options")
    for group, about in options.GROUPS.items():
        names = _options(group)
        default = _defaults().get(group)
        listed = ", ".join(f"`{name}`" for name in names) or "none yet"
        yield _row(f"[{group}]({group}.md)", about, f"`{default}`" if default else "", listed)
    yield "\n## Keys of the run itself\n"
    others = (*options.GROUPS, "schema_version")
    yield from _keys(row for row in described.keys_of(Config, "") if row["key"] not in others)
    yield "\n## Sweeps\n"
    yield from _table("sweep", "", "runs every combination of")
    for name, path in options.sweeps().items():
        axes = " ".join(f"`{key!s}={value}`" for key, value in cast(DictConfig, OmegaConf.load(path)).items())
        yield _row(f"`sweep={name}`", _text(options.comment(path)), axes)


def _page(group: str) -> Iterator[str]:
    yield f"# {group}\n"
    yield f"{_sentence(options.GROUPS[group])} {_how_to_choose(group)}\n"
    names = _options(group)
    presets = [name for name in names if options.yaml_file(f"{group}/{name}")]
    plugins = [name for name in names if name not in presets]
    if plugins:
        yield from _table("option", "")
        yield from (
            _row(f"[`{group}={name}`](#{group}{name})", _text(options.summary(group, name))) for name in plugins
        )
        yield ""
    for name in plugins:
        yield from _plugin(group, name)
    if (cls := described.schema(group)) is not None:
        yield "## Keys\n"
        yield from _keys(described.keys_of(cls, f"{group}."))
        yield ""
        yield from _parts(cls, group)
    if presets:
        yield from _presets(group, presets)
    elif not plugins:
        yield "None yet."


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _how_to_choose(group: str) -> str:
    if group in options.OPTIONAL_GROUPS:
        return f"None is chosen by default; `{group}=NAME` sets keys of the other groups."
    several = f", several with `{group}=[NAME,NAME]`" if group in plugin.SEVERAL else ""
    if group in options.UNCHOSEN_GROUPS:
        return f"Chosen with `{group}=NAME`{several}; the default is the stage's own."
    return f"Chosen with `{group}=NAME`{several}; the default is `{_defaults()[group]}`."


def _plugin(group: str, name: str) -> Iterator[str]:
    """Describe one plugin: what it is, what it needs, its keys."""
    cls = plugin.get(group, name)
    yield f"## `{group}={name}`\n"
    yield f"{_text(inspect.getdoc(cls) or '')}\n"
    if facts := list(_facts(cls)):
        yield from (f"- {fact}" for fact in facts)
        yield ""
    keys = list(described.keys(group, name))
    if keys:
        yield from _keys(keys)
    else:
        yield "It has no keys."
    yield ""


def _facts(cls: type[plugin.Plugin]) -> Iterator[str]:
    """Say what a plugin's class variables mean to a user."""
    if cls.requires:
        yield f"Needs `pip install {' '.join(cls.requires)}`."
    if issubclass(cls, plugin.Stage):
        formats = ", ".join(f"`{form}`" for form in KINDS.get(cls.rows, ()))
        yield f"Rows: {cls.rows}" + (f" (formats {formats})." if formats else ".")
        yield f"Without `data.path` it trains on `{cls.default_data}`."
        if cls.default_reward:
            yield f"Without `reward` its replies are judged by `reward={cls.default_reward}`."
        yield f"Peak learning rate where every weight trains: {cls.default_lr:g}."
        metrics = ", ".join(f"`{metric}`" for metric in cls.metrics)
        yield f"Metrics: {metrics}; the first that a run has is its objective."
    elif issubclass(cls, plugin.Adapter | plugin.Optimizer) and cls.lr_scale != 1:
        yield f"Its default learning rate is the stage's times {cls.lr_scale:g}."


def _parts(cls: type[Any], group: str) -> Iterator[str]:
    """Describe the dataclasses that the keys of a group are lists of."""
    for name, hint in typing.get_type_hints(cls).items():
        part = next(iter(typing.get_args(hint)), None)
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            yield f"Each of `{group}.{name}` is a mapping:\n"
            yield from _keys(described.keys_of(part, ""))
            yield ""


def _presets(group: str, names: list[str]) -> Iterator[str]:
    yield "## Presets\n"
    column, show = _MENUS.get(group, ("sets", _all_it_sets))
    yield from _table("preset", "", column)
    for name in names:
        setting = show(list(described.preset(group, name)))
        yield _row(f"`{group}={name}`", _text(options.summary(group, name)), setting)


Rows = list[dict[str, Any]]


def _all_it_sets(rows: Rows) -> str:
    return " ".join(f"`{row['key']}={row['default']}`" for row in rows)


def _sizes(rows: Rows) -> str:
    """Return the sizes of a model's family, the one that is chosen by default in bold."""
    prefix = "model.sizes."
    sizes = [row["key"].removeprefix(prefix) for row in rows if row["key"].startswith(prefix)]
    default = next((row["default"] for row in rows if row["key"] == "model.size"), None)
    return ", ".join(f"**{size}**" if size == default else size for size in sizes)


def _stops(rows: Rows) -> str:
    """Return what ends a reply; the template itself is many lines."""
    return " ".join(f"`{row['default']}`" for row in rows if row["key"] == "template.stop")


_MENUS = {"model": ("sizes, the default in bold", _sizes), "template": ("a reply also ends with", _stops)}
"""Groups whose presets are described by a part of what they set."""


def _options(group: str) -> list[str]:
    """Return the options of a group that ship with ftrun."""
    files = {name: options.yaml_file(f"{group}/{name}") or plugin.source(group, name) for name in options.names(group)}
    return [name for name, file in files.items() if file and file.is_relative_to(ROOT)]


def _defaults() -> dict[str, str]:
    """Return the option of each group that is chosen where nothing is said."""
    root = cast(DictConfig, OmegaConf.load(options.CONF / "ftrun.yaml"))
    chosen = [entry for entry in root.defaults if isinstance(entry, DictConfig)]
    return {str(group): name for entry in chosen for group, name in entry.items()}


def _keys(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    yield from _table("key", "type", "default", "meaning")
    for row in rows:
        default = "must be given" if row["default"] == MISSING else f"`{row['default']}`"
        yield _row(f"`{row['key']}`", _text(row["type"]), default, _text(row["about"]))


def _table(*titles: str) -> Iterator[str]:
    yield _row(*titles)
    yield _row(*("---" for _ in titles))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _text(docstring: str) -> str:
    """Return a docstring as Markdown, on one line."""
    line = " ".join(docstring.replace("``", "`").split())
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


if __name__ == "__main__":
    sys.exit(main())
