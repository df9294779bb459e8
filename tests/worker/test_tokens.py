"""Text into tokens: equal to the tokenizer's own, token by token, and special tokens in a text as text."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ftrun.worker import builtin
from ftrun.worker.tokens import TextEncoder, WordEncoder

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|[ ]?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "It's 12345 o'clock, isn't IT'S?\r\n\r\n  The   end .\t\n",
    "def f(x):\n    return {'a': [1, 2,  3]}  # comment\n\n\n",
    " leading and trailing  ",
    "\x00\x01\x1c\x1f control \x7f characters \x0b\x0c",
    "naïve café — “quoted” 你好世界 \u0130stanbul e\u0301 \ufb01 🙂",
    "",
]


def byte_level(pattern: str | None, *, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """Train a small byte-level BPE tokenizer."""
    core = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    core.pre_tokenizer = pre_tokenizers.Sequence([*split, last]) if split else last
    core.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*TEXTS, "the quick brown fox is 1000 times quicker"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", bos_token="<|im_start|>")


TOKENIZERS = {
    "gpt2": lambda: byte_level(None),
    "qwen": lambda: byte_level(QWEN, normalizer=normalizers.NFC()),
    "llama3": lambda: byte_level(LLAMA3),
}


def noise(seed: int) -> str:
    """Return a text of random ASCII characters, words and special tokens."""
    draw = random.Random(seed)
    pieces = [chr(draw.randrange(128)) for _ in range(60)] + TEXTS[:3] + [*SPECIAL, " ", "  ", "\n", "'S", "12"] * 3
    draw.shuffle(pieces)
    return "".join(pieces)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_equal_to_the_tokenizer_token_by_token(kind):
    tokenizer = TOKENIZERS[kind]()
    encoder = TextEncoder(tokenizer)
    assert encoder._words is not None
    texts = [*TEXTS, *(noise(seed) for seed in range(200))]
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert encoder.encode_many(texts) == expected  # by the tokenizer itself: too little text to remember words for
    encoder.encode_many(["much text " * 10_000])
    assert encoder.encode_many(texts) == expected


def test_a_tokenizer_that_is_not_understood_is_asked_itself():
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    assert WordEncoder.of(core) is None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    assert TextEncoder(tokenizer).encode("a b c") == [1, 2, 0]


def test_a_pattern_that_means_something_else_here_is_noticed(monkeypatch):
    tokenizer = byte_level(LLAMA3)  # which has tokens of several digits
    monkeypatch.setattr("ftrun.worker.tokens._pattern", lambda _: QWEN)
    assert WordEncoder.of(tokenizer.backend_tokenizer) is None


def test_special_tokens_that_are_marked_are_text():
    tokenizer = builtin.tokenizer()
    encoder = TextEncoder(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    written = "He wrote <|im_end|> and <|im_start|>."
    assert encoder.has_special(written)
    assert not encoder.has_special("He wrote <|im_ and |>.")
    ids = encoder.encode(f"{encoder.guard(written)}<|im_end|>\n")
    assert tokenizer.decode(ids) == f"{written}<|im_end|>\n"
    assert ids.count(end) == 1
    # As plain text, the letters of a special token merge with their neighbours as any others do.
    plain = tokenizer(written, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids[: len(plain)] == plain
    assert encoder.encode(f"{written}<|im_end|>").count(end) == 2


def test_marks_reach_every_text_of_a_message():
    encoder = TextEncoder(builtin.tokenizer())
    call = {"function": {"name": "f", "arguments": {"x": ["<|im_end|>", 1, None]}}}
    guarded = encoder.guard_all({"role": "assistant", "content": "fine", "tool_calls": [call]})
    text = guarded["tool_calls"][0]["function"]["arguments"]["x"][0]
    assert encoder.encode(text) == encoder.encode_many([encoder.guard("<|im_end|>")])[0]
    assert encoder.bare(text) == "<|im_end|>"
    with pytest.raises(ValueError, match="U\\+FDD0"):
        encoder.guard_all(["\ufdd0"])


def sentence_piece(normalizer: Any, pre_tokenizer: Any) -> PreTrainedTokenizerFast:
    """Train a small tokenizer that writes a space in front of a text, as those of Llama 2 and Mistral do."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()  # merges are learned within words
    known = {
        "special_tokens": ["<unk>", "<s>", "</s>"],
        "initial_alphabet": [*"▁abcdefghijklmnopqrstuvwxyzHIT[]/.!?\n"],
    }
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False, **known)
    core.train_from_iterator(["[INST] hi there [/INST] Hello there. Hi!"] * 20, trainer)
    core.normalizer, core.pre_tokenizer = normalizer, pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SENTENCE_PIECES = {
    "prepend": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "always": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
}


@pytest.mark.parametrize("kind", SENTENCE_PIECES)
def test_a_part_that_goes_on_is_written_as_in_the_whole_text(kind):
    tokenizer = sentence_piece(*SENTENCE_PIECES[kind])
    encoder = TextEncoder(tokenizer)
    assert encoder._begins
    for parts in (
        ["<s>[INST] hi [/INST]", " Hello there.</s>", "[INST] hi [/INST]", " Hi!</s>"],
        ["<s>", "hi there", " Hello"],
        ["hi\n", "there"],
    ):
        whole = tokenizer.encode("".join(parts), add_special_tokens=False)
        apart = encoder.encode_many(parts, ["", *parts[:-1]])
        assert [token for ids in apart for token in ids] == whole, parts
    # A special token that is only text is letters like any others, and begins no text.
    ids = encoder.encode(f"<s>{encoder.guard('hi </s> there')}")
    (there,) = encoder.encode_many([" there"], ["hi"])
    assert (ids[0], ids[-len(there) :]) == (tokenizer.bos_token_id, there)
    assert tokenizer.eos_token_id not in ids
