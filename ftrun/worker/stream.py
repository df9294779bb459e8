"""Rows that are tokenised while training, for data that is larger than the disk.

Rows are read in order, in blocks of ``data.shuffle_buffer``. Each block is tokenised, packed if that is asked for, and
shuffled by a seed of its own. So the order is a function of the seed and the place in the stream, and a place is a few
numbers: which block, how far into it, and how far the sources had been read where the block begins. A checkpoint holds
those, and a resumed run reads on from there; no row is lost or seen twice.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ftrun.config import Config
from ftrun.data import Mix, MixUntil, Packing, mix, sources
from ftrun.data.rows import BadRow, Row
from ftrun.data.sources import Opened
from ftrun.errors import ConfigError, Problem
from ftrun.worker import encode, pack
from ftrun.worker.encode import EncodedRow, RowEncoder
from ftrun.worker.report import Report, judge, refuse_packing
from ftrun.worker.sequence import Encoded, arrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Numbers = np.ndarray[Any, Any]


@dataclass
class Position:
    """Where a stream of rows is, as a checkpoint holds it."""

    block: int = 0
    """The block whose rows come next."""

    taken: int = 0
    """How many of that block's sequences have been taken."""

    draws: int = 0
    """How often a source had been drawn where the block begins."""

    rows: list[int] = field(default_factory=list)
    """How many rows of each source had been read there, in its current pass."""

    passes: list[int] = field(default_factory=list)
    """How often each source had been begun anew."""


class RawRows:
    """The rows of several sources without end, mixed as the config says, from any position on."""

    def __init__(self, cfg: Config, opened: Sequence[Opened], position: Position) -> None:
        data, count = cfg.data, len(opened)
        self._seed = cfg.seed
        self._opened = opened
        self.rows, self.passes = position.rows or [0] * count, position.passes or [0] * count
        # One source after the other, without an end to any, is to begin with the first again after the last.
        self._in_turn = data.mix is Mix.concatenate
        self._again = data.mix_until is MixUntil.last
        self._drawer = mix.Drawer(
            [one.weight for one in opened], Mix.interleave if self._in_turn else data.mix, cfg.seed
        )
        self._drawer.count = position.draws
        self._readers = [self._reader(number) for number in range(count)]

    @property
    def draws(self) -> int:
        """How often a source has been drawn."""
        return self._drawer.count

    def __iter__(self) -> Iterator[tuple[Opened, Row | BadRow]]:
        return self

    def __next__(self) -> tuple[Opened, Row | BadRow]:
        """Return the next row, and the source that it is of.

        Raises:
            ConfigError: No source has a row.
        """
        empty: set[int] = set()
        while len(empty) < len(self._opened):
            number = self._drawer.count % len(self._opened) if self._in_turn else self._drawer.next()
            row = next(self._readers[number], None)
            if row is not None:
                self.rows[number] += 1
                return self._opened[number], row
            if not self.rows[number]:
                empty.add(number)
            self._begin_anew(number)
        raise ConfigError([Problem("data.path", "has no rows", "a file with rows")])

    def _begin_anew(self, number: int) -> None:
        """Go on after a source is used up: with the next one, with itself again, or with all of them."""
        if self._in_turn:
            self._drawer.count += 1
        whose = [number] if self._in_turn or self._again else range(len(self._opened))
        for each in whose:
            self.rows[each], self.passes[each] = 0, self.passes[each] + 1
            self._readers[each] = self._reader(each)

    def _reader(self, number: int) -> Iterator[Row | BadRow]:
        opened, current = self._opened[number], self.passes[number]
        found = sources.read(opened)
        if self._in_turn and opened.weight != 1:
            found = _weighted(found, opened.weight, f"{self._seed} {number} {current}")
        return islice(found, self.rows[number], None)


def _weighted(rows: Iterator[Row | BadRow], weight: float, seed: str) -> Iterator[Row | BadRow]:
    """Yield each row as often as a weight says: of a fraction, a share drawn anew in each pass."""
    chance = random.Random(seed)  # noqa: S311
    for row in rows:
        for _ in range(int(weight) + (chance.random() < weight % 1)):
            yield row


