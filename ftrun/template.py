"""How a conversation becomes text: the ``template`` group.

A template is the tokenizer's own (nothing set), Jinja text (``chat_template``), or slots: strings that a message is put
into. Slots are rendered here, without a tokenizer, into pieces that are tokenised apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from ftrun.data import Reasoning
from ftrun.data.rows import Message
from ftrun.errors import Problem, did_you_mean

if TYPE_CHECKING:
    from ftrun.data.tools import Call, Tool


@dataclass(kw_only=True)
class Template:
    """How a conversation becomes text."""

    chat_template: str | None = None
    """Jinja text, as transformers' ``apply_chat_template`` takes it. Default: the slots, or without a ``user`` slot the
    tokenizer's own template."""

    prefix: str = ""
    """Slot that a conversation begins with. ``{bos}`` and ``{eos}`` in a slot are the tokenizer's tokens; at ``{cut}``
    the text is tokenised in two parts."""

    system: str = "{content}"
    """Slot of the system message; left out where there are neither a system message nor tools."""

    user: str | None = None
    """Slot of a user message, ``{content}`` in it, up to where the reply's header begins."""

    generation: str = ""
    """What stands between a user or tool message and the reply: the header of the reply."""

    assistant: str = "{content}{eos}"
    """Slot of a reply, all of which is learned: with it, a model learns to stop."""

    calls: str | None = None
    """Slot of a reply that calls tools. Default: ``assistant``."""

    tool: str | None = None
    """Slot of what a tool returned. Default: ``user``."""

    tool_join: str | None = None
    """What stands between the results of several calls in one ``tool`` slot. Default: each has a slot of its own."""

    tool_generation: str | None = None
    """The header of a reply to a tool message, where it is another than ``generation``."""

    tool_format: str | None = None
    """How tools and calls are written, one of docs/templates.md. Default: ``default``, for slots."""

    trim_tools: bool = False
    """Drop the line breaks that the list of tools begins with where it is all of the system message."""

    default_system: str | None = None
    """System message of a conversation that has none."""

    system_in_user: bool = False
    """Put the system message into the first user message."""

    date: str | None = None
    """What day a chat template that writes today's date is told it is, as YYYY-MM-DD. Default: the day on which the run
    is started, kept in run.yaml, so that a run that goes on tomorrow is still the same."""

    stop: list[str] = field(default_factory=list)
    """Strings that end a reply, besides the tokenizer's end-of-sequence token."""

    replace_eos: bool = False
    """Make the first of ``stop`` the tokenizer's end-of-sequence token."""

    single_eos: bool = False
    """Write the end-of-sequence token once, after the last reply: each reply ends where the next message begins."""

    thought_open: str = "<think>\n"
    """What thinking begins with."""

    thought_close: str = "\n</think>\n\n"
    """What stands between thinking and the answer."""

    thought_empty: str | None = None
    """For a model that thinks: the block of a reply without thinking. ``data.reasoning`` says where it goes."""

    @property
    def has_slots(self) -> bool:
        """Whether conversations are rendered from the slots."""
        return self.chat_template is None and self.user is not None


_WITH_CONTENT = ("system", "user", "assistant", "calls", "tool")
_MARK = re.compile(r"(\{(?:content|bos|eos|cut)\})")
_CUTS = ("{bos}", "{eos}", "{cut}")
"""Marks at which a slot is tokenised in parts."""


def check(template: Template) -> Iterator[Problem]:
    """Yield what is wrong with a template."""
    for name in _WITH_CONTENT:
        slot = getattr(template, name)
        if slot is not None and slot.count("{content}") != 1:
            message = f"holds {{content}} {slot.count('{content}')} times, and a message goes into one place"
            yield Problem(f"template.{name}", message, f"template.{name}='BEFORE{{content}}AFTER'")
    yield from _unknown_tool_format(template)
    yield from _broken_jinja(template)
    if template.date is not None and not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", template.date):
        yield Problem("template.date", f"{template.date} is no day", "template.date=2026-01-31")
    if template.replace_eos and not template.stop:
        yield Problem("template.replace_eos", "no string is named that ends a reply", "template.stop=['<|im_end|>']")
    if not template.chat_template and template.user is None:
        fresh = Template()
        for name, value in vars(template).items():
            if value != getattr(fresh, name) and name not in ("stop", "replace_eos", "date"):
                message = "belongs to a template of slots, and this one, the tokenizer's own, has no user slot"
                yield Problem(f"template.{name}", message, "template=NAME, or template.user too")


