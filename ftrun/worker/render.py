"""Conversations into parts of text: which the model is given, which it is to write, and how much each counts.

Each part is tokenised on its own, so that no token spans the border between a prompt and a reply: at inference the
prompt ends there.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ftrun.data import Data, Reasoning, TrainOn
from ftrun.data.rows import BadRow, Conversation, Message, Row
from ftrun.template import Kind, Piece, Template, TemplateError, render
from ftrun.worker.media import processor
from ftrun.worker.tokens import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_THINKING = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)
_THINKING_LOST = "the thinking"
_OTHER_TEMPLATE = "template=NAME (`ftrun list template`) instead of the tokenizer's own"


class Part(NamedTuple):
    """A part of a rendered conversation."""

    text: str
    weight: float
    """How much its tokens count in the loss; 0 is not learned."""

    reply: bool
    """Whether the model is to write it."""


class Renderer:
    """Writes conversations as a run's template does: one named in the config, or the tokenizer's own."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template, data: Data, encoder: TextEncoder
    ) -> None:
        self.tokenizer, self.template, self.data, self.encoder = tokenizer, template, data, encoder
        self._bos, self._eos = str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")
        self._marked = bool(tokenizer.chat_template and _MARKS.search(str(tokenizer.chat_template)))
        self._texts: dict[bool, str] = {}
        self._media = processor.of(tokenizer)
        self._written = {kind: self._media.written(kind) for kind in self._media.tokens} if self._media else {}
        self._parts_only = self._media is not None and not template.has_slots and _reads_parts_only(tokenizer)

    def sequences(self, item: Conversation, first: int = 0) -> list[list[Part]]:
        """Return the sequences to train a conversation with: one, unless the template rewrites earlier turns.

        A template that does (some drop the thinking of earlier replies) leaves no single text in which every reply
        stands as it is generated. Then there is one sequence to each reply that is learned, with what comes before it
        as the template writes it at that point.

        Args:
            item: The messages.
            first: The first message that may be learned; if it is not 0, thinking before it is history.

        Raises:
            BadRow: The template refuses the row, or writes it in a way that cannot be masked.
        """
        strip = (first > 0 or self.data.train_on is TrainOn.last) and not self.data.history_reasoning
        messages = self._prepared(item, strip_history=strip)
        first += (len(messages) - len(item.messages)) if first else 0
        if self.template.has_slots:
            found = [self._slots(messages, item, strip_history=strip)]
        else:
            found = self._own(messages, item, first)
        return [self._parts(pieces, messages, first) for pieces in found]

    def prompt(self, messages: Sequence[Message], row: Row, tools: list[Any] | None = None) -> list[str]:
        """Return what the model is given when it is to reply: the messages and the opening of a reply.

        Raises:
            BadRow: The template refuses them.
        """
        item = Conversation(list(messages), row, tools)
        strip = not self.data.history_reasoning
        prepared = self._prepared(item, strip_history=strip)
        if self.template.has_slots:
            return [piece.text for piece in self._slots(prepared, item, strip_history=strip, generation=True)]
        return [_Own(self, prepared, item).render(len(prepared), opening=True)]

    def _own(self, messages: list[Message], item: Conversation, first: int) -> list[list[Piece]]:
        own = _Own(self, messages, item)
        found = self._written_by(own, messages, item, first)
        for pieces in found:
            own.refuse_losses(pieces)
        return found

    def _written_by(self, own: _Own, messages: list[Message], item: Conversation, first: int) -> list[list[Piece]]:
        if self._marked:
            return [own.marked()]
        replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [index for index in replies if index >= first and messages[index].get("weight", 1.0)]
        if self.data.train_on is TrainOn.last:
            learned = learned[-1:]
        only_replies = self.data.train_on in (TrainOn.completions, TrainOn.last)
        if only_replies and len(learned) == 1 and learned == replies[-1:]:
            return [own.one(learned[0])]
        if (whole := own.whole()) is not None:
            return [whole]
        if first or not only_replies:
            message = "the chat template rewrites earlier turns, so that no mask can be right"
            raise BadRow(item.row, message, f"data.train_on=completions, or {_OTHER_TEMPLATE}")
        return [own.one(index) for index in learned]

    def own_template(self, tools: list[Any] | None) -> str:
        """Return the text of the tokenizer's own template, of which it may have one for tools, with the run's date."""
        if bool(tools) not in self._texts:
            self._texts[bool(tools)] = dated(self.tokenizer.get_chat_template(tools=tools), self.template.date)
        return self._texts[bool(tools)]

    def _parts(self, pieces: Sequence[Piece], messages: list[Message], first: int) -> list[Part]:
        """Say of each piece how much it counts."""
        replies = [piece.message for piece in pieces if piece.kind is Kind.reply]
        last = replies[-1] if replies else -1
        return [
            Part(self._bordered(piece.text), self._weight(piece, messages, first, last), piece.kind is Kind.reply)
            for piece in pieces
            if piece.text
        ]

    def _weight(self, piece: Piece, messages: list[Message], first: int, last: int) -> float:
        message: Message = messages[piece.message] if piece.message >= 0 else {"role": None}
        weight = float(message.get("weight", 1.0))
        if piece.message < first and first:
            return 0.0
        match self.data.train_on:
            case TrainOn.all:
                return weight
            case TrainOn.roles:
                is_header = piece.kind is Kind.after or (piece.kind is Kind.prompt and message["role"] == "assistant")
                return weight if message["role"] in self.data.train_roles and not is_header else 0.0
            case TrainOn.last:
                return weight if piece.kind is Kind.reply and piece.message == last else 0.0
            case _:
                return weight if piece.kind is Kind.reply else 0.0

    def _prepared(self, item: Conversation, *, strip_history: bool) -> list[Message]:
        """Return the messages with the system message, the thinking and the special tokens that the config wants."""
        messages = item.messages
        if self.data.system is not None and not (messages and messages[0]["role"] == "system"):
            messages = [{"role": "system", "content": self.data.system}, *messages]
        strip = self.data.reasoning is Reasoning.strip
        if not self.template.has_slots and (strip or strip_history):
            last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
            messages = [
                without_thinking(message) if strip or index < last else message
                for index, message in enumerate(messages)
            ]
        if not self.data.control_tokens_in_text:
            messages = [self._guarded(message, item.row) for message in messages]
        return [self._for_template(message) for message in messages] if self._media else messages

    def _for_template(self, message: Message) -> Message:
        """Return a message with its content as the template takes it: a text, or a list of parts."""
        content = message["content"]
        if isinstance(content, str):
            return message | {"content": [{"type": "text", "text": content}]} if self._parts_only else message
        if not self.template.has_slots:
            return message
        texts = (part["text"] if part["type"] == "text" else self._written.get(part["type"], "") for part in content)
        return message | {"content": "".join(texts)}

    def opening(self, parts: list[Any]) -> str:
        """Return what the first part of a content is written as."""
        first = parts[0]
        return str(first["text"]).strip() if first["type"] == "text" else self._written.get(first["type"], "")

    def _bordered(self, text: str) -> str:
        return self._media.bordered(text) if self._media else text

    def _guarded(self, message: Message, row: Row) -> Message:
        """Mark the special tokens in a message's own text as plain text."""
        if not self.holds_special(message):
            return message
        try:
            return self.encoder.guard_all(message)
        except ValueError as error:
            raise BadRow(row, str(error), "leave that character out") from None

    def holds_special(self, value: Any) -> bool:
        """Tell whether a special token stands in a message's own text, at any depth."""
        if isinstance(value, str):
            return self.encoder.has_special(value)
        if isinstance(value, dict):
            value = value.values()
        elif not isinstance(value, list):
            return False
        return any(map(self.holds_special, value))

    def _slots(
        self, messages: list[Message], item: Conversation, *, strip_history: bool, generation: bool = False
    ) -> list[Piece]:
        apart = frozenset(index for index, message in enumerate(messages) if self.is_apart(message))
        try:
            return render(
                self.template,
                messages,
                item.tools,
                bos=self._bos,
                eos=self._eos,
                reasoning=self.data.reasoning,
                strip_history=strip_history,
                generation=generation,
                apart=apart,
            )
        except TemplateError as error:
            raise BadRow(item.row, error.message, error.fix) from None

    def is_apart(self, message: Message) -> bool:
        """Tell whether a message that is no reply is learned, so that its text must stand apart from what is not."""
        role = message["role"]
        return self.data.train_on is TrainOn.roles and role != "assistant" and role in self.data.train_roles


