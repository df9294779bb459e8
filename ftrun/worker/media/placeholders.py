"""The placeholders of media in tokenised rows: each has its medium, and each medium its placeholder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ftrun.data import Data
from ftrun.data.rows import BadRow, Item, Row, Text, Tokens
from ftrun.worker.media import place, processor
from ftrun.worker.media.place import Located

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Placeholders:
    """Finds the media of rows, and checks that a row's tokens hold a placeholder for each."""

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase) -> None:
        self._data = data
        self._processor = processor.of(tokenizer)
        self._kinds = self._processor.kinds if self._processor else {}

    def located(self, item: Item) -> list[Located]:
        """Return the media of a row, found and looked at.

        Raises:
            BadRow: One cannot be used, or the model does not take its kind.
        """
        if isinstance(item, Text | Tokens) or not item.media:
            return []
        if self._processor is None:
            message = f"has a medium ({item.media[0].kind}), and the model takes text alone"
            raise BadRow(item.row, message, "a multimodal model, or rows of text")
        taken = self._processor.tokens
        for medium in item.media:
            if medium.kind not in taken:
                raise BadRow(item.row, f"has a medium ({medium.kind}) that {self._processor.refusal}", "other rows")
        found = place.locate(item.media, item.row, self._data)
        return [replace(medium, num_tokens=self._processor.num_tokens(medium)) for medium in found]

    def matched(self, ids: Sequence[int], media: list[Located], row: Row, *, whole: bool) -> list[Located]:
        """Return the media that a sequence has placeholders for, in order.

        Args:
            ids: The tokens of the sequence.
            media: Those of its row.
            row: What is said to be bad.
            whole: Whether the sequence is all of the row, and not the part of it up to one reply.

        Raises:
            BadRow: The placeholders are not those of the media.
        """
        if not self._kinds:
            return media
        kinds = self.kinds(ids)
        found = media if whole else media[: len(kinds)]
        if kinds != [medium.kind for medium in found]:
            told = f"{_counted(kinds)} in the text for {_counted([medium.kind for medium in found])}"
            message = f"has another number or order of placeholders than of media: {told}"
            fix = "a chat template that writes media (template=auto), and no placeholder tokens in the texts of rows"
            raise BadRow(row, message, fix)
        return found

    def kinds(self, ids: Sequence[int]) -> list[str]:
        """Return the kinds of media that tokens hold placeholders for, in order."""
        return [] if self._kinds.keys().isdisjoint(ids) else [self._kinds[each] for each in ids if each in self._kinds]


def _counted(kinds: Sequence[str]) -> str:
    """Return kinds as a person counts them."""
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "none"
