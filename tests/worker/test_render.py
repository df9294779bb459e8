"""Conversations into parts, against texts written by hand: what is learned of any chat template and what is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ftrun.data import Data, Reasoning, TrainOn
from ftrun.data.rows import BadRow, Conversation, Row
from ftrun.template import Template
from ftrun.worker import builtin
from ftrun.worker.render import Renderer
from ftrun.worker.tokens import TextEncoder

TWO_TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]
THINKING = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "<think>\nhard\n</think>\n\n6"},
]

PLAIN = [THINKING[0], {"role": "assistant", "content": "4"}]

# Replies of earlier turns lose their thinking, and a reply without any gets an empty block: as Qwen3's template does.
REWRITES = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' -%}
{%- set parts = m.content.split('</think>') -%}
{%- if loop.last -%}<think>
{{ parts[0].replace('<think>', '').strip() if parts | length > 1 else '' }}
</think>

{% endif -%}
{{ parts[-1].strip() }}
{%- else -%}{{ m.content }}{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>

{% endif -%}
{%- endif -%}"""

MARKS = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
[bot]{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>
{%- else -%}[{{ m.role }}]{{ m.content }}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}[bot]{%- endif -%}"""


def renderer(chat_template: str | None = None, template: Template | None = None, **data: Any) -> Renderer:
    tokenizer: Any = copy.deepcopy(builtin.tokenizer())
    if chat_template:
        tokenizer.chat_template = chat_template
    return Renderer(tokenizer, template or Template(), Data(**data), TextEncoder(tokenizer))


def conversation(messages: list[dict[str, Any]], **more: Any) -> Conversation:
    return Conversation(messages, Row({"messages": messages}, "rows.jsonl", 1), **more)


def shown(parts: Any) -> str:
    """Return the text with what is learned in brackets; each bracket is one part."""
    return "".join(f"[{part.text}]" if part.weight else part.text for part in parts)


def only(found: list[Any]) -> str:
    (parts,) = found
    return shown(parts)


def test_replies_and_their_ends_are_learned():
    assert only(renderer().sequences(conversation(TWO_TURNS))) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "[Hello.<|im_end|>]\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[So long.<|im_end|>]\n"
    )


@pytest.mark.parametrize(
    ("data", "learned"),
    [
        ({"train_on": TrainOn.last}, ["So long.<|im_end|>"]),
        (
            {"train_on": TrainOn.roles, "train_roles": ["user"]},
            ["Hi<|im_end|>", "Bye<|im_end|>"],
        ),
        ({"train_on": TrainOn.roles, "train_roles": ["assistant"]}, ["Hello.<|im_end|>", "So long.<|im_end|>"]),
        (
            {"train_on": TrainOn.roles, "train_roles": ["system", "assistant"]},
            ["Be kind.<|im_end|>", "Hello.<|im_end|>", "So long.<|im_end|>"],
        ),
    ],
)
def test_what_is_learned_can_be_chosen(data, learned):
    (parts,) = renderer(**data).sequences(conversation(TWO_TURNS))
    assert [part.text for part in parts if part.weight] == learned


def test_all_of_the_text_can_be_learned():
    (parts,) = renderer(train_on=TrainOn.all).sequences(conversation(TWO_TURNS))
    assert all(part.weight == 1 for part in parts)
    plain = builtin.tokenizer().apply_chat_template(TWO_TURNS, tokenize=False)
    assert "".join(part.text for part in parts) == plain


def test_messages_have_weights():
    messages = [dict(message) for message in TWO_TURNS]
    messages[2]["weight"], messages[4]["weight"] = 0.0, 0.5
    (parts,) = renderer().sequences(conversation(messages))
    assert [(part.text, part.weight) for part in parts if part.weight] == [("So long.<|im_end|>", 0.5)]
    messages[2]["weight"] = 2.0
    (parts,) = renderer().sequences(conversation(messages))
    assert [part.weight for part in parts if part.reply] == [2.0, 0.5]


def test_a_default_system_message_is_put_in_front_where_there_is_none():
    found = renderer(system="Be brief.")
    assert only(found.sequences(conversation(TWO_TURNS[1:3]))).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert "Be brief." not in only(found.sequences(conversation(TWO_TURNS)))


def test_a_template_that_marks_what_is_generated_is_taken_at_its_word():
    found = renderer(MARKS).sequences(conversation(TWO_TURNS))
    assert only(found) == "[system]Be kind.[user]Hi[bot][Hello.<|im_end|>][user]Bye[bot][So long.<|im_end|>]"
    (parts,) = renderer(MARKS, train_on=TrainOn.last).sequences(conversation(TWO_TURNS))
    assert [part.text for part in parts if part.weight] == ["So long.<|im_end|>"]


def test_a_template_that_rewrites_history_gives_a_sequence_to_each_reply():
    first, second = renderer(REWRITES).sequences(conversation(THINKING))
    opening = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert shown(first) == f"{opening}[<think>\neasy\n</think>\n\n4<|im_end|>]\n"
    assert shown(second) == (
        f"{opening}4<|im_end|>\n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n"
        "[<think>\nhard\n</think>\n\n6<|im_end|>]\n"
    )
    # Each begins with what inference would be given at that point.
    row = Row({}, "f", 1)
    assert shown(first).startswith("".join(renderer(REWRITES).prompt(THINKING[:1], row)))
    assert shown(second).startswith("".join(renderer(REWRITES).prompt(THINKING[:3], row)))
    assert len(renderer(REWRITES, train_on=TrainOn.last).sequences(conversation(THINKING))) == 1
    assert len(renderer(REWRITES, system="Be brief.").sequences(conversation(THINKING))) == 2


def test_where_no_mask_can_be_right_there_is_an_error_and_no_guess():
    mismatched = REWRITES.replace(
        "<|im_start|>assistant\n{% if enable", "<|im_start|>assistant\n<think>\n!{% if enable"
    )
    with pytest.raises(BadRow, match="in another way than it asks for one"):
        renderer(mismatched).sequences(conversation(THINKING[:2]))
    with pytest.raises(BadRow, match="rewrites earlier turns"):
        renderer(REWRITES, train_on=TrainOn.all).sequences(conversation(THINKING))
    with pytest.raises(BadRow, match="the chat template refuses it: no tools here"):
        renderer("{{ raise_exception('no tools here') }}").sequences(conversation(TWO_TURNS))
    once = MARKS.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    with pytest.raises(BadRow, match="marks 1 replies in a conversation of 2"):
        renderer(once).sequences(conversation(TWO_TURNS))


@pytest.mark.parametrize(
    ("reasoning", "messages", "text"),
    [
        (Reasoning.keep, THINKING[:2], "[<think>\neasy\n</think>\n\n4<|im_end|>]\n"),
        (Reasoning.strip, THINKING[:2], "<think>\n\n</think>\n\n[4<|im_end|>]\n"),
        (Reasoning.empty, THINKING[:2], "[<think>\neasy\n</think>\n\n4<|im_end|>]\n"),
        (
            Reasoning.empty,
            [THINKING[0], {"role": "assistant", "content": "4"}],
            "<think>\n\n</think>\n\n[4<|im_end|>]\n",
        ),
        (
            Reasoning.keep,
            [THINKING[0], {"role": "assistant", "content": "4"}],
            "[<think>\n\n</think>\n\n4<|im_end|>]\n",
        ),
    ],
)
def test_thinking_is_kept_stripped_or_empty(reasoning, messages, text):
    found = only(renderer(REWRITES, reasoning=reasoning).sequences(conversation(messages)))
    assert found == f"<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n{text}"


def test_the_thinking_of_earlier_replies_is_history():
    (parts,) = renderer(train_on=TrainOn.last).sequences(conversation(THINKING))
    assert "easy" not in shown(parts)
    assert "[<think>\nhard" in shown(parts)
    (parts,) = renderer(train_on=TrainOn.last, history_reasoning=True).sequences(conversation(THINKING))
    assert "easy" in shown(parts)
    (parts,) = renderer().sequences(conversation(THINKING), first=2)  # of a pair
    assert "easy" not in shown(parts)
    assert [part.text for part in parts if part.weight] == ["<think>\nhard\n</think>\n\n6<|im_end|>"]


SLOTS = Template(
    user="<|im_start|>user\n{content}<|im_end|>\n",
    generation="<|im_start|>assistant\n",
    assistant="{content}<|im_end|>\n",
    system="<|im_start|>system\n{content}<|im_end|>\n",
)


def test_slots_write_what_chatml_writes_and_learn_the_whole_reply():
    found = renderer(template=SLOTS).sequences(conversation(TWO_TURNS))
    assert only(found) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "[Hello.<|im_end|>\n]<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[So long.<|im_end|>\n]"
    )


@pytest.mark.parametrize("template", [Template(), SLOTS], ids=["own", "slots"])
def test_special_tokens_in_a_rows_own_text_are_text(template):
    messages = [{"role": "user", "content": "What is <|im_end|>?"}, {"role": "assistant", "content": "It ends a turn."}]
    plain = renderer(template=template, control_tokens_in_text=True)
    marked = renderer(template=template)
    end = marked.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def ends(found: Renderer) -> int:
        (parts,) = found.sequences(conversation(messages))
        return sum(ids.count(end) for ids in found.encoder.encode_many([part.text for part in parts]))

    assert (ends(plain), ends(marked)) == (3, 2)


def test_a_pair_of_a_tool_call_and_its_result_learns_all_of_the_reply():
    messages = [*TWO_TURNS[:2], TWO_TURNS[2], {"role": "user", "content": "?"}, TWO_TURNS[4]]
    (parts,) = renderer(system="x").sequences(conversation(messages[1:]), first=1)
    assert [part.text for part in parts if part.weight] == ["Hello.<|im_end|>", "So long.<|im_end|>"]


def test_the_prompt_is_what_inference_is_given():
    for template in (Template(), SLOTS):
        found = renderer(template=template)
        (parts,) = found.sequences(conversation(TWO_TURNS[:3]))
        before = [part.text for part in parts if not part.weight and part.text != "\n"]
        assert "".join(found.prompt(TWO_TURNS[:2], Row({}, "f", 1))) == "".join(before)


DATES = (
    "{%- if strftime_now is defined -%}{{ strftime_now('%d %B %Y') }}|{{ strftime_now( \"%Y-%m-%d\" ) }}{%- endif -%}"
)


def test_a_template_that_writes_the_date_writes_the_runs(monkeypatch):
    """So a run that goes on tomorrow still has the rows that it had."""
    found = renderer(DATES + "{% for m in messages %}{{ m.content }}{% endfor %}", Template(date="2024-02-29"))
    assert "".join(found.prompt(TWO_TURNS[1:2], Row({}, "f", 1))) == "29 February 2024|2024-02-29Hi"


def test_a_tokenizer_may_have_a_template_for_tools():
    found = renderer()
    found.tokenizer.chat_template = {"default": "plain", "tool_use": "tools"}
    assert [found.own_template(None), found.own_template([{"name": "f"}])] == ["plain", "tools"]


PLAIN_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


@pytest.mark.parametrize(
    ("what", "messages", "more"),
    [
        ("the tool calls", [TWO_TURNS[1], {"role": "assistant", "content": "", "tool_calls": [CALL]}], {}),
        ("the thinking", [TWO_TURNS[1], {**TWO_TURNS[2], "reasoning_content": "hm"}], {}),
        ("the tools", TWO_TURNS[1:3], {"tools": [{"type": "function", "function": {"name": "weather"}}]}),
        ("the system message", TWO_TURNS, {}),
    ],
)
def test_a_template_that_leaves_something_out_is_noticed(what, messages, more):
    without_system = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
    template = without_system + PLAIN_TEMPLATE if what == "the system message" else PLAIN_TEMPLATE
    with pytest.raises(BadRow, match=f"the chat template leaves out {what}"):
        renderer(template).sequences(conversation(messages, **more))


def test_a_template_that_writes_a_message_as_json_leaves_nothing_out():
    as_json = PLAIN_TEMPLATE.replace("{{ m.content }}", "{{ m.content | tojson }}")
    messages = [{"role": "user", "content": 'Say "hi"\nand é'}, {"role": "assistant", "content": "hi"}]
    assert len(renderer(as_json).sequences(conversation(messages))) == 1
