"""Templates of slots: every name as in LLaMA-Factory 0.9.5, piece by piece, and what is on purpose otherwise.

The fixture was recorded with a tokenizer whose tokens are the texts it is given, so it holds what is tokenised apart:
for each template and each ``CONVERSATION/MODE/REASONING`` a list of ``[text]`` or, where the text is learned,
``[text, 1]``; ``[text, EOS]`` is a text whose first token has the end token as its label. MODE is plain, mask_history
or pair (the encoding of a preference pair). Cases that the peer cannot encode hold its error instead.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from jinja2.sandbox import ImmutableSandboxedEnvironment
from omegaconf import OmegaConf

from ftrun import config, options, template
from ftrun.data import Reasoning
from ftrun.template import Kind, Piece, Template, TemplateError, render, to_jinja

FIXTURES = Path(__file__).parent / "data" / "fixtures"
PEER: dict[str, dict[str, Any]] = json.loads(gzip.decompress((FIXTURES / "template_pieces.json.gz").read_bytes()))
SAID = json.loads((FIXTURES / "conversations.json").read_text())
FILES = {file.name.removesuffix(".yaml"): file for file in sorted((options.CONF / "template").glob("*.yaml"))}
NOT_SLOTS = ("auto", "olmo2")
NAMES = [name for name in FILES if name not in NOT_SLOTS]
NOT_IN_THE_RELEASE = {"moss_vl", "hy_dense_1_8b", "hy_dense_7b"}
OURS = {"granite", "phi3"}

BOS, EOS = "<bos>", "<eos>"


@cache
def load(name: str) -> Template:
    """Read a preset as Hydra does, in a tenth of the time; a test compares."""
    return Template(**_values(name))


def _values(name: str) -> dict[str, Any]:
    values = yaml.safe_load(FILES[name].read_text()) or {}
    bases = [base for base in values.pop("defaults", []) if base != "_self_"]
    return {key: value for base in bases for key, value in _values(base).items()} | values


def eos_of(chosen: Template) -> str:
    return chosen.stop[0] if chosen.replace_eos else EOS


def rendered(chosen: Template, messages: list[dict[str, Any]], **kwargs: Any) -> list[Piece]:
    settings = {"tools": None, "reasoning": Reasoning.keep, "strip_history": False} | kwargs
    tools = settings.pop("tools")
    return render(chosen, messages, tools, bos=BOS, eos=eos_of(chosen), **settings)


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def talk(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_all_names_of_the_peer_are_here():
    assert len(PEER) == 121
    assert {*PEER, *NOT_IN_THE_RELEASE, *OURS} == set(NAMES)


def test_every_name_composes_without_a_problem():
    """All in one tree, each below a key of its own: to compose a hundred trees takes long."""
    each = [{f"template@t{number}": name} for number, name in enumerate(FILES)]
    ConfigStore.instance().store("all_templates", {"defaults": each})
    with initialize_config_dir(str(options.CONF), version_base="1.3"):
        tree = compose("all_templates")
    for number, name in enumerate(FILES):
        chosen = OmegaConf.to_object(OmegaConf.merge(Template, tree[f"t{number}"]))
        assert chosen == load(name), name
        assert list(template.check(chosen)) == [], name


@pytest.mark.parametrize("name", [*FILES][::25])
def test_a_name_is_typed_in_a_whole_tree(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.compose([f"template={name}", "model=tiny"]).template == load(name)


@pytest.mark.parametrize("name", FILES)
def test_a_preset_says_how_it_is_typed_and_only_what_differs(name):
    first = FILES[name].read_text().splitlines()[0]
    assert name == "auto" or (first.startswith("# ") and f"`ftrun template={name}`" in first)
    own = yaml.safe_load(FILES[name].read_text()) or {}
    bases = [base for base in own.pop("defaults", []) if base != "_self_"]
    before = dataclasses.asdict(load(bases[0]) if bases else Template())
    assert all(value != before[key] for key, value in own.items())


def mended(name: str, rows: list[list[Any]]) -> list[list[Any]]:
    """Return what the peer encodes, with what docs/templates.md says is otherwise here."""
    chosen = load(name)
    rows = [list(row) for row in rows]
    for row in rows:
        is_learned = len(row) > 1 or "Action: " in row[0]
        if chosen.tool_format == "glm4_moe" and "<arg_key>" in row[0] and "# Tools" not in row[0]:
            row[0] = re.sub(r"(</arg_value>)(?=\n\n<tool_call>|$)", r"\1\n</tool_call>", row[0])
        elif chosen.tool_format == "seed_oss" and "工具" not in row[0]:
            row[0] = re.sub(r"<function=(\w+)\n", r"<function=\1>\n", row[0])
        elif chosen.tool_format == "minimax2" and "# Tools" not in row[0]:
            call = r"(<invoke.*</invoke>)"
            row[0] = re.sub(call, r"<minimax:tool_call>\n\1\n</minimax:tool_call>", row[0], flags=re.DOTALL)
        elif name == "youtu" and is_learned and "Action Input: {" in row[0] and "Tool Name" not in row[0]:
            row[0] += "<|end_of_text|>"
        elif name in ("gemma4", "gemma4n", "mistral_small"):
            thought = re.escape(chosen.thought_open) + ".*" + re.escape(chosen.thought_close)
            row[0] = re.sub(rf"^(<\|tool>|\[TOOL_CALLS\])({thought})", r"\2\1", row[0], flags=re.DOTALL)
    if name == "phi_small":
        rows.insert(0, ["<|endoftext|>"])
    return rows


@pytest.mark.parametrize("name", PEER)
def test_pieces_are_those_of_the_peer(name):
    chosen = load(name)
    for case, recorded in PEER[name].items():
        if isinstance(recorded, str):
            continue
        conversation, mode, reasoning = case.split("/")
        said = SAID["conversations"][conversation]
        tools = SAID["tools"] if said.get("tools") else None
        last = len(said["messages"]) - 1
        pieces = rendered(
            chosen, said["messages"], tools=tools, reasoning=Reasoning(reasoning), strip_history=mode != "plain"
        )
        ours, before = [], Kind.prompt
        for piece in pieces:
            is_learned = piece.kind is Kind.reply and (mode == "plain" or piece.message == last)
            ours.append([piece.text, 1] if is_learned else [piece.text])
            if chosen.single_eos and mode == "plain" and (before, piece.kind) == (Kind.reply, Kind.prompt):
                ours[-1].append(eos_of(chosen))
            before = piece.kind
        theirs = mended(name, recorded)
        if chosen.single_eos and mode == "mask_history":  # the peer learns where replies end that it does not learn
            theirs = [row if row[1:] in ([], [1]) else row[:1] for row in theirs]
        assert ours == theirs, case


def test_what_the_peer_cannot_encode_is_known():
    errors = {error.split("[")[0] for cases in PEER.values() for error in cases.values() if isinstance(error, str)}
    assert errors == {
        "ValueError: GLM-4 does not support parallel functions.",
        "RuntimeError: Invalid JSON format in function message: ",
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("moss_vl", "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"),
        ("hy_dense_1_8b", "<bos><｜hy_User｜>A<｜hy_Assistant｜>B<eos>"),  # noqa: RUF001
        ("hy_dense_7b", "<bos>A<|extra_0|>B<eos>"),
    ],
)
def test_names_that_are_not_in_the_release(name, text):
    assert text_of(rendered(load(name), talk("A", "B"))) == text


def test_moss_vl_begins_a_system_message_of_tools_alone_without_line_breaks():
    text = text_of(rendered(load("moss_vl"), talk("A", "B"), tools=SAID["tools"]))
    assert text.startswith("<|im_start|>system\n# Tools\n\n")
    system = {"role": "system", "content": "S"}
    assert text_of(rendered(load("moss_vl"), [system, *talk("A", "B")], tools=SAID["tools"])).startswith(
        "<|im_start|>system\nS\n\n# Tools\n\n"
    )


def test_a_list_of_no_tools_has_a_system_message_and_no_list_has_none():
    assert text_of(rendered(load("qwen3"), talk("A", "B"), tools=[])).startswith("<|im_start|>system\n<|im_end|>\n")
    assert text_of(rendered(load("qwen3"), talk("A", "B"), tools=None)).startswith("<|im_start|>user\n")


def test_jinja_wins_over_slots_and_nothing_set_is_the_tokenizers_own():
    assert Template(user="{content}").has_slots
    assert not Template(user="{content}", chat_template="{{ messages }}").has_slots
    assert not Template().has_slots


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@cache
def environment() -> ImmutableSandboxedEnvironment:
    """As transformers renders chat templates."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    made.globals["raise_exception"] = raise_exception
    return made


