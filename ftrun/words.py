"""The words of the command line: which choose an option, which set a value, and what is wrong with each by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from ftrun import options, plugin
from ftrun.errors import Problem, did_you_mean


def read(overrides: Sequence[str]) -> tuple[list[Override], list[Override], list[Problem]]:
    """Parse words and load the plugin files they name.

    Returns:
        Those that choose an option that exists, those that set a value, and what is wrong with the others.
    """
    problems: list[Problem] = []
    parsed = [override for word in overrides for override in _parse(word, problems)]
    problems += _load_plugin_files(parsed)
    chosen: list[Override] = []
    values: list[Override] = []
    for override in parsed:
        is_choice = override.key_or_group in options.GROUPS
        found = list(_misused(override)) or (list(_wrong_choice(override)) if is_choice else [])
        problems += found
        if not found:
            (chosen if is_choice else values).append(override)
    return chosen, values, [*problems, *_overruled(values)]


def _parse(word: str, problems: list[Problem]) -> list[Override]:
    try:
        if not word.startswith("="):
            return [OverridesParser.create().parse_override(word)]
    except HydraException:
        pass
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


def _load_plugin_files(parsed: Sequence[Override]) -> Iterator[Problem]:
    """Import the files of ``plugins=[...]``, so that what they register can be chosen."""
    for override in parsed:
        files = override.value() if override.key_or_group == "plugins" else None
        for file in files if isinstance(files, list) else ():
            path = Path(str(file)).expanduser().resolve()
            if not path.is_file():
                yield Problem("plugins", f"there is no file {file}", "plugins=[PATH_OF_A_PYTHON_FILE]")
                continue
            try:
                plugin.load_file(path)
            except plugin.PluginError as error:
                yield Problem("plugins", str(error), "mend the file")


def _misused(override: Override) -> Iterator[Problem]:
    """Yield what is wrong with a well-formed word before anything is looked up."""
    key = override.key_or_group
    group = key.split(".")[0]
    if group in ("hydra", "hydra/launcher", "hydra/sweeper") or key.startswith("hydra/"):
        why = "ftrun starts runs itself, so Hydra's own settings would change nothing"
        yield Problem(key, why, "output_dir=FOLDER for the run's folder")
    elif override.is_delete():
        yield Problem(f"~{key}", "no key can be taken out of the tree", f"{key}= another value")
    elif override.is_sweep_override():
        value = (override.input_line or "").partition("=")[2]
        message = f"{value} is several values, and a run takes one"
        yield Problem(key, message, f"`ftrun -m` for a run each; a list is {key}=[...]; text is \"{key}='...'\"")
    elif key == "schema_version":
        yield Problem(key, "is set by ftrun and cannot be typed", f"leave {key} out")
    elif group in plugin.GROUPS and key.endswith(".name"):
        yield Problem(key, "is set by what is chosen and cannot be typed", f"{group}=OPTION")


def _wrong_choice(override: Override) -> Iterator[Problem]:
    group, value = override.key_or_group, override.value()
    known = options.names(group)
    if override.is_add():
        yield Problem(f"+{group}", f"{group} is always there and has one choice", f"{group}={value}")
    elif value is None and group not in options.OPTIONAL_GROUPS:
        neutral = next((name for name in ("none", "auto", "default", "full") if name in known), known[0])
        yield Problem(group, "cannot be null", f"{group}={neutral}")
    elif isinstance(value, list) and group not in ("tracker", *options.OPTIONAL_GROUPS):
        yield Problem(group, "takes one option, not a list", f"{group}={value[0] if value else 'OPTION'}")
    elif value is not None:
        for name in value if isinstance(value, list) else [value]:
            if str(name) not in known:
                message = f"there is no {group} {name}{did_you_mean(str(name), known)}"
                yield Problem(group, message, f"one of {', '.join(known) or '(none)'}")


def _overruled(values: Sequence[Override]) -> Iterator[Problem]:
    """Yield what is typed and would be overruled by something else that is typed."""
    keys = {override.key_or_group for override in values}
    if {"model.path", "model.size"} <= keys:
        yield Problem("model.size", "model.path says already which model it is", "one of them")
