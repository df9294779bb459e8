"""Rows into tokens and labels: what the model sees, and which of it is learned."""

from __future__ import annotations

import hashlib
import math
import random
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypedDict

from ftrun import events
from ftrun.config import Config
from ftrun.data import Data, OnBadRow, Packing, TrainOn, read
from ftrun.data.formats import Conversation, Message, Pair, Text, understand
from ftrun.data.read import BadRow, Row
from ftrun.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not learned."""


class Encoded(TypedDict):
    """One training sequence."""

    input_ids: list[int]
    labels: list[int]


class Packed(Encoded):
    """One sequence of several rows; the positions start again at each, which is what keeps attention apart."""

    position_ids: list[int]


@dataclass
class Rows:
    """The encoded rows of a run, and what became of those that were read."""

    train: list[Any]
    eval: list[Any]
    eval_prompts: list[list[Message]] = field(default_factory=list)
    """What comes before the last reply, for the first evaluation rows."""

    report: dict[str, Any] = field(default_factory=dict)
    """Rows in and out by reason, tokens, truncation, packing."""

    content_key: str = ""
    """Hash of everything that the tokens depend on."""


def load(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Read, render and tokenise the rows of a run, of whatever kind its stage trains on.

    A row of conversations or texts becomes one `Encoded`, a pair becomes ``{"chosen": Encoded, "rejected": Encoded}``.

    Raises:
        ConfigError: A row cannot be trained on and ``data.on_bad_row=error``, or no row is left.
    """
    events.send("phase", text="encoding the rows")
    train_rows, eval_rows = split(cfg)
    digest = hashlib.sha256(repr((cfg.data, tokenizer.chat_template, tokenizer.vocab_size)).encode())
    train, report = _encode_all(cfg, tokenizer, train_rows, digest)
    held_out, eval_report = _encode_all(cfg, tokenizer, eval_rows, digest)
    if not train:
        message = f"no row is left to train on: {report.reasons()}"
        raise ConfigError([Problem("data", message, "other rows, or a larger data.max_length")])
    rows = Rows([row for _, row in train], [row for _, row in held_out], content_key=digest.hexdigest())
    rows.eval_prompts = [_prompt(item) for item, _ in held_out if isinstance(item, Conversation)]
    rows.report = {"train": report.summary(), **({"eval": eval_report.summary()} if held_out else {})}
    if cfg.data.packing is Packing.best_fit:
        rows.train = pack(rows.train, cfg.data.max_length)
        efficiency = report.tokens / (len(rows.train) * cfg.data.max_length)
        rows.report["train"] |= {"packed_into": len(rows.train), "packing_efficiency": round(efficiency, 4)}
    return rows


def split(cfg: Config) -> tuple[Iterable[Row], Iterable[Row]]:
    """Return the rows to train on and those to evaluate on, which are never the same."""
    sources = read.sources_of(cfg.data)
    train: Iterable[Row] = _all_rows(cfg, sources)
    if not cfg.data.eval_size:
        return train, [row for file in read.eval_files(cfg.data) for row in read.read(file)]
    everything = list(train)
    size = cfg.data.eval_size
    count = int(size) if size >= 1 else math.ceil(size * len(everything))
    if count >= len(everything):
        message = f"{count} of {len(everything)} rows held out leave none to train on"
        raise ConfigError([Problem("data.eval_size", message, f"data.eval_size= less than {len(everything)}")])
    chosen = set(random.Random(cfg.seed).sample(range(len(everything)), count))  # noqa: S311
    return (
        [row for index, row in enumerate(everything) if index not in chosen],
        [row for index, row in enumerate(everything) if index in chosen],
    )


def _all_rows(cfg: Config, sources: list[Any]) -> Iterator[Row]:
    for source in sources:
        if read.is_hub_id(source.path):
            yield from _hub_rows(source)
        else:
            yield from read.rows([source], cfg.seed)


def _hub_rows(source: Any) -> Iterator[Row]:
    """Yield the rows of the ``train`` split of a data set on the hub."""
    from datasets import load_dataset

    try:
        found = load_dataset(source.path, split="train")
    except Exception as error:
        message = f"there is no file {source.path}, and the hub gives no data set: {str(error).splitlines()[0]}"
        raise ConfigError([Problem("data.path", message, "a file, or a hub id with a train split")]) from error
    yield from (Row(dict(value), source.path, number) for number, value in enumerate(islice(found, source.rows), 1))