@cache
def compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


def jinja_text(source: str, chosen: Template, messages: list[dict[str, Any]], **more: Any) -> str:
    return compiled(source).render(messages=messages, bos_token=BOS, eos_token=eos_of(chosen), **more)


PLAIN = {name: said["messages"] for name, said in SAID["conversations"].items() if not said.get("tools")} | {
    "results": [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "tool", "content": "C"},
        {"role": "tool", "content": "D"},
        {"role": "assistant", "content": "E"},
        {"role": "assistant", "content": "F"},
        {"role": "user", "content": "G"},
        {"role": "user", "content": "H"},
    ],
    "written": [{"role": "system", "content": ""}, *talk("A", "<think>\nhm\n</think>\n\nB", "C", "\nno <think> here")],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_jinja_text_writes_the_same(name):
    chosen = load(name)
    for reasoning in Reasoning:
        for strip_history in (False, True):
            source = to_jinja(chosen, reasoning, strip_history)
            for case, messages in PLAIN.items():
                for generation in (False, True):
                    pieces = rendered(
                        chosen, messages, reasoning=reasoning, strip_history=strip_history, generation=generation
                    )
                    text = jinja_text(source, chosen, messages, add_generation_prompt=generation)
                    assert text == text_of(pieces), (case, reasoning, strip_history, generation)


