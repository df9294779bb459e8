"""The rows of a run: tokenised once, found again exactly when their tokens would be the same; split, mixed, packed."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftrun import config
from ftrun.data import Data, Packing
from ftrun.data import sources as places
from ftrun.data.tokens import IGNORED
from ftrun.errors import ConfigError
from ftrun.template import Template
from ftrun.worker import builtin, dataset, pack, store

TOKENIZER: Any = builtin.tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "tokens"


def load(*words: str) -> dataset.Rows:
    return dataset.load(config.compose(["model=tiny", *words]), TOKENIZER)


def entries(cache: Path) -> list[str]:
    return sorted(file.parent.name for file in cache.glob("*/meta.json"))


def everything(rows: Any) -> list[Any]:
    """Return all tokens and labels of a dataset."""
    found = [rows[index] for index in range(len(rows))]
    flat = [side for row in found for side in ([row["chosen"], row["rejected"]] if "chosen" in row else [row])]
    return [(one["input_ids"].tolist(), one["labels"].tolist()) for one in flat]


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def numbered(count: int, letter: str = "q") -> list[dict[str, Any]]:
    return [chat(f"{letter}{n}", f"answer {n}") for n in range(count)]


def questions(rows: Any) -> list[str]:
    return [TOKENIZER.decode(ids).split("user\n")[1].split("<")[0] for ids, *_ in everything(rows)]


# Every key of `data`: a row on which it changes what is learned, or why it changes nothing of what is tokenised.
THINKING = "<think>\nso\n</think>\n\nFour."
TWO = [
    {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": THINKING},
    {"role": "user", "content": "Say <|im_end|>."}, {"role": "assistant", "content": THINKING + " well" * 40},
]  # fmt: skip
CHANGES = {
    "max_length": ("data.max_length=40",),
    "system": ("data.system=x",),
    "train_on": ("data.train_on=last",),
    "train_roles": ("data.train_on=roles", "data.train_roles=[assistant]", "data.train_roles=[user]"),
    "reasoning": ("data.reasoning=strip",),
    "history_reasoning": ("data.train_on=last", "data.history_reasoning=true"),
    "control_tokens_in_text": ("data.control_tokens_in_text=true",),
    "rows": ("data.rows=1",),
    "columns": ("data.columns={messages: other}",),
    "too_long": ("data.max_length=40", "data.too_long=drop"),
    "cut": ("data.max_length=40", "data.cut=end"),
}
CHANGES_NOTHING = {
    "eval_size": ("data.eval_size=1",),
    "packing": ("data.packing=best_fit",),
    "on_bad_row": ("data.on_bad_row=skip",),
    "max_bad_share": ("data.on_bad_row=skip", "data.max_bad_share=0.5"),
    "processes": ("data.processes=2",),
    "eval_path": ("data.eval_path=held_out.jsonl",),
    "eval_sets": ("data.eval_sets={more: held_out.jsonl}",),
    "format": (),  # named or found, the same columns are read the same way: below
    "path": (), "sources": (), "subset": (), "split": (), "mix": (), "mix_until": (), "dataset_info": (),  # which rows
    "streaming": (), "shuffle_buffer": (),  # nothing is stored
    "media_folder": (), "media_urls": (),  # tests of media
}  # fmt: skip


def test_every_key_of_the_group_is_here():
    assert set(CHANGES) | set(CHANGES_NOTHING) == {field.name for field in dataclasses.fields(Data)}


@pytest.mark.parametrize("words", CHANGES.values(), ids=CHANGES)
def test_an_option_that_changes_tokens_makes_a_new_entry(words, write, cache):
    write("rows.jsonl", [{"messages": TWO, "other": TWO[:2]}, chat("Short", "Yes.", other=TWO)])
    before = load("data.path=rows.jsonl", *words[:-1])
    count = len(entries(cache))
    after = load("data.path=rows.jsonl", *words)
    assert everything(before.train) != everything(after.train)
    assert len(entries(cache)) == count + 1


@pytest.mark.parametrize("words", [words for words in CHANGES_NOTHING.values() if words])
def test_an_option_that_changes_no_token_finds_the_same_entry(words, write, cache):
    write("rows.jsonl", [chat("Short", "Yes."), chat("Other", "No.")])
    write("held_out.jsonl", [chat("Held", "Out.")])
    load("data.path=rows.jsonl")
    (entry,) = entries(cache)
    made = (cache / entry / "part-0-of-1.arrow").stat().st_mtime_ns
    load("data.path=rows.jsonl", *words)
    assert (cache / entry / "part-0-of-1.arrow").stat().st_mtime_ns == made
    assert len(entries(cache)) == 1 + any("held_out" in word for word in words)


def test_what_is_in_the_file_counts_and_not_its_name_or_time(write, cache):
    path = write("rows.jsonl", numbered(3))
    first = load("data.path=rows.jsonl")
    os.utime(path, ns=(1, 1))
    load("data.path=rows.jsonl")
    path.rename(path.with_name("renamed.jsonl"))
    load("data.path=renamed.jsonl")
    assert len(entries(cache)) == 1
    write("renamed.jsonl", numbered(4))
    assert len(load("data.path=renamed.jsonl").train) == 4
    assert len(entries(cache)) == 2
    assert len(first.train) == 3


def test_tokenizer_template_and_encoder_count(write, cache, monkeypatch):
    import copy

    write("rows.jsonl", numbered(3))
    cfg = config.compose(["model=tiny", "data.path=rows.jsonl"])
    (opened,) = places.resolve(cfg.data).train
    key = store.material(cfg, TOKENIZER, opened)
    assert store.material(cfg, copy.deepcopy(TOKENIZER), opened) == key
    other: Any = copy.deepcopy(TOKENIZER)
    other.chat_template += " "
    assert store.material(cfg, other, opened) != key
    other = copy.deepcopy(TOKENIZER)
    other.add_tokens(["q1"])
    assert store.material(cfg, other, opened) != key
    cfg.template = Template(user="{content}")
    assert store.material(cfg, TOKENIZER, opened) != key
    monkeypatch.setattr("ftrun.worker.encode.VERSION", 0)
    assert store.material(cfg, TOKENIZER, opened)["encoder"] == 0


def test_of_plain_text_the_template_does_not_count(write, cache):
    write("rows.txt", "One.\nTwo.\n")
    load("stage=pt", "data.path=rows.txt")
    cfg = config.compose(["model=tiny", "stage=pt", "data.path=rows.txt"])
    (opened,) = places.resolve(cfg.data).train
    assert store.material(cfg, TOKENIZER, opened)["template"] is None


def test_several_processes_write_what_one_does(write, cache):
    rows = [chat(f"q{n}", f"answer {n} " * (n % 7 + 1)) for n in range(1, 3 * store.BATCH)]
    write("rows.jsonl", rows)
    one = load("data.path=rows.jsonl", "data.processes=1")
    first = everything(one.train)
    (entry,) = entries(cache)
    os.rename(cache / entry, cache / "aside")
    three = load("data.path=rows.jsonl", "data.processes=3")
    assert everything(three.train) == first
    assert three.report == one.report
    assert [three.train.place_of(n).rpartition(":")[2] for n in (0, store.BATCH, len(rows) - 1)] == [
        "1", str(store.BATCH + 1), str(len(rows)),
    ]  # fmt: skip
    assert len(list((cache / entry).glob("part-*"))) == 3


def test_lengths_need_no_row(write):
    write("rows.jsonl", [chat("q", "word " * n) for n in range(1, 30)])
    rows = load("data.path=rows.jsonl").train
    assert rows.lengths.tolist() == [len(ids) for ids, *_ in everything(rows)]


def test_pairs_have_two_sides_and_a_number(write):
    write("rows.jsonl", [{"prompt": f"q{n}", "chosen": "a " * 9, "rejected": "b"} for n in range(3)])
    rows = load("stage=dpo", "data.path=rows.jsonl").train
    assert [row["index"] for row in (rows[0], rows[2])] == [0, 2]
    assert rows.lengths.tolist() == [len(rows[n]["chosen"]["input_ids"]) for n in range(3)]
    assert set(rows[0]) == {"chosen", "rejected", "index", "extra"}


def test_what_was_held_out_is_not_trained_on_even_if_a_source_is_seen_twice(write):
    write("rows.jsonl", numbered(20))
    rows = load("data.sources=[{path: rows.jsonl, weight: 2}]", "data.eval_size=0.25")
    held_out, trained = questions(rows.evals[""]), questions(rows.train)
    assert (len(held_out), len(trained)) == (5, 30)
    assert sorted({*held_out, *trained}) == sorted(f"q{n}" for n in range(20))
    assert not set(held_out) & set(trained)
    again = load("data.sources=[{path: rows.jsonl, weight: 2}]", "data.eval_size=5")
    assert questions(again.evals[""]) == held_out
    assert questions(load("data.path=rows.jsonl", "data.eval_size=5", "seed=1").evals[""]) != held_out


def test_rows_on_one_line_are_rows_of_their_own(write):
    """As in JSON that is written without line breaks, or where each file is one text."""
    write("rows.json", json.dumps(numbered(20)))
    rows = load("data.path=rows.json", "data.eval_size=5")
    assert (len(rows.train), len(rows.evals[""])) == (15, 5)
    assert rows.report["train"]["rows_read"] == 20
    assert "sequences" not in rows.report["train"]
    for n in range(6):
        write(f"docs/{n}.txt", f"Document {n}.\nIts end.")
    rows = load("stage=pt", "data.path=documents:docs", "data.eval_size=2")
    assert (len(rows.train), len(rows.evals[""])) == (4, 2)


MIXES = {
    ("concatenate", "first"): ["a0", "a1", "b0", "b1", "b2", "b3"],
    ("interleave", "first"): ["a0", "b0", "a1", "b1"],
    ("interleave", "last"): ["a0", "b0", "a1", "b1", "a0", "b2", "a1", "b3", "a0"],
}


@pytest.mark.parametrize(("how", "order"), MIXES.items(), ids=lambda case: "-".join(case))
def test_sources_are_mixed(how, order, write):
    write("a.jsonl", numbered(2, "a"))
    write("b.jsonl", numbered(4, "b"))
    until = f"data.mix_until={how[1]}" if how[0] != "concatenate" else "seed=42"
    rows = load("data.sources=[{path: a.jsonl}, {path: b.jsonl}]", f"data.mix={how[0]}", until)
    assert questions(rows.train) == order
    assert sorted(rows.report["sources"]) == ["a.jsonl", "b.jsonl"]


def test_weighted_sources_are_drawn_by_their_weights(write):
    write("a.jsonl", numbered(400, "a"))
    write("b.jsonl", numbered(400, "b"))
    sources = "data.sources=[{path: a.jsonl, weight: 3}, {path: b.jsonl, weight: 1}]"
    found = questions(load(sources, "data.mix=weighted").train)
    share = sum(question.startswith("a") for question in found) / len(found)
    assert abs(share - 0.75) < 0.05
    assert questions(load(sources, "data.mix=weighted").train) == found
    assert questions(load(sources, "data.mix=weighted", "seed=1").train) != found


def test_packed_rows_are_the_rows_and_their_plan_is_kept(write, cache, monkeypatch):
    write("rows.jsonl", [chat(f"q{n}", "word " * (n % 9 + 1)) for n in range(50)])
    plain = load("data.path=rows.jsonl")
    packed = load("data.path=rows.jsonl", "data.packing=best_fit", "data.max_length=64")
    assert packed.report["train"]["packed_into"] == len(packed.train) < 50
    tokens = int(plain.train.lengths.sum())
    assert packed.report["train"]["packing_efficiency"] == round(tokens / (64 * len(packed.train)), 4)
    assert sum(len(ids) for ids, *_ in everything(packed.train)) == tokens
    monkeypatch.setattr(dataset, "_WORTH_KEEPING", 10)
    kept = load("data.path=rows.jsonl", "data.packing=best_fit", "data.max_length=64")
    assert list(cache.glob("*.packing"))
    monkeypatch.setattr(pack.Bins, "save", None)
    again = load("data.path=rows.jsonl", "data.packing=best_fit", "data.max_length=64")
    assert everything(again.train) == everything(kept.train) == everything(packed.train)


def test_concatenated_text_loses_no_token(write):
    write("rows.txt", "".join(f"{'word ' * n}\n" for n in range(1, 60)))
    plain = load("stage=pt", "data.path=rows.txt", "data.max_length=4096")
    packed = load("stage=pt", "data.path=rows.txt", "data.packing=concatenate", "data.max_length=64")
    assert [ids for one, *_ in everything(plain.train) for ids in one] == [
        ids for one, *_ in everything(packed.train) for ids in one
    ]
    assert set(packed.train.lengths[:-1].tolist()) == {64}


BAD = [chat("Hi", ""), {"messages": []}, chat("Hi", "Yes."), chat("Hi", ""), chat("Ho", "No.")]


def test_bad_rows_are_all_named_or_all_counted(write, cache):
    path = write("rows.jsonl", BAD)
    with pytest.raises(ConfigError) as caught:
        load("data.path=rows.jsonl")
    assert {problem.key for problem in caught.value.problems} == {f"{path.name}:{n}" for n in (1, 2, 4)}
    assert entries(cache) == []
    with pytest.raises(ConfigError, match="3 of 5 rows are bad"):
        load("data.path=rows.jsonl", "data.on_bad_row=skip")
    rows = load("data.path=rows.jsonl", "data.on_bad_row=skip", "data.max_bad_share=0.6")
    assert len(rows.train) == 2
    assert sorted(rows.report["train"]["skipped"].values()) == [1, 2]
    with pytest.raises(ConfigError):  # what is stored was made by skipping, which is not wanted now
        load("data.path=rows.jsonl")


def test_nothing_is_left_of_a_build_that_fails(write, cache, monkeypatch):
    write("rows.jsonl", numbered(3))
    monkeypatch.setattr("ftrun.worker.store.record_batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load("data.path=rows.jsonl")
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_a_process_that_dies_while_tokenising_is_an_error(write, monkeypatch):
    write("rows.jsonl", numbered(3))
    monkeypatch.setattr("ftrun.worker.store.record_batch", lambda *_: os._exit(9))
    with pytest.raises(RuntimeError, match="was killed"):
        load("data.path=rows.jsonl", "data.processes=2")


def test_one_builds_and_the_others_wait(write, cache, tmp_path, monkeypatch):
    """Several processes that ask for the same rows at once: they are tokenised once."""
    from multiprocessing import get_context

    write("rows.jsonl", numbered(50))
    log = tmp_path / "built"

    def slowly(place: Path, *arguments: Any) -> None:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        build(place, *arguments)

    build = store._build
    monkeypatch.setattr(store, "_build", slowly)
    fork = get_context("fork")
    processes = [fork.Process(target=load, args=("data.path=rows.jsonl",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "built\n"


def test_no_row_left_is_an_error_with_the_reasons(write):
    write("rows.jsonl", [chat("Hi " * 50, "Yes. " * 50)] * 3)
    with pytest.raises(ConfigError, match=r"no row is left to train on: 3 x longer than data.max_length"):
        load("data.path=rows.jsonl", "data.max_length=64", "data.too_long=drop")
    with pytest.raises(ConfigError, match=r"is longer than data\.max_length=64"):
        load("data.path=rows.jsonl", "data.max_length=64", "data.too_long=error")
    assert load("data.path=rows.jsonl", "data.max_length=64").report["train"]["truncated"] == 3


def test_nothing_vanishes_without_a_word(write):
    write("rows.jsonl", numbered(1))
    write("long.jsonl", [chat("Hi", "Yes. " * 90)])
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.weight: of its 1 rows, weight=0.1 leaves none"):
        load("data.sources=[{path: rows.jsonl}, {path: rows.jsonl, weight: 0.1}]")
    with pytest.raises(ConfigError, match=r"data\.eval_sets\.math: no row is left to evaluate on: 1 x longer"):
        load("data.path=rows.jsonl", "data.eval_sets={math: long.jsonl}", "data.max_length=64", "data.too_long=drop")
    write("tokens.jsonl", [{"input_ids": [1, 2, 999_999]}])
    with pytest.raises(ConfigError, match="holds the token 999999, and the tokenizer has 1024"):
        load("data.path=tokens.jsonl")


def test_what_lies_damaged_in_the_cache_is_made_again(write, cache):
    write("rows.jsonl", numbered(5))
    before = everything(load("data.path=rows.jsonl").train)
    (entry,) = entries(cache)
    (part,) = (cache / entry).glob("part-*")
    part.write_bytes(part.read_bytes()[:200])
    assert everything(load("data.path=rows.jsonl").train) == before
    (cache / entry / "meta.json").write_text("{")
    assert everything(load("data.path=rows.jsonl").train) == before


def test_a_cache_that_cannot_be_written_to_is_an_error(write, tmp_path, monkeypatch):
    write("rows.jsonl", numbered(5))
    monkeypatch.setenv("FTRUN_CACHE", str(write("a_file", "x") / "cache"))
    with pytest.raises(ConfigError, match=r"FTRUN_CACHE: .* cannot be written to: Not a directory"):
        load("data.path=rows.jsonl")


def test_tables_fill_objects_up_with_nulls_which_are_no_arguments(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def call(arguments: dict[str, Any]) -> list[dict[str, Any]]:
        calls = [{"type": "function", "function": {"name": "w", "arguments": arguments}}]
        return [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}]

    rows = [{"messages": call({"city": "Oslo"})}, {"messages": call({"day": 3})}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    rows = load("data.path=rows.parquet", "template=qwen").train
    texts = [TOKENIZER.decode(ids) for ids, _ in everything(rows)]
    assert ['"arguments": {"city": "Oslo"}' in texts[0], '"arguments": {"day": 3}' in texts[1]] == [True, True]


def test_evaluation_sets_have_names(write):
    write("rows.jsonl", numbered(5))
    write("a.jsonl", numbered(2, "a"))
    write("b.jsonl", numbered(3, "b"))
    rows = load("data.path=rows.jsonl", "data.eval_sets={one: a.jsonl, two: b.jsonl}", "data.eval_size=1")
    assert {name: len(found) for name, found in rows.evals.items()} == {"": 1, "one": 2, "two": 3}
    assert rows.report["eval_two"]["rows"] == 3
    assert len(rows.train) == 4


def test_the_store_says_what_it_was_made_of(write, cache):
    write("rows.jsonl", numbered(5))
    load("data.path=rows.jsonl")
    (entry,) = entries(cache)
    meta = json.loads((cache / entry / "meta.json").read_text())
    assert (meta["name"], meta["needs"]["kind"], meta["report"]["rows"]) == ("rows.jsonl", "conversations", 5)
    assert meta["needs"]["options"]["max_length"] == 1024


def test_memory_is_that_of_a_batch_and_not_of_the_file(write, tmp_path):
    """Twenty times the rows take no more memory to tokenise."""
    import resource
    from multiprocessing import get_context

    def peak(count: int) -> int:
        path = tmp_path / f"rows{count}.jsonl"
        line = json.dumps(chat("question " * 30, "answer " * 60))
        with path.open("w") as file:
            file.writelines(f"{line}\n" for _ in range(count))
        receiver, sender = fork.Pipe(duplex=False)

        def measure() -> None:
            load(f"data.path={path}", "data.processes=1")
            sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

        process = fork.Process(target=measure)
        process.start()
        process.join()
        return receiver.recv()

    fork = get_context("fork")
    assert peak(20 * store.BATCH) - peak(store.BATCH) < 40_000  # kilobytes; the rows alone are 20 MB of text


def test_arrays_are_views_that_nobody_shares(write):
    write("rows.jsonl", numbered(2))
    rows = load("data.path=rows.jsonl").train
    row = rows[0]
    row["input_ids"][:] = 0
    assert rows[0]["input_ids"].tolist() != row["input_ids"].tolist()
    assert isinstance(row["labels"], np.ndarray)
    assert (row["labels"] == IGNORED).any()
    assert Packing.none.value == "none"
