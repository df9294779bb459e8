"""Streaming: every row once a pass, in an order of its own, shared among processes and workers, resumed exactly."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from ftrun import config
from ftrun.data import sources
from ftrun.errors import ConfigError
from ftrun.worker import builtin, dataset
from ftrun.worker.stream import Stream

TOKENIZER: Any = builtin.tokenizer()


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@functools.cache
def composed(*words: str) -> config.Config:
    return config.compose(["model=tiny", "data.streaming=true", "train.max_steps=9", *words])


def stream(*words: str, rank: int = 0, world_size: int = 1, begins: Any = None) -> Stream:
    cfg = copy.deepcopy(composed(*words))
    made = Stream(cfg, TOKENIZER, sources.resolve(cfg.data).train, rank=rank, world_size=world_size)
    made.begins = begins or []
    return made


def question(sequence: dict[str, Any]) -> str:
    return TOKENIZER.decode(sequence["input_ids"]).split("user\n")[1].split("<")[0]


def taken(found: Iterator[dict[str, Any]], count: int) -> list[str]:
    return [question(sequence) for sequence in itertools.islice(found, count)]


def rows(count: int, letter: str = "q") -> list[dict[str, Any]]:
    return [{"prompt": f"{letter}{n}", "completion": f"answer {n}"} for n in range(count)]


def test_a_pass_has_every_row_once_in_an_order_of_its_own(write):
    write("rows.jsonl", rows(100))
    words = ("data.path=rows.jsonl", "data.shuffle_buffer=10")
    found = taken(iter(stream(*words)), 300)
    for start in (0, 100, 200):
        assert sorted(found[start : start + 100]) == sorted(f"q{n}" for n in range(100))
    assert found[:100] != found[100:200] != [f"q{n}" for n in range(100)]
    for block in range(10):  # shuffled within the buffer
        assert {int(name[1:]) // 10 for name in found[10 * block : 10 * block + 10]} == {block}
    assert taken(iter(stream(*words)), 300) == found
    assert taken(iter(stream(*words, "seed=1")), 300) != found
    assert taken(iter(stream(*words, "train.shuffle=false")), 100) == [f"q{n}" for n in range(100)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_rows(world_size, write):
    write("rows.jsonl", rows(120))
    words = ("data.path=rows.jsonl", "data.shuffle_buffer=10")
    shares = [
        taken(iter(stream(*words, rank=rank, world_size=world_size)), 120 // world_size) for rank in range(world_size)
    ]
    assert sorted(itertools.chain(*shares)) == sorted(f"q{n}" for n in range(120))


WAYS = {
    "plain": (),
    "packed": ("data.packing=best_fit", "data.max_length=64"),
    "several sources": ("data.path=null", "data.sources=[{path: rows.jsonl}, {path: more.jsonl}]"),
    "weighted": (
        "data.path=null",
        "data.sources=[{path: rows.jsonl, weight: 2}, {path: more.jsonl}]",
        "data.mix=weighted",
        "data.mix_until=last",
    ),
    "in turn": ("data.path=null", "data.sources=[{path: rows.jsonl, weight: 0.5}, {path: more.jsonl, weight: 2}]"),
}


@pytest.mark.parametrize("words", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stream_goes_on_where_it_was(words, workers, write):
    """Stopped after any number of batches, whatever the workers had prepared meanwhile: no row lost or seen twice."""
    write("rows.jsonl", rows(37))
    write("more.jsonl", rows(11, "m"))
    words = ("data.path=rows.jsonl", "data.shuffle_buffer=8", *words)
    whole = [ids for ids, _ in batches(stream(*words), workers, 30)]
    for stop in (0, 1, 5, 14):
        first = stream(*words)
        for _, places in batches(first, workers, stop):
            first.note(places)
        rest = [ids for ids, _ in batches(stream(*words, begins=first.state(workers)), workers, 30 - stop)]
        assert rest == whole[stop:], stop


def test_a_stream_can_be_stopped_again(write):
    write("rows.jsonl", rows(37))
    words = ("data.path=rows.jsonl", "data.shuffle_buffer=8")
    whole = [ids for ids, _ in batches(stream(*words), 2, 24)]
    begins, found = None, []
    for count in (5, 1, 7, 11):
        part = stream(*words, begins=begins)
        for ids, places in batches(part, 2, count):
            found.append(ids)
            part.note(places)
        begins = part.state(2)
    assert found == whole


def batches(made: Stream, workers: int, count: int) -> Iterator[tuple[Any, list[Any]]]:
    """Draw batches as training does: the rows of each, and where they stand."""
    context = "fork" if workers else None
    loader: Any = DataLoader(made, 2, num_workers=workers, collate_fn=list, multiprocessing_context=context)
    for batch in itertools.islice(loader, count):
        yield [sequence["input_ids"].tolist() for sequence in batch], [sequence["at"] for sequence in batch]


def test_bad_rows_are_an_error_or_counted(write):
    write("rows.jsonl", [*rows(5), {"prompt": "q5", "completion": ""}])
    with pytest.raises(ConfigError, match=r"rows\.jsonl:6"):
        taken(iter(stream("data.path=rows.jsonl", "data.shuffle_buffer=6")), 6)
    skipping = ("data.path=rows.jsonl", "data.shuffle_buffer=6", "data.on_bad_row=skip", "data.max_bad_share=0.2")
    assert len({*taken(iter(stream(*skipping)), 5)}) == 5
    with pytest.raises(ConfigError, match="1 of 6 rows are bad"):
        taken(iter(stream(*skipping[:-1])), 6)


def test_what_is_left_out_is_counted(write):
    long = {"prompt": "q", "completion": "word " * 90}
    write("rows.jsonl", [*rows(9), long, {"prompt": "q", "completion": ""}])
    words = ("data.path=rows.jsonl", "data.shuffle_buffer=4", "data.max_length=64", "data.on_bad_row=skip")
    made = stream(*words, "data.max_bad_share=0.5", "data.too_long=drop")
    for _, places in batches(made, 0, 9):  # a pass, with one row too long and one bad, and most of another
        made.note(places)
    assert made.counts["rows read"] == 20
    assert made.counts["longer than data.max_length"] == 1
    assert sum(made.counts.values()) == 20 + 1 + 1
    cut = stream(*words[:3], "data.on_bad_row=skip", "data.max_bad_share=0.5")
    for _, places in batches(cut, 0, 5):
        cut.note(places)
    assert cut.counts["rows cut"] == 1


def test_rows_that_are_all_too_long_do_not_go_on_for_ever(write):
    write("rows.jsonl", [{"prompt": "q", "completion": "word " * 90}] * 10)
    for buffer in ("4", "1000"):
        words = ("data.path=rows.jsonl", f"data.shuffle_buffer={buffer}", "data.max_length=64")
        with pytest.raises(ConfigError, match="no row is left to train on"):
            taken(iter(stream(*words, "data.too_long=drop", world_size=2)), 1)
        with pytest.raises(ConfigError, match="is longer than"):
            taken(iter(stream(*words, "data.too_long=error")), 1)


def test_a_source_without_rows_is_an_error(write):
    write("rows.jsonl", "\n")
    with pytest.raises(ConfigError, match="has no rows"):
        taken(iter(stream("data.path=rows.jsonl")), 1)


def test_a_stream_is_what_a_run_gets(write, monkeypatch):
    write("rows.jsonl", rows(5))
    write("eval.jsonl", rows(2, "e"))
    cfg = config.compose(
        ["model=tiny", "data.streaming=true", "train.max_steps=9", "data.path=rows.jsonl", "data.eval_path=eval.jsonl"]
    )
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    loaded = dataset.load(cfg, TOKENIZER)
    assert isinstance(loaded.train, Stream)
    assert (loaded.train.rank, loaded.train.world_size, len(loaded.evals[""])) == (1, 2, 2)
    assert loaded.content_key
    assert isinstance(loaded.train, torch.utils.data.IterableDataset)