@pytest.mark.parametrize(
    ("messages", "more", "words"),
    [
        (talk("A"), {"tools": [{"name": "f"}]}, "cannot list tools"),
        ([{"role": "assistant", "content": "A"}], {}, "the first message"),
        ([], {}, "the first message"),
        (
            [{"role": "user", "content": "A"}, {"role": "critic", "content": "A"}],
            {},
            "no place for message 2, from critic",
        ),
        ([*talk("A"), {"role": "assistant", "tool_calls": [{}]}], {}, "no place for message 2"),
    ],
)
def test_the_jinja_text_refuses_what_it_cannot_write(messages, more, words):
    with pytest.raises(jinja2.TemplateError, match=words):
        jinja_text(to_jinja(load("qwen")), load("qwen"), messages, **more)


def test_tokens_that_a_tokenizer_lacks_are_left_out():
    pieces = render(load("llama2"), talk("A", "B"), None, bos="", eos="", reasoning=Reasoning.keep, strip_history=False)
    assert [piece.text for piece in pieces] == ["[INST] A [/INST]", "B"]
    source = to_jinja(load("llama2"))
    assert environment().from_string(source).render(messages=talk("A", "B")) == "[INST] A [/INST]B"


def test_kinds_and_messages_say_what_is_whose():
    messages = [{"role": "system", "content": "S"}, *talk("A", "B", "C", "D")]
    assert rendered(load("llama2"), messages) == [
        Piece("<bos>", Kind.prompt, 1),
        Piece("[INST] <<SYS>>\nS\n<</SYS>>\n\nA [/INST]", Kind.prompt, 1),
        Piece("B", Kind.reply, 2),
        Piece("<eos>", Kind.reply, 2),
        Piece("<bos>", Kind.prompt, 3),
        Piece("[INST] C [/INST]", Kind.prompt, 3),
        Piece("D", Kind.reply, 4),
        Piece("<eos>", Kind.reply, 4),
    ]


