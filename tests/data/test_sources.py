"""What paths name: files, folders, globs, addresses, saved data sets, names of a dataset_info.json, sets on hubs."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftrun.data import Data, Source, digests, hub, info, places, sources
from ftrun.data.formats import understand
from ftrun.data.rows import Conversation, Feedback, Pair, Row, Text
from ftrun.errors import ConfigError, Problem

ROW = {"text": "one"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    hub.revision.cache_clear()


@pytest.fixture
def memory():
    """A file system at memory:// that is empty before and after."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def train(**keys: Any) -> list[sources.Opened]:
    return sources.resolve(Data(**keys)).train


def one(path: str, **keys: Any) -> sources.Opened:
    (opened,) = train(path=path, **keys)
    return opened


def names(opened: sources.Opened) -> list[str]:
    return [Path(file).name for file in opened.files]


def values(opened: sources.Opened) -> list[Any]:
    return [row.value for row in sources.read(opened)]


def refused(kind: str | None = None, **keys: Any) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        sources.resolve(Data(**keys), kind)
    return list(caught.value.problems)


def said(**keys: Any) -> str:
    (problem,) = refused(**keys)
    return str(problem)


class TestLocalPaths:
    def test_a_file_a_folder_and_a_glob(self, write):
        for name in ("here/b.jsonl", "here/a.csv", "here/deep/c.json.gz", "here/.hidden.jsonl", "here/.git/d.jsonl"):
            write(name, [ROW])
        write("here/README.md", "no rows")
        write("here/dataset_info.json", "{}")
        assert names(one("here")) == ["a.csv", "b.jsonl", "c.json.gz"]
        assert names(one("here/*.jsonl")) == ["b.jsonl"]
        assert names(one("here/**/*.gz")) == ["c.json.gz"]
        assert values(one("here/b.jsonl")) == [ROW]
        assert one("here").name == "here"

    def test_rows_and_weight(self, write):
        write("a.jsonl", [ROW] * 9)
        first, second = train(sources=[Source(path="a.jsonl", rows=2, weight=3.0), Source(path="a.jsonl")])
        assert (len(values(first)), first.weight, first.rows) == (2, 3.0, 2)
        assert len(values(second)) == 9
        assert (first.name, second.name) == ("a.jsonl", "a.jsonl (2)")

    def test_what_a_folder_holds_to_evaluate_on(self, write):
        for name in ("train", "test", "validation-00000-of-00001", "tests_passed", "dev_tools"):
            write(f"here/{name}.jsonl", [ROW])
        found = sources.resolve(Data(path="here"))
        assert names(found.train[0]) == ["dev_tools.jsonl", "tests_passed.jsonl", "train.jsonl"]
        assert names(found.eval[""][0]) == ["test.jsonl", "validation-00000-of-00001.jsonl"]
        assert sources.resolve(Data(path="here", eval_size=0.1)).eval == {}

    def test_evaluation_sets(self, write):
        for name in ("a.jsonl", "here/train.jsonl", "here/test.jsonl"):
            write(name, [ROW])
        found = sources.resolve(Data(path="here", eval_sets={"math": "a.jsonl", "all": "here"}, format="text"))
        assert list(found.eval) == ["", "math", "all"]
        assert names(found.eval["math"][0]) == ["a.jsonl"]
        assert sorted(names(found.eval["all"][0])) == ["test.jsonl", "train.jsonl"]
        assert found.eval["math"][0].format == "text"
        found = sources.resolve(Data(path="here", eval_path="a.jsonl"))
        assert [names(opened) for opened in found.eval[""]] == [["a.jsonl"]]
        assert "data.eval_sets: 'a b'" in said(path="here", eval_sets={"a b": "a.jsonl"})
        assert "data.eval_sets.x: there is no file b.jsonl" in said(path="here", eval_sets={"x": "b.jsonl"})

    def test_splits_of_a_folder(self, write):
        for name in ("train.jsonl", "test.jsonl", "extra-00000-of-00002.jsonl", "extra-00001-of-00002.jsonl"):
            write(f"here/{name}", [ROW])
        assert names(one("here", split="test")) == ["test.jsonl"]
        assert names(one("here", split="extra")) == ["extra-00000-of-00002.jsonl", "extra-00001-of-00002.jsonl"]
        assert names(one("here", split="train")) == ["train.jsonl"]
        problem = said(path="here", split="tset")
        assert "data.split: here has no split tset; did you mean test" in problem
        assert "data.split: here/test.jsonl is no folder" in said(path="here/test.jsonl", split="test")
        assert names(one("here/test.jsonl", split="train")) == ["test.jsonl"]

    def test_a_subset_is_a_folder(self, write):
        write("here/physics/train.jsonl", [ROW])
        write("here/maths/train.jsonl", [ROW])
        assert len(one("here", subset="maths").files) == 1
        assert "data.subset: here has no folder music" in said(path="here", subset="music")

    def test_documents(self, write):
        write("books/one.txt", "a\nb\n")
        write("books/two.md", "c\n")
        write("books/three.py", "d\n")
        write("books/empty.txt", "")
        assert values(one("documents:books")) == [{"text": text} for text in ("", "a\nb\n", "c\n")]
        assert values(one("documents:books/*.py")) == [{"text": "d\n"}]
        assert values(one("books/one.txt")) == [{"text": "a"}, {"text": "b"}]

    def test_what_is_not_there(self, write, tmp_path):
        write("rows.jsonl", [ROW])
        (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
        assert "data.path: there is no file row.jsonl; did you mean rows.jsonl" in said(path="row.jsonl")
        assert "data.path: link.jsonl is a link to gone.jsonl, which is not there" in said(path="link.jsonl")
        assert "data.path: link.jsonl is a link" in said(path="link*")
        assert "is a link to gone.jsonl" in said(path=str(tmp_path))
        assert "no file matches *.csv" in said(path="*.csv")
        assert "is of no kind that is read" in said(path=str(write("a.docx", "x")))
        first, second = refused(sources=[Source(path="a.jsonl"), Source(path="rows.jsonl"), Source(path="b.jsonl")])
        assert (first.key, second.key) == ("data.sources.0.path", "data.sources.2.path")

    def test_a_folder_called_like_a_file(self, write):
        write("x.jsonl/a.jsonl", [ROW])
        assert names(one("x.jsonl")) == ["a.jsonl"]
        write("here/y.csv/b.jsonl", [ROW])
        assert names(one("here")) == ["b.jsonl"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_what_may_not_be_read(self, write):
        write("here/a.jsonl", [ROW]).chmod(0)
        assert "a.jsonl cannot be read: permission denied" in said(path="here")
        write("there/deep/a.jsonl", [ROW]).parent.chmod(0)
        assert "deep: cannot be read" in said(path="there")

    def test_what_the_system_says_may_not_be_read(self, write, monkeypatch):
        write("here/deep/a.jsonl", [ROW])
        monkeypatch.setattr(os, "access", lambda _file, _mode: False)
        assert "a.jsonl cannot be read: permission denied" in said(path="here")

    def test_demos(self):
        assert names(one("demo:identity")) == ["train.jsonl"]
        assert one("demo:identity").name == "demo:identity"
        assert "did you mean identity" in said(path="demo:identit")


class TestSavedToDisk:
    def test_a_data_set(self, tmp_path):
        made = datasets.Dataset.from_list([{"text": f"t{i}"} for i in range(50)])
        made.save_to_disk(tmp_path / "saved", num_shards=12)
        pq.write_table(pa.table({"text": ["x"]}), tmp_path / "saved" / "other.parquet")
        (tmp_path / "saved" / "cache-0123.arrow").write_bytes(b"left by a map")
        assert [value["text"] for value in values(one("saved"))] == [f"t{i}" for i in range(50)]

    def test_the_order_is_that_of_its_state(self, tmp_path):
        datasets.Dataset.from_list([{"text": f"t{i}"} for i in range(4)]).save_to_disk(tmp_path / "saved", num_shards=2)
        state = json.loads((tmp_path / "saved" / "state.json").read_text())
        state["_data_files"].reverse()
        (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
        assert [value["text"] for value in values(one("saved"))] == ["t2", "t3", "t0", "t1"]

    def test_several_splits(self, tmp_path):
        splits = {
            name: datasets.Dataset.from_list([{"text": name}]) for name in ("train_sft", "test_sft", "validation")
        }
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
        found = sources.resolve(Data(path="saved"))
        assert values(found.train[0]) == [{"text": "train_sft"}]
        assert values(found.eval[""][0]) == [{"text": "test_sft"}, {"text": "validation"}]
        assert values(one("saved", split="test_sft")) == [{"text": "test_sft"}]
        assert values(one("saved", split="train")) == [{"text": "train_sft"}]

    def test_of_several_splits_train_is_the_one_that_is_trained_on(self, tmp_path):
        splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test", "unsupervised")}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
        assert values(one("saved")) == [{"text": "train"}]
        assert values(one("saved", split="unsupervised")) == [{"text": "unsupervised"}]


class TestAddresses:
    def test_files_folders_and_globs(self, memory):
        memory.pipe("/bucket/b.jsonl", b'{"text": "b"}\n')
        memory.pipe("/bucket/deep/a.csv", b"text\na\n")
        memory.pipe("/bucket/test.jsonl", b'{"text": "t"}\n')
        memory.pipe("/bucket/README.md", b"x")
        assert values(one("memory://bucket/b.jsonl")) == [{"text": "b"}]
        found = sources.resolve(Data(path="memory://bucket"))
        assert values(found.train[0]) == [{"text": "b"}, {"text": "a"}]
        assert values(found.eval[""][0]) == [{"text": "t"}]
        assert values(one("memory://bucket/*.jsonl")) == [{"text": "b"}, {"text": "t"}]
        assert values(one("memory://bucket", subset="deep")) == [{"text": "a"}]
        assert sources.size(one("memory://bucket/b.jsonl")) is None

    def test_packed_files_and_tables(self, memory, tmp_path):
        import gzip

        memory.pipe("/a.json.gz", gzip.compress(b'[{"text": "x"}]'))
        memory.pipe("/a.json.zst", pa.compress(b'[{"text": "x"}]', "zstd", asbytes=True))
        pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
        memory.pipe("/a.parquet", (tmp_path / "a.parquet").read_bytes())
        for name in ("a.json.gz", "a.json.zst", "a.parquet"):
            assert values(one(f"memory://{name}")) == [{"text": "x"}]
        memory.pipe("/b.json.gz", gzip.compress(b'[{"text": "x"}]')[:12])
        with pytest.raises(ConfigError, match="is damaged"):
            values(one("memory://b.json.gz"))

    def test_files_of_this_machine(self, write):
        assert values(one(f"file://{write('a.jsonl', [ROW])}")) == [ROW]

    @pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp")])
    def test_a_package_that_is_missing(self, protocol, package, monkeypatch):
        monkeypatch.setitem(sys.modules, package, None)
        problem = said(path=f"{protocol}://bucket/a.jsonl")
        assert f"data.path: {protocol}:// needs the package {package}" in problem
        assert f"pip install {package}" in problem

    def test_what_cannot_be_reached(self, memory):
        assert "there is no file of rows at memory://a.jsonl" in said(path="memory://a.jsonl")
        assert "nothing opens addresses that begin with s4://" in said(path="s4://bucket/a.jsonl")
        memory.pipe("/a.docx", b"x")
        assert "memory:///a.docx is of no kind" in said(path="memory://a.docx")

    def test_a_connection_that_breaks_while_rows_are_read(self, memory, monkeypatch):
        memory.pipe("/a.jsonl", b'{"text": "b"}\n')
        opened = one("memory://a.jsonl")
        monkeypatch.setattr(type(memory), "open", lambda *_a, **_k: (_ for _ in ()).throw(RuntimeError("line is down")))
        with pytest.raises(ConfigError, match="cannot be read: line is down"):
            values(opened)


LISTED = {
    "mine": {"file_name": "mine.json", "columns": {"prompt": "q"}},
    "chat": {
        "file_name": "chat.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns"},
        "tags": {"user_tag": "Mensch", "assistant_tag": "Maschine"},
    },
    "openai": {"file_name": "openai.json", "formatting": "openai", "tags": {"user_tag": "asker"}},
    "pairs": {"file_name": "pairs.json", "ranking": True, "columns": {"chosen": "good", "rejected": "bad"}},
    "liked": {"file_name": "liked.json", "columns": {"kto_tag": "ok"}, "num_samples": 1},
    "plain": {"file_name": "plain.txt", "columns": {"prompt": "text"}},
    "folder": {"file_name": "folder", "split": "train"},
    "cloud": {"cloud_file_name": "memory://cloud.jsonl"},
    "hub": {"hf_hub_url": "org/name", "ms_hub_url": "other/name", "subset": "en", "split": "test", "folder": "data"},
    "ms": {"ms_hub_url": "org/name"},
    "script": {"script_url": "code"},
    "nowhere": {"formatting": "alpaca"},
    "wrong": {"file_nam": "x", "file_name": "mine.json", "formatting": "sharegtp", "columns": {"prompts": "q"}},
}


class TestDatasetInfo:
    @pytest.fixture(autouse=True)
    def _listed(self, write):
        write("lf/dataset_info.json", json.dumps(LISTED))
        write("lf/mine.json", json.dumps([{"q": "2+2?", "output": "4", "input": "now"}]))
        turns = [{"from": "Mensch", "value": "Hi"}, {"from": "Maschine", "value": "Hello."}]
        write("lf/chat.json", json.dumps([{"turns": turns}]))
        messages = [{"role": "asker", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
        write("lf/openai.json", json.dumps([{"messages": messages}]))
        write("lf/pairs.json", json.dumps([{"instruction": "Hi", "good": "Hello.", "bad": "Go."}]))
        write("lf/liked.json", json.dumps([{"instruction": "Hi", "output": "Hello.", "ok": True}] * 2))
        write("lf/plain.txt", "a\nb\n")
        write("lf/folder/a.jsonl", [ROW])

    def item(self, name: str, kind: str) -> Any:
        (opened,) = sources.resolve(Data(path=name, dataset_info="lf"), kind).train
        (row, *_) = sources.read(opened)
        assert isinstance(row, Row)
        (item,) = understand(row, kind, opened.format, opened.columns, opened.tags)
        return item

    @pytest.mark.parametrize("place", ["lf", "lf/dataset_info.json"])
    def test_names_of_columns_that_are_not_listed_keep_their_defaults(self, place):
        opened = one("mine", dataset_info=place)
        assert (opened.format, opened.columns, opened.name) == ("alpaca", {"instruction": "q"}, "mine")
        item = self.item("mine", "conversations")
        assert isinstance(item, Conversation)
        assert [message["content"] for message in item.messages] == ["2+2?\nnow", "4"]

    @pytest.mark.parametrize("name", ["chat", "openai"])
    def test_tags_that_are_not_listed_keep_their_defaults(self, name):
        item = self.item(name, "conversations")
        assert [(m["role"], m["content"]) for m in item.messages] == [("user", "Hi"), ("assistant", "Hello.")]

    def test_pairs_feedback_and_texts(self):
        pair, liked, text = self.item("pairs", "pairs"), self.item("liked", "feedback"), self.item("plain", "texts")
        assert isinstance(pair, Pair)
        assert [pair.prompt[0]["content"], pair.chosen[0]["content"], pair.rejected[0]["content"]] == [
            "Hi",
            "Hello.",
            "Go.",
        ]
        assert isinstance(liked, Feedback)
        assert liked.good
        assert isinstance(text, Text)
        assert text.text == "a"
        assert len(values(one("liked", dataset_info="lf"))) == 1

    def test_other_places(self, memory):
        memory.pipe("/cloud.jsonl", b'{"text": "c"}\n')
        assert values(one("cloud", dataset_info="lf")) == [{"text": "c"}]
        assert values(one("folder", dataset_info="lf")) == [ROW]
        on_hub = one("hub", dataset_info="lf").hub
        assert on_hub == hub.Hub("data.path", "org/name", "en", "test", "data")
        assert one("ms", dataset_info="lf").hub == hub.Hub("data.path", "ms://org/name")

    def test_what_is_typed_goes_first(self):
        opened = one("liked", dataset_info="lf", rows=2, columns={"output": "instruction"}, format="alpaca")
        assert (opened.rows, opened.format) == (2, "alpaca")
        assert opened.columns == {"label": "ok", "output": "instruction"}

    def test_paths_may_still_be_paths(self):
        found = train(dataset_info="lf", sources=[Source(path="lf/mine.json"), Source(path="mine")])
        assert found[0].files == found[1].files

    def test_what_is_wrong_in_it(self, write):
        assert "data.path: data.dataset_info has no data set mime; did you mean mine" in said(
            path="mime", dataset_info="lf"
        )
        assert "which is not run" in said(path="script", dataset_info="lf")
        assert "does not say where" in said(path="nowhere", dataset_info="lf")
        problems = "\n".join(map(str, refused(path="wrong", dataset_info="lf")))
        for part in ("the key file_nam; did you mean file_name", "formatting 'sharegtp'; did you mean sharegpt",
                     "columns has no name prompts; did you mean prompt"):  # fmt: skip
            assert part in problems
        assert (
            "data.dataset_info: nothing.json cannot be read"
            in refused(path="x", dataset_info="nothing.json")[0].__str__()
        )
        write("bad.json", "{")
        assert "bad.json: is not JSON" in str(refused(path="x", dataset_info="bad.json")[0])
        write("list.json", "[]")
        assert "list.json: is not a JSON object" in str(refused(path="x", dataset_info="list.json")[0])

    def test_the_names_of_tags_are_those_that_formats_takes(self):
        turns = [{"r": "U", "c": "x"}, {"r": "F", "c": '{"name": "f", "arguments": {}}'}, {"r": "O", "c": "y"},
                 {"r": "A", "c": "z"}]  # fmt: skip
        tags = dict(zip(info.TAGS, ("r", "c", "U", "A", "O", "F", "S"), strict=True))
        (item,) = understand(Row({"conversations": turns}, "x", 1), "conversations", "auto", None, tags)
        assert isinstance(item, Conversation)
        assert [message["role"] for message in item.messages] == ["user", "assistant", "tool", "assistant"]


class TestHubs:
    @pytest.fixture
    def online(self, monkeypatch):
        """A hub that has one data set; returns what was asked of it."""
        asked: list[dict[str, Any]] = []
        made = datasets.Dataset.from_list([{"text": f"t{i}"} for i in range(5)])

        def load(**words):
            asked.append(words)
            if words["split"] not in ("train", "test_sft"):
                raise ValueError(f"Bad split: {words['split']}")
            return made.to_iterable_dataset() if words["streaming"] else made

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_a, **_k: ["train", "test_sft"])
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_a, **_k: SimpleNamespace(sha="c0ffee"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        return asked

    def test_rows_are_streamed_at_the_commit_that_the_identity_names(self, online):
        opened = one("org/name", rows=2, subset="en")
        assert values(opened) == [{"text": "t0"}, {"text": "t1"}]
        assert online == [
            {
                "path": "org/name",
                "name": "en",
                "data_dir": None,
                "revision": "c0ffee",
                "split": "train",
                "streaming": True,
            }
        ]
        assert (opened.name, opened.files, sources.size(opened)) == ("org/name", (), None)

    def test_the_identity_is_of_the_commit_and_remembered_for_offline(self, online, monkeypatch):
        opened = one("org/name")
        known = sources.identity(opened)
        assert (
            known != sources.identity(one("org/name", subset="en")) != sources.identity(one("org/name", split="test"))
        )

        def fail(*words, **more):
            raise ConnectionError("offline")

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
        hub.revision.cache_clear()
        assert sources.identity(opened) == known
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_a, **_k: SimpleNamespace(sha="decaf"))
        hub.revision.cache_clear()
        assert sources.identity(opened) != known

    def test_offline_the_copy_of_this_machine_is_read(self, online, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert len(values(one("org/name"))) == 5
        assert online[0]["streaming"] is False

    def test_the_split_to_evaluate_on(self, online):
        found = sources.resolve(Data(path="org/name", eval_path="org/name")).eval[""]
        assert len(values(found[0])) == 5
        assert online[0]["split"] == "test_sft"

    def test_what_is_not_there(self, online, monkeypatch):
        with pytest.raises(ConfigError, match="org/name has no split trian; did you mean train"):
            values(one("org/name", split="trian"))
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_a, **_k: ["train"])
        with pytest.raises(ConfigError, match=r"data\.eval_path: org/name has no split to evaluate on, only train"):
            values(sources.resolve(Data(path="org/name", eval_path="org/name")).eval[""][0])

        def fail(**words):
            raise ConnectionError("no route to the hub\nmore")

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(
            ConfigError, match=r"data\.sources\.0\.path: there is no file org/name.*: no route to the hub\n"
        ):
            values(train(sources=[Source(path="org/name")])[0])

    def test_modelscope_needs_its_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "modelscope", None)
        with pytest.raises(ConfigError, match=r"(?s)needs the package modelscope.*pip install"):
            values(one("ms://org/name"))

    def test_modelscope(self, monkeypatch):
        """The package is not here; what stands in for it has the one call that is made."""
        asked = []

        def load(name, **words):
            asked.append((name, words["split"], words["subset_name"]))
            return [{"text": "x"}]

        package, module = ModuleType("modelscope"), ModuleType("modelscope.msdatasets")
        module.MsDataset = SimpleNamespace(load=load)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "modelscope", package)
        monkeypatch.setitem(sys.modules, "modelscope.msdatasets", module)
        opened = one("ms://org/name", subset="en")
        assert values(opened) == [{"text": "x"}]
        assert asked == [("org/name", "train", "en")]
        known = sources.identity(opened)
        assert known == sources.identity(opened)
        module.MsDataset = SimpleNamespace(load=lambda *_a, **_k: [{"text": "y"}])  # type: ignore[attr-defined]
        assert sources.identity(opened) != known


class TestIdentity:
    def test_is_of_the_bytes_and_their_order(self, write):
        write("a.jsonl", [ROW])
        write("b.jsonl", [{"text": "two"}])
        write("c.jsonl", [ROW])
        write("d.txt", json.dumps(ROW) + "\n")
        a, b, c, d = (sources.identity(one(name)) for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.txt"))
        assert a == c
        assert len({a, b, d, sources.identity(one("documents:d.txt"))}) == 4  # what is read from equal bytes differs
        assert sources.identity(one("*.jsonl")) not in (a, b)
        ordered = one("*.jsonl")
        turned = sources.Opened("x", ordered.files[::-1])
        assert sources.identity(ordered) == sources.identity(turned)  # a b a

    def test_order_matters(self, write):
        files = str(write("a.jsonl", [ROW])), str(write("b.jsonl", [{"text": "two"}]))
        assert sources.identity(sources.Opened("x", files)) != sources.identity(sources.Opened("x", files[::-1]))

    def test_an_unchanged_file_is_read_once(self, write, monkeypatch):
        file = write("a.jsonl", [ROW])
        os.utime(file, ns=(1, time.time_ns() - 10**9 + 1))
        opened = one("a.jsonl")
        known = sources.identity(opened)
        with monkeypatch.context() as patched:
            patched.setattr(digests, "_sha256", lambda _content: pytest.fail("it is read again"))
            assert sources.identity(opened) == known
        write("a.jsonl", [{"text": "eno"}])
        assert sources.identity(opened) != known

    def test_a_file_that_was_written_just_now_is_not_trusted(self, write, monkeypatch):
        """A second change within one tick of the clock would leave the time as it is."""
        file = write("a.jsonl", [ROW])
        for changed in (time.time_ns() + 10**9 + 1, int(time.time()) * 10**9):
            os.utime(file, ns=(changed, changed))
            known = digests.digest(str(file))
            file.write_text(json.dumps({"text": "eno"}) + "\n")
            os.utime(file, ns=(changed, changed))
            assert digests.digest(str(file)) != known
            write("a.jsonl", [ROW])

    def test_torn_lines_and_several_writers(self, write, tmp_path):
        file = write("a.jsonl", [ROW])
        os.utime(file, ns=(1, 1))
        known = digests.digest(str(file))
        cache = tmp_path / "cache" / "digests.jsonl"
        with cache.open("ab") as out:
            out.write(b'["/elsewhere", [1, 2, "abc"]]\n[3]\n"x"\n[["a"], 1]\n["/torn", [1, 2')
        assert digests.digest(str(file)) == known
        assert digests.recall("/elsewhere") == [1, 2, "abc"]

    def test_a_cache_that_cannot_be_written_costs_time_only(self, write, monkeypatch):
        file = write("a.jsonl", [ROW])
        os.utime(file, ns=(1, 1))
        monkeypatch.setenv("FTRUN_CACHE", str(write("in_the_way", "x") / "cache"))
        assert digests.digest(str(file)) == digests.digest(str(file))

    def test_of_addresses(self, memory, monkeypatch):
        memory.pipe("/a.jsonl", b'{"text": "b"}\n')
        known = sources.identity(one("memory://a.jsonl"))
        memory.pipe("/a.jsonl", b'{"text": "c"}\n')
        assert sources.identity(one("memory://a.jsonl")) != known
        monkeypatch.setattr(digests, "_sha256", lambda _content: pytest.fail("it is downloaded"))
        tags = iter(["x", "x", "y"])
        monkeypatch.setattr(
            type(memory), "info", lambda _self, _path, **_k: {"ETag": next(tags), "size": 1, "type": "file"}
        )
        opened = sources.Opened("a", ("memory://a.jsonl",))
        first, second, third = (sources.identity(opened) for _ in range(3))
        assert first == second != third


def test_size(write):
    write("a.jsonl", "{}\n" * 5)
    write("b.jsonl", "{}\n" * 2)
    assert sources.size(one("*.jsonl")) == 21


def test_absolute_paths(write, tmp_path):
    write("lf/dataset_info.json", '{"mine": {}}')
    write("here/a.jsonl", [ROW])
    data = Data(
        path="here", eval_path="documents:b", eval_sets={"x": "~/c.jsonl", "y": "mine"}, dataset_info="lf",
        media_folder="media", sources=[Source(path=path) for path in ("org/name", "s3://b/c", "demo:text", "ms://o/n")],
    )  # fmt: skip
    sources.make_absolute(data)
    assert data.path == str(tmp_path / "here")
    assert data.eval_path == f"documents:{tmp_path}/b"
    assert data.eval_sets == {"x": str(Path.home() / "c.jsonl"), "y": "mine"}
    assert data.dataset_info == str(tmp_path / "lf")
    assert data.media_folder == str(tmp_path / "media")
    assert [source.path for source in data.sources] == ["org/name", "s3://b/c", "demo:text", "ms://o/n"]


@pytest.mark.parametrize(
    ("path", "is_id"),
    [("org/name", True), ("ms://org/name", True), ("name", False), ("a/b.jsonl", False), ("a/b.json.gz", False),
     ("./a", False), ("a/*", False), ("a/b/c", False), ("demo:a/b", False), ("s3://a/b", False), ("here/now", False),
     ("documents:a/b", False)],
)  # fmt: skip
def test_what_is_an_id_on_a_hub(path, is_id, tmp_path):
    (tmp_path / "here" / "now").mkdir(parents=True)
    assert places.is_hub_id(path) is is_id