@dataclass
class _Report:
    """What became of the rows."""

    read: int = 0
    rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    tokens: int = 0
    learned: int = 0

    def reasons(self) -> str:
        """Return the reasons for which rows were skipped, most frequent first."""
        return "; ".join(f"{count} x {reason}" for reason, count in self.skipped.most_common()) or "none was read"

    def take(self, sequences: list[Encoded], *, truncated: bool) -> None:
        """Count a row that is trained on."""
        self.rows += 1
        self.truncated += truncated
        self.tokens += sum(len(sequence["input_ids"]) for sequence in sequences)
        self.learned += sum(label != IGNORED for sequence in sequences for label in sequence["labels"])

    def summary(self) -> dict[str, Any]:
        """Return the counts, for the log and the manifest."""
        return {
            "rows_read": self.read,
            "rows": self.rows,
            "skipped": dict(self.skipped),
            "truncated": self.truncated,
            "tokens": self.tokens,
            "tokens_learned": self.learned,
        }


def _encode_all(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], digest: Any
) -> tuple[list[tuple[Conversation | Pair | Text, Any]], _Report]:
    """Encode rows; return each with what it was read as."""
    report, out = _Report(), []
    longest = cfg.data.max_length
    for row in rows:
        report.read += 1
        digest.update(repr(row.value).encode())
        try:
            item = understand(row, cfg.stage.rows, cfg.data.format, cfg.data.reasoning)
            whole = encode(item, tokenizer, cfg.data)
            sequences = [_cut(sequence, longest, row) for sequence in whole]
        except BadRow as bad:
            if cfg.data.on_bad_row is OnBadRow.error:
                raise ConfigError([bad.problem]) from None
            report.skipped[bad.reason] += 1
            continue
        report.take(sequences, truncated=any(len(sequence["input_ids"]) > longest for sequence in whole))
        pair = len(sequences) == 2
        out.append((item, dict(zip(("chosen", "rejected"), sequences, strict=True)) if pair else sequences[0]))
    return out, report


def encode(item: Conversation | Pair | Text, tokenizer: PreTrainedTokenizerBase, data: Data) -> list[Encoded]:
    """Return the sequence of a row, or the two of a pair, uncut.

    Raises:
        BadRow: The template refuses the row, or renders it in a way that cannot be masked.
    """
    if isinstance(item, Text):
        return [encode_text(item, tokenizer)]
    if isinstance(item, Conversation):
        return [encode_conversation(item, tokenizer, data)]
    return [
        encode_conversation(Conversation(item.prompt + reply, item.row), tokenizer, data, first=len(item.prompt))
        for reply in (item.chosen, item.rejected)
    ]