def test_a_message_that_stands_apart_shares_no_piece():
    messages = [{"role": "system", "content": "S"}, *talk("A", "B")]
    pieces = rendered(load("qwen"), messages, apart=frozenset({0, 1}))
    assert pieces == [
        Piece("<|im_start|>system\n", Kind.prompt, -1),
        Piece("S<|im_end|>\n", Kind.prompt, 0),
        Piece("<|im_start|>user\n", Kind.prompt, -1),
        Piece("A<|im_end|>\n", Kind.prompt, 1),
        Piece("<|im_start|>assistant\n", Kind.prompt, -1),
        Piece("B<|im_end|>\n", Kind.reply, 2),
    ]
    assert rendered(load("gemma"), messages, apart=frozenset({0}))[1:4] == [
        Piece("<start_of_turn>user\n", Kind.prompt, 1),
        Piece("S\n\n", Kind.prompt, 0),
        Piece("A<end_of_turn>\n<start_of_turn>model\n", Kind.prompt, 1),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_standing_apart_changes_no_text(name):
    for said in SAID["conversations"].values():
        tools = SAID["tools"] if said.get("tools") else None
        if load(name).tool_format == "glm4" and tools:
            continue
        whole = rendered(load(name), said["messages"], tools=tools)
        apart = rendered(load(name), said["messages"], tools=tools, apart=frozenset(range(len(said["messages"]))))
        assert text_of(apart) == text_of(whole)
        for index, message in enumerate(said["messages"]):
            own = text_of([piece for piece in apart if piece.message == index])
            assert (message.get("content") or "") in own
            assert not any(
                other["content"] in own
                for place, other in enumerate(said["messages"])
                if place != index and len(other["content"]) > 8
            )


def test_users_in_a_row_have_turns_of_their_own_and_one_header_follows():
    messages = [
        {"role": "user", "content": "A"},
        {"role": "user", "content": "B"},
        {"role": "assistant", "content": "C"},
    ]
    assert text_of(rendered(load("chatml"), messages)) == (
        "<|im_start|>user\nA<|im_end|>\n<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\nC<|im_end|>\n"
    )


def test_replies_in_a_row_have_headers_of_their_own():
    messages = [*talk("A", "B"), {"role": "assistant", "content": "C"}]
    pieces = rendered(load("chatml"), messages)
    assert [(piece.text, piece.kind) for piece in pieces[1:]] == [
        ("B<|im_end|>\n", Kind.reply),
        ("<|im_start|>assistant\n", Kind.prompt),
        ("C<|im_end|>\n", Kind.reply),
    ]


def test_results_share_a_turn_where_the_template_joins_them():
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    messages = [*talk("A", "B"), *results, {"role": "assistant", "content": "C"}]
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    assert [piece.text for piece in rendered(load("qwen"), messages)][3] == (
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>" + tail
    )
    assert [piece.text for piece in rendered(load("chatml"), messages)][2:4] == [
        "<|im_start|>tool\n1<|im_end|>\n",
        "<|im_start|>tool\n2" + tail,
    ]


def test_a_reply_to_a_tool_may_have_a_header_of_its_own():
    messages = [*talk("A", "B"), {"role": "tool", "content": "1"}, {"role": "assistant", "content": "C"}]
    pieces = [piece.text for piece in rendered(load("granite4"), messages)]
    assert pieces[1].endswith("<|start_of_role|>assistant<|end_of_role|>")
    assert pieces[3].endswith("<|end_of_text|>\n<|start_of_role|>assistant\n")


def test_what_is_said_before_calls_has_lines_of_its_own_and_stands_before_a_mark():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "Well.", "tool_calls": [call]}]
    qwen, glm, mistral = (rendered(load(name), messages)[-1].text for name in ("qwen", "glm4_moe", "mistral_small"))
    assert qwen.startswith("Well.\n<tool_call>\n{")
    assert "Well.\n<tool_call>f" in text_of(rendered(load("glm4_moe"), messages))
    assert 'Well.[TOOL_CALLS][{"name": "f", "arguments": {}}]<eos>' in text_of(
        rendered(load("mistral_small"), messages)
    )
    assert (glm, mistral) == (EOS, EOS)


THOUGHT = [
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": "B", "reasoning_content": "hm"},
    {"role": "user", "content": "C"},
    {"role": "assistant", "content": "D"},
]


@pytest.mark.parametrize(
    ("reasoning", "strip_history", "replies", "blocks"),
    [
        (Reasoning.keep, False, ["<think>\nhm\n</think>\n\nB", "D"], [Kind.reply]),
        (Reasoning.keep, True, ["B", "D"], [Kind.reply]),
        (Reasoning.empty, False, ["<think>\nhm\n</think>\n\nB", "D"], [Kind.prompt]),
        (Reasoning.strip, False, ["B", "D"], [Kind.prompt, Kind.prompt]),
        (Reasoning.strip, True, ["B", "D"], [Kind.prompt]),
    ],
)
def test_where_thinking_goes(reasoning, strip_history, replies, blocks):
    pieces = rendered(load("qwen3"), THOUGHT, reasoning=reasoning, strip_history=strip_history)
    empty = "<think>\n\n</think>\n\n"
    assert [piece.kind for piece in pieces if piece.text == empty] == blocks
    kept = [
        piece.text.removesuffix("<|im_end|>\n") for piece in pieces if piece.kind is Kind.reply and piece.text != empty
    ]
    assert kept == replies


@pytest.mark.parametrize(
    ("name", "reasoning", "tail"),
    [
        ("qwen3", Reasoning.keep, "assistant\n"),
        ("qwen3", Reasoning.strip, "assistant\n<think>\n\n</think>\n\n"),
        ("qwen3", Reasoning.empty, "assistant\n<think>\n\n</think>\n\n"),
        ("glm4_7", Reasoning.empty, "<|assistant|></think>"),
        ("qwen", Reasoning.strip, "assistant\n"),
    ],
)
def test_what_inference_begins_with_is_what_was_not_learned(name, reasoning, tail):
    pieces = rendered(load(name), talk("A"), reasoning=reasoning, generation=True)
    assert {piece.kind for piece in pieces} == {Kind.prompt}
    assert text_of(pieces).endswith(tail)
    trained = rendered(load(name), talk("A", "B"), reasoning=reasoning)
    assert text_of(trained).startswith(text_of(pieces))
    assert text_of([piece for piece in trained if piece.kind is Kind.prompt]) == text_of(pieces)


