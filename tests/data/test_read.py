"""Files of rows of every kind, whole and broken: what is read, with which line, and what is said of the rest."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftrun.data import read, storage
from ftrun.data.rows import BadRow, Row
from ftrun.errors import ConfigError

ROWS = [{"text": "one"}, {"text": "zwö\n2"}, {"text": "😀", "n": [1, {"a": None}]}]


def values(file: Path, **options: Any) -> list[Any]:
    """Return the rows of a file; of a bad one, its place and reason."""
    return [
        row.problem.key.rpartition("/")[2] + ": " + row.reason if isinstance(row, BadRow) else row.value
        for row in read.each(file, **options)
    ]


def lines(file: Path) -> list[int]:
    return [row.line for row in read.read(file)]


def refused(file: Path, **options: Any) -> str:
    """Return the one problem of a file that cannot be read."""
    with pytest.raises(ConfigError) as caught:
        list(read.each(file, **options))
    (problem,) = caught.value.problems
    return str(problem).replace(f"{file.parent}/", "")


def json_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class TestTextFiles:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL"])
    def test_json_lines(self, name, write):
        file = write(name, "\n" + json_lines(ROWS) + "\n \n" + json_lines(ROWS[:1]))
        assert values(file) == [*ROWS, ROWS[0]]
        assert lines(file) == [2, 3, 4, 7]

    @pytest.mark.parametrize("indent", [None, 2])
    @pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
    def test_a_json_list_in_chunks_of_any_size(self, indent, chunk, write, monkeypatch):
        monkeypatch.setattr(read, "_CHUNK", chunk)
        rows = [*ROWS, {"x": [1.5e-3, -12, True, None, "\u2028"], "y": {}}, {}]
        text = json.dumps(rows, indent=indent, ensure_ascii=False)
        file = write("a.json", "\n " + text + "\n\n")
        assert values(file) == rows
        starts = [text.count("\n", 0, text.index(mark)) + 2 for mark in ("one", "zwö", "😀", '"x"')]
        if indent:
            assert lines(file)[:4] == [start - 1 for start in starts]
        else:
            assert lines(file) == [2] * 5

    @pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
    @pytest.mark.parametrize("name", ["data", "train", "rows"])
    def test_a_list_inside_an_object(self, name, chunk, write, monkeypatch):
        monkeypatch.setattr(read, "_CHUNK", chunk)
        file = write("a.json", json.dumps({name: ROWS}, indent=1, ensure_ascii=False) + "\n")
        assert values(file) == ROWS
        assert values(write("b.json", json.dumps({name: []}))) == []
        assert "c.json:1: is behind the end" in refused(write("c.json", json.dumps({name: ROWS, "version": 2})))
        assert "d.json:1: is not JSON" in refused(write("d.json", json.dumps({name: ROWS})[:-1]))

    def test_an_object_of_another_column_is_a_row(self, write):
        row = {"messages": [{"role": "user", "content": "x"}]}
        assert values(write("a.json", json.dumps(row))) == [row]
        assert values(write("a.jsonl", json.dumps({"data": [row]}))) == [{"data": [row]}]

    @pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
    def test_separated_values(self, name, mark, write):
        file = write(name, f'prompt{mark}completion\n"a\na"{mark}"say ""b"""\n\nc{mark}\n')
        assert values(file) == [{"prompt": "a\na", "completion": 'say "b"'}, {"prompt": "c", "completion": ""}]
        assert lines(file) == [2, 5]

    def test_text_is_a_document_a_line_or_a_file(self, write):
        file = write("a.txt", "one \n\ntwo\r\n")
        assert values(file) == [{"text": "one "}, {"text": "two"}]
        assert lines(file) == [1, 3]
        assert values(file, documents=True) == [{"text": "one \n\ntwo\n"}]

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
    def test_a_byte_order_mark_and_windows_lines(self, name, write):
        rows = {"a.jsonl": '{"text": "x"}\n{"text": "y"}\n', "a.json": '[{"text": "x"},\n{"text": "y"}]\n'}
        text = rows.get(name, "text\nx\ny\n" if name == "a.csv" else "x\ny\n")
        file = write(name, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        assert values(file) == [{"text": "x"}, {"text": "y"}]

    @pytest.mark.parametrize("content", [b"", b"\n\n \t\n", b"\xef\xbb\xbf"])
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
    def test_nothing_is_no_row(self, name, content, write):
        if name == "a.csv" and content.isspace():
            content = b"\n\n"
        assert values(write(name, content)) == []

    def test_an_empty_list_is_no_row(self, write):
        assert values(write("a.json", " [ ]\n")) == []


class TestPackedFiles:
    PACK: ClassVar = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    }

    @pytest.mark.parametrize("packing", PACK)
    def test_of_text(self, packing, write):
        text = json_lines(ROWS * 1000).encode()
        assert values(write(f"a.jsonl{packing}", self.PACK[packing](text))) == ROWS * 1000
        listed = json.dumps(ROWS).encode()
        assert values(write(f"a.json{packing}", self.PACK[packing](listed))) == ROWS
        assert values(write(f"a.csv{packing.upper()}", self.PACK[packing](b"text\nx\n"))) == [{"text": "x"}]

    @pytest.mark.parametrize("packing", PACK)
    def test_of_parts_behind_one_another(self, packing, write):
        one, two = (self.PACK[packing](json_lines([row]).encode()) for row in ROWS[:2])
        assert values(write(f"a.jsonl{packing}", one + two)) == ROWS[:2]

    @pytest.mark.parametrize("packing", PACK)
    def test_of_tables(self, packing, write, tmp_path):
        pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
        packed = self.PACK[packing]((tmp_path / "a.parquet").read_bytes())
        assert values(write(f"b.parquet{packing}", packed)) == [{"text": "a"}, {"text": "b"}]

    @pytest.mark.parametrize("packing", PACK)
    def test_cut_off(self, packing, write):
        rows = [{"text": os.urandom(500).hex()} for _ in range(300)]
        packed = self.PACK[packing](json_lines(rows).encode())
        file = write(f"a.jsonl{packing}", packed[: len(packed) // 2])
        assert f"a.jsonl{packing}: is damaged" in refused(file)

    @pytest.mark.parametrize("packing", PACK)
    def test_not_packed_at_all(self, packing, write):
        assert f"a.jsonl{packing}: is damaged, or not what its ending says" in refused(
            write(f"a.jsonl{packing}", json_lines(ROWS))
        )


class TestTables:
    TABLE = pa.table({"text": [f"t{i}" for i in range(700)], "n": [{"a": [i]} for i in range(700)]})

    def expected(self):
        return [{"text": f"t{i}", "n": {"a": [i]}} for i in range(700)]

    def test_parquet(self, tmp_path):
        pq.write_table(self.TABLE, tmp_path / "a.parquet", row_group_size=300)
        assert values(tmp_path / "a.parquet") == self.expected()
        assert lines(tmp_path / "a.parquet") == list(range(1, 701))

    @pytest.mark.parametrize("kind", ["file", "stream"])
    def test_arrow(self, kind, tmp_path):
        make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, make(sink, self.TABLE.schema) as writer:
            writer.write_table(self.TABLE, max_chunksize=300)
        assert values(tmp_path / "a.arrow") == self.expected()

    @pytest.mark.parametrize("content", [b"", b"PAR1", b'{"text": "x"}\n', os.urandom(2000)])
    def test_what_is_no_table(self, content, write):
        assert "a.parquet: is not Parquet" in refused(write("a.parquet", content))
        assert "a.arrow: " in refused(write("a.arrow", content))

    def test_a_table_that_is_cut_off(self, tmp_path, write):
        pq.write_table(self.TABLE, tmp_path / "a.parquet")
        whole = (tmp_path / "a.parquet").read_bytes()
        assert "b.parquet: is not Parquet" in refused(write("b.parquet", whole[:-20]))

    def test_two_columns_of_one_name(self, tmp_path):
        pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"]), tmp_path / "a.parquet")
        assert "has the column text more than once" in refused(tmp_path / "a.parquet")

    def test_text_that_is_not_utf8(self, tmp_path):
        broken = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"\xff"]).buffers()[1:]])
        pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
        assert "not UTF-8" in refused(tmp_path / "a.parquet")