class _Own:
    """One conversation, rendered by the tokenizer's own chat template or by Jinja text in the config."""

    def __init__(self, renderer: Renderer, messages: list[Message], item: Conversation) -> None:
        self._renderer, self._messages, self._item = renderer, messages, item
        self._tokenizer, self._reasoning = renderer.tokenizer, renderer.data.reasoning

    def whole(self) -> list[Piece] | None:
        """Render turn by turn; return nothing if a rendering does not begin with the one before it."""
        pieces: list[Piece] = []
        done = ""
        for index, message in enumerate(self._messages):
            reply = message["role"] == "assistant"
            if reply or self._renderer.is_apart(message):
                before = self.render(index, opening=reply)
                if not before.startswith(done):
                    return None
                pieces.append(Piece(before[len(done) :], Kind.prompt, -1))
                done = before
            elif index + 1 < len(self._messages):
                continue  # rendered together with what follows it
            text = self.render(index + 1)
            if not text.startswith(done):
                return None
            piece = text[len(done) :]
            if reply:
                pieces += self._reply(piece, index)
            else:
                pieces += (
                    self._message(piece, index)
                    if self._renderer.is_apart(message)
                    else [Piece(piece, Kind.prompt, index)]
                )
            done = text
        return pieces

    def one(self, index: int) -> list[Piece]:
        """Render the conversation up to one reply, which alone is learned: the prompt as at inference, and the reply.

        Raises:
            BadRow: The reply as the template writes it does not begin where its own prompt ends.
        """
        prompt, text = self.render(index, opening=True), self.render(index + 1)
        if not text.startswith(prompt):
            message = (
                "the chat template writes a reply in another way than it asks for one, so that no mask can be right"
            )
            raise BadRow(self._item.row, message, _OTHER_TEMPLATE)
        return [Piece(prompt, Kind.prompt, -1), *self._reply(text[len(prompt) :], index)]

    def marked(self) -> list[Piece]:
        """Render once, where the template itself marks what the model generates."""
        from transformers.utils.chat_template_utils import render_jinja_template

        replies = [index for index, message in enumerate(self._messages) if message["role"] == "assistant"]
        with _refusing(self._item.row):
            (text,), (spans,) = render_jinja_template(
                [self._messages],
                tools=self._item.tools,
                chat_template=self._renderer.own_template(self._item.tools),
                return_assistant_tokens_mask=True,
                **self._variables(len(self._messages)),
                **{name: str(token) for name, token in self._tokenizer.special_tokens_map.items()},
            )
        if len(spans) != len(replies):
            message = f"the chat template marks {len(spans)} replies in a conversation of {len(replies)}"
            raise BadRow(self._item.row, message, _OTHER_TEMPLATE)
        pieces, done = [], 0
        for index, (start, end) in zip(replies, spans, strict=True):
            end += self._renderer.encoder.length_of_leading_special(text[end:])
            pieces += [Piece(text[done:start], Kind.prompt, -1), Piece(text[start:end], Kind.reply, index)]
            done = end
        return [*pieces, Piece(text[done:], Kind.after, -1)]

    def refuse_losses(self, pieces: list[Piece]) -> None:
        """See to it that the template has left nothing out: some know no tools, thinking or system message.

        Raises:
            BadRow: With what is not in the text.
        """
        text = "".join(piece.text for piece in pieces)
        replies = {piece.message: piece.text for piece in pieces if piece.kind is Kind.reply}
        for index, message in enumerate(self._messages[: max(replies, default=-1) + 1]):
            lost = "" if _holds(text, message["content"]) else f"the {message['role']} message"
            if (reply := replies.get(index)) is not None:
                lost = lost or _lost_of_reply(reply, message)
            if lost:
                strip = "data.reasoning=strip, or " if lost == _THINKING_LOST else ""
                raise BadRow(self._item.row, f"the chat template leaves out {lost}", f"{strip}{_OTHER_TEMPLATE}")
        if any(name not in text for name in map(_name_of, self._item.tools or ())):
            raise BadRow(self._item.row, "the chat template leaves out the tools", _OTHER_TEMPLATE)

    def render(self, count: int, *, opening: bool = False) -> str:
        """Return the first ``count`` messages as the chat template writes them, and the opening of a reply."""
        if not count and not opening:
            return ""
        with _refusing(self._item.row):
            text = self._tokenizer.apply_chat_template(
                self._messages[:count],
                tools=self._item.tools,
                chat_template=self._renderer.own_template(self._item.tools),
                tokenize=False,
                add_generation_prompt=opening,
                **self._variables(count + opening),
            )
        assert isinstance(text, str)
        return text

    def _message(self, text: str, index: int) -> list[Piece]:
        """Split a rendered message that is learned and no reply: before its own words stands a header, which is not.

        Raises:
            BadRow: Its words are not in the text as they are.
        """
        content = self._messages[index]["content"]
        # A header stands before the words and may hold them ("user"), but not the words of several parts.
        start = text.rfind(content.strip()) if isinstance(content, str) else text.find(self._renderer.opening(content))
        if start < 0:
            message = f"the chat template writes the {self._messages[index]['role']} message in other words"
            raise BadRow(self._item.row, message, _OTHER_TEMPLATE)
        words, *after = self._reply(text[start:], index)
        return [Piece(text[:start], Kind.prompt, -1), words._replace(kind=Kind.prompt), *after]

    def _reply(self, text: str, index: int) -> list[Piece]:
        """Split a rendered reply after its end-of-turn token; white space that follows it is never generated."""
        end = self._renderer.encoder.end_of_last_special(text)
        if not end or text[end:].strip():
            end = len(text)
        return [Piece(text[:end], Kind.reply, index), Piece(text[end:], Kind.after, index)]

    def _variables(self, count: int) -> dict[str, Any]:
        """Return what the template is told of thinking; told nothing, it does as it was made to."""
        if self._reasoning is Reasoning.strip:
            return {"enable_thinking": False}
        if self._reasoning is Reasoning.empty:
            reply = next((m for m in reversed(self._messages[:count]) if m["role"] == "assistant"), None)
            return {"enable_thinking": False} if reply is not None and not thinks(reply) else {}
        return {}


