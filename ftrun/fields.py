"""What a config field carries besides its type: a range, and the docstring written under it."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import math
import re
import textwrap
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from ftrun.errors import Problem

MISSING: Any = "???"
"""A field without a value: OmegaConf's mark, here so that listing options need not import it."""


def ranged(
    default: Any, *, ge: float | None = None, gt: float | None = None, le: float | None = None, lt: float | None = None
) -> Any:
    """Declare a dataclass field whose value must lie in a range; ``None`` and text always may pass.

    Example:
        ``rank: int = ranged(16, ge=1)``
    """
    bounds = {sign: bound for sign, bound in ((">=", ge), (">", gt), ("<=", le), ("<", lt)) if bound is not None}
    return dataclasses.field(default=default, metadata={"bounds": bounds})


_HOLDS = {
    ">=": lambda value, bound: value >= bound,
    ">": lambda value, bound: value > bound,
    "<=": lambda value, bound: value <= bound,
    "<": lambda value, bound: value < bound,
}


def range_text(field: dataclasses.Field[Any]) -> str:
    """Return a field's range as a person reads it (``>= 0 and < 1``), or nothing."""
    return " and ".join(f"{sign} {bound}" for sign, bound in field.metadata.get("bounds", {}).items())


def out_of_range(node: Any, prefix: str = "") -> Iterator[Problem]:
    """Yield a problem for each value below ``node`` (a dataclass, list or dict of them) that leaves its range."""
    for name, value, field in _children(node):
        key = f"{prefix}{name}"
        if isinstance(value, int | float):
            bounds = field.metadata.get("bounds", {}) if field else {}
            # A NaN satisfies no bound, which is the wanted outcome.
            if not math.isfinite(value) or not all(_HOLDS[sign](value, bound) for sign, bound in bounds.items()):
                wanted = range_text(field) if field and bounds else "finite"
                yield Problem(key, f"{value} is out of range", f"{key}=X with X {wanted}")
        else:
            yield from out_of_range(value, f"{key}.")


def _children(node: Any) -> Iterator[tuple[str, Any, dataclasses.Field[Any] | None]]:
    if dataclasses.is_dataclass(node):
        yield from ((field.name, getattr(node, field.name), field) for field in dataclasses.fields(node))
    elif isinstance(node, dict):
        yield from ((str(name), value, None) for name, value in node.items())
    elif isinstance(node, list):
        yield from ((str(index), value, None) for index, value in enumerate(node))


def plain(value: Any) -> Any:
    """Return a dataclass, and all below it, as dicts, lists and plain values; choices as their names."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.name if isinstance(value, Enum) else value


def to_yaml(values: dict[str, Any]) -> str:
    """Return plain values as YAML that OmegaConf reads back as they are."""
    return "".join(_entry(name, json.dumps(value)) for name, value in values.items())


@functools.lru_cache(maxsize=256)
def _entry(name: str, value: str) -> str:
    """Return one of the outermost entries as YAML: of many configs, most have most of them alike."""
    import yaml

    return str(yaml.dump({name: json.loads(value)}, Dumper=_dumper(), sort_keys=False, allow_unicode=True))


@functools.cache
def _dumper() -> Any:
    import yaml

    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc] # chosen where it runs
        def represent_text(self, text: str) -> Any:
            """Quote what looks like a number to OmegaConf, though not to YAML itself: 1e-4."""
            style = "'" if _NUMBER.fullmatch(text) else None
            return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, Dumper.represent_text)
    return Dumper


_NUMBER = re.compile(r"[-+]?[\d_]*\.?[\d_]+([eE][-+]?[\d_]+)?|[-+]?[\d_]+\.([eE][-+]?[\d_]+)?")


def open_keys(cls: type[Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys below a dataclass that are dicts of texts, whose names are the user's own."""
    for name, hint in typing.get_type_hints(cls).items():
        if hint == dict[str, str]:
            yield f"{prefix}{name}"
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from open_keys(hint, f"{prefix}{name}.")


def docs(cls: type[Any]) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, bases included, by field name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            body = tree.body[0]
            assert isinstance(body, ast.ClassDef)
            found |= field_docs(body)
    return found


def field_docs(node: ast.ClassDef) -> dict[str, str]:
    """Return the docstring under each annotated name of a class body."""
    found = {}
    for statement, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            if isinstance(text, str):
                found[statement.target.id] = inspect.cleandoc(text)
    return found


def summary(docstring: str | None) -> str:
    """Return the first sentence or line of a docstring."""
    return (docstring or "").strip().split("\n")[0]
