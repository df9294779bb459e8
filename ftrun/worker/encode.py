"""Rows into tokens and labels: what the model sees, and which of it is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ftrun.config import Config
from ftrun.data import Cut, Packing, TooLong, TrainOn
from ftrun.data.formats import understand
from ftrun.data.rows import BadRow, Conversation, Feedback, Item, Pair, Question, Row, Text, Tokens
from ftrun.data.sources import Opened
from ftrun.data.tokens import IGNORED
from ftrun.worker.media.place import Located
from ftrun.worker.media.placeholders import Placeholders
from ftrun.worker.render import Part, Renderer
from ftrun.worker.tokens import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Numbers = np.ndarray[Any, Any]

VERSION = 2
"""Raised when the same row gives other tokens than before: what was tokenised is then tokenised again."""


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


@dataclass(slots=True)
class EncodedRow:
    """What is kept of a row: its sequences, and what else a stage reads of it."""

    row: Row
    sequences: list[Encoded]
    """One; of a pair two, the better first."""

    extra: Any = None
    """A pair's margin, feedback's label, a question's answer."""

    truncated: bool = False
    special_as_text: bool = False
    """Whether the row's own text holds special tokens, which are tokenised as text."""

    media: list[Located] = field(default_factory=list)
    """What the placeholders in each of its sequences stand for, in order."""

    @property
    def grown(self) -> int:
        """How many more tokens a sequence has once its placeholders are replaced, as far as is known."""
        return sum(medium.num_tokens - 1 for medium in self.media)


SIDES: dict[str, tuple[str, ...]] = {"pairs": ("chosen", "rejected")}
"""The names of a row's sequences, for kinds of rows that have several."""