def _reads_parts_only(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a chat template leaves out content that is a text and not a list of parts."""
    if not tokenizer.chat_template:
        return False
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "probe7"}], tokenize=False)
    except Exception:
        return True
    return "probe7" not in str(text)


@contextlib.contextmanager
def _refusing(row: Row) -> Iterator[None]:
    """Turn whatever a chat template raises into a bad row."""
    try:
        yield
    except Exception as error:
        message = f"the chat template refuses it: {error}"
        raise BadRow(row, message, "a conversation that the model's template knows, or template=NAME") from None


def dated(chat_template: str, date: str | None) -> str:
    """Return a chat template that writes a given day where it would write today's date."""
    if date is None:
        return chat_template
    day = datetime.date.fromisoformat(date)
    return _TODAY.sub(lambda found: json.dumps(day.strftime(found[2])), chat_template)


def _holds(text: str, content: Any) -> bool:
    """Tell whether a message's words are in a rendered text, as they are or as JSON; thinking is not asked for."""
    if not isinstance(content, str):
        return True
    words = content.rpartition("</think>")[2].strip()
    return words in text or json.dumps(words, ensure_ascii=False)[1:-1] in text or json.dumps(words)[1:-1] in text


def _lost_of_reply(text: str, message: Message) -> str:
    """Return what of a reply, besides its words, is not in its rendered text."""
    if not _holds(text, message.get("reasoning_content")):
        return _THINKING_LOST
    if any(name not in text for name in map(_name_of, message.get("tool_calls") or ())):
        return "the tool calls"
    return ""


def _name_of(tool: Any) -> str:
    """Return the name of a tool or of a call, in OpenAI's form or bare."""
    function = tool.get("function", tool) if isinstance(tool, dict) else {}
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def thinks(message: Message) -> bool:
    """Tell whether a reply has thinking in it."""
    content = message["content"]
    return bool(message.get("reasoning_content")) or (isinstance(content, str) and "</think>" in content)


def without_thinking(message: Message) -> Message:
    """Return a reply without its thinking; any other message as it is."""
    if message["role"] != "assistant" or not thinks(message):
        return message
    kept = {name: value for name, value in message.items() if name != "reasoning_content"}
    content = kept["content"]
    return kept | {"content": _THINKING.sub("", content) if isinstance(content, str) else content}