class Stream(IterableDataset[dict[str, Any]]):
    """Tokenised sequences without end, of whose blocks each process and each of its data workers takes a share.

    Every sequence carries ``at``: the shard it comes from and the `Position` behind it. What a trainer has used, and
    not what workers have prepared meanwhile, is where a checkpoint stands.
    """

    def __init__(
        self,
        cfg: Config,
        tokenizer: PreTrainedTokenizerBase,
        opened: Sequence[Opened],
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.cfg, self.opened = cfg, opened
        self.encoder = RowEncoder(cfg, tokenizer)
        self.rank, self.world_size = rank, world_size
        self.begins: list[dict[str, Any]] = []
        """What `state` returned, to go on from there: one for each data worker, the one whose turn is next in front."""

        self.counts: Counter[str] = Counter()
        """The rows of the batches that were noted: read, cut, and left out by reason."""

        self._used: dict[int, dict[str, Any]] = {}
        self._batches = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        shard, position = self.rank * count + number, Position()
        if self.begins:
            begin = self.begins[number]
            shard, position = begin["shard"], Position(**begin["position"])
        return self._sequences(shard, self.world_size * count, position)

    def note(self, places: Sequence[dict[str, Any]]) -> None:
        """Take down that a batch has been used, by the ``at`` of its sequences."""
        self._used |= {place["shard"]: place for place in places}
        self._batches += 1
        for place in places:
            self.counts += Counter(place["counts"])

    def state(self, workers: int) -> list[dict[str, Any]]:
        """Return where to go on after the batches that were noted, for a checkpoint.

        Args:
            workers: How many data workers this process has.
        """
        count = max(1, workers)
        shards = range(self.rank * count, (self.rank + 1) * count)
        fresh: list[dict[str, Any]] = [{"shard": shard, "position": asdict(Position())} for shard in shards]
        order = self.begins or fresh
        current = [self._used.get(begin["shard"], begin) for begin in order]
        current = [{name: place[name] for name in ("shard", "position")} for place in current]
        turn = self._batches % count
        return current[turn:] + current[:turn]

    def _sequences(self, shard: int, shards: int, position: Position) -> Iterator[dict[str, Any]]:
        raw = RawRows(self.cfg, self.opened, position)
        block, skip = position.block, position.taken
        since, counts = min(raw.passes), Counter[str]()  # what has been read since a sequence was last given
        while True:
            begin = Position(block, 0, raw.draws, list(raw.rows), list(raw.passes))
            rows = islice(raw, self.cfg.data.shuffle_buffer)
            if block % shards == shard:
                report, sequences = self._block(list(rows), block)
                counts += Counter() if skip else report.counts()  # of a block that is gone on with, they were told
                for taken, sequence in enumerate(sequences, 1):
                    if taken > skip:
                        begin.taken = taken
                        at = {"shard": shard, "position": asdict(begin), "counts": dict(counts)}
                        since, counts = min(raw.passes), Counter()
                        yield sequence | {"at": at}
                skip = 0
                if counts and min(raw.passes) - since >= shards:
                    self._refuse(counts)
            else:
                for _ in rows:
                    pass
            block += 1

    def _refuse(self, counts: Counter[str]) -> None:
        """Stop where a whole pass has given nothing to train on: there would be no end to it."""
        found = "; ".join(f"{count} x {name}" for name, count in counts.items())
        message = f"no row is left to train on: {found}"
        raise ConfigError([Problem("data", message, "other rows, or a larger data.max_length")])

    def _block(self, rows: list[tuple[Opened, Row | BadRow]], number: int) -> tuple[Report, Iterator[dict[str, Any]]]:
        """Tokenise the rows of a block; return its sequences in the order to train in."""
        report = Report(read=len(rows))
        items, origins, bad = encode.understood(rows, self.cfg.stage.rows)
        found = [kept for one in (*bad, *self.encoder.encode(items, origins)) if (kept := report.take(one))]
        judge(report, self.cfg.data, f"rows {number * len(rows) + 1} and on")
        refuse_packing(report, self.cfg)
        sequences: Any = _InMemory(found, weighted=report.weighted)
        if self.cfg.data.packing is not Packing.none:
            apart = self.cfg.data.packing is Packing.best_fit
            how: Callable[[Numbers, int], pack.Bins] = pack.best_fit if apart else pack.concatenate
            sequences = pack.PackedRows(sequences, how(sequences.lengths, self.cfg.data.max_length), apart=apart)
        order = list(range(len(sequences)))
        if self.cfg.train.shuffle:
            random.Random(f"{self.cfg.seed} {number}").shuffle(order)  # noqa: S311
        return report, (sequences[index] for index in order)


class _InMemory:
    """A few sequences, as a dataset."""

    def __init__(self, rows: list[EncodedRow], *, weighted: bool) -> None:
        self.rows: list[tuple[Encoded, EncodedRow]] = [(each, row) for row in rows for each in row.sequences]
        self.weighted = weighted
        self.lengths = np.array([len(each.ids) + row.grown for each, row in self.rows], np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        each, row = self.rows[index]
        found: dict[str, Any] = dict(arrays(each.ids, each.spans, each.weights if self.weighted else None, each.labels))
        return found | ({"media": row.media, "place": row.row.place} if row.media else {})
