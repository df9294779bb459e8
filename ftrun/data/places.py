"""Which files a path names: a file, folder, glob, address, data set saved to disk, or one that ships with ftrun."""

from __future__ import annotations

import glob
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ftrun.data import storage
from ftrun.data.read import KINDS
from ftrun.errors import ConfigError, Problem, did_you_mean

DEMO = "demo:"
DOCUMENTS = "documents:"
"""Before a path: each of its files is one document, whatever its lines are."""

MODELSCOPE = "ms://"

_DEMOS = Path(__file__).resolve().parent.parent / "demo"

EVAL_NAMES = ("validation", "valid", "val", "eval", "dev", "test")
"""Splits, and files of a folder, that hold rows to evaluate on; of files, the first part of their name."""

_DOCUMENT_KINDS = (".txt", ".md", ".rst", ".tex")
"""What is taken from a folder of documents; a glob may name files of any ending."""

_STATE = "state.json"
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", _STATE)
"""Files that describe data sets beside them."""


@dataclass(frozen=True)
class Files:
    """The files behind one source, as paths or addresses."""

    train: tuple[str, ...]
    eval: tuple[str, ...] = ()
    documents: bool = False
    """Whether each file is one document."""


def why_unreadable(path: str) -> str:
    """Say why the system does not look at a path at all, or return nothing, also where nothing is there."""
    if "\0" in path:
        return "a NUL character stands in it"
    try:
        os.stat(Path(path).expanduser())
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle; a ~user that is not there
        return getattr(error, "strerror", None) or str(error)
    return ""


def shortened(path: str) -> str:
    """Return a path as it can be shown, whatever it holds."""
    shown = path if path.isprintable() else repr(path)[1:-1]
    return shown if len(shown) <= 120 else f"{shown[:60]}...{shown[-40:]}"


def demos() -> list[str]:
    """Return the names of the data sets that ship with ftrun."""
    return sorted(folder.name for folder in _DEMOS.iterdir() if folder.is_dir())


def is_hub_id(path: str) -> bool:
    """Tell whether ``path`` can only be a data set on a hub."""
    if path.startswith(MODELSCOPE):
        return True
    local = path.startswith((DEMO, DOCUMENTS, "/", "./", "../", "~")) or glob.has_magic(path)
    if local or path.count("/") != 1 or storage.ending(path)[0] in KINDS or why_unreadable(path):
        return False
    return not Path(path).exists()


def absolute(path: str) -> str:
    """Return a path so that it means the same in any working folder."""
    if path.startswith(DOCUMENTS):
        return DOCUMENTS + absolute(path.removeprefix(DOCUMENTS))
    if path.startswith(DEMO) or storage.is_url(path) or is_hub_id(path):
        return path
    return str(Path(path).expanduser().absolute())


def find(key: str, path: str, *, subset: str | None = None, split: str | None = None) -> Files:
    """Return the files that a path names.

    Args:
        key: The config key to name when there are none.
        path: As it was typed.
        subset: Folder of a folder.
        split: Take the files of this split, by their names or folders. Default: all but those to evaluate on; of a data
            set in shards that has a split train, that one.

    Raises:
        ConfigError: There are none, or one of them is of an unknown kind.
    """
    documents = path.startswith(DOCUMENTS)
    place = path.removeprefix(DOCUMENTS).removeprefix("file://")
    if place.startswith(DEMO):
        place = str(_demo(key, place.removeprefix(DEMO)))
    if storage.is_url(place):
        root, found = _find_url(key, f"{place.rstrip('/')}/{subset}" if subset else place, documents)
    else:
        root, found = _find_local(key, place, subset, documents)
    if root is None:
        if split not in (None, "train"):
            message = f"{path} is no folder, so it has no split {split}"
            raise ConfigError(
                [Problem(_beside(key, "split"), message, "leave it out, or a folder with a file a split")]
            )
        return Files(tuple(found), documents=documents)
    return _divide(key, path, root, found, split, documents)


def _beside(key: str, name: str) -> str:
    """Return the key ``name`` of what has the key ``...path``."""
    return f"{key.rpartition('.')[0]}.{name}"


def _demo(key: str, name: str) -> Path:
    if name not in demos():
        message = f"ftrun ships no data set {name}{did_you_mean(name, demos())}"
        raise ConfigError([Problem(key, message, f"one of {', '.join(DEMO + demo for demo in demos())}")])
    return _DEMOS / name


def _divide(key: str, path: str, root: str, found: list[str], split: str | None, documents: bool) -> Files:
    """Tell the files of a folder that are trained on from those that are evaluated on."""
    if documents:
        held_out: set[str] = set()
    else:
        held_out = {file for file in found if not _split_words(file, root).isdisjoint(EVAL_NAMES)}
    evaluated = tuple(file for file in found if file in held_out)
    if split is not None:
        named = tuple(file for file in found if split in _splits(file, root))
        if named:
            return Files(named, tuple(file for file in evaluated if file not in set(named)), documents)
        if split != "train":
            known = sorted(set().union(*(_splits(file, root) for file in found)))
            message = f"{path} has no split {split}{did_you_mean(split, known)}"
            raise ConfigError([Problem(_beside(key, "split"), message, f"one of {', '.join(known)}")])
    rest = [file for file in found if file not in held_out]
    shards = {file: _shard_of(file, root) for file in rest}
    if "train" in shards.values():  # beside it may be others, of which nobody knows whether they are to be trained on
        rest = [file for file, name in shards.items() if name in (None, "train")]
    return Files(tuple(rest), evaluated, documents)


_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


def _parts(file: str, root: str) -> tuple[list[str], str]:
    """Return the folders between a root and a file, and the file's name up to the first dot."""
    *folders, name = file.removeprefix(root).strip("/").split("/")
    return folders, name.partition(".")[0]