class TestBadLines:
    """A line that is no row, behind which others are read."""

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b'{"text": "x"', "is not JSON"),
            (b'{"text": "a\0b"}', "is not JSON"),
            (b"\0\0\0\0", "is not JSON"),
            (b'{"text": "caf\xe9"}', "is not UTF-8 text"),
            (b"[" * 200_000, "is not JSON"),
            (b'{"a":' * 200_000, "is not JSON"),
            (b'{"n": ' + b"9" * 5000 + b"}", "is not JSON"),
            (b"[1, 2]", "is a list, not an object"),
            (b"null", "is null, not an object"),
            (b"NaN", "is a number, not an object"),
            (b'{"a": 1} {"a": 2}', "is not JSON"),
        ],
    )
    def test_of_json_lines(self, line, reason, write):
        file = write("a.jsonl", b'{"text": "x"}\n' + line + b'\n{"text": "y"}\n')
        assert values(file) == [{"text": "x"}, f"a.jsonl:2: {reason}", {"text": "y"}]
        with pytest.raises(ConfigError, match=r"a\.jsonl:2"):
            list(read.read(file))

    def test_say_what_is_wrong_and_how_to_go_on(self, write):
        (bad,) = read.each(write("a.jsonl", '{"n": ' + "9" * 5000 + "}\n"))
        assert isinstance(bad, BadRow)
        assert "4300 digits" in bad.problem.message
        assert bad.problem.fix.endswith("data.on_bad_row=skip")
        (bad,) = read.each(write("b.jsonl", '{"a":' * 200_000))
        assert isinstance(bad, BadRow)
        assert "too deep" in bad.problem.message

    def test_of_a_list(self, write):
        assert values(write("a.json", '[{"a": 1},\n3,\n{"a": 2}]')) == [
            {"a": 1}, "a.json:2: is a number, not an object", {"a": 2}
        ]  # fmt: skip

    def test_of_csv(self, write):
        file = write("a.csv", "a,b\n1,2\n3\n4,5,6\n7,8\n")
        assert values(file) == [
            {"a": "1", "b": "2"},
            "a.csv:3: has fewer cells than the first line has names",
            "a.csv:4: has more cells than the first line has names",
            {"a": "7", "b": "8"},
        ]

    def test_of_text(self, write):
        assert values(write("a.txt", b"x\ncaf\xe9\ny\n")) == [
            {"text": "x"},
            "a.txt:2: is not UTF-8 text",
            {"text": "y"},
        ]
        assert values(write("b.txt", b"x\ncaf\xe9\n"), documents=True) == ["b.txt:2: is not UTF-8 text"]


