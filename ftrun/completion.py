"""Shell completion: the words that could stand next, and the scripts that ask for them."""

from __future__ import annotations

import dataclasses
import enum
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

from ftrun import options, plugin

SHELLS = ("bash", "zsh", "fish")

_SCRIPTS = {
    "bash": """\
_ftrun() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\\n'
    local words; IFS=' ' read -r -a words <<< "$line"
    [[ "$line" == *' ' ]] && words+=("")
    COMPREPLY=($(ftrun __complete "${words[@]:1}" 2>/dev/null))
    local last="${words[-1]}"
    if [[ "$last" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${last%"${last##*=}"}"}")
    fi
    [[ "${COMPREPLY[0]}" == *[=.] ]] && compopt -o nospace
}
complete -o default -F _ftrun ftrun
# to install: ftrun completion bash >> ~/.bashrc""",
    "zsh": """\
#compdef ftrun
_ftrun() {
    local -a found
    found=("${(@f)$(ftrun __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then
        compadd -S '' -- $found
    else
        compset -P '*='
        _files
    fi
}
compdef _ftrun ftrun
# to install: ftrun completion zsh > a file in a folder of $fpath, named _ftrun""",
    "fish": """\
function __ftrun_words
    ftrun __complete (commandline -opc)[2..] (commandline -ct) 2>/dev/null
end
complete -c ftrun -f -a '(__ftrun_words)'
complete -c ftrun -n 'not __ftrun_words | string length -q' -F
# to install: ftrun completion fish > ~/.config/fish/completions/ftrun.fish""",
}


_FLAGS = {
    "preview": ("--html", "--json", "--rows"),
    "cache": ("--clear", "--json", "--prune"),
    "list": ("--json",),
    "runs": ("--json",),
    "compare": ("--json",),
    "diff": ("--json",),
    "resume": ("--retry-failed",),
    "env": ("--json",),
}


def script(shell: str) -> str:
    """Return the script that makes a shell ask ``ftrun __complete``."""
    return _SCRIPTS[shell]


def candidates(words: Sequence[str]) -> list[str]:
    """Return what the last word could become, given those before it."""
    *before, last = words or [""]
    return sorted(word for word in _possible(before, last) if word.startswith(last))


def _possible(before: Sequence[str], last: str) -> Iterator[str]:
    if before and last.startswith("-"):
        yield from _FLAGS.get(before[0], ())
    elif before and before[-1] in ("--html", "--rows"):
        return
    elif before and before[0] in ("list",):
        group, equals, _ = last.partition("=")
        yield from (
            (f"{group}={name}" for name in options.names(group))
            if equals and group in options.GROUPS
            else [*options.GROUPS, "data.format"]
        )
    elif before and before[0] == "completion":
        yield from SHELLS
    elif before and before[0] in ("runs", "compare", "diff", "cancel", "resume", "env", "cache"):
        return
    else:
        if not before:
            yield from options.COMMANDS
        yield from _words(before, last)


def _words(before: Sequence[str], last: str) -> Iterator[str]:
    key, equals, _ = last.partition("=")
    if last.startswith("-"):
        more = ["--quick", "--probe"] if before[:1] == ["check"] else ["--retry-failed"] if "-m" in before else []
        yield from (*options.FLAGS, "-h", "-m", *more)
    elif key == "sweep" and ("-m" in before or "--multirun" in before):
        yield from (f"sweep={name}" for name in options.sweeps())
    elif equals and key in options.GROUPS:
        yield from (f"{key}={name}" for name in options.names(key))
    elif equals:
        yield from (f"{key}={value}" for value in _values(before, key))
    elif "." in last:
        yield from (f"{name}=" for name in _keys(before, last.split(".")[0]))
    else:
        yield from (f"{group}=" for group in options.GROUPS)
        yield from (f"{group}." for group in options.GROUPS if group not in options.OPTIONAL_GROUPS)
        yield from ("seed=", "objective=", "objective_mode=", "output_dir=", "plugins=")
        if "-m" in before or "--multirun" in before:
            yield "sweep="


def _schema(before: Sequence[str], group: str) -> type | None:
    """Return the dataclass whose fields are the keys below a group, given the options chosen so far."""
    from ftrun.config import Config

    if group not in plugin.GROUPS:
        hint = typing.get_type_hints(Config).get(group)
        return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None
    name = _chosen(before, group) or {"stage": "sft", "adapter": "lora", "optimizer": "adamw"}.get(group, "none")
    while (file := options.yaml_file(f"{group}/{name}")) and (found := re.search(r"[\[\s-](\w+)", _defaults(file))):
        name = found[1]  # a preset: what it derives from
    try:
        return plugin.get(group, name)
    except (LookupError, plugin.PluginError):
        return None


def _chosen(before: Sequence[str], group: str) -> str:
    return next((word.partition("=")[2] for word in reversed(before) if word.startswith(f"{group}=")), "")


def _defaults(file: Path) -> str:
    found = re.search(r"^defaults:(.*(?:\n +-.*)*)", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found[1] if found else ""


def _keys(before: Sequence[str], group: str) -> Iterator[str]:
    if group in plugin.SEVERAL:
        for name in re.findall(r"\w+", _chosen(before, group)):
            if plugin.exists(group, name):
                fields = dataclasses.fields(plugin.get(group, name))
                yield from (f"{plugin.place(group, name)}.{f.name}" for f in fields if f.name != "name")
    elif cls := _schema(before, group):
        yield from (f"{group}.{f.name}" for f in dataclasses.fields(cls) if f.name not in ("name", "sizes"))


def _values(before: Sequence[str], key: str) -> Iterator[str]:
    from ftrun.config import Config

    if key == "model.size":
        file = options.yaml_file(f"model/{_chosen(before, 'model') or 'smollm2'}")
        yield from re.findall(r"^  ([\w.-]+): ", file.read_text(encoding="utf-8") if file else "", re.MULTILINE)
        return
    group, _, name = key.rpartition(".")
    above, _, option = group.partition(".")
    if above in plugin.SEVERAL:
        cls = plugin.get(above, option) if plugin.exists(above, option) else None
    else:
        cls = _schema(before, group) if group else Config
    hint = typing.get_type_hints(cls).get(name) if cls else None
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        yield from (str(member.value) for member in hint)
    elif hint is bool:
        yield from ("true", "false")
