"""Gemma 3: blank lines around each image, and the kinds of tokens under a name of their own.

The processor writes an empty line before and after an image. That is text, so it is tokenised as one with a newline
that stands beside it.
"""

from __future__ import annotations

from typing import Any

from ftrun.worker.media.family import Family


class Gemma3(Family):
    """What Gemma 3 does in another way."""

    border = "\n\n"
    token_columns = ("token_type_ids",)

    def num_image_tokens(self, processor: Any, size: tuple[int, int]) -> int:
        """Count also the tokens that begin and end an image."""
        return super().num_image_tokens(processor, size) + 2


FAMILY = Gemma3()