class TestOddValues:
    """What JSON allows or Python reads, and only the use of it can judge."""

    def test_are_read(self, write):
        file = write("a.jsonl", '{"a": NaN, "b": -Infinity, "c": "\\ud800", "d": "\\u0000"}\n{"a": 1, "a": 2}\n')
        (first, second) = read.read(file)
        assert first.value["a"] != first.value["a"]
        assert first.value["c"] == "\ud800"
        assert first.value["d"] == "\0"
        assert second.value == {"a": 2}


class TestDamagedFiles:
    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("a.jsonl", b"PAR1\x15\x04\x15", "a.jsonl: is a Parquet file (.parquet)"),
            ("a.jsonl", b"ARROW1\0\0", "a.jsonl: is an Arrow file"),
            ("a.json", gzip.compress(b"x", mtime=0), "a.json: is packed with gzip (.gz)"),
            ("a.csv", b"PK\x03\x04xx", "a.csv: is a ZIP archive"),
            ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "a.jsonl: is UTF-16 text"),
            ("a.json", '[{"text": "x"}]'.encode("utf-16-le"), "a.json: is UTF-16 text"),
            ("a.csv", "text\nx".encode("utf-16-be"), "a.csv: is UTF-16 text"),
            ("a.json", b'[{"text": "x"},\n{"text": "caf\xe9"}]', "a.json:2: is not UTF-8 text"),
            ("a.csv", b"text\nx\ncaf\xe9\n", "a.csv:3: is not UTF-8 text"),
            ("a.csv", b"a,b,a\n1,2,3\n", "a.csv:1: has the column a more than once"),
            ("a.csv", b'a,b\n1,"2\n', "is not CSV"),
            ("a.json", b"[" * 200_000, "a.json:1: is not JSON: lists and objects inside one another go too deep"),
            ("a.json", b'[{"a": 1}\n,,{"a": 2}]', "a.json:2: is not JSON"),
            ("a.json", b'[{"a": 1},\n]', "a.json:2: is not JSON"),
            ("a.json", b'[{"a": 1},\n{"a": "x]', "a.json:2: is not JSON: Unterminated string starting at at column 7"),
            ("a.json", b'[{"a": ' + b"9" * 5000 + b"}]", "a.json:1: is not JSON: a whole number"),
        ],
    )
    def test_say_so(self, name, content, said, write):
        assert said in refused(write(name, content))

    def test_a_broken_list_is_not_read_to_its_end(self, write, monkeypatch):
        """A syntax error is told from the end of what is in hand, so that the rest of a large file is left alone."""
        monkeypatch.setattr(read, "_CHUNK", 64)
        moves: list[int] = []
        move = read._Window.move
        monkeypatch.setattr(
            read._Window, "move", lambda self, at, *, begun: (moves.append(at), move(self, at, begun=begun))
        )
        file = write("a.json", '[{"a": 1},\n{"a" 1},\n' + '{"a": 2},\n' * 10_000 + '{"a": 3}]')
        assert "a.json:2: is not JSON: Expecting ':' delimiter at column 6" in refused(file)
        assert len(moves) < 5

    @pytest.mark.parametrize("chunk", [3, 50, 1 << 20])
    def test_the_column_is_right_in_a_list_on_one_line(self, chunk, write, monkeypatch):
        monkeypatch.setattr(read, "_CHUNK", chunk)
        text = '[{"text": "abcdef"}, {"text": "ghi"}, {"text" 3}]'
        with pytest.raises(json.JSONDecodeError) as caught:
            json.loads(text)
        assert f"a.json:1: is not JSON: {caught.value.msg} at column {caught.value.colno}" in refused(
            write("a.json", text)
        )

    def test_a_million_columns(self, write):
        file = write("a.csv", ",".join(f"c{i}" for i in range(1_000_000)) + "\n" + "," * 999_999 + "\n")
        began = time.process_time()
        assert "a.csv:1: has more than 10,000 columns" in refused(file)
        assert time.process_time() - began < 1
        with pytest.raises(ConfigError, match="more than 10,000 columns"):
            read.head(str(file), 1000, 8 << 20)

    def test_a_million_cells_in_one_row(self, write):
        file = write("a.csv", "a,b\n" + "," * 999_999 + "\n1,2\n")
        assert values(file) == ["a.csv:2: has more cells than the first line has names", {"a": "1", "b": "2"}]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_file_that_may_not_be_read(self, write):
        file = write("a.jsonl", json_lines(ROWS))
        file.chmod(0)
        assert "a.jsonl: cannot be read: Permission denied" in refused(file)


