"""What can be chosen: the config groups and their options, found by file name, without Hydra and without imports."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

from ftrun import fields, plugin

_here = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    """Return a folder that lies inside the package in a wheel, and beside it in a checkout."""
    return next(folder for folder in (_here / name, _here.parent / name) if folder.is_dir())


CONF = _shipped("conf")
SWEEPS = _shipped("sweeps")

GROUPS = {
    "stage": "what the run does",
    "model": "the weights it starts from",
    "template": "how a conversation becomes text",
    "data": "the rows it trains on",
    "adapter": "which weights train",
    "quant": "how frozen weights are stored",
    "optimizer": "how a gradient becomes a step",
    "train": "how long, and in what batches",
    "hardware": "what it is computed on",
    "tracker": "who else is told the metrics",
    "reward": "what a reply is worth",
    "method": "published recipes over several groups",
    "experiment": "whole runs worth keeping",
    "debug": "short runs that look for trouble",
}
"""The config groups, and what each is about."""

OPTIONAL_GROUPS = ("method", "experiment", "debug")
"""Groups of which nothing is chosen by default; their options set keys of the other groups."""

UNCHOSEN_GROUPS = ("reward", *OPTIONAL_GROUPS)
"""Groups of which conf/ftrun.yaml chooses nothing; the reward is then the stage's own, if it has replies judged."""

LAUNCHING = ("hydra/launcher", "hydra/sweeper")
"""Hydra's own groups: where runs are started, and which. No part of a run's config."""

FLAGS = ("--help", "--version", "--multirun")
"""What is typed with dashes, besides ``-h`` and ``-m``."""

COMMANDS = (
    "list", "show", "check", "preview", "prepare", "cache", "runs", "compare", "diff", "cancel", "env", "resume",
    "completion",
)  # fmt: skip


def working_conf() -> Path | None:
    """Return the working folder's own ``conf``, if it has one that is not ftrun's."""
    mine = Path.cwd() / "conf"
    return mine if mine.is_dir() and mine.resolve() != CONF else None


def conf_folders() -> list[Path]:
    """Return the folders of YAML options, the one that is found first in front."""
    mine = working_conf()
    return [*([mine] if mine else []), CONF]


def sweeps() -> dict[str, Path]:
    """Return the sweep files by name: those of ftrun, and, found first, of the working folder's own ``sweeps``."""
    folders = (SWEEPS, Path.cwd() / "sweeps")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def names(group: str) -> list[str]:
    """Return the names of all options of a group, sorted."""
    presets = {path.stem for folder in conf_folders() for path in (folder / group).glob("*.yaml")}
    return sorted(presets | set(plugin.names(group) if group in plugin.GROUPS else ()))


def exists(group: str, name: str) -> bool:
    """Tell whether a group has an option of that name."""
    is_preset = Path(name).name == name and yaml_file(f"{group}/{name}") is not None
    return is_preset or (group in plugin.GROUPS and plugin.exists(group, name))


def yaml_file(option: str) -> Path | None:
    """Return the file of the YAML option ``<group>/<name>``."""
    return next((path for folder in conf_folders() if (path := folder / f"{option}.yaml").is_file()), None)


def comment(path: Path) -> str:
    """Return the comment that a YAML file opens with."""
    text = path.read_text(encoding="utf-8", errors="replace")
    comments = [line[2:].strip() for line in text.splitlines() if line.startswith("# ")]
    return next((line for line in comments if not line.startswith("@package")), "")


def summary(group: str, name: str) -> str:
    """Return one line on an option: a preset's opening comment, or the first line of a plugin's docstring."""
    if path := yaml_file(f"{group}/{name}"):
        return comment(path)
    if cls := plugin.registered(group, name):
        return fields.summary(cls.__doc__)
    path = plugin.source(group, name)
    if path is None:
        return ""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError) as error:
        warnings.warn(f"the plugin {group}={name} cannot be read: {error}, {path}", stacklevel=2)
        return "cannot be imported"
    registered = [node for node in tree.body if isinstance(node, ast.ClassDef) and _is_registered(node)]
    named = [node for node in registered if _has_name(node, name)] or registered
    return fields.summary(ast.get_docstring(named[0]) if named else ast.get_docstring(tree))


def _has_name(node: ast.ClassDef, name: str) -> bool:
    """Tell whether a plugin class says ``name: str = "<name>"``."""
    return any(
        isinstance(line, ast.AnnAssign)
        and ast.unparse(line.target) == "name"
        and isinstance(line.value, ast.Constant)
        and line.value.value == name
        for line in node.body
    )


def _is_registered(node: ast.ClassDef) -> bool:
    return any("register" in ast.unparse(decorator) for decorator in node.decorator_list)
