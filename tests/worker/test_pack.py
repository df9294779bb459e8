"""Which rows share a sequence, and what the joined sequences hold."""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ftrun.data.tokens import IGNORED
from ftrun.worker import builtin, pack


class InMemory:
    """Rows as the encoder's data sets give them: a fresh dict of arrays each time."""

    def __init__(self, lengths: Any, weighted: tuple[int, ...] = ()) -> None:
        self.lengths, self.weighted = np.asarray(lengths, np.int32), weighted

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = np.arange(self.lengths[index], dtype=np.int32) + 100 * index
        row = {"input_ids": ids, "labels": ids.copy()}
        return row | ({"weights": np.full(len(ids), 0.5, np.float32)} if index in self.weighted else {})


def alpaca_like(size: int, seed: int = 0) -> Any:
    """Lengths distributed as those of alpaca rows under a chat template: 41 to 902 tokens, 255 on average."""
    quantiles = [41, 56, 85, 204, 390, 600, 902]
    shares = [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]
    return np.interp(np.random.default_rng(seed).random(size), shares, quantiles).astype(np.int32)


def plain_best_fit(lengths: Any, max_length: int) -> list[int]:
    """How full each sequence is, placing row after row."""
    filled: list[int] = []
    room: list[tuple[int, int]] = []
    for length in sorted(lengths.tolist(), reverse=True):
        at = bisect_left(room, (length, -1))
        if at == len(room):
            filled.append(0)
            left, number = max_length, len(filled) - 1
        else:
            left, number = room.pop(at)
        filled[number] += length
        insort(room, (left - length, number))
    return sorted(filled)


def rows_of(bins: pack.Bins) -> list[list[int]]:
    return [bins.members[a:b].tolist() for a, b in zip(bins.offsets[:-1], bins.offsets[1:], strict=True)]


@pytest.mark.parametrize("max_length", [8, 100, 2048])
@pytest.mark.parametrize("seed", range(5))
def test_best_fit_fills_as_placing_row_after_row_does(seed, max_length):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, max_length + 1, random.integers(1, 400))
    bins = pack.best_fit(lengths, max_length)
    assert sorted(bins.lengths.tolist()) == plain_best_fit(lengths, max_length)
    assert sorted(bins.members.tolist()) == list(range(len(lengths)))
    assert bins.lengths.tolist() == [int(lengths[rows].sum()) for rows in rows_of(bins)]
    assert bins.lengths.max() <= max_length


def test_the_order_is_that_of_the_rows():
    bins = pack.best_fit(np.array([3, 9, 5, 7, 1]), 10)
    assert rows_of(bins) == [[0, 3], [1, 4], [2]]
    assert bins.efficiency(10) == pytest.approx(25 / 30)


def test_alpaca_is_packed_to_98_percent():
    bins = pack.best_fit(alpaca_like(1000), 2048)
    assert bins.efficiency(2048) >= 0.98


def test_a_million_rows_take_seconds():
    lengths = alpaca_like(1_000_000)
    start = time.process_time()
    bins = pack.best_fit(lengths, 2048)
    assert time.process_time() - start < 5
    assert bins.efficiency(2048) >= 0.98


def test_bins_are_the_same_from_disk(tmp_path):
    bins = pack.best_fit(alpaca_like(100), 1024)
    bins.save(tmp_path)
    loaded = pack.Bins.load(tmp_path)
    assert isinstance(loaded.members, np.memmap)
    assert rows_of(loaded) == rows_of(bins)
    assert len(pack.best_fit(np.array([], int), 8)) == len(pack.concatenate(np.array([], int), 8)) == 0


def test_rows_that_are_kept_apart():
    rows = InMemory([3, 9, 5, 7, 1], weighted=(3,))
    packed = pack.PackedRows(rows, pack.best_fit(rows.lengths, 10), apart=True)
    found = packed[0]
    assert found["input_ids"].tolist() == [0, 1, 2, 300, 301, 302, 303, 304, 305, 306]
    assert found["labels"].tolist() == [IGNORED, 1, 2, IGNORED, 301, 302, 303, 304, 305, 306]
    assert found["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]
    assert found["weights"].tolist() == [1.0] * 3 + [0.5] * 7
    assert "weights" not in packed[1]
    assert packed.lengths.tolist() == [10, 10, 5]
    assert len(packed) == 3
    assert packed[0]["labels"].tolist() == found["labels"].tolist()
    with pytest.raises(IndexError):
        packed[3]


def test_rows_one_behind_the_other():
    rows = InMemory([3, 9, 5, 2])
    packed = pack.PackedRows(rows, pack.concatenate(rows.lengths, 6), apart=False)
    assert [row["input_ids"].tolist() for row in packed] == [
        [0, 1, 2, 100, 101, 102],
        [103, 104, 105, 106, 107, 108],
        [200, 201, 202, 203, 204, 300],
        [301],
    ]
    assert packed[0]["labels"].tolist() == [0, 1, 2, 100, 101, 102]
    assert set(packed[0]) == {"input_ids", "labels"}
    assert packed.lengths.tolist() == [6, 6, 6, 1]


@pytest.mark.parametrize("seed", range(3))
def test_concatenating_loses_no_token(seed):
    random = np.random.default_rng(seed)
    rows = InMemory(random.integers(1, 90, 60))
    packed = pack.PackedRows(rows, pack.concatenate(rows.lengths, 32), apart=False)
    everything = np.concatenate([rows[index]["input_ids"] for index in range(len(rows))])
    assert (np.concatenate([row["input_ids"] for row in packed]) == everything).all()
    assert set(packed.lengths[:-1].tolist()) == {32}


def test_a_model_that_does_not_keep_rows_apart_is_found_out():
    assert not pack.leaks(builtin.model({"dtype": torch.float32}))

    class Running(nn.Module):
        """Carries a running mean from row to row, as a recurrent state would."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(32, 8)

        def forward(self, input_ids: Any, position_ids: Any, use_cache: bool, output_hidden_states: bool) -> Any:
            states = self.embedding(input_ids).cumsum(1) / torch.arange(1, 1 + input_ids.shape[1])[:, None]
            return type("Output", (), {"hidden_states": (states,)})

    assert pack.leaks(Running())
