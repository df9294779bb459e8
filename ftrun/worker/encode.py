"""Rows into tokens and labels: what the model sees, and which of it is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftrun.config import Config
from ftrun.data import Cut, Packing, TooLong, TrainOn
from ftrun.data.formats import understand
from ftrun.data.rows import BadRow, Conversation, Feedback, Item, Pair, Question, Row, Text, Tokens
from ftrun.data.sources import Opened
from ftrun.data.tokens import IGNORED
from ftrun.errors import Problem
from ftrun.worker.media.place import Located
from ftrun.worker.media.placeholders import Placeholders
from ftrun.worker.render import Part, Renderer
from ftrun.worker.sequence import Encoded, learn
from ftrun.worker.tokens import TextEncoder
from ftrun.worker.truncation import cut, cut_each_at_its_end, cut_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 4
"""Raised when the same row gives other tokens than before: what was tokenised is then tokenised again."""


@dataclass(slots=True)
class EncodedRow:
    """What is kept of a row: its sequences, and what else a stage reads of it."""

    row: Row
    sequences: list[Encoded]
    """One; of a pair two, the better first."""

    extra: Any = None
    """What else a stage reads of it (`EXTRA`)."""

    truncated: bool = False
    special_as_text: bool = False
    """Whether the row's own text holds special tokens, which are tokenised as text."""

    media: list[Located] = field(default_factory=list)
    """What the placeholders in each of its sequences stand for, in order."""

    origin: int = 0
    """The number of the row that it comes from, the same for all that come from one."""

    @property
    def grown(self) -> int:
        """How many more tokens a sequence has once its placeholders are replaced, as far as is known."""
        return sum(medium.num_tokens - 1 for medium in self.media)


SIDES: dict[str, tuple[str, ...]] = {"pairs": ("chosen", "rejected")}
"""The names of a row's sequences, for kinds of rows that have several."""

EXTRA = {
    "pairs": "the margin, or None",
    "feedback": "whether the reply is a good one",
    "questions": "the prompt's messages as `prompt`, and the `answer`, or None",
}
"""What is kept of a row beside its sequences, for kinds of rows of which anything is."""


