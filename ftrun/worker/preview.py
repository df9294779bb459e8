"""Rows as they will be trained on: their tokens and labels, and what became of all of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from ftrun.config import Config
from ftrun.data import Packing, TrainOn
from ftrun.data.tokens import IGNORED
from ftrun.errors import ConfigError
from ftrun.template import Template
from ftrun.worker import dataset, loading
from ftrun.worker.dataset import Rows, Selected
from ftrun.worker.pack import PackedRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 1000
"""Rows that are looked at for the warnings, evenly spread over all."""

_STREAMED = 1000
"""Rows of each source that are looked at where the config streams them."""

_BARS = 12
"""Most bars of the length histogram."""

_MANY = 0.05
"""Share of truncated rows from on which they are worth a warning."""

_TAIL = 12
"""Last tokens of a reply that are decoded to see what it ends with."""

_PROBE = (
    {"role": "user", "content": "Question"},
    {"role": "assistant", "content": "Answer"},
    {"role": "user", "content": "Another"},
)
"""A conversation by which two chat templates are compared."""


def answer(cfg: Config, output: TextIO, *, rows: int | None, plain: bool, template: str = "") -> None:
    """Write one line for each row, and, unless they are asked for plainly, a last one with the report.

    Args:
        cfg: The config.
        output: Where to.
        rows: How many rows. Default: all.
        plain: Write ids, labels and text only: the lines of ``ftrun preview --json``.
        template: The name of the template as it was typed, which a config does not keep.
    """
    streamed = _shorten_stream(cfg)
    tokenizer = loading.tokenizer(cfg)
    loaded = dataset.load(cfg, tokenizer)
    selected = loaded.train.rows if isinstance(loaded.train, PackedRows) else loaded.train
    assert isinstance(selected, Selected)
    view = _View(selected, tokenizer, cfg)
    make = view.plain if plain else view.drawn
    for index in range(min(len(selected), rows or len(selected))):
        print(json.dumps(make(index), ensure_ascii=False), file=output)
    if not plain:
        report = _report(cfg, loaded, view, template)
        report["notes"] += [f"rows are streamed: the figures are of each source's first {_STREAMED:,}"] * streamed
        print(json.dumps(report, ensure_ascii=False), file=output)


def _shorten_stream(cfg: Config) -> bool:
    """Look at the first rows of each source only, where all may not fit on the disk; tell whether that is so."""
    streamed = cfg.data.streaming
    if streamed:
        cfg.data.streaming = False
        cfg.data.rows = min(cfg.data.rows or _STREAMED, _STREAMED)
        for source in cfg.data.sources:
            source.rows = min(source.rows or _STREAMED, _STREAMED)
    return streamed


class _View:
    """Training rows in file order, before packing, as objects for JSON."""

    def __init__(self, rows: Selected, tokenizer: PreTrainedTokenizerBase, cfg: Config) -> None:
        self.rows, self.tokenizer, self.kind = rows, tokenizer, cfg.stage.rows
        self.special = special_ids(tokenizer)

    def sequences(self, index: int) -> dict[str, dict[str, Any]]:
        """Return a row's sequences by their names; that of a row with a single one is "text"."""
        row = self.rows[index]
        return {side: row[side] for side in ("chosen", "rejected")} if self.kind == "pairs" else {"text": row}

    def plain(self, index: int) -> dict[str, Any]:
        """Return a row's place, text, ids and labels."""
        sequences = {name: self._plain(sequence) for name, sequence in self.sequences(index).items()}
        found = {"index": index, "source": self.rows.place_of(index)}
        return found | (sequences if self.kind == "pairs" else sequences["text"]) | self._extra(index)

    def drawn(self, index: int) -> dict[str, Any]:
        """Return a row's place, and the pieces of its sequences, of pairs without what they begin with in common."""
        sequences = self.sequences(index)
        found = {"index": index, "source": self.rows.place_of(index)} | self._extra(index)
        pieces = {name: list(self._pieces(sequence)) for name, sequence in sequences.items()}
        if self.kind == "pairs":
            common = _common(list(pieces.values()))
            prompt = next(iter(pieces.values()))[:common]
            pieces = {"prompt": prompt} | {name: whole[common:] for name, whole in pieces.items()}
        counts = {
            name: [len(sequence["input_ids"]), int((sequence["labels"] != IGNORED).sum())]
            for name, sequence in sequences.items()
        }
        return {"row": found | {"tokens": counts, "parts": pieces}}

    def _plain(self, sequence: dict[str, Any]) -> dict[str, Any]:
        ids = sequence["input_ids"].tolist()
        return {"text": self.decode(ids), "input_ids": ids, "labels": sequence["labels"].tolist()}

    def _extra(self, index: int) -> dict[str, Any]:
        """Return what else a stage reads of a row."""
        rows = self.rows
        name = {"pairs": "margin", "feedback": "label", "questions": "answer"}.get(self.kind)
        stored, at = rows.stores[int(rows.which[index])], int(rows.index[index])
        value: Any = stored.extra_of(at) if name else None
        if name == "answer":
            value = value["answer"]
        return {} if name is None or (name == "margin" and value is None) else {name: value}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _pieces(self, sequence: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the tokens of a sequence as text; several together where one character takes several tokens.

        Each is ``text``, ``ids``, ``trained``, ``special``, and ``learned`` where the label is another token's, which
        stands nowhere in the text.
        """
        ids, labels = sequence["input_ids"].tolist(), sequence["labels"].tolist()
        for start, end, text in spans_of_text(ids, self.decode):
            own, wanted = ids[start:end], labels[start:end]
            other = [label for token, label in zip(own, wanted, strict=True) if label not in (IGNORED, token)]
            piece = {
                "text": text,
                "ids": own,
                "trained": any(label == token for token, label in zip(own, wanted, strict=True)),
                "special": any(token in self.special for token in own),
            }
            yield piece | ({"learned": self.decode(other), "learned_ids": other} if other else {})


def spans_of_text(ids: Sequence[int], decode: Any) -> Iterator[tuple[int, int, str]]:
    """Yield start, end and text of the shortest stretches of tokens that are whole characters.

    A token's text depends on what is before it (a leading space), so each is what it adds to that of the last stretch.
    """
    before = read = 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[before:end])
        if text.endswith("\ufffd") and end < len(ids) and end - read < 8:
            continue
        yield read, end, text[len(decode(ids[before:read])) :]
        before, read = read, end


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that control a model."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _common(sides: Sequence[Sequence[dict[str, Any]]]) -> int:
    """Return how many pieces that are not learned both sides begin with."""
    pairs = enumerate(zip(*sides, strict=False))
    shortest = min(len(side) for side in sides)
    return next((at for at, (one, other) in pairs if one != other or one["trained"]), shortest)


def _report(cfg: Config, rows: Rows, view: _View, template: str) -> dict[str, Any]:
    own = _own_template(cfg)
    sampled = Sampled.of(view, cfg)
    return {
        "report": rows.report,
        "truncated_share": round(_truncated_share(rows.report["train"]), 4),
        "lengths": histogram(view.rows.lengths),
        "max_length": None if cfg.data.packing is Packing.concatenate else cfg.data.max_length,
        "warnings": [*_warnings(cfg, view.tokenizer, rows, sampled), *_of_template(template, own, view.tokenizer)],
        "notes": list(_notes(cfg, view.tokenizer, own)),
        "model": cfg.model.path,
        "stage": cfg.stage.name,
        "kind": cfg.stage.rows,
        "template": template or ("the model's own" if own is None else "of the config"),
    }


def histogram(lengths: Any) -> dict[str, Any]:
    """Return how many rows there are of which lengths: bars of equal and round width, and a few figures."""
    lengths = np.asarray(lengths)
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = next(step for step in _round_numbers() if longest // step - shortest // step < _BARS)
    return {
        "start": shortest // width * width,
        "width": width,
        "counts": np.bincount(lengths // width - shortest // width).tolist(),
        "shortest": shortest,
        "median": int(np.median(lengths)),
        "mean": round(float(lengths.mean()), 1),
        "p95": int(np.percentile(lengths, 95)),
        "longest": longest,
    }


def _round_numbers() -> Iterator[int]:
    scale = 1
    while True:
        yield from (scale, 2 * scale, 5 * scale)
        scale *= 10


@dataclass
class Sampled:
    """What was seen in some of the rows."""

    sequences: int = 0
    ended: int = 0
    """Sequences whose last reply was not cut, so that it has to end with an end-of-turn token."""

    without_end: int = 0
    double_bos: int = 0
    example: str = ""
    """The place of the first row without an end."""

    bos_example: str = field(default="")

    @classmethod
    def of(cls, view: _View, cfg: Config) -> Sampled:
        """Look at up to `SAMPLE` rows, evenly spread over all."""
        found = cls()
        ends = tuple({*view.tokenizer.all_special_tokens, *cfg.template.stop, *_added(view.tokenizer)} - {""})
        count = len(view.rows)
        for index in np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).astype(int)).tolist():
            for sequence in view.sequences(index).values():
                found._look(view, index, sequence, ends, cfg)
        return found

    def _look(self, view: _View, index: int, sequence: dict[str, Any], ends: tuple[str, ...], cfg: Config) -> None:
        ids, labels = sequence["input_ids"], sequence["labels"]
        self.sequences += 1
        bos = view.tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            self.double_bos += 1
            self.bos_example = self.bos_example or view.rows.place_of(index)
        trained = np.flatnonzero(labels != IGNORED)
        is_cut = len(ids) >= cfg.data.max_length and len(trained) and trained[-1] == len(ids) - 1
        if not len(trained) or is_cut:
            return
        self.ended += 1
        if not view.decode(labels[trained[-_TAIL:]].tolist()).rstrip().endswith(ends):
            self.without_end += 1
            self.example = self.example or view.rows.place_of(index)


def _added(tokenizer: PreTrainedTokenizerBase) -> Iterable[str]:
    return (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def _warnings(cfg: Config, tokenizer: PreTrainedTokenizerBase, rows: Rows, sampled: Sampled) -> Iterator[str]:
    """Yield what is likely to spoil the training, and by what."""
    train = rows.report["train"]
    learns_replies = cfg.data.train_on is not TrainOn.roles or "assistant" in cfg.data.train_roles
    if sampled.without_end and learns_replies:
        yield (
            f"no end-of-turn token is trained in {sampled.without_end:,} of {sampled.ended:,} sequences looked at "
            f"(first: {sampled.example}): the model would not learn to stop"
        )
    if sampled.double_bos:
        yield (
            f"{sampled.double_bos:,} of {sampled.sequences:,} sequences looked at begin with {tokenizer.bos_token} "
            f"twice (first: {sampled.bos_example}): the text holds one, and the tokenizer adds another"
        )
    if train.get("special_as_text"):
        yield (
            f"special tokens stand in the own text of {train['special_as_text']:,} of the rows, and are tokenised as "
            "plain text; data.control_tokens_in_text=true reads them as special tokens"
        )
    if (share := _truncated_share(train)) > _MANY:
        yield f"{share:.0%} of the rows are longer than data.max_length={cfg.data.max_length} and cut"
    if cfg.stage.rows != "questions" and train["tokens_learned"] < 0.01 * train["tokens"]:
        share = train["tokens_learned"] / train["tokens"]
        yield f"only {share:.2%} of the tokens are trained: the rest of each row is prompt"


def _truncated_share(train: dict[str, Any]) -> float:
    """Return which share of the encoded rows was cut."""
    left_out = sum(train["skipped"].values()) + train.get("too_long", 0)
    return train["truncated"] / max(1, train.get("sequences", train["rows_read"] - left_out))


def _of_template(name: str, own: PreTrainedTokenizerBase | None, chosen: PreTrainedTokenizerBase) -> Iterator[str]:
    if own is not None and _differ(own, chosen):
        yield (
            f"{f'template={name}' if name else 'the template'} is not the model's own, and writes conversations in "
            "another way than the model was trained with; template=auto is its own"
        )


def _notes(cfg: Config, tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """Yield what is worth knowing and no fault."""
    if cfg.stage.rows == "texts":
        return
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield f"{tokenizer.eos_token} also pads; it is trained all the same where it ends a reply"
    if own is None and _is_chosen(cfg.template):
        yield "the tokenizer has no chat template of its own; this one is saved with the model"


def _is_chosen(template: Template) -> bool:
    """Tell whether a config names a template, instead of leaving it to the tokenizer."""
    return template.has_slots or template.chat_template is not None


def _own_template(cfg: Config) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer with the chat template it came with, if another one was chosen and it has one."""
    if not _is_chosen(cfg.template) or cfg.stage.rows == "texts":
        return None
    try:
        return loading.tokenizer(dataclasses.replace(cfg, template=Template()))
    except ConfigError:
        return None


def _differ(own: PreTrainedTokenizerBase, chosen: PreTrainedTokenizerBase) -> bool:
    """Tell whether two chat templates write the same conversation differently; what cannot be compared does not."""
    try:
        texts = {
            str(one.apply_chat_template(list(_PROBE), tokenize=False, add_generation_prompt=True))
            for one in (own, chosen)
        }
    except Exception:  # whatever a template raises
        return False
    return len(texts) > 1
