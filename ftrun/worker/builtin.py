"""``model=tiny``: a random model and a small tokenizer, made on the spot from what ftrun ships."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ftrun.data import places, read
from ftrun.model import BUILTIN, BUILTINS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SEED = 0
"""The model's weights are the same for every run, whatever the run's own seed, as a downloaded model's would be."""

_VOCABULARY = 1024
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

_CHATML = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
)


def tokenizer() -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer of 1,024 tokens on the demo rows; speaks ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_texts(), trainer)
    pad, _, end = _SPECIAL
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=pad)
    made.chat_template = _CHATML
    return made


def _texts() -> list[str]:
    """Return every piece of text in the demo sets, whatever their format."""
    return [text for file in _demo_files() for row in read.read(file) for text in _strings(row.value)]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _demo_files() -> list[str]:
    return [file for name in places.demos() for file in places.find("data.path", places.DEMO + name).train]


def model(arguments: dict[str, Any]) -> PreTrainedModel:
    """Return a two-layer Llama with seeded random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=_SPECIAL.index("<|im_end|>"),
        pad_token_id=_SPECIAL.index("<|endoftext|>"),
        attn_implementation=arguments.get("attn_implementation"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        made = LlamaForCausalLM(config)
    made.name_or_path = BUILTIN + BUILTINS[0]
    dtype = arguments["dtype"]
    return made.to(dtype) if isinstance(dtype, torch.dtype) else made
