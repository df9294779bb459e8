"""What a run needs from elsewhere, fetched and made ahead of it: the model's files and the tokenised rows."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ftrun import events, record
from ftrun.config import Config
from ftrun.errors import ConfigError, Problem
from ftrun.model import Model, Source
from ftrun.worker import dataset, loading
from ftrun.worker.dataset import Rows, Selected
from ftrun.worker.pack import PackedRows
from ftrun.worker.stored import StoredRows

_WEIGHTS = ("*.safetensors", "*.bin")
"""Files of weights that transformers loads, the first kind that there is."""

_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx*", "*.gguf", "*.ot", "original/*")
"""Further files of weights, of which a repository may hold several times the model."""


def answer(cfg: Config, output: TextIO) -> None:
    """Write a line for each thing that is there now: what it is, where, and whether it was there before."""
    for repository, revision in _on_the_hub(cfg.model):
        _write(output, kind="model", **_fetched(repository, revision))
    tokenizer = loading.tokenizer(cfg)
    if not cfg.stage.rows:
        return
    begun = time.time()
    rows = dataset.load(cfg, tokenizer)
    seen = set()
    for stored in _stores(rows):
        made = json.loads((stored.place / "meta.json").read_text())["made"]
        if stored.place not in seen:
            _write(
                output,
                kind="rows",
                name=stored.name,
                place=str(stored.place),
                bytes=_size(stored.place),
                rows=len(stored),
                tokens=stored.report.tokens,
                was_there=made < begun,
            )
        seen.add(stored.place)


def _write(output: TextIO, **values: Any) -> None:
    print(json.dumps(values, ensure_ascii=False), file=output)


def _stores(rows: Rows) -> Iterator[StoredRows]:
    """Yield every source that is kept, those to evaluate on behind those to train on, which may be streamed instead."""
    train = rows.train.rows if isinstance(rows.train, PackedRows) else rows.train
    for selected in (train, *rows.evals.values()):
        if isinstance(selected, Selected):
            yield from selected.stores


def _size(place: Path) -> int:
    return sum(file.stat().st_size for file in place.iterdir() if file.is_file())


def _on_the_hub(chosen: Model) -> Iterator[tuple[str, str | None]]:
    """Yield the repositories that loading a model reads, with their revisions."""
    path = Path(chosen.path or "")
    if chosen.source is Source.hub and chosen.path:
        yield chosen.path, chosen.revision
    elif chosen.source is Source.run and (path / record.MODEL / "adapter_config.json").is_file():
        yield from _on_the_hub(Config.load(path / record.RUN).model)
    elif chosen.source is Source.folder and (path / "adapter_config.json").is_file():
        base = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path") or ""
        if base and not Path(base).exists():
            yield base, None


def _fetched(repository: str, revision: str | None) -> dict[str, Any]:
    """Download what transformers loads of a repository, unless it is here.

    Raises:
        ConfigError: It cannot be reached, and is not here whole.
    """
    import huggingface_hub

    events.send("phase", text=f"downloading {repository}")
    begun = time.time()
    try:
        ignored = [name for name in _OTHER_WEIGHTS if name not in _needed(repository, revision)]
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, ignore_patterns=ignored))
    except Exception as error:  # any way in which a network can fail
        message = f"{repository} is not on this machine, and cannot be downloaded: {error}"
        fix = "connect to the hub, or copy its cache from a machine that has"
        raise ConfigError([Problem("model.path", message, fix)]) from None
    files = [file for file in folder.rglob("*") if file.is_file()]
    if not any(file.match(pattern) for pattern in _WEIGHTS for file in files):
        message = f"{folder} holds no weights of {repository}"
        raise ConfigError([Problem("model.path", message, "connect to the hub, or another model")])
    return {
        "name": repository,
        "place": str(folder),
        "bytes": sum(file.stat().st_size for file in files),
        "was_there": all(file.stat().st_mtime < begun for file in files),
    }


def _needed(repository: str, revision: str | None) -> tuple[str, ...]:
    """Return which weights are to be downloaded: safetensors, or what there is without them."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        names = huggingface_hub.HfApi().list_repo_files(repository, revision=revision)
    except (errors.OfflineModeIsEnabled, OSError):
        return ()  # only what is here already can be used
    return () if any(name.endswith(".safetensors") for name in names) else _WEIGHTS[1:]
