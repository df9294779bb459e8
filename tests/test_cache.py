"""`ftrun cache`: what is kept is listed, what is old is deleted, what is being made is left alone."""

from __future__ import annotations

import json
import mmap
import os
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

DAY = 24 * 60 * 60


@pytest.fixture
def tokens(tmp_path, monkeypatch) -> Path:
    """The folder of the cache's entries."""
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "tokens"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def entry(tokens):
    """Make an entry as a run leaves it, last used so many days ago."""

    def make(key: str, days: float = 0.0, **needs: Any) -> Path:
        place = tokens / key
        place.mkdir()
        (tokens / f"{key}.lock").touch()
        (place / "part-0-of-1.arrow").write_bytes(b"x" * 1000)
        meta = {
            "name": f"{key}.jsonl",
            "made": time.time() - 100 * DAY,
            "needs": {
                "kind": "conversations",
                "rows": None,
                "tokenizer": "0123456789abcdef",
                "template": {"chat_template": None, "user": None, "own": "{{ messages }}"},
                "options": {"max_length": 1024, "train_on": "completions"},
            }
            | needs,
            "report": {"sequences": 12, "tokens": 345},
        }
        (place / "meta.json").write_text(json.dumps(meta))
        used = time.time() - days * DAY
        os.utime(place / "meta.json", (used, used))
        return place

    return make


def left(tokens: Path) -> set[str]:
    return {path.name for path in tokens.iterdir()}


def test_entries_are_listed_the_last_used_in_front(entry, driver):
    old, new = entry("old", days=3), entry("new", options={"max_length": 512, "train_on": "last"})
    found = json.loads(driver("cache", "--json").sees(0).out)
    first, second = found["entries"]
    assert [first["name"], second["name"]] == ["new.jsonl", "old.jsonl"]
    size = sum(file.stat().st_size for file in old.iterdir())
    assert {name: second[name] for name in ("key", "kind", "rows", "tokens", "bytes", "folder")} == {
        "key": "old",
        "kind": "conversations",
        "rows": 12,
        "tokens": 345,
        "bytes": size,
        "folder": str(old),
    }
    assert time.time() - second["used"] == pytest.approx(3 * DAY, abs=60)
    assert time.time() - second["made"] == pytest.approx(100 * DAY, abs=60)
    assert found["bytes"] == size + sum(file.stat().st_size for file in new.iterdir())
    assert first["needs"]["options"]["max_length"] == 512


def test_the_table_says_where_entries_differ(entry, driver, tokens):
    entry("one", options={"max_length": 512, "train_on": "last"})
    entry("two", rows=7, template={"chat_template": None, "user": "{content}", "own": None})
    out = driver("cache").sees(0).out
    one, two = (next(line for line in out.splitlines() if f"{name}.jsonl" in line) for name in ("one", "two"))
    assert "tokenizer 01234567, own template" in one
    assert "max_length=512" in one
    assert "train_on=last" in one
    assert "first 7 rows" in two
    assert "named template" in two
    assert "max_length" not in two, "that is the default"
    size = sum(file.stat().st_size for file in tokens.rglob("*") if file.is_file())
    assert f"2 sources, {size / 1024:.1f} KiB in {tokens}\n" in out


def test_an_empty_cache_is_said_to_be(driver, tokens):
    assert driver("cache").sees(0).out == f"nothing is tokenised in {tokens}\n"
    tokens.rmdir()
    assert json.loads(driver("cache", "--json").sees(0).out) == {"entries": [], "bytes": 0}
    assert "deleted 0 sources" in driver("cache", "--clear").sees(0).out


def test_prune_deletes_what_has_not_been_used_for_so_long(entry, driver, tokens):
    entry("fresh", days=1)
    entry("stale", days=10)
    out = driver("cache", "--prune", "5").sees(0).out
    assert out.startswith("deleted 1 source, ")
    assert left(tokens) == {"fresh", "fresh.lock"}
    found = json.loads(driver("cache", "--prune", "0.5", "--json").sees(0).out)
    assert (found["deleted"]["entries"], found["entries"]) == (1, [])
    assert found["deleted"]["bytes"] > 1000
    assert not left(tokens)


def test_clear_deletes_everything(entry, driver, tokens):
    for name in ("a", "b"):
        entry(name)
    assert driver("cache", "--clear").sees(0).out.startswith("deleted 2 sources, ")
    assert not left(tokens)


def test_what_killed_processes_left_goes_too(entry, driver, tokens):
    entry("whole")
    for leftover in ("whole.17.partial", "lost.18.partial"):
        (tokens / leftover).mkdir()
        (tokens / leftover / "part-0-of-1.arrow").write_bytes(b"y" * 5000)
    (tokens / "stale.lock").touch()
    out = driver("cache", "--prune", "1").sees(0).out
    assert out.startswith("deleted 0 sources and what 2 killed processes left, 9.8 KiB\n")
    assert left(tokens) == {"whole", "whole.lock"}


def test_what_is_being_made_is_left_alone(entry, driver, tokens):
    entry("done")
    (tokens / "making.19.partial").mkdir()
    with FileLock(tokens / "making.lock"):
        out = driver("cache", "--clear").sees(0).out
        assert "kept making: a process is tokenising it" in out
        assert left(tokens) == {"making.lock", "making.19.partial"}
    driver("cache", "--clear").sees(0)
    assert not left(tokens)


def test_a_mapped_file_can_be_read_on_after_its_deletion(entry, driver, tokens):
    with (entry("mapped") / "part-0-of-1.arrow").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    driver("cache", "--clear").sees(0)
    assert not left(tokens)
    assert mapped[:] == b"x" * 1000


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--prune never", "never is no number of days from 0 up"),
        ("--prune -1", "-1 is no number of days from 0 up"),
        ("--prune nan", "nan is no number of days from 0 up"),
        ("--prune", "expected one argument"),
        ("--prune 3 --clear", "not allowed with argument"),
        ("model=tiny", "unrecognized arguments: model=tiny"),
    ],
)
def test_wrong_words_end_in_2(words, says, driver, entry, tokens):
    entry("kept", days=1000)
    assert says in driver("cache", *words.split()).sees(2).err
    assert left(tokens) == {"kept", "kept.lock"}


def test_what_a_preview_makes_is_listed_and_made_again_after_its_deletion(ftrun, tmp_path):
    env = {"FTRUN_CACHE": str(tmp_path / "cache")}
    words = ("prepare", "model=tiny")
    ftrun(*words, **env).sees(0)
    found = json.loads(ftrun("cache", "--json", **env).sees(0).out)["entries"]
    assert sorted((entry["name"], entry["kind"], entry["rows"]) for entry in found) == [
        ("demo:identity", "conversations", 16),
        ("demo:identity", "conversations", 132),
    ]
    assert ftrun("cache", "--clear", **env).sees(0).out.startswith("deleted 2 sources")
    assert ftrun(*words, **env).sees(0).out.count(", tokenised, ") == 2