class RowEncoder:
    """Tokenises rows as a config says."""

    def __init__(self, cfg: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        self.data = cfg.data
        self.text = TextEncoder(tokenizer)
        self.renderer = Renderer(tokenizer, cfg.template, cfg.data, self.text)
        self._eos_id = tokenizer.eos_token_id
        self._single_eos = cfg.template.single_eos
        # Text that is packed one row behind the other is cut where a sequence is full, not here.
        self._limit = None if cfg.data.packing is Packing.concatenate else cfg.data.max_length
        self._bos_ids = _opening_ids(tokenizer)
        self._placeholders = Placeholders(cfg.data, tokenizer)

    def encode(self, items: Sequence[Item]) -> list[EncodedRow | BadRow]:
        """Tokenise rows, all texts of the batch at once; the rows that cannot be trained on come back as `BadRow`.

        Of one item there may come several rows: one for each reply, where the template rewrites earlier turns.
        """
        drafts: list[_Draft | BadRow] = []
        for item in items:
            try:
                media = self._placeholders.located(item)
                found = _DRAFTS[type(item)](self, item)
                drafts += [replace(draft, media=media, whole=len(found) == 1) for draft in found] if media else found
            except BadRow as bad:
                drafts.append(bad)
        texts = [part.text for draft in drafts if isinstance(draft, _Draft) for side in draft.sides for part in side]
        ids = iter(self.text.encode_many(texts))
        return [draft if isinstance(draft, BadRow) else self._finished(draft, ids) for draft in drafts]

    def prompt_ids(self, messages: Sequence[Any], row: Row, tools: list[Any] | None = None) -> list[int]:
        """Return the tokens that a model is given to reply to messages: those that training has before a reply.

        Raises:
            BadRow: The template refuses the messages.
        """
        parts = self.renderer.prompt(messages, row, tools)
        return [token for ids in self.text.encode_many(parts) for token in ids]

    def _finished(self, draft: _Draft, ids: Any) -> EncodedRow | BadRow:
        sequences = [draft.ready] if draft.ready else [self._joined(side, ids, draft) for side in draft.sides]
        try:
            media, *_ = [
                self._placeholders.matched(each.ids, draft.media, draft.row, whole=draft.whole) for each in sequences
            ]
        except BadRow as bad:
            return bad
        grown = sum(medium.num_tokens - 1 for medium in media)
        longest = max(len(sequence.ids) for sequence in sequences) + grown
        too_long = self._limit is not None and longest > self._limit
        if too_long and self.data.too_long is not TooLong.cut:
            return TooLongRow(draft.row, longest, self.data.max_length)
        if too_long:
            sequences = self._cut(sequences, draft, grown)
            if any(len(self._placeholders.kinds(sequence.ids)) < len(media) for sequence in sequences):
                message = f"cut to data.max_length={self._limit}, it would lose a part of its media"
                return BadRow(draft.row, message, "a larger data.max_length, or data.too_long=drop")
        if not draft.prompt_only and not all(sequence.learned for sequence in sequences):
            what = f"the first {self._limit} tokens hold" if too_long else "the row holds"
            return BadRow(draft.row, f"{what} nothing to learn", "a reply to learn, or another data.train_on")
        return EncodedRow(draft.row, sequences, draft.extra, too_long, draft.special_as_text, media)

    def _cut(self, sequences: list[Encoded], draft: _Draft, grown: int) -> list[Encoded]:
        """Cut the sequences of a row whose placeholders become ``grown`` more tokens."""
        assert self._limit is not None
        limit = max(1, self._limit - grown)
        if self.data.cut is Cut.middle or draft.open_end or draft.prompt_only:
            return cut(sequences, limit, open_end=draft.open_end)
        if draft.one_turn:
            return cut_each_at_its_end(sequences, limit)
        return [cut_turns(sequences[0], limit, last_first=self.data.train_on is TrainOn.last)]

    def _joined(self, parts: Sequence[Part], ids: Any, draft: _Draft) -> Encoded:
        """Put the tokens of a sequence's parts behind one another."""
        out = Encoded([])
        for part in parts:
            start = len(out.ids)
            out.ids += next(ids)
            _learn(out, start, part.weight, reply=part.reply)
        if draft.ends_with_eos and self._eos_id is not None and out.ids[-1:] != [self._eos_id]:
            out.ids.append(self._eos_id)
            _learn(out, len(out.ids) - 1, 1.0)
        if draft.begins_with_bos and self._bos_ids:
            out.ids[:0] = self._bos_ids
            out.spans = [position + len(self._bos_ids) for position in out.spans]
            out.spans[:1] = [0]  # all of a text is learned
        if self._single_eos and out.replies and not draft.prompt_only:
            self._end_replies(out)
        return out

    def _end_replies(self, out: Encoded) -> None:
        """Teach a template's single end-of-sequence token after each learned reply.

        It stands in the text after the last reply only; after the others it is the label at the next prompt's first
        token.
        """
        out.labels = [IGNORED] * len(out.ids)
        for start, end in zip(out.spans[::2], out.spans[1::2], strict=True):
            out.labels[start:end] = out.ids[start:end]
        for _, end in out.replies:
            if end < len(out.ids) and out.labels[end - 1] != IGNORED and out.labels[end] == IGNORED:
                out.labels[end] = self._eos_id


class TooLongRow(BadRow):
    """A row of more than ``data.max_length`` tokens, where none is to be cut."""

    def __init__(self, row: Row, length: int, longest: int) -> None:
        super().__init__(row, f"is longer than data.max_length={longest}", "data.too_long=cut")
        self.length = length


@dataclass(slots=True)
class _Draft:
    """A row whose texts are known and whose tokens are not."""

    row: Row
    sides: Sequence[Sequence[Part]]
    extra: Any = None
    prompt_only: bool = False
    ends_with_eos: bool = False
    begins_with_bos: bool = False
    open_end: bool = False
    """Whether all of it is learned, so that a cut may fall anywhere."""

    one_turn: bool = False
    """Whether all that comes before what is learned is one prompt, the turns in it included."""

    ready: Encoded | None = None
    """The sequence itself, of a row that came tokenised."""

    special_as_text: bool = False
    media: list[Located] = field(default_factory=list)
    whole: bool = True
    """Whether it is all of its row, and not the part of it up to one reply."""


def _conversation(encoder: RowEncoder, item: Conversation) -> list[_Draft]:
    special = _special_as_text(encoder, item.messages)
    return [_Draft(item.row, [parts], special_as_text=special) for parts in encoder.renderer.sequences(item)]


def _pair(encoder: RowEncoder, item: Pair) -> list[_Draft]:
    sides = []
    for reply in (item.chosen, item.rejected):
        whole = Conversation(item.prompt + reply, item.row, item.tools, item.media)
        sides.append(_only(encoder.renderer.sequences(whole, first=len(item.prompt)), item.row))
    special = _special_as_text(encoder, item.prompt + item.chosen + item.rejected)
    return [_Draft(item.row, sides, item.margin, one_turn=True, special_as_text=special)]


def _feedback(encoder: RowEncoder, item: Feedback) -> list[_Draft]:
    whole = Conversation(item.prompt + item.reply, item.row, item.tools, item.media)
    parts = _only(encoder.renderer.sequences(whole, first=len(item.prompt)), item.row)
    special = _special_as_text(encoder, whole.messages)
    return [_Draft(item.row, [parts], item.good, one_turn=True, special_as_text=special)]


def _question(encoder: RowEncoder, item: Question) -> list[_Draft]:
    texts = encoder.renderer.prompt(item.prompt, item.row, item.tools)
    parts = [Part(text, 0.0, False) for text in texts]
    special = _special_as_text(encoder, item.prompt)
    return [_Draft(item.row, [parts], item.answer, prompt_only=True, special_as_text=special)]


def _text(encoder: RowEncoder, item: Text) -> list[_Draft]:
    special = encoder.text.has_special(item.text) and not encoder.data.control_tokens_in_text
    text = encoder.text.guard(item.text) if special else item.text
    return [
        _Draft(
            item.row,
            [[Part(text, 1.0, False)]],
            ends_with_eos=True,
            begins_with_bos=True,
            open_end=True,
            special_as_text=special,
        )
    ]


def _tokens(_: RowEncoder, item: Tokens) -> list[_Draft]:
    ready = Encoded(item.input_ids)
    ready.labels = item.labels
    return [_Draft(item.row, [], ready=ready, open_end=True)]


_DRAFTS: dict[type[Any], Callable[[RowEncoder, Any], list[_Draft]]] = {
    Conversation: _conversation,
    Pair: _pair,
    Feedback: _feedback,
    Question: _question,
    Text: _text,
    Tokens: _tokens,
}


def _only(found: list[list[Part]], row: Row) -> list[Part]:
    if len(found) != 1:
        raise BadRow(
            row, "the chat template rewrites earlier turns, so that no mask can be right", "replies of one message"
        )
    return found[0]


def _special_as_text(encoder: RowEncoder, messages: Sequence[Any]) -> bool:
    return not encoder.data.control_tokens_in_text and encoder.renderer.holds_special(list(messages))


def _opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what a tokenizer puts in front of a text of its own accord: the token of a beginning, or nothing."""
    with_it, without = (list(tokenizer("a", add_special_tokens=wanted)["input_ids"]) for wanted in (True, False))
    starts = (at for at in range(len(with_it)) if with_it[at : at + len(without)] == without)
    return with_it[: next(starts, 0)]


def _learn(out: Encoded, start: int, weight: float, *, reply: bool = False) -> None:
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


def understood(rows: Iterable[tuple[Opened, Row | BadRow]], kind: str) -> tuple[list[Item], list[BadRow]]:
    """Read rows as the kind that a stage trains on; return also those that cannot be."""
    items: list[Item] = []
    bad: list[BadRow] = []
    for opened, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            items += understand(row, kind, opened.format, opened.columns, opened.tags)
        except BadRow as error:
            bad.append(error)
    return items, bad


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


def share(prompt: int, reply: int, room: int) -> int:
    """Return how many of ``room`` tokens a prompt gets, where prompt and reply together are longer.

    The shorter of the two stays whole if it takes less than half of the room; else each gives up the same share. A
    reply always keeps at least one token.
    """
    if 2 * reply < room:
        kept = reply
    elif 2 * prompt < room:
        kept = room - prompt
    else:
        kept = room * reply // (prompt + reply)
    return min(prompt, room - max(1, kept))


def cut(sequences: Sequence[Encoded], limit: int, *, open_end: bool = False) -> list[Encoded]:
    """Cut sequences with a common prompt, or a single one, down to ``limit`` tokens each.

    A prompt that takes too much of the room (`share`) loses its middle: its beginning holds the system message and the
    task, its end the latest turn and the opening of the reply. Then the sequence is cut at its end, and a later
    prompt that no reply follows is left out too. Of several sequences, all keep the same part of the prompt.

    Args:
        sequences: What to cut.
        limit: Most tokens that each may have.
        open_end: All of the text is learned, so it is cut at its end and nowhere else.
    """
    replies = [next((span for span in sequence.replies if _touches(sequence, span)), None) for sequence in sequences]
    if open_end or not any(replies):
        if not open_end and not any(sequence.spans for sequence in sequences):  # prompts alone
            return [_without(s, limit - limit // 2, len(s.ids) - limit // 2) for s in sequences]
        return [_without(sequence, limit, len(sequence.ids)) for sequence in sequences]
    known = [span for span in replies if span]
    prompt = min(start for start, _ in known)
    kept = share(prompt, max(end - start for start, end in known), limit)
    head = kept - kept // 2
    shorter = [_without(sequence, head, prompt - kept // 2) for sequence in sequences]
    return [_without(sequence, _end(sequence, limit), len(sequence.ids)) for sequence in shorter]


def cut_each_at_its_end(sequences: Sequence[Encoded], limit: int) -> list[Encoded]:
    """Cut the prompt that sequences have in common at its end, and each reply at its own: LLaMA-Factory's rule."""
    prompt = min(sequence.spans[0] for sequence in sequences)
    kept = share(prompt, max(len(sequence.ids) for sequence in sequences) - prompt, limit)
    shorter = [_without(sequence, kept, prompt) for sequence in sequences]
    return [_without(sequence, limit, len(sequence.ids)) for sequence in shorter]


def cut_turns(sequence: Encoded, limit: int, *, last_first: bool) -> Encoded:
    """Share the room among turns, one after the other, each cut at the ends of its prompt and its reply.

    LLaMA-Factory's rule: what is left of the room goes to the next turn, and turns that find none are left out. The
    opening of a reply is lost with the end of its prompt.

    Args:
        sequence: The turns, each a prompt and a reply.
        limit: Most tokens to keep.
        last_first: Give room to the last turn first.
    """
    starts = [0, *(end for _, end in sequence.replies[:-1])]
    turns = [(start, *reply) for start, reply in zip(starts, sequence.replies, strict=True)]
    ends: dict[int, tuple[int, int]] = {}
    room = limit
    for number in reversed(range(len(turns))) if last_first else range(len(turns)):
        start, border, end = turns[number]
        prompt, reply = border - start, end - border
        if prompt + reply > room:
            prompt = share(prompt, reply, room) if room > 1 else 0
            reply = min(reply, room - prompt)
        ends[number] = (start + prompt, border + reply)
        room -= prompt + reply
    for number in reversed(range(len(turns))):
        start, border, end = turns[number]
        sequence = _without(_without(sequence, ends[number][1], end), ends[number][0], border)
    return _without(sequence, limit, len(sequence.ids))


def _touches(sequence: Encoded, reply: tuple[int, int]) -> bool:
    """Tell whether anything of a reply is learned."""
    spans = zip(sequence.spans[::2], sequence.spans[1::2], strict=True)
    return any(start < reply[1] and end > reply[0] for start, end in spans)


def _end(sequence: Encoded, limit: int) -> int:
    """Return where to end a sequence so that no prompt is left without anything learned behind it."""
    if len(sequence.ids) <= limit:
        return len(sequence.ids)
    inside = [
        min(end, limit) for start, end in zip(sequence.spans[::2], sequence.spans[1::2], strict=True) if start < limit
    ]
    return max(inside, default=limit)


def _without(sequence: Encoded, start: int, end: int) -> Encoded:
    """Return a sequence without the tokens from ``start`` to ``end``."""
    if end <= start:
        return sequence

    def moved(position: int) -> int:
        return min(position, start) if position < end else position - (end - start)

    out = Encoded(sequence.ids[:start] + sequence.ids[end:])
    for index, weight in enumerate(sequence.weights):
        first, last = (moved(position) for position in sequence.spans[2 * index : 2 * index + 2])
        if first < last:
            out.spans += (first, last)
            out.weights.append(weight)
    spans = ((moved(first), moved(last)) for first, last in sequence.replies)
    out.replies = [(first, last) for first, last in spans if first < last]
    if sequence.labels is not None:
        out.labels = sequence.labels[:start] + sequence.labels[end:]
    return out
