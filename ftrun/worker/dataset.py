"""The rows of a run: its sources tokenised, held-out rows set apart, mixed and packed as the config says."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ftrun import events
from ftrun.config import Config
from ftrun.data import Mix, Packing, mix, sources
from ftrun.errors import ConfigError, Problem
from ftrun.worker import pack, store
from ftrun.worker.report import PROMPTS, Prompt, Report, refuse_packing
from ftrun.worker.stored import StoredRows
from ftrun.worker.stream import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Numbers = np.ndarray[Any, Any]

_MORE_ROWS = "other rows, or a larger data.max_length"
_WORTH_KEEPING = 100_000
"""Rows from which on their packing is kept on disk."""


class Selected:
    """Rows of several stores, in a given order: a dataset that holds two numbers for each of its rows."""

    def __init__(self, stores: Sequence[StoredRows], which: Numbers, index: Numbers) -> None:
        self.stores, self.which, self.index = stores, which, index
        self._weighted = any(store.report.weighted for store in stores)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> Numbers:
        """The tokens of each row; of a pair, of its longer side."""
        of_stores = [stored.lengths for stored in self.stores]
        if len(self.stores) == 1:
            return of_stores[0][self.index]
        starts = np.cumsum([0, *(len(lengths) for lengths in of_stores[:-1])])
        return np.concatenate(of_stores)[starts[self.which] + self.index]

    def __getitem__(self, position: int) -> dict[str, Any]:
        stored, index = self._at(position)
        row = stored[index]
        if stored.keeps_extra:
            row |= {"index": position, "extra": stored.extra_of(index)}
        elif self._weighted and "weights" not in row:
            row["weights"] = np.ones(len(row["input_ids"]), np.float32)
        return row

    def place_of(self, position: int) -> str:
        """Return the file and line that a row comes from."""
        stored, index = self._at(position)
        return stored.place_of(index)

    def _at(self, position: int) -> tuple[StoredRows, int]:
        return self.stores[int(self.which[position])], int(self.index[position])


@dataclass
class Rows:
    """The encoded rows of a run, and what became of those that were read."""

    train: Any
    """A dataset: ``len(rows.train)``, ``rows.train[i]``, ``rows.train.lengths``."""

    evals: dict[str, Any] = field(default_factory=dict)
    """The sets to evaluate on; the one without a name is ``""``."""

    eval_prompts: list[Prompt] = field(default_factory=list)
    """What comes before the last reply, for the first evaluation rows."""

    report: dict[str, Any] = field(default_factory=dict)
    """Rows in and out by reason, tokens, truncation, packing."""

    content_key: str = ""
    """Hash of everything that the tokens depend on."""

    @property
    def longest(self) -> int:
        """The tokens of the longest row, of all that are trained and evaluated on."""
        return max(int(rows.lengths.max()) for rows in (self.train, *self.evals.values()))


def load(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Find the rows of a run, of whatever kind its stage trains on, tokenised before or now.

    Raises:
        ConfigError: A row cannot be trained on and ``data.on_bad_row=error``, or no row is left.
    """
    events.send("phase", text="encoding the rows")
    resolved = sources.resolve(cfg.data, cfg.stage.rows)

    def fetched(found: Iterable[sources.Opened]) -> list[StoredRows]:
        return [store.fetch(cfg, tokenizer, opened, say) for opened in found]

    stores = [] if cfg.data.streaming else fetched(resolved.train)
    for stored in stores:
        refuse_packing(stored.report, cfg)
    evals = {name: _evaluated(cfg, name, fetched(found)) for name, found in resolved.eval.items() if found}
    if cfg.data.streaming:
        return _streamed(cfg, tokenizer, resolved.train, evals)
    kept, held_out = _split(cfg, stores)
    if held_out is not None:
        evals[""] = held_out
    if not sum(len(rows) for rows in kept):
        raise ConfigError([Problem("data", f"no row is left to train on: {_reasons(stores)}", _MORE_ROWS)])
    train = _mixed(cfg, stores, [opened.weight for opened in resolved.train], kept)
    for number, opened in enumerate(resolved.train):
        if len(kept[number]) and not (train.which == number).any():
            message = f"of its {len(kept[number])} rows, weight={opened.weight} leaves none"
            raise ConfigError([Problem(f"data.sources.{number}.weight", message, "a larger weight, or without it")])
    rows = Rows(train, evals)
    rows.content_key = hashlib.sha256(" ".join(stored.place.name for stored in stores).encode()).hexdigest()
    rows.eval_prompts = [prompt for found in rows.evals.values() for prompt in _prompts(found)][:PROMPTS]
    rows.report = _report(rows, stores)
    if cfg.data.packing is not Packing.none:
        _pack(cfg, rows)
    return rows


def _evaluated(cfg: Config, name: str, stores: list[StoredRows]) -> Selected:
    """Return the rows of a set to evaluate on; one that is empty would give no metrics, and nobody would know why."""
    rows = _all(stores)
    if not len(rows):
        key = f"data.eval_sets.{name}" if name else "data.eval_path" if cfg.data.eval_path else "data.path"
        raise ConfigError([Problem(key, f"no row is left to evaluate on: {_reasons(stores)}", _MORE_ROWS)])
    return rows


def _reasons(stores: Sequence[StoredRows]) -> str:
    return "; ".join(stored.report.reasons() for stored in stores)


