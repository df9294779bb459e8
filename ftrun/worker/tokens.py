"""Text into token ids, as a tokenizer makes them.

Where that can be shown to be equal, a few times faster than the tokenizer itself. Special tokens that stand in a row's
own text can be marked, to be tokenised as text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from itertools import chain, product
from typing import TYPE_CHECKING, Any

import regex

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_WORDS_KEPT = 500_000
"""Words whose tokens are remembered; the cache starts anew when it is full."""

_WORDS_PAY_AFTER = 100_000
"""Characters of text after which remembering words has saved more than it costs to show that it may be done."""

_GUARD = "\ufdd0"
"""Stands in front of a special token that is only text. A Unicode noncharacter, which no text may hold."""


_ANCHOR = "\n"
"""A text that no tokenizer merges with what follows it, to stand where earlier text stood."""


class TextEncoder:
    """Tokenises texts, each on its own and without the special tokens that a tokenizer puts around a sequence."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        self.special = sorted(
            {token for token in tokenizer.all_special_tokens if token}
            | {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        )
        """The tokens that control a model: not all of them are named in a tokenizer's attributes."""

        self._special = _any_of(self.special)
        self._starts = sorted({token[0] for token in self.special})
        self._num_characters = 0

    @functools.cached_property
    def _words(self) -> WordEncoder | None:
        return WordEncoder.of(self._backend) if self._backend else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; what `guard` has marked is plain text."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str], before: Sequence[str] = ()) -> list[list[int]]:
        """Return the ids of each text; what `guard` has marked is plain text.

        Args:
            texts: What to tokenise, each for itself.
            before: Of each text, the text that it goes on with, or nothing. It makes a difference where a tokenizer
                puts something in front of a text of its own accord, as SentencePiece does a space.
        """
        if self._begins and any(before):
            return [self._continued(text, earlier) for text, earlier in zip(texts, before, strict=True)]
        out: list[list[int] | None] = [None] * len(texts)
        others: list[int] = []
        self._num_characters += sum(map(len, texts))
        words = self._words if self._num_characters > _WORDS_PAY_AFTER else None
        for index, text in enumerate(texts):
            if _GUARD in text:
                out[index] = self._guarded(text)
            elif words and text.isascii():
                out[index] = words.encode(text)
            else:
                others.append(index)
        for index, ids in zip(others, self._slowly([texts[index] for index in others]), strict=True):
            out[index] = ids
        return out  # type: ignore[return-value] # all are filled

    def guard(self, text: str) -> str:
        """Mark the special tokens that stand in a text, so that they become its plain text when it is tokenised."""
        return self._special.sub(lambda found: f"{_GUARD}{found[0][0]}{_GUARD}{found[0][1:]}", text)

    def guard_all(self, value: Any) -> Any:
        """Return a structure of lists and objects with every text in it guarded.

        Raises:
            ValueError: A text holds the character that is the mark.
        """
        if isinstance(value, str):
            if _GUARD in value:
                raise ValueError("a text holds the noncharacter U+FDD0")
            return self.guard(value) if self.has_special(value) else value
        if isinstance(value, list):
            return [self.guard_all(part) for part in value]
        if isinstance(value, dict):
            return {name: self.guard_all(part) for name, part in value.items()}
        return value

    def has_special(self, text: str) -> bool:
        """Tell whether a special token stands in a text."""
        return any(start in text for start in self._starts) and self._special.search(text) is not None

    def end_of_last_special(self, text: str) -> int:
        """Return where the last special token in a text ends, 0 if there is none."""
        return max((found.end() for found in self._special.finditer(text)), default=0)

    def length_of_leading_special(self, text: str) -> int:
        """Return the length of the special token that a text begins with, 0 if it does not."""
        found = self._special.match(text)
        return len(found[0]) if found else 0

    @staticmethod
    def bare(text: str) -> str:
        """Return a text without the marks of `guard`."""
        return text.replace(_GUARD, "")

    def _slowly(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is None:
            return [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self._backend.encode_special_tokens = False  # whatever the tokenizer's last caller has left
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    @functools.cached_property
    def _begins(self) -> bool:
        """Whether the tokenizer writes the beginning of a text in another way than the same words further on."""
        first, anchor, both = self._slowly(["a", _ANCHOR, f"{_ANCHOR}a"])
        return both[: len(anchor)] == anchor and both[len(anchor) :] != first

    @functools.cached_property
    def _anchor_length(self) -> int:
        return len(self._slowly([_ANCHOR])[0])

    @functools.cached_property
    def _begins_behind_special(self) -> bool:
        """Whether the words behind a special token are written as the beginning of a text."""
        first, token, both = self._slowly(["a", self.special[0], f"{self.special[0]}a"])
        return both[len(token) :] == first

    def _continued(self, text: str, before: str) -> list[int]:
        """Return the ids of a text that goes on with another, as they are in the two together."""
        end = self.end_of_last_special(before)
        behind_special = bool(end) and end == len(before)
        if not before or (behind_special and self._begins_behind_special):
            return self.encode(text)
        return self.encode(_ANCHOR + text)[self._anchor_length :]

    def _guarded(self, text: str) -> list[int]:
        """Tokenise a text with marks: special tokens without a mark are tokens, those with one are letters."""
        ids: list[int] = []
        start = 0
        for found in [*self._special.finditer(text), None]:
            part = text[start : found.start() if found else len(text)]
            ids += self._as_text(part, goes_on=start > 0 and not self._begins_behind_special)
            if found:
                ids.append(self._tokenizer.convert_tokens_to_ids(found[0]))
                start = found.end()
        return ids

    def _as_text(self, text: str, *, goes_on: bool = False) -> list[int]:
        if goes_on and text and self._begins:
            return self._as_text(_ANCHOR + text)[self._anchor_length :]
        text = self.bare(text)
        if not text:
            return []
        if self._backend is None:
            return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        before = self._backend.encode_special_tokens
        self._backend.encode_special_tokens = True
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        finally:
            self._backend.encode_special_tokens = before


class WordEncoder:
    """Byte-level BPE of ASCII text, word by word, each word's tokens remembered.

    The merges of byte-level BPE never cross the borders that the pre-tokenizer draws, so a text's tokens are those of
    its words, and most words have been seen before. Text beyond ASCII is left to the tokenizer itself: there, two
    engines of regular expressions may be of different versions of Unicode.
    """

    def __init__(self, backend: Tokenizer, pattern: str, added: dict[str, int]) -> None:
        model, letters = backend.model, _byte_letters()

        class Words(dict[str, tuple[int, ...]]):
            def __missing__(self, word: str) -> tuple[int, ...]:
                if len(self) >= _WORDS_KEPT:
                    self.clear()
                ids = tuple(token.id for token in model.tokenize("".join(letters[byte] for byte in word.encode())))
                self[word] = ids
                return ids

        self._words: Callable[[str], tuple[int, ...]] = Words().__getitem__
        self._find = regex.compile(pattern).findall
        self._added = added
        self._split = _any_of(list(added), capture=True).split

    @classmethod
    def of(cls, backend: Tokenizer) -> WordEncoder | None:
        """Return an encoder equal to a tokenizer on ASCII text, or None if it is not known to be."""
        state = json.loads(backend.to_str())
        pattern, added = _pattern(state), _added_tokens(state)
        if pattern is None or added is None:
            return None
        try:
            found = cls(backend, pattern, added)
        except (regex.error, ValueError):
            return None
        return found if found._agrees(backend) else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of an ASCII text."""
        ids: list[int] = []
        for part in self._split(text):
            if part in self._added:
                ids.append(self._added[part])
            elif part:
                ids += chain.from_iterable(map(self._words, self._find(part)))
        return ids

    def _agrees(self, backend: Tokenizer) -> bool:
        """Compare with the tokenizer on all pairs of ASCII characters, within words and between them."""
        characters = [chr(code) for code in range(128)]
        probes = ["".join(f"{a}{b}x{a}{b}7" for b in characters) for a in characters]
        probes += [f"{a}{b}" for a, b in product(" \n\t\r'a1.", repeat=2)]
        probes += [f"x{token} {token}{token}\n{token} y" for token in self._added]
        return all(
            self.encode(text) == found.ids
            for text, found in zip(probes, backend.encode_batch_fast(probes, add_special_tokens=False), strict=True)
        )


def _pattern(state: dict[str, Any]) -> str | None:
    """Return the regular expression that a byte-level BPE tokenizer cuts words with, or None for any other kind."""
    model, normalizer, before = state["model"], state["normalizer"], state["pre_tokenizer"]
    if model.get("type") != "BPE" or model.get("dropout") or model.get("byte_fallback") or model.get("unk_token"):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if normalizer is not None and normalizer["type"] not in ("NFC", "NFKC"):  # which leave ASCII alone
        return None
    steps = before["pretokenizers"] if before and before["type"] == "Sequence" else [before] if before else []
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1 and steps[0]["use_regex"]:
        return r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    if len(steps) == 2 and not steps[1]["use_regex"] and steps[0]["type"] == "Split":
        split = steps[0]
        if split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
            return str(split["pattern"]["Regex"])
    return None


def _added_tokens(state: dict[str, Any]) -> dict[str, int] | None:
    """Return the added tokens by text, or None if one of them takes more than its own letters."""
    found = {}
    for token in state["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or not token["content"]:
            return None
        found[token["content"]] = token["id"]
    return found


def _any_of(words: Sequence[str], *, capture: bool = False) -> re.Pattern[str]:
    """Return a pattern that finds any of the words, the longest first; with no words, one that finds nothing."""
    text = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True) if word) or r"(?!)"
    return re.compile(f"({text})" if capture else text)


def _byte_letters() -> dict[int, str]:
    """Return the letter that byte-level BPE writes for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
