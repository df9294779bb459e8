"""How tools and calls are written: as LLaMA-Factory 0.9.5 does, but where it writes what cannot be read, and back.

The fixture was recorded from its ``tool_formatter`` and ``function_formatter``, with the date of `tools.LLAMA3_DATE`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ftrun.data.tools import TOOL_FORMATS, ToolError

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = json.loads((FIXTURES / "tool_formats.json").read_text())
TOOLS = json.loads((FIXTURES / "conversations.json").read_text())["tools"]

MENDED = {
    "glm4_moe": lambda text: re.sub(r"(</arg_value>)(?=\n\n<tool_call>|$)", r"\1\n</tool_call>", text),
    "seed_oss": lambda text: re.sub(r"<function=(\w+)\n", r"<function=\1>\n", text),
    "minimax2": lambda text: f"<minimax:tool_call>\n{text}\n</minimax:tool_call>",
}
"""What LLaMA-Factory leaves out of calls: an end tag, an angle bracket, the tags around all calls."""


def call(name: str, /, **arguments: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = [call(one["name"], **one["arguments"]) for one in RECORDED["calls"]]

HARD = {
    "text": 'quote " brace } back\\slash, <b>tag</b> and "name"',
    "lines": " first\n\nsecond ",
    "number": "5",
    "word": "true",
    "empty": "",
    "count": 3,
    "share": 0.25,
    "yes": True,
    "nothing": None,
    "list": [1, "two", {"three": [False, None]}],
    "object": {"a": {"b": 1.5}, "c": "d"},
    "none": {},
}
"""Arguments that are easily lost on the way."""

DECLARED = [
    {
        "name": "hard",
        "parameters": {
            "type": "object",
            "properties": {k: {"type": "string"} for k, v in HARD.items() if isinstance(v, str)},
        },
    }
]


def test_the_formats_are_those_of_the_peer_and_phi4_mini():
    assert set(TOOL_FORMATS) == {*RECORDED["formats"], "phi4_mini"}


@pytest.mark.parametrize("name", RECORDED["formats"])
def test_tools_are_listed_as_in_the_peer(name):
    assert TOOL_FORMATS[name].system_text(TOOLS) == RECORDED["formats"][name]["system"]


@pytest.mark.parametrize("name", RECORDED["formats"])
def test_calls_are_written_as_in_the_peer(name):
    mended = MENDED.get(name, str)
    recorded = RECORDED["formats"][name]
    assert TOOL_FORMATS[name].call_text(CALLS[:1]) == mended(recorded["one"])
    if name == "glm4":
        with pytest.raises(ToolError, match="takes one call in a message, and here are 2"):
            TOOL_FORMATS[name].call_text(CALLS)
    else:
        assert TOOL_FORMATS[name].call_text(CALLS) == mended(recorded["two"])


def test_phi4_mini_lists_tools_in_its_tags():
    assert TOOL_FORMATS["phi4_mini"].system_text(TOOLS) == f"<|tool|>{json.dumps(TOOLS, ensure_ascii=False)}<|/tool|>"


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("content", ["", "Let me look.", "First {this}.\n\n[And] that: it's"])
def test_calls_are_read_back(name, content):
    calls = CALLS[:1] if name == "glm4" else CALLS
    text = (content + "\n" if content else "") + TOOL_FORMATS[name].call_text(calls)
    assert TOOL_FORMATS[name].parse(text) == (content, calls)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_arguments_survive(name):
    calls = [call("hard", **HARD)]
    assert TOOL_FORMATS[name].parse(TOOL_FORMATS[name].call_text(calls), DECLARED) == ("", calls)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_call_without_arguments_is_read_back(name):
    calls = [call("now")]
    assert TOOL_FORMATS[name].parse(TOOL_FORMATS[name].call_text(calls)) == ("", calls)


@pytest.mark.parametrize("name", ["qwen3_5", "glm4_moe", "minimax2", "seed_oss"])
def test_only_the_tools_tell_a_text_from_a_number(name):
    text = TOOL_FORMATS[name].call_text([call("hard", number="5", count=5)])
    ((without,), (with_them,)) = (TOOL_FORMATS[name].parse(text, tools)[1] for tools in (None, DECLARED))
    assert without["function"]["arguments"] == {"number": 5, "count": 5}
    assert with_them["function"]["arguments"] == {"number": "5", "count": 5}


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "Just words.",
        "Action: look\nAction Input: {broken",
        '{"name": 5, "parameters": {}}',
        '[{"name": "a"}]',
        "look\n{broken",
        "<tool_call>\n{broken}\n</tool_call>",
        "<tool_calls>\nnothing\n</tool_calls>",
        "<|tool_call_start|>[import os]<|tool_call_end|>",
        "<|tool_call_start|>[f(x=__import__('os'))]<|tool_call_end|>",
        '<|tool_call>call:f{a:<|"|>never ends}<tool_call|>',
        "<|tool_call>call:f{a}<tool_call|>",
    ],
)
def test_what_is_no_call_stays_text(name, text):
    if name == "glm4_moe" and "<tool_call>" in text:
        return  # any word in its tags is a call without arguments
    assert TOOL_FORMATS[name].parse(text) == (text, [])


def test_mistral_reads_calls_with_the_mark_that_the_template_writes():
    text = "Looking.[TOOL_CALLS] " + TOOL_FORMATS["mistral"].call_text(CALLS)
    assert TOOL_FORMATS["mistral"].parse(text) == ("Looking.", CALLS)


def test_lfm2_says_which_argument_it_cannot_name():
    with pytest.raises(ToolError, match="cannot name the argument 'my key' of f"):
        TOOL_FORMATS["lfm2"].call_text([call("f", **{"my key": 1})])


def test_a_tool_without_a_name_is_refused():
    with pytest.raises(ToolError, match="a tool has no name"):
        TOOL_FORMATS["qwen3_5"].system_text([{"type": "function", "function": {"description": "?"}}])