def _streamed(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, opened: Sequence[sources.Opened], evals: dict[str, Selected]
) -> Rows:
    """Return rows that are tokenised while training; those to evaluate on are tokenised before."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    rows = Rows(Stream(cfg, tokenizer, opened, rank=rank, world_size=world_size), evals)
    rows.eval_prompts = [prompt for found in evals.values() for prompt in _prompts(found)][:PROMPTS]
    rows.report = {"train": {"streamed_from": [one.name for one in opened]}, **_eval_report(evals)}
    material = [store.material(cfg, tokenizer, one) for one in opened]
    rows.content_key = hashlib.sha256(json.dumps(material, sort_keys=True, default=str).encode()).hexdigest()
    return rows


def say(text: str) -> None:
    """Tell the driver what is being done."""
    events.send("phase", text=text)


def _all(stores: Sequence[StoredRows]) -> Selected:
    return _selected(stores, [np.arange(len(stored)) for stored in stores])


def _selected(stores: Sequence[StoredRows], rows: Sequence[Numbers]) -> Selected:
    which = np.repeat(np.arange(len(stores), dtype=np.int16), [len(index) for index in rows])
    return Selected(stores, which, np.concatenate([*rows, np.zeros(0, np.int64)]).astype(np.int64))


def _split(cfg: Config, stores: Sequence[StoredRows]) -> tuple[list[Numbers], Selected | None]:
    """Return which rows of each store are trained on, and those that are held out of them.

    What comes from one row of a file stays together, so that nothing is both trained on and held out.
    """
    everything = [np.arange(len(stored)) for stored in stores]
    if not cfg.data.eval_size:
        return everything, None
    origins = [stored.origins for stored in stores]
    counts = [int(origin[-1]) + 1 if len(origin) else 0 for origin in origins]
    total, size = sum(counts), cfg.data.eval_size
    count = int(size) if size >= 1 else math.ceil(size * total)
    if count >= total:
        message = f"{count} of {total} rows held out leave none to train on"
        raise ConfigError([Problem("data.eval_size", message, f"data.eval_size= less than {total}")])
    chosen = np.zeros(total, bool)
    chosen[random.Random(cfg.seed).sample(range(total), count)] = True  # noqa: S311
    of_store = np.split(chosen, np.cumsum(counts)[:-1])
    masks = [mask[origin] for mask, origin in zip(of_store, origins, strict=True)]
    held_out = [rows[mask] for rows, mask in zip(everything, masks, strict=True)]
    return [rows[~mask] for rows, mask in zip(everything, masks, strict=True)], _selected(stores, held_out)


def _mixed(cfg: Config, stores: Sequence[StoredRows], weights: list[float], kept: list[Numbers]) -> Selected:
    """Put the rows of several sources behind one another as ``data.mix`` says."""
    if cfg.data.mix is Mix.concatenate and all(weight == 1 for weight in weights):
        return _selected(stores, kept)
    order = mix.order([len(rows) for rows in kept], weights, cfg.data.mix, cfg.data.mix_until, cfg.seed)
    flat = np.fromiter(chain.from_iterable(order), np.int64).reshape(-1, 2)
    starts = np.cumsum([0, *(len(rows) for rows in kept[:-1])])
    return Selected(stores, flat[:, 0].astype(np.int16), np.concatenate(kept)[starts[flat[:, 0]] + flat[:, 1]])


def _prompts(found: Selected) -> list[Prompt]:
    """Return prompts of a set's rows; of rows that were held out, those of the set they come from."""
    return [prompt for stored in found.stores for prompt in stored.report.prompts]


def _report(rows: Rows, stores: Sequence[StoredRows]) -> dict[str, Any]:
    total = Report()
    for stored in stores:
        total.add(stored.report)
    report = {"train": total.summary() | {"rows": len(rows.train)}}
    if len(stores) > 1:
        report["sources"] = {stored.name: stored.report.summary() for stored in stores}
    return report | _eval_report(rows.evals)


def _eval_report(evals: dict[str, Selected]) -> dict[str, Any]:
    return {
        f"eval_{name}" if name else "eval": {"rows": len(found), "tokens": int(found.lengths.sum())}
        for name, found in evals.items()
    }


def _pack(cfg: Config, rows: Rows) -> None:
    lengths, longest = rows.train.lengths, cfg.data.max_length
    apart = cfg.data.packing is Packing.best_fit
    bins = _bins(lengths, longest, pack.best_fit if apart else pack.concatenate)
    rows.train = pack.PackedRows(rows.train, bins, apart=apart)
    efficiency = bins.efficiency(longest)
    rows.report["train"] |= {"packed_into": len(rows.train), "packing_efficiency": round(efficiency, 4)}


def _bins(lengths: Numbers, longest: int, how: Callable[[Numbers, int], pack.Bins]) -> pack.Bins:
    """Return the sequences that rows are packed into; those of many rows are kept, since finding them takes seconds."""
    if len(lengths) < _WORTH_KEEPING:
        return how(lengths, longest)
    key = hashlib.sha256(lengths.tobytes() + f"{how.__name__} {longest}".encode()).hexdigest()[:32]
    place = store.folder() / f"{key}.packing"
    if not place.is_dir():
        with store.made_whole(place) as partial:
            how(lengths, longest).save(partial)
    return pack.Bins.load(place)
