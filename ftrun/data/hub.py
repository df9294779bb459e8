"""Data sets on a hub: Hugging Face's, or ModelScope's where its package is there."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ftrun.data import digests
from ftrun.data.places import EVAL_NAMES, MODELSCOPE
from ftrun.data.rows import Row
from ftrun.errors import ConfigError, Problem, did_you_mean


@dataclass(frozen=True)
class Hub:
    """A split of a data set on a hub."""

    key: str
    """The config key that names it."""

    path: str
    """``ORG/NAME``, or ``ms://ORG/NAME``."""

    subset: str | None = None
    split: str | None = None
    """Default: train, or with ``held_out`` the first one that is for evaluation."""

    folder: str | None = None
    held_out: bool = False

    @property
    def id(self) -> str:
        """The name on its hub."""
        return self.path.removeprefix(MODELSCOPE)

    @property
    def is_modelscope(self) -> bool:
        """Whether it is on ModelScope's hub."""
        return self.path.startswith(MODELSCOPE)


def rows(hub: Hub) -> Iterator[Row]:
    """Yield the rows as they come from the hub, or from this machine's copy when it is offline.

    Raises:
        ConfigError: There is no such data set or split, or it cannot be reached.
    """
    try:
        found = _modelscope(hub) if hub.is_modelscope else _huggingface(hub)
        for number, value in enumerate(found, 1):
            yield Row(dict(value), hub.path, number)
    except ConfigError:
        raise
    except Exception as error:  # a network, and code of other libraries, fail in a hundred ways
        raise ConfigError([_unreachable(hub, error)]) from error


def _unreachable(hub: Hub, error: Exception) -> Problem:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    message = f"there is no file {hub.path}, and the hub gives no data set: {line}"
    return Problem(hub.key, message, "a file, or the ORG/NAME of a data set, with data.subset where it has several")


def _huggingface(hub: Hub) -> Any:
    import datasets
    from huggingface_hub import constants

    commit = revision(hub) or None
    split = hub.split or ("train" if not hub.held_out else _split_to_evaluate(hub, commit))
    place = {"path": hub.id, "name": hub.subset, "data_dir": hub.folder, "revision": commit}
    streams = not constants.HF_HUB_OFFLINE and "[" not in split  # slices and copies of this machine do not stream
    try:
        found = datasets.load_dataset(**place, split=split, streaming=streams)
    except ValueError as error:
        if "split" not in str(error).lower():
            raise
        known = datasets.get_dataset_split_names(hub.id, hub.subset, revision=commit)
        message = f"{hub.path} has no split {split}{did_you_mean(split, known)}"
        raise ConfigError([Problem(hub.key, message, f"one of {', '.join(known)}")]) from None
    stream = found if streams else found.to_iterable_dataset()
    return stream.decode(False)  # images stay bytes until a batch needs them


def _split_to_evaluate(hub: Hub, commit: str | None) -> str:
    import datasets

    known = datasets.get_dataset_split_names(hub.id, hub.subset, revision=commit)
    found = next((name for wanted in EVAL_NAMES for name in known if name.partition("_")[0] == wanted), None)
    if found is None:
        message = f"{hub.path} has no split to evaluate on, only {', '.join(known)}"
        raise ConfigError([Problem(hub.key, message, "a file of rows, or data.eval_size=0.05")])
    return found


def _modelscope(hub: Hub) -> Any:
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError:
        message = f"{MODELSCOPE} needs the package modelscope, which is not installed"
        raise ConfigError([Problem(hub.key, message, "pip install 'modelscope[datasets]'")]) from None
    split = hub.split or (EVAL_NAMES[0] if hub.held_out else "train")
    return MsDataset.load(hub.id, subset_name=hub.subset, data_dir=hub.folder, split=split, use_streaming=True)


@functools.lru_cache
def revision(hub: Hub) -> str:
    """Return the commit of a data set on Hugging Face's hub: the newest, or offline the one that was last seen.

    Empty for ModelScope, and where nothing is known.
    """
    if hub.is_modelscope:
        return ""
    import huggingface_hub

    remembered = f"hub:{hub.id}"
    try:
        commit = str(huggingface_hub.HfApi().dataset_info(hub.id, timeout=10).sha)
    except Exception:  # any way in which a network can fail, offline mode included; reading says what is wrong
        known = digests.recall(remembered)
        return str(known[0]) if known else ""
    if digests.recall(remembered) != [commit]:
        digests.remember(remembered, [commit])
    return commit


def identity(hub: Hub) -> str:
    """Return what tells one content from another: the commit, or where there is none a digest of all rows.

    Raises:
        ConfigError: The rows must be read for that, and cannot be.
    """
    place = repr((hub.path, hub.subset, hub.split, hub.folder, hub.held_out))
    if commit := revision(hub):
        return hashlib.sha256(f"{place} {commit}".encode()).hexdigest()
    found = hashlib.sha256(place.encode())
    for row in rows(hub):
        found.update(repr(row.value).encode("utf-8", "surrogatepass"))
    return found.hexdigest()