def _unknown_tool_format(template: Template) -> Iterator[Problem]:
    if template.tool_format is None:
        return
    from ftrun.data.tools import TOOL_FORMATS

    if template.tool_format not in TOOL_FORMATS:
        near = did_you_mean(template.tool_format, list(TOOL_FORMATS))
        message = f"there is no tool format {template.tool_format}{near}"
        yield Problem("template.tool_format", message, f"one of {', '.join(TOOL_FORMATS)}")


def _broken_jinja(template: Template) -> Iterator[Problem]:
    """Yield a problem if the Jinja text cannot be compiled. Jinja is imported only where there is such a text."""
    if not template.chat_template:
        return
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag around what a model writes, which transformers adds to Jinja."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols]).compile(template.chat_template)
    except TemplateSyntaxError as error:
        message = f"line {error.lineno} is not Jinja: {error.message}"
        yield Problem("template.chat_template", message, "mend the line")


class TemplateError(Exception):
    """A conversation that a template has no way to write."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix


class Kind(Enum):
    """What a piece of a conversation is to the model."""

    prompt = "prompt"
    reply = "reply"
    after = "after"


class Piece(NamedTuple):
    """A text that is tokenised on its own."""

    text: str
    kind: Kind
    message: int
    """Index of the message it stands for; -1 for none."""


def render(
    template: Template,
    messages: list[Message],
    tools: list[Tool] | None,
    *,
    bos: str,
    eos: str,
    reasoning: Reasoning,
    strip_history: bool,
    generation: bool = False,
    apart: frozenset[int] = frozenset(),
) -> list[Piece]:
    """Write a conversation with a template's slots.

    Args:
        template: One with slots.
        messages: The conversation.
        tools: The tools that the system message tells of. An empty list has a system message too, if need be an empty
            one, as in LLaMA-Factory; None has not.
        bos: The tokenizer's token that begins a sequence, or nothing.
        eos: The tokenizer's token that ends one, or nothing.
        reasoning: What happens to thinking.
        strip_history: Where the model thinks, drop the thinking of all replies but one that ends the conversation.
        generation: End with the header of the next reply, as inference does.
        apart: Indices of messages whose text may not share a piece with anything else.

    Raises:
        TemplateError: The template has no way to write this conversation.
    """
    _refuse(messages)
    writer = _Writer({"{bos}": bos, "{eos}": eos}, apart)
    first = int(messages[0]["role"] == "system")
    lead = _open(writer, template, messages[0] if first else {}, tools)
    last = len(messages) - 1
    for index in range(first, last + 1):
        following = messages[index + 1]["role"] if index < last else "assistant" if generation else ""
        if messages[index]["role"] == "assistant":
            is_past = strip_history and (generation or index < last)
            _write_reply(writer, template, messages[index], index, reasoning, is_past)
        elif messages[index]["role"] == "user":
            _write_user(writer, template, messages[index], index, lead if index == first else "")
        else:
            _write_result(writer, template, messages, index)
        if following == "assistant":
            _write_header(writer, template, messages[index]["role"])
        if following != "tool" or messages[index]["role"] != "tool":
            writer.cut()
    if generation and template.thought_empty is not None and reasoning is not Reasoning.keep:
        writer.write(template.thought_empty, Kind.prompt, -1)
    if template.single_eos and not generation and messages[-1]["role"] == "assistant":
        writer.write(eos, Kind.reply, last)
    writer.cut()
    return writer.pieces


class _Writer:
    """The pieces of a conversation so far: what is written goes to one piece until the next cut."""

    def __init__(self, marks: dict[str, str], apart: frozenset[int]) -> None:
        self.marks = marks
        self.apart = apart
        self.pieces: list[Piece] = []
        self.text = ""
        self.kind = Kind.prompt
        self.message = -1

    def write(self, text: str, kind: Kind, message: int) -> None:
        """Go on with the piece in hand, or begin another if one of the two is to stand apart."""
        if self.text and self.message != message and (self.message in self.apart or message in self.apart):
            self.cut()
        if not self.text or self.message < 0:
            self.message = message
        self.text += text
        self.kind = kind

    def cut(self) -> None:
        """End the piece in hand."""
        if self.text:
            self.pieces.append(Piece(self.text, self.kind, self.message))
            self.text = ""

    def slot(self, slot: str, text: str, kind: Kind, message: int) -> None:
        """Write a slot with a message's content in it."""
        self.before(slot, kind, message)
        self.write(text, kind, message)
        self.after(slot, kind, message)

    def before(self, slot: str, kind: Kind, message: int) -> None:
        """Write a slot up to its content; of a message that stands apart, this header is not a part."""
        self._parts(_halves(slot)[0], kind, message if kind is Kind.reply or message not in self.apart else -1)

    def after(self, slot: str, kind: Kind, message: int) -> None:
        """Write a slot from its content on."""
        self._parts(_halves(slot)[1], kind, message)

    def _parts(self, parts: tuple[str, ...], kind: Kind, message: int) -> None:
        for part in parts:
            if part not in _CUTS:
                self.write(part, kind, message)
                continue
            self.cut()
            self.write(self.marks.get(part, ""), kind, message)
            self.cut()