def encode_text(item: Text, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Tokenise a plain text, ended by the end-of-sequence token; all of it is learned."""
    ids = tokenizer(item.text, add_special_tokens=True)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return {"input_ids": ids, "labels": list(ids)}


def encode_conversation(
    item: Conversation, tokenizer: PreTrainedTokenizerBase, data: Data, *, first: int = 0
) -> Encoded:
    """Render a conversation with the chat template and tokenise it, piece by piece.

    The pieces are tokenised apart, so that no token spans the border between a prompt and a reply: at inference the
    prompt ends there.

    Args:
        item: The messages.
        tokenizer: Has the chat template.
        data: Says what is learned.
        first: The first message that may be learned.

    Raises:
        BadRow: The template refuses the row, or renders it in a way that cannot be masked.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for text, learned in segments(item, tokenizer, data, first):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        input_ids += ids
        labels += ids if learned else [IGNORED] * len(ids)
    return {"input_ids": input_ids, "labels": labels}


def segments(
    item: Conversation, tokenizer: PreTrainedTokenizerBase, data: Data, first: int = 0
) -> list[tuple[str, bool]]:
    """Cut the rendered text of a conversation into pieces that are learned and pieces that are not.

    The conversation is rendered message by message, and each rendering must begin with the one before. A reply's piece
    runs from where the generation prompt ends to the end-of-turn token, that included; what a template puts after it
    (ChatML's newline) is never generated, so not learned.

    Raises:
        BadRow: The template raises, or rewrites what came before.
    """
    pieces: list[tuple[str, bool]] = []
    done = ""
    last_reply = max((i for i, message in enumerate(item.messages) if message["role"] == "assistant"), default=-1)
    for index, message in enumerate(item.messages):
        learned = index >= first and _is_learned(message, index == last_reply, data)
        if message["role"] == "assistant":
            prompt = render(item, index, tokenizer, generation_prompt=True)
            pieces.append((_extension(item.row, done, prompt), data.train_on is TrainOn.all))
            done = prompt
        elif learned:  # apart from what is not learned before it
            before = render(item, index, tokenizer)
            pieces.append((_extension(item.row, done, before), data.train_on is TrainOn.all))
            done = before
        elif index + 1 < len(item.messages):
            continue  # rendered together with what follows it
        text = render(item, index + 1, tokenizer)
        piece = _extension(item.row, done, text)
        done = text
        reply, after = _after_end(piece, tokenizer) if message["role"] == "assistant" else (piece, "")
        pieces += [(reply, learned), (after, data.train_on is TrainOn.all)]
    return [(text, learned) for text, learned in pieces if text]


def render(
    item: Conversation, count: int, tokenizer: PreTrainedTokenizerBase, *, generation_prompt: bool = False
) -> str:
    """Return the first ``count`` messages as the chat template writes them.

    Raises:
        BadRow: The template refuses them.
    """
    if not count and not generation_prompt:
        return ""
    try:
        text = tokenizer.apply_chat_template(
            item.messages[:count], tools=item.tools, tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:  # a template can raise anything
        raise BadRow(
            item.row,
            f"the chat template refuses it: {error}",
            "a conversation the model's template knows, or template=NAME",
        ) from None
    assert isinstance(text, str)
    return text


def _extension(row: Row, done: str, text: str) -> str:
    if not text.startswith(done):
        message = "the chat template rewrites earlier turns, so that no mask can be right"
        raise BadRow(row, message, "data.train_on=last with one reply a row, or template=chatml")
    return text[len(done) :]


def _after_end(piece: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Split a reply after its last end-of-turn token, if it has one."""
    end = tokenizer.eos_token or ""
    at = piece.rfind(end) + len(end) if end and end in piece else len(piece)
    return piece[:at], piece[at:]


def _is_learned(message: Message, is_last_reply: bool, data: Data) -> bool:
    if data.train_on is TrainOn.all:
        return True
    if data.train_on is TrainOn.roles:
        return message["role"] in data.train_roles
    return message["role"] == "assistant" and (is_last_reply or data.train_on is TrainOn.completions)


def _cut(encoded: Encoded, max_length: int, row: Row) -> Encoded:
    """Cut a sequence at its end.

    Raises:
        BadRow: Nothing that is learned is left.
    """
    cut: Encoded = {"input_ids": encoded["input_ids"][:max_length], "labels": encoded["labels"][:max_length]}
    if all(label == IGNORED for label in cut["labels"][1:]):  # the first token has nothing to be predicted from
        what = (
            f"the first {max_length} of {len(encoded['input_ids'])} tokens"
            if len(encoded["input_ids"]) > max_length
            else "the row"
        )
        raise BadRow(row, f"{what} hold nothing to learn", "a larger data.max_length, or another data.train_on")
    return cut


def _prompt(item: Conversation) -> list[Message]:
    last_reply = max(index for index, message in enumerate(item.messages) if message["role"] == "assistant")
    return item.messages[:last_reply]


def pack(rows: list[Encoded], max_length: int) -> list[Packed]:
    """Fill sequences of up to ``max_length`` tokens with whole rows, best fit, the longest rows first.

    Best-fit decreasing leaves little room unused and cuts no row (https://arxiv.org/abs/2404.10830).
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in order:
        length = len(rows[index]["input_ids"])
        at = bisect_left(room, (length, -1))
        if at == len(room):
            bins.append([index])
            insort(room, (max_length - length, len(bins) - 1))
        else:
            left, number = room.pop(at)
            bins[number].append(index)
            insort(room, (left - length, number))
    return [_join([rows[index] for index in members]) for members in bins]


def _join(rows: list[Encoded]) -> Packed:
    """Put rows behind one another; the first token of each has nothing of its own to be predicted from."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in (IGNORED, *row["labels"][1:])],
        "position_ids": [position for row in rows for position in range(len(row["input_ids"]))],
    }