class TestMemory:
    """A reader holds a piece of its file, whatever its size."""

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.json.gz"])
    def test_does_not_grow_with_the_file(self, name, tmp_path):
        file = tmp_path / name
        with (gzip.open if name.endswith(".gz") else open)(file, "wt") as out:
            rows = (json.dumps({"text": f"{i} " + "x" * 1000}) for i in range(20_000))
            if "json" not in name or name.endswith("l"):
                out.write("text\n" if name == "a.csv" else "")
                out.writelines(f"{i} {'x' * 1000}\n" if name == "a.csv" else row + "\n" for i, row in enumerate(rows))
            else:
                out.write("[" + next(rows))
                out.writelines(",\n" + row for row in rows)
                out.write("]")
        tracemalloc.start()
        count = sum(1 for _ in read.read(file))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 20_000
        assert peak < 8 << 20  # of 20 MB

    def test_a_long_line(self, write):
        row = {"text": "x" * 10_000_000}
        assert values(write("a.jsonl", json_lines([row, ROWS[0]]))) == [row, ROWS[0]]
        assert values(write("a.json", json.dumps([row, ROWS[0]]))) == [row, ROWS[0]]


class TestHead:
    def test_ends_at_rows_or_bytes(self, write):
        file = str(write("a.jsonl", json_lines([{"text": "x" * 1000}] * 1000)))
        rows, cut_off = read.head(file, 10, 1 << 30)
        assert (len(rows), cut_off) == (10, False)
        rows, cut_off = read.head(file, 1000, 100_000)
        assert cut_off
        assert 0 < len(rows) < 300
        assert all(isinstance(row, Row) for row in rows)
        assert read.head(str(write("b.jsonl", "")), 10, 100) == ([], False)

    def test_a_long_line_is_not_waited_for(self, write):
        for name, text in [
            ("a.jsonl", '{"text": "%s"}'),
            ("a.json", '[{"text": "%s"}]'),
            ("a.csv", 'text\n"%s"'),
            ("a.txt", "%s"),
        ]:
            assert read.head(str(write(name, text % ("x" * 10_000_000))), 10, 1 << 20) == ([], True)


def test_endings():
    assert storage.ending("a/b.c/rows.jsonl.gz") == (".jsonl", ".gz")
    assert storage.ending("s3://bucket/v1.2/rows.Parquet") == (".parquet", "")
    assert storage.ending("https://host/rows.csv.zst?download=true&x=.json") == (".csv", ".zst")
    assert storage.ending("zip://rows.jsonl::https://host/a.zip") == (".jsonl", "")
    assert storage.ending("README") == ("", "")
