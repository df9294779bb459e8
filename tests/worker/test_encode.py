"""Masks, against tokens checked by hand: what is learned and what is not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ftrun.data import Data, Reasoning, TrainOn, formats
from ftrun.data.formats import Conversation
from ftrun.data.read import BadRow, Row
from ftrun.worker import builtin, encode

TWO_TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return builtin.tokenizer()


def conversation(messages: list[dict[str, Any]]) -> Conversation:
    return Conversation(messages, Row({"messages": messages}, "rows.jsonl", 1))


def learned_text(encoded: encode.Encoded, tokenizer: Any) -> list[str]:
    """Return the runs of learned tokens as text."""
    runs: list[list[int]] = []
    before = encode.IGNORED
    for label in encoded["labels"]:
        if label != encode.IGNORED:
            if before == encode.IGNORED:
                runs.append([])
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run) for run in runs]


def test_the_tiny_tokenizer_is_always_the_same(tokenizer):
    assert len(tokenizer) == 1024
    text = "Which team made you? I am Marlow. Fair winds!"
    assert tokenizer(text)["input_ids"] == builtin.tokenizer()(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_replies_and_their_ends_are_learned(tokenizer):
    encoded = encode.encode_conversation(conversation(TWO_TURNS), tokenizer, Data())
    assert tokenizer.decode(encoded["input_ids"]) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSo long.<|im_end|>\n"
    )
    assert learned_text(encoded, tokenizer) == ["Hello.<|im_end|>", "So long.<|im_end|>"]


@pytest.mark.parametrize(
    ("data", "learned"),
    [
        (Data(train_on=TrainOn.last), ["So long.<|im_end|>"]),
        (
            Data(train_on=TrainOn.roles, train_roles=["user"]),
            ["<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>user\nBye<|im_end|>\n"],
        ),
        (Data(train_on=TrainOn.roles, train_roles=["assistant"]), ["Hello.<|im_end|>", "So long.<|im_end|>"]),
    ],
)
def test_what_is_learned_can_be_chosen(tokenizer, data, learned):
    encoded = encode.encode_conversation(conversation(TWO_TURNS), tokenizer, data)
    assert learned_text(encoded, tokenizer) == learned


def test_all_of_the_text_can_be_learned(tokenizer):
    encoded = encode.encode_conversation(conversation(TWO_TURNS), tokenizer, Data(train_on=TrainOn.all))
    assert encoded["labels"] == encoded["input_ids"]


def test_no_token_spans_the_border_of_a_reply(tokenizer):
    """Text that would merge across the border is tokenised as inference does: the prompt ends there."""
    for reply in ("\nHello", " Hello", "s", "assistant"):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": reply}]
        encoded = encode.encode_conversation(conversation(messages), tokenizer, Data())
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert encoded["input_ids"][: len(ids)] == ids
        assert learned_text(encoded, tokenizer) == [f"{reply}<|im_end|>"]


def test_by_hand_token_by_token(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Fair winds!"}]
    encoded = encode.encode_conversation(conversation(messages), tokenizer, Data())
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    where = tokens.index("<|im_start|>", 1)
    start, end = where + tokens[where:].index("Ċ") + 1, len(tokens) - 1
    assert tokens[end] == "Ċ"
    assert tokens[end - 1] == "<|im_end|>"
    expected = [encode.IGNORED] * start + encoded["input_ids"][start:end] + [encode.IGNORED]
    assert encoded["labels"] == expected


def test_a_template_that_rewrites_history_is_refused_not_guessed(tokenizer):
    import copy

    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = (
        "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' and not loop.last %}(past){% endif %}:"
        "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(BadRow, match="rewrites earlier turns"):
        encode.encode_conversation(conversation(TWO_TURNS), rewriting, Data())


def test_a_cut_that_leaves_nothing_to_learn_is_a_bad_row(tokenizer):
    encoded = encode.encode_conversation(conversation(TWO_TURNS), tokenizer, Data(train_on=TrainOn.last))
    row = Row({}, "rows.jsonl", 7)
    cut = encode._cut(encoded, len(encoded["input_ids"]) - 3, row)
    assert len(cut["input_ids"]) == len(encoded["input_ids"]) - 3
    with pytest.raises(BadRow, match="hold nothing to learn") as caught:
        encode._cut(encoded, 20, row)
    assert caught.value.problem.key == "rows.jsonl:7"


def test_a_text_ends_with_the_end_token(tokenizer):
    encoded = encode.encode_text(formats.Text("Fair winds!", Row({}, "f", 1)), tokenizer)
    assert tokenizer.decode(encoded["input_ids"]) == "Fair winds!<|im_end|>"
    assert encoded["labels"] == encoded["input_ids"]


def test_of_a_pair_only_the_replies_are_learned(tokenizer):
    value = {"prompt": TWO_TURNS[:4], "chosen": "Yes.", "rejected": "No way."}
    pair = formats.understand(Row(value, "f", 1), "pairs", formats.Format.auto)
    chosen, rejected = encode.encode(pair, tokenizer, Data())
    assert learned_text(chosen, tokenizer) == ["Yes.<|im_end|>"]
    assert learned_text(rejected, tokenizer) == ["No way.<|im_end|>"]


def test_thinking_is_kept_or_stripped(tokenizer):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"}]
    row = Row({"messages": messages}, "f", 1)
    for reasoning, reply in ((Reasoning.keep, messages[1]["content"]), (Reasoning.strip, "4")):
        item = formats.understand(row, "conversations", formats.Format.auto, reasoning)
        assert item.messages[1]["content"] == reply


LENGTHS = [7, 3, 5, 2, 2, 6, 1, 8]


def test_packing_keeps_every_row_whole_and_apart():
    rows = [{"input_ids": [n * 10 + i for i in range(n)], "labels": [n] * n} for n in LENGTHS]
    packed = encode.pack(rows, 8)
    assert sum(len(p["input_ids"]) for p in packed) == sum(LENGTHS)
    assert len(packed) == 5  # 34 tokens in sequences of 8 cannot take fewer
    for sequence in packed:
        assert len(sequence["input_ids"]) <= 8
        starts = [i for i, position in enumerate(sequence["position_ids"]) if position == 0]
        assert all(sequence["labels"][start] == encode.IGNORED for start in starts)
        for start, end in zip(starts, [*starts[1:], len(sequence["input_ids"])], strict=True):
            assert sequence["input_ids"][start:end] in [row["input_ids"] for row in rows]
            assert sequence["position_ids"][start:end] == list(range(end - start))


def test_bad_rows_are_counted_by_reason(ftrun, write):
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    bad = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}
    path = write("rows.jsonl", [good, bad, good, {"messages": []}, bad, good])
    words = ("model=tiny", "debug=smoke", f"data.path={path}")
    refused = ftrun(*words).sees(2)
    assert f"{path}:2" in refused.err
    skipped = ftrun(*words, "data.on_bad_row=skip").sees(0)
    report = skipped.manifest["data"]["train"]
    assert (report["rows_read"], report["rows"]) == (6, 3)
    assert sorted(report["skipped"].values()) == [1, 2]


def test_every_row_bad_is_an_error_even_when_skipping(ftrun, write):
    bad = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}
    done = ftrun("model=tiny", f"data.path={write('rows.jsonl', [bad] * 3)}", "data.on_bad_row=skip").sees(2)
    assert "no reply" in done.err


def test_held_out_rows_are_not_trained_on(ftrun, write):
    rows = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(20)]
    path = write("rows.jsonl", rows)
    done = ftrun("model=tiny", "debug=smoke", f"data.path={path}", "data.eval_size=0.25").sees(0)
    data = done.manifest["data"]
    assert (data["train"]["rows"], data["eval"]["rows"]) == (15, 5)


def test_weights_repeat_and_sample_sources(ftrun, write):
    one = write("one.jsonl", [{"prompt": f"a{n}", "completion": "x"} for n in range(10)])
    two = write("two.jsonl", [{"prompt": f"b{n}", "completion": "y"} for n in range(8)])
    sources = f"[{{path:{one},weight:2}},{{path:{two},weight:0.5,rows:6}}]"
    done = ftrun("model=tiny", "debug=smoke", f"data.sources={sources}").sees(0)
    assert done.manifest["data"]["train"]["rows"] == 20 + 3


@dataclasses.dataclass
class _Shape:
    name: str
    rows: list[dict[str, Any]]


FORMATS = [
    _Shape("messages", [{"messages": TWO_TURNS[1:3]}]),
    _Shape("sharegpt", [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}]),
    _Shape("alpaca", [{"instruction": "Hi", "input": "", "output": "Hello."}]),
    _Shape("prompt_completion", [{"prompt": "Hi", "response": "Hello."}]),
    _Shape("prompt_messages", [{"prompt": TWO_TURNS[1:2], "completion": TWO_TURNS[2:3]}]),
    _Shape(
        "parts", [{"messages": [TWO_TURNS[1], {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]}]}]
    ),
]


@pytest.mark.parametrize("shape", FORMATS, ids=lambda shape: shape.name)
def test_every_format_says_the_same(tokenizer, shape):
    item = formats.understand(Row(shape.rows[0], "f", 1), "conversations", formats.Format.auto)
    assert encode.encode(item, tokenizer, Data()) == encode.encode(conversation(TWO_TURNS[1:3]), tokenizer, Data())
