"""The best arm of a sweep as an experiment of the user's own: ``conf/experiment/best_NAME.yaml``.

It chooses the winner's options, and sets what differs from what they give by themselves, and what was typed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from ftrun import config, options, plugin, record, words
from ftrun.board.arms import Arm, Board, Table
from ftrun.config import Config
from ftrun.errors import ConfigError, Problem
from ftrun.sweep.ledger import Ledger

_WRITTEN = "# @package _global_\n# Written by ftrun: the winner of a sweep"
"""How each file begins: what does not begin so is somebody's own. (The package has to come first.)"""

_OF_THE_RUN = ("seed", "output_dir", "plugins", "schema_version", "template.date")
"""Keys that are a run's own, and no part of what won."""


def write(board: Board, conf: Path) -> list[Path]:
    """Write the best arm of each table, and return the files.

    Args:
        board: What the sweep has come to.
        conf: The folder of the user's own options, which is made if there is none.

    Raises:
        ConfigError: A file of that name is there that ftrun did not write, or the winner's config cannot be read here.
    """
    winners = [(table, best) for table in board.tables if (best := table.best)]
    files = []
    for table, arm in winners:
        name = name_of(board.folder) + (f"_{table.stage}" if len(board.tables) > 1 else "")
        path = conf / "experiment" / f"{name}.yaml"
        if path.exists() and not path.read_text(encoding="utf-8").startswith(_WRITTEN):
            message = f"{path} is not written: a file that ftrun did not write has that name"
            raise ConfigError([Problem("experiment", message, f"rename it, then ftrun compare {board.folder}")])
        record.write_whole(path, render(board.folder, table, arm, name))
        files.append(path)
    return files


def name_of(folder: Path) -> str:
    """Return the experiment's name."""
    return f"best_{re.sub(r'[^A-Za-z0-9]+', '_', folder.name).strip('_')}"


def render(folder: Path, table: Table, arm: Arm, name: str) -> str:
    """Return the experiment that gives the arm's config again, but for the seed."""
    run = min(arm.rows, key=lambda row: (row.seed not in arm.done, row.id)).folder
    saved = OmegaConf.structured(Config.load(run / record.RUN))
    files = [str(run / file) for file in saved.plugins]
    needs = [f"plugins=[{','.join(words.as_text(file) for file in files)}]"] if files else []
    typed = _typed(folder, arm)
    chosen = dict(_chosen(saved, typed))
    given, problems = config.examine([*needs, *(_word(group, option) for group, option in chosen.items())])
    if given is None:
        raise ConfigError(problems)
    values = dict(_differing(OmegaConf.structured(given), saved, typed))
    head = f"{_WRITTEN}, {' '.join(folder.name.split())}: {table.objective} {arm.mean:.4g}, {_seeds(arm)}."
    command = " ".join(["ftrun", *needs, f"experiment={name}"])
    return "\n".join(
        [
            head,
            f"# {arm.name}; {table.how_sure()}",
            f"# {command}",
            yaml.safe_dump({"defaults": [{f"override /{key}": option} for key, option in chosen.items()]}).strip(),
            yaml.safe_dump(_nested(values), sort_keys=False, allow_unicode=True).strip() if values else "",
            "",
        ]
    )


def _seeds(arm: Arm) -> str:
    return f"mean of {len(arm.done)} seeds" if len(arm.done) > 1 else "one seed"


def _typed(folder: Path, arm: Arm) -> dict[str, str]:
    """Return what was typed for the arm, by key: the words of the sweep, and those of the point, which win."""
    asks = Ledger(folder).asks()
    given = [word for ask in asks[-1:] for word in ask.words]
    pairs = [word.lstrip("+").partition("=") for word in given]
    return {key: value for key, _, value in pairs} | dict(arm.point)


def _chosen(saved: DictConfig, typed: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield the option of each group that what won rests on: of plugins what was frozen, else what was typed."""
    for group in options.GROUPS:
        if group in options.OPTIONAL_GROUPS:
            continue  # flattened into values
        option = typed.get(group)
        if group in plugin.SEVERAL:
            if names := list(saved[group]):
                yield group, names if len(names) > 1 else str(names[0])
        elif group in plugin.GROUPS:
            name = str(saved[group].name)
            is_preset = option is not None and options.yaml_file(f"{group}/{option}") is not None
            yield group, option if is_preset else name
        elif option is not None and options.exists(group, option):
            yield group, option


def _word(group: str, option: Any) -> str:
    return f"{group}=[{','.join(option)}]" if isinstance(option, list) else f"{group}={option}"


def _differing(given: DictConfig, saved: DictConfig, typed: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield the keys that are to be set: those that differ from the chosen options', and those that were typed."""
    before, after = dict(_leaves(given)), dict(_leaves(saved))
    for key, value in after.items():
        if key in _OF_THE_RUN or (key.endswith(".name") and key.partition(".")[0] in plugin.GROUPS):
            continue
        is_typed = any(key == word or key.startswith(f"{word}.") for word in typed if word not in options.GROUPS)
        is_settled = key.startswith("hardware.") or key in ("train.precision", "model.source", "model.revision")
        if is_typed or (not is_settled and before.get(key, ...) != value):
            yield key, value


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key with its plain value; lists, and what is empty, are values."""
    for name, value in ((str(name), value) for name, value in node.items()):
        if isinstance(value, DictConfig) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            yield f"{prefix}{name}", getattr(plain, "value", plain)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
