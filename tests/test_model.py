"""Where a model is found: the hub's answers, each of which a user can act on."""

from __future__ import annotations

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from ftrun import model
from ftrun.errors import ConfigError
from ftrun.model import Model, Source


@pytest.fixture
def hub(monkeypatch):
    """Answer in the hub's place."""

    def answer(result):
        def model_info(self, repo, *, revision=None, timeout=None):
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)

    return answer


def refusal(cls):
    request = httpx2.Request("GET", "https://huggingface.co/api/models/a/b")
    return cls("no", response=httpx2.Response(404, request=request))


def test_the_commit_is_settled(hub):
    hub(type("Info", (), {"sha": "abc123"}))
    located = model.locate(Model(path="Qwen/Qwen2-0.5B-Instruct"))
    assert (located.source, located.revision) == (Source.hub, "abc123")


@pytest.mark.parametrize(
    ("cls", "key", "words"),
    [
        (errors.RepositoryNotFoundError, "model.path", "no folder a/b here, and no such model on the hub"),
        (errors.GatedRepoError, "model.path", "licence accepted"),
        (errors.RevisionNotFoundError, "model.revision", "has no revision"),
    ],
)
def test_a_refusal_says_what_to_do(hub, cls, key, words):
    hub(refusal(cls))
    with pytest.raises(ConfigError) as caught:
        model.locate(Model(path="a/b", revision="v9"))
    (problem,) = caught.value.problems
    assert problem.key == key
    assert words in problem.message


def test_without_network_the_newest_download_serves(hub, monkeypatch, tmp_path):
    hub(httpx2.ConnectError("no route"))
    config = tmp_path / "snapshots" / "c0ffee" / "config.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(config))
    located = model.locate(Model(path="a/b"))
    assert (located.source, located.revision) == (Source.hub, "c0ffee")


def test_without_network_or_download_it_says_what_to_type(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    hub(httpx2.ConnectError("no route"))
    with pytest.raises(ConfigError, match=r"is not on this machine, and the hub cannot be reached \(ConnectError\)"):
        model.locate(Model(path="some/where"))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("Qwen/Qwen2-0.5B", Source.hub),
        ("gpt2", Source.hub),
        ("builtin:tiny", Source.builtin),
        ("/models/a", Source.folder),
        ("./a/b", Source.folder),
        ("~/a", Source.folder),
        ("models/a/b", Source.folder),
        ("weights.gguf", Source.gguf),
    ],
)
def test_what_a_path_names_is_told_by_its_look(path, kind):
    assert model._kind(Model(path=path)) is kind


def test_a_folder_is_preferred_to_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert model._kind(Model(path="org/name")) is Source.folder
    (tmp_path / "org" / "name" / "run.yaml").touch()
    assert model._kind(Model(path="org/name")) is Source.run


def test_the_manifest_tells_one_version_of_a_folder_from_another(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = model.identity(model.locate(Model(path=str(tmp_path))))
    assert before["files"][0][:2] == ["config.json", 2]
    (tmp_path / "config.json").write_text("{ }")
    assert model.identity(model.locate(Model(path=str(tmp_path)))) != before


@pytest.fixture
def folder(tmp_path):
    """A model's folder, as far as it is looked at without loading it."""
    for name, text in (("config.json", '{"model_type": "llama"}'), ("vocab.json", "{}"), ("pytorch_model.bin", "")):
        (tmp_path / name).write_text(text)
    return tmp_path


def problems(path, **keys) -> list[str]:
    weights = keys.pop("weights", True)
    return [problem.message for problem in model.check(Model(path=str(path), **keys), weights=weights)]


def test_a_folder_with_all_that_is_loaded_passes(folder):
    assert problems(folder) == []
    assert problems(folder, source=Source.folder) == []
    (folder / "pytorch_model.bin").rename(folder / "model-00001-of-00001.safetensors")
    assert len(problems(folder)) == 1
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    assert problems(folder) == []


def test_a_tokenizer_is_enough_where_no_weights_are_needed(folder):
    (folder / "pytorch_model.bin").unlink()
    assert len(problems(folder)) == 1
    assert problems(folder, weights=False) == []


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "tokenizer_config.json", "vocab.txt", "tekken.json", "qwen.tiktoken"]
)
def test_tokenizers_come_in_many_files(folder, name):
    (folder / "vocab.json").rename(folder / name)
    assert problems(folder) == []


def test_an_architecture_may_come_as_code(folder):
    (folder / "config.json").write_text('{"auto_map": {"AutoConfig": "configuration_mine.Mine"}}')
    assert problems(folder) == []


def test_weights_may_have_the_name_that_the_config_says(folder):
    (folder / "config.json").write_text('{"model_type": "llama", "transformers_weights": "mine.safetensors"}')
    assert "mine.safetensors" in problems(folder)[0]
    (folder / "mine.safetensors").touch()
    assert problems(folder) == []


def test_a_gguf_file_is_one_whatever_its_name(tmp_path):
    (tmp_path / "blob").write_bytes(b"GGUF\3\0\0\0")
    assert problems(tmp_path / "blob") == problems(tmp_path / "blob", source=Source.gguf) == []


def test_a_model_on_the_hub_may_be_called_like_a_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert len(problems("org/name")) == 1
    assert problems("org/name", source=Source.hub) == []
