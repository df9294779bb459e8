"""One sequence of tokens: what of it is learned, and as what it is trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftrun.data.tokens import IGNORED

Numbers = np.ndarray[Any, Any]


@dataclass(slots=True)
class Encoded:
    """One sequence of tokens."""

    ids: list[int]
    spans: list[int] = field(default_factory=list)
    """What is learned: start, end, start, end ..."""

    weights: list[float] = field(default_factory=list)
    """How much the tokens of each span count."""

    replies: list[tuple[int, int]] = field(default_factory=list)
    """Where the model's own text stands, learned or not."""

    labels: list[int] | None = None
    """The labels, where they are not simply the learned tokens."""

    @property
    def learned(self) -> int:
        """How many tokens have a label that can be predicted: the first has nothing to be predicted from."""
        if self.labels is not None:
            return sum(label != IGNORED for label in self.labels[1:])
        return sum(self.spans[1::2]) - sum(self.spans[::2]) - (self.spans[:1] == [0])


def learn(out: Encoded, start: int, weight: float, *, reply: bool = False) -> None:
    """Note what the tokens from ``start`` to the end of a growing sequence are."""
    end = len(out.ids)
    if start == end:
        return
    if reply:
        begin = out.replies.pop()[0] if out.replies and out.replies[-1][1] == start else start
        out.replies.append((begin, end))
    if not weight:
        return
    if out.spans and out.spans[-1] == start and out.weights[-1] == weight:
        out.spans[-1] = end
    else:
        out.spans += (start, end)
        out.weights.append(weight)


def arrays(ids: Any, spans: Any, weights: Any | None, labels: Any | None) -> dict[str, Numbers]:
    """Return a sequence as it is trained on.

    Args:
        ids: Its T tokens.
        spans: What is learned: start, end, start, end ...
        weights: How much each span counts, if any of the data set counts more or less than 1.
        labels: The labels, where they are not simply the learned tokens.

    Returns:
        ``input_ids`` and ``labels`` of shape (T,) as int32, and with weights ``weights`` of shape (T,) as float32.
    """
    out = {"input_ids": np.array(ids, np.int32), "labels": np.full(len(ids), IGNORED, np.int32)}
    pairs = np.asarray(spans, np.int32).reshape(-1, 2).tolist()
    for start, end in pairs:
        out["labels"][start:end] = out["input_ids"][start:end]
    if labels is not None and len(labels):
        out["labels"] = np.array(labels, np.int32)
    if weights is not None:
        out["weights"] = np.ones(len(ids), np.float32)
        for (start, end), weight in zip(pairs, weights, strict=True):
            out["weights"][start:end] = weight
    return out