class RowEncoder:
    """Tokenises rows as a config says."""

    def __init__(self, cfg: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        self.data = cfg.data
        self.text = TextEncoder(tokenizer)
        self.renderer = Renderer(tokenizer, cfg.template, cfg.data, self.text)
        self._eos_id = tokenizer.eos_token_id
        self._single_eos, self._has_slots = cfg.template.single_eos, cfg.template.has_slots
        self._num_tokens = len(tokenizer)
        # Text that is packed one row behind the other is cut where a sequence is full, not here.
        self._limit = None if cfg.data.packing is Packing.concatenate else cfg.data.max_length
        self._bos_ids = _opening_ids(tokenizer)
        self._placeholders = Placeholders(cfg.data, tokenizer)

    def encode(self, items: Sequence[Item], origins: Sequence[int] = ()) -> list[EncodedRow | BadRow]:
        """Tokenise rows, all texts of the batch at once; the rows that cannot be trained on come back as `BadRow`.

        Of one item there may come several rows: one for each reply, where the template rewrites earlier turns.

        Args:
            items: What the rows were read as.
            origins: Of each item, the number of its row.
        """
        drafts: list[_Draft | BadRow] = []
        for item, origin in zip(items, origins or range(len(items)), strict=True):
            try:
                media = self._placeholders.located(item)
                found = _DRAFTS[type(item)](self, item)
                for draft in found:
                    draft.media, draft.whole, draft.origin = media, len(found) == 1, origin
                drafts += found
            except BadRow as bad:
                drafts.append(bad)
        sides = [side for draft in drafts if isinstance(draft, _Draft) for side in draft.sides]
        before = [before for side in sides for before in self._before(side)]
        ids = iter(self.text.encode_many([part.text for side in sides for part in side], before))
        return [draft if isinstance(draft, BadRow) else self._finished(draft, ids) for draft in drafts]

    def _before(self, side: Sequence[Part]) -> list[str]:
        """Return what stands before each part, where a part goes on with it.

        The tokenizer's own template writes one text, which is only cut where a reply begins. The slots of a named one
        are tokenised each for itself, as LLaMA-Factory does.
        """
        return [""] * len(side) if self._has_slots else ["", *(part.text for part in side[:-1])]

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
        return EncodedRow(draft.row, sequences, draft.extra, too_long, draft.special_as_text, media, draft.origin)

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
            learn(out, start, part.weight, reply=part.reply)
        if draft.ends_with_eos and self._eos_id is not None and out.ids[-1:] != [self._eos_id]:
            out.ids.append(self._eos_id)
            learn(out, len(out.ids) - 1, 1.0)
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
        super().__init__(row, f"is longer than data.max_length={longest}", "data.too_long=cut, or drop")
        self.problem = Problem(row.place, self.reason, "data.too_long=cut, or drop")
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

    origin: int = 0


def _conversation(encoder: RowEncoder, item: Conversation) -> list[_Draft]:
    special, everything = _special_as_text(encoder, item.messages), encoder.data.train_on is TrainOn.all
    found = encoder.renderer.sequences(item)
    return [_Draft(item.row, [parts], open_end=everything, special_as_text=special) for parts in found]


def _pair(encoder: RowEncoder, item: Pair) -> list[_Draft]:
    _refuse_weights(item.chosen + item.rejected, item.row)
    sides = []
    for reply in (item.chosen, item.rejected):
        whole = Conversation(item.prompt + reply, item.row, item.tools, item.media)
        sides.append(_only(encoder.renderer.sequences(whole, first=len(item.prompt)), item.row))
    special = _special_as_text(encoder, item.prompt + item.chosen + item.rejected)
    return [_Draft(item.row, sides, item.margin, one_turn=True, special_as_text=special)]


def _refuse_weights(reply: Sequence[Any], row: Row) -> None:
    if any(message.get("weight", 1) not in (0, 1) for message in reply):
        raise BadRow(
            row, "a weight of a reply that is judged as a whole means nothing", "no weight, or 0 for a message"
        )


def _feedback(encoder: RowEncoder, item: Feedback) -> list[_Draft]:
    _refuse_weights(item.reply, item.row)
    whole = Conversation(item.prompt + item.reply, item.row, item.tools, item.media)
    parts = _only(encoder.renderer.sequences(whole, first=len(item.prompt)), item.row)
    special = _special_as_text(encoder, whole.messages)
    return [_Draft(item.row, [parts], item.good, one_turn=True, special_as_text=special)]


def _question(encoder: RowEncoder, item: Question) -> list[_Draft]:
    texts = encoder.renderer.prompt(item.prompt, item.row, item.tools)
    parts = [Part(text, 0.0, False) for text in texts]
    special = _special_as_text(encoder, item.prompt)
    kept = {"prompt": item.prompt, "answer": item.answer}
    return [_Draft(item.row, [parts], kept, prompt_only=True, special_as_text=special)]


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


def _tokens(encoder: RowEncoder, item: Tokens) -> list[_Draft]:
    highest = max(*item.input_ids, *item.labels, 0)
    if highest >= encoder._num_tokens:
        message = f"holds the token {highest}, and the tokenizer has {encoder._num_tokens}"
        raise BadRow(item.row, message, "rows tokenised by this model's tokenizer")
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


def understood(rows: Iterable[tuple[Opened, Row | BadRow]], kind: str) -> tuple[list[Item], list[int], list[BadRow]]:
    """Read rows as the kind that a stage trains on.

    Returns:
        The items, of one row there may be several; the number of the row that each comes from, counted from 0; and the
        rows that cannot be trained on.
    """
    items: list[Item] = []
    origins: list[int] = []
    bad: list[BadRow] = []
    for number, (opened, row) in enumerate(rows):
        try:
            if isinstance(row, BadRow):
                raise row
            found = understand(row, kind, opened.format, opened.columns, opened.tags)
            items += found
            origins += [number] * len(found)
        except BadRow as error:
            bad.append(error)
    return items, origins, bad
