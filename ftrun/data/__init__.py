"""Which rows a run trains on: the ``data`` group.

`ftrun.data.read` reads files into rows, `ftrun.data.formats` understands their columns; both run in the driver, without
torch. Turning rows into tokens is `ftrun.worker.encode`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from ftrun.fields import MISSING, ranged


class Format(StrEnum):
    """What the columns of a row mean."""

    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    preference = "preference"
    feedback = "feedback"
    text = "text"


class Packing(StrEnum):
    """How rows share a sequence."""

    none = "none"
    best_fit = "best_fit"


class TrainOn(StrEnum):
    """Which messages of a conversation are learned."""

    completions = "completions"
    last = "last"
    roles = "roles"
    all = "all"


class Reasoning(Enum):
    """What happens to the thinking in replies."""

    keep = "keep"
    strip = "strip"


class OnBadRow(StrEnum):
    """What happens to a row that cannot be trained on."""

    error = "error"
    skip = "skip"


@dataclass(kw_only=True)
class Source:
    """One of several places that rows come from."""

    path: str = MISSING
    """A file, folder, glob, hub id, or a set that ships with ftrun (``demo:identity``)."""

    weight: float = ranged(1.0, gt=0)
    """How often its rows are seen in an epoch: 2 is twice, 0.5 is a seeded half of them."""

    rows: int | None = ranged(None, ge=1)
    """Use no more than the first so many rows."""


@dataclass(kw_only=True)
class Data:
    """The rows a run trains on."""

    path: str | None = None
    """A file, folder, glob, hub id, or a set that ships with ftrun. Default: the stage's own demo set."""

    rows: int | None = ranged(None, ge=1)
    """Use no more than the first so many rows of ``path``."""

    sources: list[Source] = field(default_factory=list)
    """Several places instead of one ``path``: a list of {path, weight, rows}."""

    format: Format = Format.auto
    """What the columns mean. Default: found by their names."""

    max_length: int = ranged(1024, ge=8)
    """Longest sequence, in tokens. A longer row is cut at its end; one with nothing left to learn is a bad row."""

    packing: Packing = Packing.none
    """Fill each sequence of ``max_length`` tokens with several rows, none of which sees another (best_fit), or not."""

    train_on: TrainOn = TrainOn.completions
    """What is learned: every reply, the last reply only, the messages of ``train_roles``, or all of the text."""

    train_roles: list[str] = field(default_factory=list)
    """The roles that are learned with ``train_on=roles``: a list of user, assistant, tool, system."""

    reasoning: Reasoning = Reasoning.keep
    """Keep the <think> block of a reply, or strip it."""

    eval_path: str | None = None
    """Rows to evaluate on, from elsewhere. Default: the data set's own eval, validation or test file, if it has one."""

    eval_size: float = ranged(0.0, ge=0)
    """Hold out rows for evaluation: a share if below 1, else a count. They are not trained on."""

    on_bad_row: OnBadRow = OnBadRow.error
    """Stop at a row that cannot be trained on, or skip and count it."""