def _shard_of(file: str, root: str) -> str | None:
    """Return the split that a file is a shard of: test of test-00000-of-00001, or of test/data-00000-of-00001."""
    folders, stem = _parts(file, root)
    if (shard := _SHARD.fullmatch(stem)) is None:
        return None
    return folders[-1] if folders and shard[1] == "data" else shard[1]


def _splits(file: str, root: str) -> set[str]:
    """Return the names of the splits that a file of a folder may be of, by its own name and its folders'."""
    folders, stem = _parts(file, root)
    return {*folders, _shard_of(file, root) or stem.partition("-")[0]}


def _split_words(file: str, root: str) -> set[str]:
    """Return `_splits`, and the first words of names that are splits for sure: ``test`` of the shards of test_sft."""
    shard = _shard_of(file, root)
    return _splits(file, root) | ({shard.partition("_")[0]} if shard else set())


def _find_local(key: str, path: str, subset: str | None, documents: bool) -> tuple[str | None, list[str]]:
    """Return the folder, if it is one, and the files."""
    if why := why_unreadable(path):
        raise ConfigError([Problem(key, f"{shortened(path)} cannot be read: {why}", "a file that is there")])
    local = Path(path).expanduser()
    if subset is not None:
        local = local / subset
        if not local.is_dir():
            message = f"{path} has no folder {subset}, and only data sets on a hub have subsets otherwise"
            raise ConfigError([Problem(_beside(key, "subset"), message, f"leave {_beside(key, 'subset')} out")])
    folder = local.is_dir()
    if folder:
        files = _walk(local, _DOCUMENT_KINDS if documents else KINDS)
        if not files:
            kinds = ", ".join(_DOCUMENT_KINDS if documents else KINDS)
            message = f"the folder {path} holds no file of rows ({kinds})"
            raise ConfigError([Problem(key, message, "a folder that does")])
    elif glob.has_magic(path) and not local.exists():
        matches = sorted(Path(file) for file in glob.glob(str(local), recursive=True))
        files = [file for file in matches if not file.is_dir()]
        if not files:
            raise ConfigError([Problem(key, f"no file matches {path}", "a glob that matches, or a file")])
    else:
        files = [local]
    problems = [problem for file in files if (problem := _wrong_file(key, file, documents or folder))]
    if problems:
        raise ConfigError(problems)
    return str(local) if folder else None, [str(file) for file in files]


def _walk(folder: Path, kinds: tuple[str, ...]) -> list[Path]:
    """Return the files of some kinds in a folder and its folders, sorted; of data sets saved to disk, their shards.

    Raises:
        ConfigError: A folder cannot be read.
    """
    found: list[Path] = []
    unreadable: list[OSError] = []
    for place, folders, names in os.walk(folder, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shards = _shards(Path(place)) if _STATE in names else None
        if shards is not None:
            found += shards
            continue
        files = [Path(place) / name for name in names if not name.startswith(".") and name not in _NOT_ROWS]
        found += sorted(file for file in files if storage.ending(file.name)[0] in kinds)
    if unreadable:
        raise ConfigError([storage.cannot_read(str(error.filename), error) for error in unreadable])
    return sorted(found, key=lambda file: file.parent)  # keeps the order of a folder's shards


def _shards(folder: Path) -> list[Path] | None:
    """Return the files of a data set saved to disk, in order; what else is in its folder are caches."""
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # a state.json of something else


def _wrong_file(key: str, file: Path, any_kind: bool) -> Problem | None:
    if file.is_symlink() and not file.exists():
        message = f"{file} is a link to {file.readlink()}, which is not there"
        return Problem(key, message, "a file that is there")
    if not file.is_file():
        parent = file.parent if str(file.parent) else Path()
        beside = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        message = f"there is no file {file}{did_you_mean(file.name, beside)}"
        return Problem(key, message, f"{key}=FILE (paths start at {Path.cwd()})")
    if not os.access(file, os.R_OK):
        return Problem(key, f"{file} cannot be read: permission denied", f"chmod u+r {file}, or another file")
    return None if any_kind else _unknown_kind(key, str(file))


def _unknown_kind(key: str, file: str) -> Problem | None:
    if storage.ending(file)[0] in KINDS:
        return None
    fix = f"a file that ends in one of {', '.join(KINDS)} (and then {', '.join(storage.PACKINGS)} if it is packed)"
    return Problem(key, f"{file} is of no kind that is read", f"{fix}; or {DOCUMENTS}{file}, if it is one text")


def _find_url(key: str, url: str, documents: bool) -> tuple[str | None, list[str]]:
    """Return the folder, if the address is one, and the addresses of the files."""
    system, path = storage.filesystem(key, url)
    web = url.startswith(("http://", "https://"))  # has no folders
    try:
        if "::" in url:
            folder, found = False, [url]
        elif "*" in path:
            folder, found = False, [system.unstrip_protocol(file) for file in sorted(system.glob(path))]
        else:
            folder = not web and system.isdir(path)
            names = sorted(system.find(path)) if folder else [path]
            found = [system.unstrip_protocol(file) for file in names if folder or system.exists(file)]
    except Exception as error:
        raise ConfigError([storage.unreachable(key, url, error)]) from None
    if folder:
        kinds = _DOCUMENT_KINDS if documents else KINDS
        found = [file for file in found if storage.ending(file)[0] in kinds and Path(file).name not in _NOT_ROWS]
    if not found:
        raise ConfigError([Problem(key, f"there is no file of rows at {url}", "the address of a file, folder or glob")])
    problems = [] if documents else [problem for file in found if (problem := _unknown_kind(key, file))]
    if problems:
        raise ConfigError(problems)
    return system.unstrip_protocol(path) if folder else None, found
