"""Which rows a run trains on: the ``data`` group.

`ftrun.data.sources` finds the places that rows come from (`places` for files, `hub`, `info` for dataset_info.json), and
`ftrun.data.read` reads them; `ftrun.data.formats` understands their columns; `ftrun.data.mix` says in which order those
of several sources follow one another. All of these run in the driver, without torch. Turning rows into tokens begins in
`ftrun.worker.dataset`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from ftrun.fields import MISSING, ranged

ROWS = tuple(
    f"data.{name}"
    for name in (
        "path", "rows", "subset", "split", "sources", "mix", "mix_until", "dataset_info", "format", "columns",
        "max_length", "too_long", "control_tokens_in_text", "eval_path", "eval_size", "eval_sets", "on_bad_row",
        "max_bad_share", "processes",
    )
)  # fmt: skip
"""Keys by which rows are found, read and tokenised, whatever they are: what every stage that has rows reads."""

MESSAGES = tuple(
    f"data.{name}" for name in ("system", "cut", "reasoning", "history_reasoning", "media_folder", "media_urls")
)
"""Keys by which messages are rendered, whichever of them are learned."""


class Packing(StrEnum):
    """How rows share a sequence."""

    none = "none"
    best_fit = "best_fit"
    concatenate = "concatenate"


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
    empty = "empty"


class OnBadRow(StrEnum):
    """What happens to a row that cannot be trained on."""

    error = "error"
    skip = "skip"


class TooLong(StrEnum):
    """What happens to a row of more than ``max_length`` tokens."""

    cut = "cut"
    drop = "drop"
    error = "error"


class Cut(StrEnum):
    """Which part of a prompt is cut, where it is too long for its reply to have room."""

    middle = "middle"
    end = "end"


class Mix(StrEnum):
    """How the rows of several sources follow one another."""

    concatenate = "concatenate"
    interleave = "interleave"
    weighted = "weighted"


class MixUntil(StrEnum):
    """When interleaved sources are at an end."""

    first = "first"
    last = "last"


@dataclass(kw_only=True)
class Source:
    """One of several places that rows come from."""

    path: str = MISSING
    """A file, folder, glob, address, hub id, name in ``data.dataset_info``, or a set that ships with ftrun."""

    weight: float = ranged(1.0, gt=0)
    """With ``mix=concatenate``, how often its rows are seen in an epoch: 2 is twice, 0.5 is a seeded half of them.
    With ``mix=weighted``, how often one of its rows comes next, relative to the others."""

    rows: int | None = ranged(None, ge=1)
    """Use no more than the first so many rows."""

    format: str | None = None
    """What its columns mean. Default: ``data.format``."""

    columns: dict[str, str] = field(default_factory=dict)
    """Other names of columns, as in ``data.columns``, which it adds to."""

    subset: str | None = None
    """Which configuration of a data set on the hub."""

    split: str | None = None
    """Which split of a data set that has several. Default: train."""


@dataclass(kw_only=True)
class Data:
    """The rows a run trains on."""

    path: str | None = None
    """A file, folder, glob, address (s3://, gs://, hf://, https://), hub id (ModelScope's as ``ms://ORG/NAME``), name
    in ``dataset_info``, or a set that ships with ftrun (``demo:identity``). Behind ``documents:``, each file is one
    text. Default: the stage's own demo set."""

    rows: int | None = ranged(None, ge=1)
    """Use no more than the first so many rows of ``path``."""

    subset: str | None = None
    """Which configuration of the data set that ``path`` names on the hub."""

    split: str | None = None
    """Which split of a data set that has several. Default: train."""

    sources: list[Source] = field(default_factory=list)
    """Several places instead of one ``path``: a list of {path, weight, rows, format, columns, subset, split}."""

    mix: Mix = Mix.concatenate
    """How the rows of several sources follow one another: one source after the other, in turn, or drawn by weight."""

    mix_until: MixUntil = MixUntil.first
    """With ``mix=interleave`` or ``weighted``: stop when the first source is used up, or begin those that are used up
    again until the last one is."""

    dataset_info: str | None = None
    """A ``dataset_info.json`` as LLaMA-Factory reads it, or its folder: paths may then be names in it."""

    format: str = "auto"
    """What the columns mean (`ftrun list data.format`). Default: found by their names."""

    columns: dict[str, str] = field(default_factory=dict)
    """Other names of columns: ``data.columns={prompt: q, completion: a}`` reads the column ``q`` as the prompt."""

    system: str | None = None
    """System message of conversations that have none."""

    max_length: int = ranged(1024, ge=8)
    """Longest sequence, in tokens."""

    too_long: TooLong = TooLong.cut
    """Cut a longer row, leave it out, or stop."""

    cut: Cut = Cut.middle
    """Where a prompt is cut that leaves its reply no room: in its middle, so that the task at its beginning and the
    opening of the reply at its end stay; or, as LLaMA-Factory does, each turn at its end (docs/data.md)."""

    packing: Packing = Packing.none
    """Fill each sequence of ``max_length`` tokens with several rows, none of which sees another (best_fit); with the
    rows one behind the other, cut where a sequence is full (concatenate, for plain text); or not."""

    train_on: TrainOn = TrainOn.completions
    """What is learned: every reply, the last reply only, the messages of ``train_roles``, or all of the text."""

    train_roles: list[str] = field(default_factory=list)
    """The roles that are learned with ``train_on=roles``: a list of user, assistant, tool, system."""

    reasoning: Reasoning = Reasoning.keep
    """The thinking in replies: keep it, strip it, or keep it and begin replies without any with an empty block that is
    not learned. docs/data.md says what it does with each kind of template."""

    history_reasoning: bool = False
    """With ``train_on=last``, keep the thinking of earlier replies too."""

    control_tokens_in_text: bool = False
    """Read special tokens that are written in a row's own text (``<|im_end|>``) as such. Default: as plain text."""

    eval_path: str | None = None
    """Rows to evaluate on, from elsewhere. Default: the data set's own eval, validation or test file, if it has one."""

    eval_size: float = ranged(0.0, ge=0)
    """Hold out rows for evaluation: a share if below 1, else a count. They are not trained on."""

    eval_sets: dict[str, str] = field(default_factory=dict)
    """More rows to evaluate on, each with its own metrics: ``data.eval_sets={math: m.jsonl}`` gives eval_math_loss."""

    on_bad_row: OnBadRow = OnBadRow.error
    """Stop at a row that cannot be trained on, or skip and count it."""

    max_bad_share: float = ranged(0.1, ge=0, le=1)
    """With ``on_bad_row=skip``, stop if more than this share of the rows is bad."""

    streaming: bool = False
    """Read and tokenise while training, for data larger than the disk; needs ``train.max_steps``."""

    shuffle_buffer: int = ranged(10000, ge=1)
    """With ``streaming``, shuffle (and pack) within so many rows."""

    processes: int | None = ranged(None, ge=1)
    """Processes that tokenise. Default: one for each core where there is much to do."""

    media_folder: str | None = None
    """Folder that the paths of images, videos and sounds start at. Default: the folder of the file of rows."""

    media_urls: bool = False
    """Fetch images, videos and sounds from the addresses that rows name. Only for rows that you trust."""
