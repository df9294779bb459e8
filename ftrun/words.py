"""The words of the command line: which choose an option, which set a value, and what is wrong with each by itself."""

from __future__ import annotations

import difflib
import re
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
    parsed = [override for word in overrides for override in parse(word, problems)]
    plugin.forget_files()
    problems += _load_plugin_files(parsed)
    chosen: list[Override] = []
    values: list[Override] = []
    free = {o.key_or_group: o for o in parsed if o.key_or_group in options.UNCHOSEN_GROUPS and not o.is_delete()}
    null = [group for group, last in free.items() if not last.is_sweep_override() and last.value() is None]
    for override in parsed:
        if override.key_or_group in null:  # Hydra cannot choose nothing, which is what is chosen anyway
            continue
        is_choice = override.key_or_group in options.GROUPS
        found = list(_misused(override)) or (list(_wrong_choice(override)) if is_choice else [])
        problems += found
        if not found:
            (chosen if is_choice else values).append(override)
    return chosen, values, [*problems, *_overruled(values)]


def apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words that say where and by whom runs are started (``hydra/launcher=slurm``), and the others."""
    where = [
        word for word in words if re.match(r"[+~]*hydra/(launcher|sweeper)=|[+~]*hydra\.(launcher|sweeper)\.", word)
    ]
    return where, [word for word in words if word not in where]


def parse(word: str, problems: list[Problem]) -> list[Override]:
    """Return a word as Hydra understands it, or add to the problems why it does not."""
    if word.startswith("-"):
        key, equals, value = word.lstrip("-").partition("=")
        typed = f"{key.replace('-', '_')}={value if equals else 'VALUE'}"
        near = difflib.get_close_matches(word, options.FLAGS, n=1)
        if word in ("-m", "--multirun"):
            fix = "`ftrun -m KEY=VALUE,VALUE` for a grid"
        elif near:
            fix = f"ftrun {near[0]}"
        else:
            fix = f"{typed}, without dashes; `ftrun --help` lists what there is"
        problems.append(Problem(word, "is no option of ftrun, whose settings are KEY=VALUE", fix))
        return []
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
        group, _, option = word.partition("/")
        if group in options.GROUPS:
            return Problem(word, "is not KEY=VALUE", f"{group}={option or 'OPTION'}")
        near = did_you_mean(word, [*options.GROUPS, *options.COMMANDS])
        shown = word if word.strip() else repr(word)
        return Problem(shown, f"is neither a command nor KEY=VALUE{near}", "`ftrun --help` lists both")
    if not key:
        return Problem(word, "has no key before the =", "KEY=VALUE")
    if not re.fullmatch(r"[+~]*[A-Za-z_][\w/-]*(\.\w[\w-]*)*(@[\w.:]*)?", key):
        return Problem(key, "is not a key: a key is names with dots between them", "data.path=..., for example")
    shown = "the value" if is_secret(key) else f"the value {value!r}"
    why = (
        "has characters that mean something to the grammar (one of , = : { } [ ] ( ) ~ ! ^ & ; < > ` # ' \" or spaces)"
    )
    return Problem(key, f"{shown} {why}", f"quote it inside the shell's quotes: {quoted(key, value)}")


def is_secret(key: str) -> bool:
    """Tell whether a key names where a secret is, so that a secret may have been typed there by mistake."""
    return key.endswith("_env")


def quoted(key: str, value: str) -> str:
    """Return ``key=value`` as it is typed in a shell, so that Hydra's grammar takes the value for text."""
    if is_secret(key):
        value = "VALUE"
    for_shell = re.sub(r'(["$`]|\\(?=[\\"$`]|$))', r"\\\1", f"{key}={as_text(value)}")
    return f'"{for_shell}"'


def as_text(value: str) -> str:
    """Return a value in the quotes in which Hydra's grammar takes it for text."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"'{escaped}'"


def _load_plugin_files(parsed: Sequence[Override]) -> Iterator[Problem]:
    """Import the files of ``plugins=[...]``, so that what they register can be chosen."""
    for override in parsed:
        files = override.value() if override.key_or_group == "plugins" else None
        for file in files if isinstance(files, list) else ():
            from ftrun.data import places

            if why := places.why_unreadable(str(file)):
                message = f"{places.shortened(str(file))} cannot be read: {why}"
                yield Problem("plugins", message, "plugins=[PATH_OF_A_PYTHON_FILE]")
                continue
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
    if key.startswith(("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweeper")):
        yield Problem(key, "says where runs are started, which is no part of a run", f"leave {key} out here")
    elif group == "hydra" or key.startswith("hydra/"):
        why = "of Hydra's own settings only the launcher's and the sweeper's mean anything here"
        yield Problem(key, why, "output_dir=FOLDER for the run's folder")
    elif override.is_delete():
        yield Problem(f"~{key}", "no key can be taken out of the tree", f"{key}= another value")
    elif key in options.GROUPS and override.is_sweep_override():
        yield several_values(override, "")
    elif key == "sweep":
        yield Problem(key, "is a grid of runs", f"ftrun -m {override.input_line}")
    elif override.package is not None:
        yield Problem(override.input_line or key, "an option has its place already", f"{key}={override.value()}")
    elif key == "schema_version":
        yield Problem(key, "is set by ftrun and cannot be typed", f"leave {key} out")
    elif group in plugin.GROUPS and key.endswith(".name"):
        yield Problem(key, "is set by what is chosen and cannot be typed", f"{group}=OPTION")


def several_values(override: Override, fix: str) -> Problem:
    """Say that a run takes one value."""
    value = (override.input_line or "").partition("=")[2]
    shown = "a value with commas" if is_secret(override.key_or_group) else value
    message = f"{shown} is several values, and a run takes one"
    return Problem(override.key_or_group, message, f"`ftrun -m` for a run each{fix}")


def _wrong_choice(override: Override) -> Iterator[Problem]:
    group, value = override.key_or_group, override.value()
    if override.is_add() or override.is_force_add():
        yield Problem(
            f"{'++' if override.is_force_add() else '+'}{group}",
            f"{group} is always there and has one choice",
            f"{group}={'OPTION' if isinstance(value, dict) else value}",
        )
    elif isinstance(value, dict):
        first = next(iter(value), "KEY")
        yield Problem(group, "takes an option; its keys are set one by one", f"{group}.{first}={value.get(first)}")
    elif value is None and group not in options.UNCHOSEN_GROUPS:
        known = options.names(group)
        neutral = next((name for name in ("none", "auto", "default", "full") if name in known), known[0])
        yield Problem(group, "cannot be null", f"{group}={neutral}")
    elif isinstance(value, list) and group not in (*plugin.SEVERAL, *options.OPTIONAL_GROUPS):
        yield Problem(group, "takes one option, not a list", f"{group}={value[0] if value else 'OPTION'}")
    elif value is not None:
        for name in value if isinstance(value, list) else [value]:
            if not options.exists(group, str(name)):
                known = options.names(group)
                message = f"there is no {group} {name}{did_you_mean(str(name), known)}"
                yield Problem(group, message, f"one of {', '.join(known) or '(none)'}")


def _overruled(values: Sequence[Override]) -> Iterator[Problem]:
    """Yield what is typed and would be overruled by something else that is typed."""
    keys = {override.key_or_group for override in values}
    if {"model.path", "model.size"} <= keys:
        yield Problem("model.size", "model.path says already which model it is", "one of them")
