"""What became of the rows of a source: counted by reason, so that none is lost in silence."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ftrun.config import Config
from ftrun.data import Data, OnBadRow, Packing, TooLong
from ftrun.data.rows import BadRow, Message
from ftrun.errors import ConfigError, Problem
from ftrun.worker.encode import EncodedRow, TooLongRow

MOST_PROBLEMS = 5
"""Bad rows that are reported by name."""

PROMPTS = 8
"""Prompts that are kept as messages, to be replied to while training."""


@dataclass(frozen=True)
class Prompt:
    """What a reply is wanted to."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass
class Report:
    """What became of a source's rows."""

    read: int = 0
    rows: int = 0
    sequences: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    """Rows left out for their length, as ``data.too_long=drop`` asks."""

    truncated: int = 0
    special_as_text: int = 0
    """Rows whose own text holds special tokens."""

    tokens: int = 0
    learned: int = 0
    problems: list[dict[str, str]] = field(default_factory=list)
    """The first bad rows."""

    too_long: list[dict[str, str]] = field(default_factory=list)
    """The first rows that are too long, where none is to be cut."""

    prompts: list[Prompt] = field(default_factory=list)
    """What comes before the last reply, of the first conversations."""

    weighted: bool = False
    """Whether any message counts more or less than others."""

    media: Counter[str] = field(default_factory=Counter)
    """Images, videos and sounds."""

    media_folders: list[str] = field(default_factory=list)
    """The folders of the files whose rows name media by their paths."""

    def take(self, found: EncodedRow | BadRow) -> EncodedRow | None:
        """Count a row; return it if it is to be trained on."""
        if isinstance(found, TooLongRow):
            self.dropped += 1
            self.too_long = [*self.too_long, dataclasses.asdict(found.problem)][:MOST_PROBLEMS]
            return None
        if isinstance(found, BadRow):
            self.skipped[found.reason] += 1
            self.problems = [*self.problems, dataclasses.asdict(found.problem)][:MOST_PROBLEMS]
            return None
        self.sequences += 1
        self.truncated += found.truncated
        self.special_as_text += found.special_as_text
        self.tokens += sum(len(sequence.ids) + found.grown for sequence in found.sequences)
        self.learned += sum(sequence.learned for sequence in found.sequences)
        self.weighted |= any(weight != 1.0 for sequence in found.sequences for weight in sequence.weights)
        if found.media:
            self.media.update(medium.kind for medium in found.media)
            folder = os.path.dirname(found.row.file)
            on_disk = any(isinstance(source, str) for medium in found.media for source in medium.sources)
            self.media_folders += [folder] if on_disk and folder not in self.media_folders else []
        return found

    def add(self, other: Report) -> None:
        """Add another part's counts."""
        for name in ("read", "rows", "sequences", "dropped", "truncated", "special_as_text", "tokens", "learned"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.skipped += other.skipped
        self.problems = (self.problems + other.problems)[:MOST_PROBLEMS]
        self.too_long = (self.too_long + other.too_long)[:MOST_PROBLEMS]
        self.prompts = (self.prompts + other.prompts)[:PROMPTS]
        self.weighted |= other.weighted
        self.media += other.media
        self.media_folders = sorted({*self.media_folders, *other.media_folders})

    @property
    def bad(self) -> int:
        """Rows that cannot be trained on."""
        return self.skipped.total()

    def reasons(self) -> str:
        """Return the reasons for which rows were skipped, most frequent first."""
        found = [f"{count} x {reason}" for reason, count in self.skipped.most_common()]
        found += [f"{self.dropped} x longer than data.max_length"] if self.dropped else []
        return "; ".join(found) or "none was read"

    def summary(self) -> dict[str, Any]:
        """Return the counts, for the log and the manifest."""
        counts = {
            "rows_read": self.read,
            "rows": self.rows,
            "skipped": dict(self.skipped),
            "truncated": self.truncated,
            "tokens": self.tokens,
            "tokens_learned": self.learned,
        }
        some: dict[str, Any] = {"sequences": self.sequences} if self.sequences != self.rows else {}
        some |= {"too_long": self.dropped} if self.dropped else {}
        some |= {"media": dict(self.media)} if self.media else {}
        return counts | some | ({"special_as_text": self.special_as_text} if self.special_as_text else {})

    def counts(self) -> Counter[str]:
        """Return how many rows were read, cut, and left out for which reason."""
        named = {"rows read": self.read, "rows cut": self.truncated, "longer than data.max_length": self.dropped}
        return Counter(named) + self.skipped

    def saved(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        plain = {"prompts": [dataclasses.asdict(prompt) for prompt in self.prompts]}
        return {**vars(self), **plain, "skipped": dict(self.skipped), "media": dict(self.media)}

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Report:
        """Return a report that was saved as JSON."""
        prompts = [Prompt(**prompt) for prompt in saved["prompts"]]
        counts = {name: Counter(saved[name]) for name in ("skipped", "media")}
        return cls(**saved | counts | {"prompts": prompts})


def judge(report: Report, data: Data, name: str) -> None:
    """Stop where bad rows, or rows that are too long, are not to be borne.

    Raises:
        ConfigError: With the first of them.
    """
    if data.too_long is TooLong.error and report.too_long:
        raise ConfigError([Problem(**saved) for saved in report.too_long])
    problems = [Problem(**saved) for saved in report.problems]
    if report.bad and data.on_bad_row is OnBadRow.error:
        if report.bad > len(problems):
            more = f"has at least {report.bad - len(problems)} more bad rows"
            problems.append(Problem(name, more, "data.on_bad_row=skip counts and skips them"))
        raise ConfigError(problems)
    if report.bad > data.max_bad_share * report.read:
        share = f"{report.bad} of {report.read} rows are bad: {report.reasons()}"
        raise ConfigError([Problem(name, share, "data.max_bad_share=, or better rows"), *problems[:1]])


def refuse_packing(report: Report, cfg: Config) -> None:
    """Stop where rows with media are to share a sequence: their positions are not those of the tokens alone.

    Raises:
        ConfigError: Some are.
    """
    key = "data.packing" if cfg.data.packing is not Packing.none else "train.padding_free"
    if report.media and (cfg.data.packing is not Packing.none or cfg.train.padding_free):
        what = ", ".join(f"{count} {kind}" for kind, count in report.media.items())
        message = f"rows with media ({what}) cannot share a sequence: the model finds their positions from whole rows"
        raise ConfigError([Problem(key, message, f"{key}={'none' if key == 'data.packing' else 'false'}")])