@pytest.mark.parametrize("text", ["<think>\nhm\n</think>\n\nB", "<think>hm</think>B", "\n<think>\nhm</think>\nB"])
def test_thinking_that_is_written_in_the_content_is_stripped_however_it_is_spaced(text):
    for name in ("qwen3", "qwen"):
        pieces = rendered(load(name), talk("A", text), reasoning=Reasoning.strip)
        assert pieces[-1].text == "B<|im_end|>\n"


def test_a_model_that_does_not_think_keeps_what_is_written_and_what_it_says_of_tags():
    later = "Tags: <think>a</think>."
    assert rendered(load("qwen"), talk("A", later), reasoning=Reasoning.strip)[-1].text == later + "<|im_end|>\n"
    for reasoning in (Reasoning.keep, Reasoning.empty):
        pieces = rendered(load("qwen"), THOUGHT, reasoning=reasoning, strip_history=True)
        assert [piece.text for piece in pieces if piece.kind is Kind.reply] == [
            "<think>\nhm\n</think>\n\nB<|im_end|>\n",
            "D<|im_end|>\n",
        ]


CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("name", "messages", "tools", "words"),
    [
        ("qwen", [], None, "there is no message, and this template begins with the user"),
        ("qwen", [{"role": "assistant", "content": "A"}], None, "the first message is from assistant"),
        ("qwen", [{"role": "system", "content": "S"}], None, "there is no message"),
        ("qwen", [*talk("A", "B"), {"role": "system", "content": "S"}], None, "message 3 is from system"),
        ("qwen", [{"role": "critic", "content": "A"}], None, "no template has a place for a message from critic"),
        ("qwen", [{"role": "user", "content": [{"type": "image"}]}], None, "a message has parts"),
        ("qwen3_5", talk("A", "B"), [{"description": "?"}], "qwen3_5 cannot list the tools: a tool has no name"),
        ("yi", talk("A", "B"), ["f"], "the tool format default cannot list the tools"),
        ("glm4", [*talk("A"), {"role": "assistant", "tool_calls": [CALL, CALL]}], None, "takes one call in a message"),
    ],
)
def test_what_a_template_cannot_write_is_refused(name, messages, tools, words):
    with pytest.raises(TemplateError, match=words) as caught:
        rendered(load(name), messages, tools=tools)
    assert caught.value.message == str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("values", "key", "words"),
    [
        ({"user": "no place"}, "template.user", "holds {content} 0 times"),
        ({"user": "{content}", "tool": "{content}{content}"}, "template.tool", "holds {content} 2 times"),
        ({"user": "{content}", "tool_format": "qwen2"}, "template.tool_format", "did you mean qwen"),
        ({"replace_eos": True}, "template.replace_eos", "no string is named"),
        ({"generation": "x"}, "template.generation", "has no user slot"),
        ({"default_system": "x"}, "template.default_system", "has no user slot"),
    ],
)
def test_a_template_that_cannot_work_is_refused(values, key, words):
    (problem,) = template.check(Template(**values))
    assert problem.key == key
    assert words in problem.message
    assert problem.fix


BASE = {"user": "{content}|", "stop": ["#"]}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "S|A|B<eos>1|C<eos>"),
        ({"prefix": "{bos}>"}, "<bos>>S|A|B<eos>1|C<eos>"),
        ({"system": "[{content}]"}, "[S]A|B<eos>1|C<eos>"),
        ({"generation": ":"}, "S|A|:B<eos>1|:C<eos>"),
        ({"assistant": "{content}."}, "S|A|B.1|C."),
        ({"tool": "({content})"}, "S|A|B<eos>(1)C<eos>"),
        ({"tool_generation": "?"}, "S|A|B<eos>1|?C<eos>"),
        ({"default_system": "D"}, "DA|B<eos>1|C<eos>"),
        ({"replace_eos": True}, "S|A|B#1|C#"),
        ({"assistant": "{content}", "single_eos": True}, "S|A|B1|C<eos>"),
        ({"thought_empty": "~"}, "S|A|~B<eos>1|~C<eos>"),
    ],
)
def test_each_slot_does_what_it_says(values, text):
    chosen = Template(**{"system": "{content}|", **BASE, **values})
    system = [] if "default_system" in values else [{"role": "system", "content": "S"}]
    messages = [*system, *talk("A", "B"), {"role": "tool", "content": "1"}, {"role": "assistant", "content": "C"}]
    if "default_system" in values:
        chosen.system = "{content}"
    assert text_of(rendered(chosen, messages)) == text
    assert jinja_text(to_jinja(chosen), chosen, messages) == text