@cache
def _halves(slot: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the texts and marks of a slot before and after its content."""
    before, _, after = slot.partition("{content}")
    return tuple(filter(None, _MARK.split(before))), tuple(filter(None, _MARK.split(after)))


def _refuse(messages: list[Message]) -> None:
    """Raise what no template of slots has a place for."""
    roles = [message["role"] for message in messages]
    for role in roles:
        if role not in ("system", "user", "assistant", "tool"):
            raise TemplateError(f"no template has a place for a message from {role}", "system, user, assistant or tool")
    if "system" in roles[1:]:
        place = roles.index("system", 1) + 1
        raise TemplateError(
            f"message {place} is from system, which this template has only as the first", "template=auto"
        )
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns[:1] != ["user"]:
        found = f"the first message is from {turns[0]}" if turns else "there is no message"
        raise TemplateError(f"{found}, and this template begins with the user", "a user message first")


def _open(writer: _Writer, template: Template, message: Message, tools: list[Tool] | None) -> str:
    """Write what stands before the first turn; return the text that the first user message is to begin with."""
    writer.before(template.prefix, Kind.prompt, -1)
    writer.cut()
    text = (_text(message) if message else "") or template.default_system or ""
    listed = _tools_text(template, tools) if tools else ""
    text += listed.lstrip("\n") if template.trim_tools and not text else listed
    if not text and tools is None:
        return ""
    if template.system_in_user:
        return template.system.replace("{content}", text, 1)
    writer.slot(template.system, text, Kind.prompt, 0 if message else -1)
    writer.cut()
    return ""


def _tools_text(template: Template, tools: list[Tool]) -> str:
    from ftrun.data.tools import TOOL_FORMATS, ToolError

    name = template.tool_format or "default"
    try:
        return TOOL_FORMATS[name].system_text(tools)
    except (ToolError, AttributeError, KeyError, TypeError) as error:
        message = f"the tool format {name} cannot list the tools: {error}"
        raise TemplateError(message, 'tools like {"name": ..., "description": ..., "parameters": {...}}') from error


def _write_user(writer: _Writer, template: Template, message: Message, index: int, lead: str) -> None:
    slot = template.user or ""
    writer.before(slot, Kind.prompt, index)
    if lead:
        writer.write(lead, Kind.prompt, index - 1)
    writer.write(_text(message), Kind.prompt, index)
    writer.after(slot, Kind.prompt, index)


def _write_result(writer: _Writer, template: Template, messages: list[Message], index: int) -> None:
    """Write what a tool returned, into the slot of the result before it where the template joins them."""
    slot = (template.user if template.tool is None else template.tool) or ""
    is_joined = template.tool_join is not None
    if is_joined and messages[index - 1]["role"] == "tool":
        writer.write(template.tool_join or "", Kind.prompt, -1)
    else:
        writer.cut()
        writer.before(slot, Kind.prompt, index)
    writer.write(_text(messages[index]), Kind.prompt, index)
    if not is_joined or messages[index + 1 : index + 2] == [] or messages[index + 1]["role"] != "tool":
        writer.after(slot, Kind.prompt, index)


def _write_header(writer: _Writer, template: Template, role: str) -> None:
    """Write the header of a reply behind a message from ``role``."""
    is_after_tool = role == "tool" and template.tool_generation is not None
    writer.before((template.tool_generation if is_after_tool else template.generation) or "", Kind.prompt, -1)


def _write_reply(
    writer: _Writer, template: Template, message: Message, index: int, reasoning: Reasoning, is_past: bool
) -> None:
    said = _said(template, message, reasoning, is_past)
    calls = _calls_text(template, message["tool_calls"]) if message.get("tool_calls") else ""
    needs_block = template.thought_empty is not None and not is_past and not _has_thinking(template, said + calls)
    if needs_block:
        writer.write(template.thought_empty or "", Kind.reply if reasoning is Reasoning.keep else Kind.prompt, index)
        writer.cut()
    if not calls:
        writer.slot(template.assistant, said, Kind.reply, index)
    elif template.calls is None:
        writer.slot(template.assistant, _joined(template, said, calls), Kind.reply, index)
    elif any(part.strip() and part not in _CUTS for part in _halves(template.calls)[0]):
        # Something like [TOOL_CALLS] stands before the calls; what the reply says goes before it.
        writer.write(said, Kind.reply, index)
        writer.slot(template.calls, calls, Kind.reply, index)
    else:
        writer.slot(template.calls, _joined(template, said, calls), Kind.reply, index)
    writer.cut()


def _joined(template: Template, said: str, calls: str) -> str:
    """Return a reply's words and its calls, in lines of their own."""
    is_apart = not said or said[-1].isspace() or said.endswith(template.thought_close) or calls.startswith("\n")
    return said + ("" if is_apart else "\n") + calls


def _said(template: Template, message: Message, reasoning: Reasoning, is_past: bool) -> str:
    """Return what a reply says besides its calls: its thinking and its content."""
    text = _text(message)
    if reasoning is Reasoning.strip or (is_past and template.thought_empty is not None):
        return _without_thinking(template, text)
    thinking = message.get("reasoning_content")
    return f"{template.thought_open}{thinking}{template.thought_close}{text}" if thinking else text


def _calls_text(template: Template, calls: list[Call]) -> str:
    from ftrun.data.tools import TOOL_FORMATS, ToolError

    try:
        return TOOL_FORMATS[template.tool_format or "default"].call_text(calls)
    except ToolError as error:
        raise TemplateError(str(error), "another template, or template.tool_format=qwen") from error


def _has_thinking(template: Template, text: str) -> bool:
    return template.thought_open.strip() in text or template.thought_close.strip() in text


def _without_thinking(template: Template, text: str) -> str:
    """Return a text without its thinking; of a model that does not think, only what opens the text counts as such."""
    opening, closing = template.thought_open.strip(), template.thought_close.strip()
    if template.thought_empty is None:
        return _thinking(rf"\A\s*{re.escape(opening)}.*?{re.escape(closing)}\n*").sub("", text)
    return _thinking(f"{re.escape(opening)}.*?{re.escape(closing)}").sub("", text).lstrip("\n")


@cache
def _thinking(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)


def _text(message: Message) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if not isinstance(content, str):
        raise TemplateError("a template of slots writes text, and a message has parts", "template=auto")
    return content


def to_jinja(template: Template, reasoning: Reasoning = Reasoning.keep, strip_history: bool = False) -> str:
    """Return Jinja text that writes plain conversations as `render` does, for the tokenizer that a run saves.

    It refuses tools, whose formats are not in it.
    """
    lead = _jinja_lead(template)
    lines = [
        _JINJA_REFUSE,
        *_jinja_opening(template),
        "{%- for message in turns -%}",
        "{%- set last = 'assistant' if add_generation_prompt else '' -%}",
        "{%- set following = last if loop.last else loop.nextitem['role'] -%}",
        "{%- set content = message['content'] or '' -%}",
        "{%- if message['role'] == 'assistant' -%}",
        *_jinja_reply(template, reasoning, strip_history),
        "{%- elif message['role'] == 'user' -%}",
        _jinja_slot(template.user or "", f"({lead}) ~ content" if lead else "content"),
        "{%- else -%}",
        *_jinja_result(template),
        "{%- endif -%}",
        "{%- if following == 'assistant' -%}",
        *_jinja_header(template),
        "{%- endif -%}",
        "{%- endfor -%}",
    ]
    if template.thought_empty is not None and reasoning is not Reasoning.keep:
        lines += ["{%- if add_generation_prompt -%}", _jinja_slot(template.thought_empty), "{%- endif -%}"]
    if template.single_eos:
        ended = "not add_generation_prompt and turns[-1]['role'] == 'assistant'"
        lines += [f"{{%- if {ended} -%}}", _jinja_slot("{eos}"), "{%- endif -%}"]
    return "\n".join(line for line in lines if line)


_JINJA_REFUSE = """\
{%- if tools -%}
{{- raise_exception("this template cannot list tools") -}}
{%- endif -%}
{%- set turns = messages[1:] if messages and messages[0]['role'] == 'system' else messages -%}
{%- if not turns or turns[0]['role'] != 'user' -%}
{{- raise_exception("the first message, or the first after the system message, is not from the user") -}}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] not in ['user', 'assistant', 'tool'] or message['tool_calls'] -%}
{{- raise_exception("this template has no place for message " ~ loop.index ~ ", from " ~ message['role']) -}}
{%- endif -%}
{%- endfor -%}"""


def _jinja_slot(slot: str, content: str = "content") -> str:
    """Return the expression that writes a slot, with the expression ``content`` in its place."""
    words = {"{content}": content, "{bos}": "(bos_token or '')", "{eos}": "(eos_token or '')", "{cut}": ""}
    parts = [words[part] if part in words else _quoted(part) for part in _MARK.split(slot) if part]
    return f"{{{{- {' ~ '.join(filter(None, parts))} -}}}}" if any(parts) else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _jinja_opening(template: Template) -> list[str]:
    text = "messages[0]['content'] if messages[0]['role'] == 'system' else ''"
    system = f"{{%- set system = ({text}) or {_quoted(template.default_system or '')} -%}}"
    if template.system_in_user:
        return [_jinja_slot(template.prefix), system]
    slot = _jinja_slot(template.system, "system")
    return [_jinja_slot(template.prefix), system, "{%- if system -%}", slot, "{%- endif -%}"]


def _jinja_lead(template: Template) -> str:
    """Return the expression of what the first user message begins with, or nothing."""
    if not template.system_in_user:
        return ""
    before, _, after = template.system.partition("{content}")
    return f"{_quoted(before)} ~ system ~ {_quoted(after)} if system and loop.first else ''"


def _jinja_reply(template: Template, reasoning: Reasoning, strip_history: bool) -> list[str]:
    opening, closing = _quoted(template.thought_open.strip()), _quoted(template.thought_close.strip())
    thinks = template.thought_empty is not None
    is_past = "not loop.last or add_generation_prompt" if strip_history and thinks else "false"
    is_dropped = "true" if reasoning is Reasoning.strip else is_past
    begins = "" if thinks else f" and content.lstrip().startswith({opening})"
    lines = [
        f"{{%- if {is_dropped} -%}}",
        f"{{%- if {opening} in content and {closing} in content{begins} -%}}",
        f"{{%- set content = content.split({closing})[-1].lstrip('\\n') -%}}",
        "{%- endif -%}",
        "{%- set content = content.lstrip('\\n') -%}" if thinks else "",
        "{%- elif message['reasoning_content'] -%}",
        f"{{%- set content = {_jinja_thinking(template)} ~ content -%}}",
        "{%- endif -%}",
    ]
    if thinks:
        lines += [
            f"{{%- if not ({is_past}) and {opening} not in content and {closing} not in content -%}}",
            _jinja_slot(template.thought_empty or ""),
            "{%- endif -%}",
        ]
    return [*lines, _jinja_slot(template.assistant)]


def _jinja_thinking(template: Template) -> str:
    return f"{_quoted(template.thought_open)} ~ message['reasoning_content'] ~ {_quoted(template.thought_close)}"


def _jinja_result(template: Template) -> list[str]:
    slot = (template.user if template.tool is None else template.tool) or ""
    if template.tool_join is None:
        return [_jinja_slot(slot)]
    before, _, after = slot.partition("{content}")
    return [
        "{%- if loop.previtem['role'] == 'tool' -%}",
        _jinja_slot(template.tool_join),
        "{%- else -%}",
        _jinja_slot(before),
        "{%- endif -%}",
        "{{- content -}}",
        "{%- if following != 'tool' -%}",
        _jinja_slot(after),
        "{%- endif -%}",
    ]


def _jinja_header(template: Template) -> list[str]:
    if template.tool_generation is None:
        return [_jinja_slot(template.generation)]
    return [
        "{%- if message['role'] == 'tool' -%}",
        _jinja_slot(template.tool_generation),
        "{%- else -%}",
        _jinja_slot(template.generation),
        "{%- endif -%}",
    ]
