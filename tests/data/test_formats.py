"""Rows of every layout say the same thing, and what cannot be trained on is refused with a reason to count it by."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import pytest

from ftrun.data import formats
from ftrun.data.formats import KINDS, LAYOUTS, understand
from ftrun.data.messages import ROLES, normalise
from ftrun.data.rows import BadRow, Conversation, Feedback, Item, Medium, Pair, Question, Row, Text, Tokens


def row(value: dict[str, Any]) -> Row:
    return Row(value, "rows.jsonl", 3)


def read(value: dict[str, Any], kind: str = "conversations", form: str = "auto", **more: Any) -> Any:
    """Return the one item of a row."""
    (item,) = understand(row(value), kind, form, **more)
    return item


def refused(value: dict[str, Any], kind: str = "conversations", form: str = "auto", **more: Any) -> BadRow:
    with pytest.raises(BadRow) as caught:
        understand(row(value), kind, form, **more)
    assert caught.value.problem.key == "rows.jsonl:3"
    assert caught.value.problem.fix
    return caught.value


def user(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


HI = [user("Hi"), assistant("Hello.")]


# Conversations.

SAY_HI = {
    "messages": {"messages": HI},
    "parts": {"messages": [user([{"type": "text", "text": "H"}, {"text": "i"}]), assistant("Hello.")]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "sharegpt with OpenAI's fields": {"conversations": HI},
    "capitals": {"conversations": [{"from": "Human", "value": "Hi"}, {"from": "ASSISTANT", "value": "Hello."}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello.", "system": None, "history": []},
    "prompt and completion": {"prompt": "Hi", "completion": "Hello."},
    "prompt and response": {"prompt": "Hi", "response": "Hello."},
    "question and answer": {"question": "Hi", "answer": "Hello."},
    "the worked solution": {"problem": "Hi", "solution": "Hello.", "answer": "H"},
    "messages in columns": {"prompt": [HI[0]], "completion": [HI[1]]},
    "a message in a column": {"prompt": "Hi", "completion": HI[1]},
    "what is null is not there": {"messages": HI, "tools": None, "system": None, "images": None, "input_ids": None},
    "null in messages": {"messages": [user("Hi", tool_calls=None, name=None), assistant("Hello.", tool_calls=[])]},
}


@pytest.mark.parametrize("value", SAY_HI.values(), ids=SAY_HI)
def test_every_layout_says_the_same(value):
    item = read(value)
    assert isinstance(item, Conversation)
    assert (item.messages, item.tools, item.media) == (HI, None, [])
    assert item.row.place == "rows.jsonl:3"


@pytest.mark.parametrize("name", ROLES)
def test_every_role_is_known(name):
    role = ROLES[name]
    content = json.dumps({"name": "f", "arguments": {}}) if "call" in name else "text"
    before = [] if role == "system" else [{"from": "human", "value": "Hi"}]
    after = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    item = read({"conversations": [*before, {"from": name, "value": content}, *after]})
    assert item.messages[len(before)]["role"] == role


def test_alpaca_has_history_input_and_system():
    value = {
        "instruction": "Translate.", "input": "Hallo", "output": "Hello",
        "history": [["a", "b"], ["c", "d"]], "system": "Be brief.",
    }  # fmt: skip
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    expected = [system("Be brief."), *turns, user("Translate.\nHallo"), assistant("Hello")]
    assert read(value).messages == expected
    assert read({"instruction": "", "input": "Hallo", "output": "Hello"}).messages[0] == user("Hallo")


def test_the_messages_own_system_goes_before_the_column():
    assert read({"messages": HI, "system": "A"}).messages == [system("A"), *HI]
    assert read({"messages": [system("B"), *HI], "system": "A"}).messages == [system("B"), *HI]
    assert read({"prompt": "Hi", "completion": "Hello.", "system": "A"}).messages == [system("A"), *HI]


def test_a_named_format_is_read_where_columns_of_two_are_there():
    value = {"messages": HI, "prompt": "a", "completion": "b"}
    assert read(value).messages == HI
    assert read(value, form="prompt_completion").messages == [user("a"), assistant("b")]
    value["conversations"] = [user("c"), assistant("d")]
    assert read(value, form="sharegpt").messages == [user("c"), assistant("d")]
    assert "conversations are read from instruction and output" in str(refused(value, form="alpaca"))
    assert "not read from rows of the format text" in str(refused(value, form="text"))


def test_columns_are_renamed():
    value = {"q": "Hi", "a": "Hello.", "prompt": "not this", "solution": "nor this"}
    assert read(value, columns={"prompt": "q", "completion": "a"}).messages == HI
    swapped = {"prompt": "Hello.", "completion": "Hi"}
    assert read(swapped, columns={"prompt": "completion", "completion": "prompt"}).messages == HI
    assert "has the columns a" in str(refused({"a": "Hello.", "prompt": "x"}, columns={"prompt": "typo"}))


def test_one_that_is_renamed_goes_before_its_alternatives():
    value = {"problem": "1+1", "final": "two", "solution": "1+1=2"}
    assert read(value, "questions").answer == "two"
    assert read(value, "questions", columns={"answer": "solution"}).answer == "1+1=2"


def test_tags_name_fields_and_roles():
    tags = {
        "role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A", "system_tag": "S",
        "observation_tag": "O", "function_tag": "F",
    }  # fmt: skip
    turns = [("S", "s"), ("U", "u"), ("F", '{"name": "f", "arguments": {"x": 1}}'), ("O", "3"), ("A", "a")]
    item = read({"conversations": [{"who": who, "says": says} for who, says in turns]}, tags=tags)
    assert item.messages == [
        system("s"),
        user("u"),
        assistant("", tool_calls=[call("f", x=1)]),
        tool("3"),
        assistant("a"),
    ]
    usual = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
    assert read(usual, tags={"user_tag": "human", "role_tag": "from"}).messages == HI


# Tools.

CALL = call("search", query="x")
CALLS = {
    "an object": [CALL],
    "arguments as text": [{"type": "function", "function": {"name": "search", "arguments": '{"query": "x"}'}}],
    "bare": [{"name": "search", "arguments": {"query": "x"}}],
    "parameters": [{"name": "search", "parameters": {"query": "x"}}],
    "all as text": json.dumps([CALL]),
    "each as text": [json.dumps(CALL)],
    "one that is no list": CALL,
    "null beside it": [CALL | {"id": None}],
}


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_calls_become_objects(calls):
    item = read({"messages": [user("Find x."), assistant(None, tool_calls=calls), tool("found"), assistant("Here.")]})
    assert item.messages[1] == assistant("", tool_calls=[CALL])


def test_the_older_name_of_a_call_and_its_id():
    older = {"name": "search", "arguments": '{"query": "x"}'}
    assert read({"messages": [user("x"), assistant(None, function_call=older)]}).messages[1]["tool_calls"] == [CALL]
    item = read({"messages": [user("x"), assistant("", tool_calls=[CALL | {"id": "c1"}])]})
    assert item.messages[1]["tool_calls"] == [{"id": "c1"} | CALL]
    none = [{"name": "now", "arguments": ""}, {"name": "now", "arguments": None}, {"name": "now"}]
    assert (
        read({"messages": [user("x"), assistant("", tool_calls=none)]}).messages[1]["tool_calls"] == [call("now")] * 3
    )


def test_sharegpt_calls_may_follow_thinking():
    bare = '{"name": "search", "arguments": {"query": "x"}}'
    turns = [{"from": "human", "value": "x"}, {"from": "function_call", "value": f"<think>\nhm\n</think>\n\n{bare}"}]
    assert read({"conversations": turns}).messages[1] == assistant("<think>\nhm\n</think>\n\n", tool_calls=[CALL])
    turns[1]["value"] = f"[{bare}, {bare}]"
    assert read({"conversations": turns}).messages[1] == assistant("", tool_calls=[CALL, CALL])


BARE = {"name": "search", "description": "Search.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": BARE}


@pytest.mark.parametrize("tools", [[TOOL], [BARE], json.dumps([TOOL]), json.dumps([BARE]), TOOL, [json.dumps(BARE)]])
def test_tools_take_one_form(tools):
    assert read({"messages": HI, "tools": tools}).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, "", []])
def test_no_tools(tools):
    assert read({"messages": HI, "tools": tools}).tools is None


def test_tools_that_are_no_objects_are_a_bad_row():
    with pytest.raises(BadRow, match="tools is not a list of objects"):
        read({"messages": HI, "tools": ["[]"]})


def test_a_text_that_says_no_tools_is_an_empty_list():
    """Some templates write an empty system message then, as their models have seen it."""
    assert read({"messages": HI, "tools": "[]"}).tools == []


# Further fields of messages.


def test_unknown_fields_stay_for_the_template():
    messages = [user("Hi", name="Ann"), assistant("Hello.", reasoning_content="Be kind.", mood={"kind": 1})]
    assert read({"messages": messages}).messages == messages


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({"weight": 0}, 0), ({"weight": 0.5}, 0.5), ({"loss_weight": 2}, 2), ({"train": False}, 0),
        ({"train": False, "weight": 0}, 0), ({"train": True}, None), ({"weight": 1}, None), ({"weight": None}, None),
    ],
)  # fmt: skip
def test_weights(fields, weight):
    messages = [*HI, user("And?"), assistant("That is all.", **fields)]
    expected = assistant("That is all.") if weight is None else assistant("That is all.", weight=weight)
    assert read({"messages": messages}).messages[3] == expected


# Pairs.

PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Hi", "chosen": "Good", "rejected": "Bad"},
    "a question": {"question": "Hi", "chosen": "Good", "rejected": "Bad"},
    "messages and texts": {"messages": [user("Hi")], "chosen": "Good", "rejected": "Bad"},
    "messages": {"prompt": [user("Hi")], "chosen": [assistant("Good")], "rejected": [assistant("Bad")]},
    "a message each": {"prompt": "Hi", "chosen": assistant("Good"), "rejected": assistant("Bad")},
    "whole conversations": {"chosen": [user("Hi"), assistant("Good")], "rejected": [user("Hi"), assistant("Bad")]},
    "whole conversations beside their prompt": {
        "prompt": "Hi", "chosen": [user("Hi"), assistant("Good")], "rejected": [user("Hi"), assistant("Bad")],
    },
    "whole conversations beside one of them": {
        "messages": [user("Hi"), assistant("Good")],
        "chosen": [user("Hi"), assistant("Good")], "rejected": [user("Hi"), assistant("Bad")],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Good"}, "rejected": {"from": "gpt", "value": "Bad"},
    },
    "alpaca": {"instruction": "Hi", "input": "", "chosen": "Good", "rejected": "Bad"},
    "ranked": {"prompt": "Hi", "ranked": ["Good", "Bad"]},
    "lists of one": {"prompt": "Hi", "chosen": ["Good"], "rejected": ["Bad"]},
}  # fmt: skip


@pytest.mark.parametrize("value", PAIRS.values(), ids=PAIRS)
def test_every_layout_of_pairs_says_the_same(value):
    item = read(value, "pairs")
    assert isinstance(item, Pair)
    assert (item.prompt, item.chosen, item.rejected) == ([user("Hi")], [assistant("Good")], [assistant("Bad")])
    assert item.margin is None


def test_a_pair_may_go_on_over_several_turns():
    history = [user("a"), assistant("b")]
    value = {"prompt": history, "chosen": [user("c"), assistant("d")], "rejected": [user("c"), assistant("e")]}
    pair = read(value, "pairs")
    assert (pair.prompt, len(pair.chosen), len(pair.rejected)) == (history, 2, 2)
    del value["prompt"]
    assert read(value, "pairs").prompt == [user("c")]
    assert read(value | {"system": "S"}, "pairs").prompt == [system("S"), user("c")]


def replies(items: list[Item]) -> list[tuple[str, str, float | None]]:
    pairs = [item for item in items if isinstance(item, Pair)]
    return [(pair.chosen[0]["content"], pair.rejected[0]["content"], pair.margin) for pair in pairs]


def test_ranked_replies_are_every_pair():
    value = {"prompt": "Hi", "ranked": ["a", "b", "c"]}
    assert replies(understand(row(value), "pairs")) == [("a", "b", None), ("a", "c", None), ("b", "c", None)]
    value = {"prompt": "Hi", "responses": ["a", "b", "c", "d"], "scores": [1, 3, 1, 0.5]}
    expected = [("a", "d", 0.5), ("b", "a", 2), ("b", "c", 2), ("b", "d", 2.5), ("c", "d", 0.5)]
    assert sorted(replies(understand(row(value), "pairs"))) == expected
    assert replies(understand(row(value | {"chosen": "c", "rejected": "a"}), "pairs")) == [("c", "a", None)]
    value = {"prompt": "Hi", "chosen": ["a", "b"], "rejected": "c"}
    assert replies(understand(row(value), "pairs")) == [("a", "c", None), ("b", "c", None)]


@pytest.mark.parametrize(
    ("columns", "margin"),
    [
        ({"margin": 2}, 2.0),
        ({"score_chosen": 8.5, "score_rejected": 8}, 0.5),
        ({"chosen_score": 3, "rejected_score": 1}, 2.0),
        ({"chosen_rating": 5, "rejected_rating": 5}, 0.0),
        ({"margin": None, "score_chosen": 1}, None),
    ],
)
def test_a_margin_is_read(columns, margin):
    assert read(PAIRS["texts"] | columns, "pairs").margin == margin


# Feedback, questions, texts, tokens.


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "Hi", "completion": "Hello.", "label": True},
        {"prompt": [HI[0]], "completion": [HI[1]], "label": True},
        {"messages": HI, "label": True},
        {"conversations": SAY_HI["sharegpt"]["conversations"], "kto_tag": True},
        {"instruction": "Hi", "input": "", "output": "Hello.", "kto_tag": True},
    ],
)
def test_every_layout_of_feedback_says_the_same(value):
    item = read(value, "feedback")
    assert isinstance(item, Feedback)
    assert (item.prompt, item.reply, item.good) == ([HI[0]], [HI[1]], True)
    name = "label" if "label" in value else "kto_tag"
    assert read(value | {name: False}, "feedback").good is False


@pytest.mark.parametrize("label", [1, 0, "true", None, float("nan"), [True]])
def test_a_label_is_true_or_false(label):
    value = {"prompt": "Hi", "completion": "Hello.", "label": label}
    assert "not true or false" in refused(value, "feedback").reason


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ({"prompt": "1+1?", "answer": "2"}, "2"),
        ({"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2", "final": "2"}, "2"),
        ({"problem": "1+1?", "solution": "1+1=2", "answer": "2"}, "2"),
        ({"prompt": [user("1+1?")], "ground_truth": 2}, 2),
        ({"messages": [user("1+1?")], "solution": ["2", "two"]}, ["2", "two"]),
        ({"prompt": "1+1?", "answer": 0}, 0),
        ({"problem": "1+1?", "answer": "2", "messages": [user("1+1?"), assistant("It is 2.")]}, "2"),
    ],
)
def test_questions(value, answer):
    item = read(value, "questions")
    assert isinstance(item, Question)
    assert (item.prompt, item.answer) == ([user("1+1?")], answer)


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "Hi"},
        {"question": "Hi", "answer": None},
        {"messages": [user("Hi")]},
        {"conversations": [{"from": "human", "value": "Hi"}]},
        {"instruction": "Hi", "input": "", "output": "not read"},
        {"prompt": "Hi", "completion": "not read"},
    ],
)
def test_prompts_alone_are_questions_without_an_answer(value):
    item = read(value, "questions")
    assert isinstance(item, Question)
    assert (item.prompt, item.answer) == ([user("Hi")], None)


def test_answers_are_asked_for_by_name_or_left_out_by_name():
    value = {"prompt": "1+1?", "answer": "2"}
    assert read(value, "questions", "prompt_answer").answer == "2"
    assert read(value, "questions", "prompt").answer is None
    null = {"prompt": "1+1?", "answer": None}
    assert refused(null, "questions", "prompt_answer").reason == "answer is null, not text"
    assert "read from prompt and final" in str(refused({"prompt": "1+1?"}, "questions", "prompt_answer"))
    assert "questions" not in str(refused({"prompt": "1+1?"})), "a prompt does not tell of which kind a row is"


def test_text():
    item = read({"text": "  Once.\n"}, "texts")
    assert isinstance(item, Text)
    assert item.text == "  Once.\n"


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ({}, [5, 6, 7]),
        ({"labels": [-100, 6, 7]}, [-100, 6, 7]),
        ({"completion_mask": [0, 0, 1]}, [-100, -100, 7]),
        ({"assistant_masks": [0, 1, 1]}, [-100, 6, 7]),
        ({"loss_mask": [False, True, False]}, [-100, 6, -100]),
        ({"attention_mask": [1, 1, 1]}, [5, 6, 7]),
    ],
)
@pytest.mark.parametrize("kind", ["conversations", "texts"])
def test_tokens(columns, labels, kind):
    item = read({"input_ids": [5, 6, 7]} | columns, kind)
    assert isinstance(item, Tokens)
    assert (item.input_ids, item.labels) == ([5, 6, 7], labels)


def test_padding_is_left_out():
    item = read({"input_ids": [5, 6, 0, 0], "labels": [-100, 6, -100, -100], "attention_mask": [1, 1, 0, 0]}, "texts")
    assert (item.input_ids, item.labels) == ([5, 6], [-100, 6])


# Media.

PIXEL = b"\x89PNG"
IMAGE = {"type": "image"}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("image", "source"),
    [
        ("a.png", "a.png"),
        ("https://example.org/a.png", "https://example.org/a.png"),
        (PIXEL, PIXEL),
        ({"bytes": PIXEL, "path": "a.png"}, PIXEL),
        ({"bytes": None, "path": "a.png"}, "a.png"),
        ({"url": "http://a"}, "http://a"),
        (f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}", PIXEL),
    ],
)
def test_a_medium_is_a_path_an_address_or_bytes(image, source):
    by_column = [read({"prompt": "<image>What?", "completion": "A cat.", "images": one}) for one in (image, [image])]
    anthropic = {"type": "image", "source": image}
    parts = [[anthropic, words("What?")]]
    parts += [
        [{"type": "image", "image": image}, words("What?")],
        [{"type": "image_url", "image_url": image}, words("What?")],
    ]
    by_part = [read({"messages": [user(content), assistant("A cat.")]}) for content in parts]
    for item in (*by_column, *by_part):
        assert item.messages == [user([IMAGE, words("What?")]), assistant("A cat.")]
        assert item.media == [Medium("image", source)]


def test_media_are_in_the_order_of_the_text():
    text = "First <image>, then\n<video><audio> and <image>"
    value = {"prompt": text, "completion": "Yes.", "images": ["1.png", "2.png"], "videos": ["v.mp4"], "audios": "a.wav"}
    item = read(value)
    expected = [words("First "), IMAGE, words(", then\n"), {"type": "video"}, {"type": "audio"}, words(" and "), IMAGE]
    assert item.messages[0]["content"] == expected
    assert [medium.source for medium in item.media] == ["1.png", "v.mp4", "a.wav", "2.png"]


def test_parts_without_a_source_take_the_columns():
    inline = {"type": "image", "image": "own.png"}
    content = [IMAGE | {"text": None}, words("and"), inline, IMAGE]
    item = read({"messages": [system("S"), user(content), assistant("Two.")], "images": ["1.png", "2.png"]})
    assert [medium.source for medium in item.media] == ["1.png", "own.png", "2.png"]
    assert item.messages[1]["content"] == [IMAGE, words("and"), IMAGE, IMAGE]
    assert item.messages[2] == assistant("Two.")


def test_media_without_a_place_come_before_the_first_user_message():
    item = read({"messages": [system("S"), user("Which?"), assistant("A cat.")], "images": ["1.png", "2.png"]})
    assert item.messages[1]["content"] == [IMAGE, IMAGE, words("Which?")]
    assert read({"prompt": "", "completion": "A cat.", "images": "1.png"}).messages[0]["content"] == [IMAGE]


def test_a_placeholder_in_a_row_without_media_is_a_word():
    text = "What does the tag <video> do, and <image>?"
    assert read({"prompt": text, "completion": "Play."}).messages[0] == user(text)
    item = read({"prompt": f"<image>{text}", "completion": "Play.", "videos": None, "images": ["1.png", "2.png"]})
    assert item.messages[0]["content"][1] == words("What does the tag <video> do, and ")


def test_sound_in_a_part_and_frames_of_a_video():
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"}}
    assert read({"messages": [user([sound]), assistant("A bell.")]}).media == [Medium("audio", b"RIFF")]
    item = read({"prompt": "<video>", "completion": "It runs.", "videos": [["1.png", "2.png"]]})
    assert item.media == [Medium("video", ["1.png", "2.png"])]


def test_media_of_the_other_kinds_of_rows():
    pair = read({"prompt": "<image>?", "chosen": "Cat", "rejected": "Dog", "images": ["1.png"]}, "pairs")
    assert (pair.prompt, pair.media) == ([user([IMAGE, words("?")])], [Medium("image", "1.png")])
    three = understand(row({"prompt": [user([IMAGE | {"image": "1.png"}])], "ranked": ["a", "b", "c"]}), "pairs")
    assert [pair.media for pair in three if isinstance(pair, Pair)] == [[Medium("image", "1.png")]] * 3
    question = read({"prompt": "<image>?", "answer": "cat", "images": ["1.png"]}, "questions")
    assert question.media == pair.media
    liked = read({"prompt": "<image>?", "completion": "Cat", "label": True, "images": ["1.png"]}, "feedback")
    assert (liked.prompt, liked.media) == (pair.prompt, pair.media)


# Rows that cannot be trained on.

NESTED = {"messages": [user("x"), assistant("", tool_calls=[call("f", x="\ud800")])]}
BAD = [
    ("no columns", "conversations", {}, "other columns"),
    ("other columns", "conversations", {"a": "b"}, "other columns"),
    ("null", "conversations", {"instruction": "a", "output": None}, "output is null, not text"),
    ("messages null", "conversations", {"messages": None}, "messages is null, not a list"),
    ("no list", "conversations", {"messages": "Hi"}, "messages is not a list of messages"),
    ("no messages", "conversations", {"messages": []}, "messages is not a list of messages"),
    ("no object", "conversations", {"messages": ["Hi"]}, "a message is not an object"),
    ("no role", "conversations", {"messages": [{"content": "Hi"}]}, "a message has no role"),
    ("unknown role", "conversations", {"messages": [{"role": "boss", "content": "Hi"}]},
     "a message has an unknown role"),
    ("role of a wrong type", "conversations", {"messages": [{"role": ["user"], "content": "Hi"}]},
     "a message has an unknown role"),
    ("no content", "conversations", {"messages": [user("x"), {"role": "assistant"}]},
     "a message has no text in content"),
    ("number as content", "conversations", {"messages": [user(3), HI[1]]},
     "a message has a number as content, not text"),
    ("unknown part", "conversations", {"messages": [user([{"type": "smell"}]), HI[1]]},
     "a message has a part of an unknown type in content"),
    ("part without text", "conversations", {"messages": [user([{"text": 3}]), HI[1]]},
     "a message has a part without text in content"),
    ("no reply", "conversations", {"messages": [user("x")]}, "has no reply of the assistant to learn"),
    ("empty reply", "conversations", {"messages": [user("x"), assistant(" \n")]},
     "has no reply of the assistant to learn"),
    ("empty output", "conversations", {"instruction": "a", "output": ""}, "has no reply of the assistant to learn"),
    ("empty prompt", "conversations", {"prompt": " ", "completion": "x"}, "has an empty prompt"),
    ("empty instruction", "conversations", {"instruction": "", "output": "x"}, "has an empty prompt"),
    ("assistant first", "conversations", {"messages": [assistant("x"), user("y"), assistant("z")]},
     "begins with a reply of the assistant to nothing"),
    ("tool first", "conversations", {"messages": [system("s"), tool("x"), assistant("y")]},
     "begins with the answer of a tool that nobody called"),
    ("null byte", "conversations", {"messages": [user("x"), assistant("a\0b")]}, "content has a null byte in its text"),
    ("null byte in a column", "conversations", {"instruction": "a\0", "output": "b"},
     "instruction has a null byte in its text"),
    ("lone surrogate", "conversations", json.loads('{"prompt": "x", "completion": "\\ud83d"}'),
     "completion has half of a surrogate pair in its text, which is no character"),
    ("lone surrogate in a call", "conversations", NESTED,
     "tool_calls has half of a surrogate pair in its text, which is no character"),
    ("NaN", "conversations", {"instruction": "a", "input": float("nan"), "output": "b"}, "input is NaN, not text"),
    ("history", "conversations", {"instruction": "a", "output": "b", "history": [["c"]]},
     "history is not a list of [question, answer] pairs"),
    ("number in history", "conversations", {"instruction": "a", "output": "b", "history": [["c", 3]]},
     "history is a number, not text"),
    ("call that is no JSON", "conversations",
     {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f(x)"}]},
     "a message has a tool call that is no JSON object"),
    ("arguments that are no JSON", "conversations",
     {"messages": [user("x"), assistant("", tool_calls=[{"name": "f", "arguments": "{x"}])]},
     "a message has a tool call whose arguments are no JSON object"),
    ("call without a name", "conversations", {"messages": [user("x"), assistant("", tool_calls=[{"arguments": {}}])]},
     "a message has a tool call without a name"),
    ("tools that are no list", "conversations", {"messages": HI, "tools": 3}, "tools is not a list of objects"),
    ("tools that are no JSON", "conversations", {"messages": HI, "tools": "search"}, "tools is not a list of objects"),
    ("tools that are no objects", "conversations", {"messages": HI, "tools": [3]}, "tools is not a list of objects"),
    ("negative weight", "conversations", {"messages": [user("x"), assistant("y", weight=-1)]},
     "a message has a weight that is no finite number of at least 0"),
    ("NaN weight", "conversations", {"messages": [user("x"), assistant("y", loss_weight=float("nan"))]},
     "a message has a loss_weight that is no finite number of at least 0"),
    ("train", "conversations", {"messages": [user("x"), assistant("y", train=0)]},
     "a message has a number as train, not true or false"),
    ("two weights", "conversations", {"messages": [user("x"), assistant("y", weight=0.5, train=False)]},
     "a message has two different weights"),
    ("field that is no JSON", "conversations", {"messages": [user("x", name=b"y"), HI[1]]},
     "name holds bytes, which is not JSON"),
    ("same replies", "pairs", {"prompt": "x", "chosen": "y", "rejected": "y"},
     "chosen and rejected are the same, so neither is better"),
    ("no common prompt", "pairs", {"chosen": [user("a"), HI[1]], "rejected": [user("b"), HI[1]]},
     "chosen and rejected do not follow a common prompt"),
    ("pair without a prompt", "pairs", {"chosen": "a", "rejected": "b"},
     "chosen and rejected do not follow a common prompt"),
    ("empty reply of a pair", "pairs", {"prompt": "x", "chosen": "a", "rejected": ""},
     "rejected has no reply of the assistant to learn"),
    ("chosen of a wrong type", "pairs", {"prompt": "x", "chosen": 3, "rejected": "b"}, "chosen is a number, not text"),
    ("margin", "pairs", PAIRS["texts"] | {"margin": float("nan")}, "margin is NaN, not a finite number"),
    ("margin beyond any float", "pairs", PAIRS["texts"] | {"margin": 10**400},
     "margin is a number, not a finite number"),
    ("name of a field", "conversations", {"messages": [user("x", **{"\0": 1}), HI[1]]},
     "the name of a field has a null byte in its text"),
    ("margin as text", "pairs", PAIRS["texts"] | {"margin": "2"}, "margin is text, not a finite number"),
    ("one ranked reply", "pairs", {"prompt": "x", "ranked": ["a"]}, "ranked is not a list of two or more replies"),
    ("scores", "pairs", {"prompt": "x", "responses": ["a", "b"], "scores": [1]},
     "scores are not a number for each of responses"),
    ("tied scores", "pairs", {"prompt": "x", "responses": ["a", "b"], "scores": [1, 1]},
     "scores are all the same, so no reply is better"),
    ("rising scores", "pairs", {"prompt": "x", "ranked": ["a", "b"], "scores": [1, 2]},
     "scores rise where ranked has the best reply first"),
    ("media in a reply of a pair", "pairs", {"prompt": "x", "chosen": assistant([IMAGE]), "rejected": "b"},
     "chosen has media in it, and only the prompt can"),
    ("feedback that ends with a question", "feedback", {"messages": [*HI, user("x")], "label": True},
     "does not end with a reply of the assistant to judge"),
    ("empty answer", "questions", {"prompt": "x", "answer": " "}, "answer is empty, and a reply is judged by it"),
    ("NaN answer", "questions", {"prompt": "x", "answer": float("nan")}, "answer is NaN, and a reply is judged by it"),
    ("question with a reply", "questions", {"messages": HI, "answer": "x"},
     "ends with a reply of the assistant, so there is none to generate"),
    ("prompt that ends with a reply", "questions", {"messages": HI},
     "ends with a reply of the assistant, so there is none to generate"),
    ("empty prompt alone", "questions", {"prompt": " "}, "has an empty prompt"),
    ("blank text", "texts", {"text": " \n"}, "has an empty text"),
    ("no text", "texts", {"text": 3}, "text is a number, not text"),
    ("no tokens", "texts", {"input_ids": []}, "input_ids is empty"),
    ("tokens that are no numbers", "texts", {"input_ids": ["a"]}, "input_ids is not a list of whole numbers"),
    ("true as a token", "texts", {"input_ids": [True]}, "input_ids is not a list of whole numbers"),
    ("negative token", "texts", {"input_ids": [-1]}, "input_ids has numbers below 0 or above 2147483647"),
    ("token beyond any vocabulary", "texts", {"input_ids": [2**40]},
     "input_ids has numbers below 0 or above 2147483647"),
    ("short labels", "texts", {"input_ids": [1, 2], "labels": [1]}, "labels is not as long as input_ids"),
    ("long mask", "texts", {"input_ids": [1, 2], "loss_mask": [1, 1, 1]}, "loss_mask is not as long as input_ids"),
    ("negative label", "texts", {"input_ids": [1, 2], "labels": [-1, 2]},
     "labels has negative numbers other than -100"),
    ("mask of other numbers", "texts", {"input_ids": [1], "loss_mask": [2]},
     "loss_mask has numbers below 0 or above 1"),
    ("nothing learned", "texts", {"input_ids": [1, 2], "labels": [-100, -100]}, "learns none of its tokens"),
    ("NaN labels", "texts", {"input_ids": [1, 2], "labels": [float("nan"), 1]},
     "labels is not a list of whole numbers"),
    ("more media", "conversations", {"prompt": "<image>", "completion": "x", "images": ["1", "2"]},
     "has more images than places for them"),
    ("fewer media", "conversations", {"prompt": "<image><image>", "completion": "x", "images": ["1"]},
     "has more places for images than images"),
    ("no media", "conversations", {"prompt": "<image>", "completion": "x", "images": []},
     "has more places for images than images"),
    ("part without a medium", "conversations", {"messages": [user([{"type": "video"}]), HI[1]]},
     "has more places for videos than videos"),
    ("number as a medium", "conversations", {"prompt": "<image>", "completion": "x", "images": [3]},
     "images has a number for a medium"),
    ("half a data address", "conversations", {"prompt": "x", "completion": "x", "images": "data:image/png;base64,a"},
     "images has data that is not base64"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value", "reason"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_row_says_why(kind, value, reason):
    error = refused(value, kind)
    assert reason in error.reason
    assert "data.on_bad_row=skip" in error.problem.fix


def test_a_reason_is_the_same_for_all_rows_of_a_kind():
    """The message names the message and the role; rows are counted by what they have in common."""
    errors = [refused({"messages": [*HI[:n], {"role": f"r{n}", "content": "x"}]}) for n in (1, 2)]
    assert [str(error) for error in errors] == ["message 2 has the role 'r1'", "message 3 has the role 'r2'"]
    assert len({error.reason for error in errors}) == 1
    assert refused({"a": 1}).reason == refused({"b": 1}).reason


def test_rows_of_another_kind_are_told():
    error = refused(PAIRS["texts"])
    assert "those of pairs" in str(error)
    assert "a stage that trains on pairs" in error.problem.fix
    assert "has the columns \\ud800," in str(refused({"\ud800": 1}))
    many = refused({f"column {n}": n for n in range(100_000)})
    assert "and 99980 more" in str(many)
    assert len(str(many)) < 1000


def test_what_a_template_can_express_is_taken():
    """Two messages of one role in a row, a greeting after the system message, a question left open at the end."""
    two = [user("a"), user("b"), assistant("c"), assistant("d")]
    greeting = [system("s"), assistant("Welcome!"), user("a"), assistant("b"), user("c")]
    partly_empty = [user("a"), assistant(""), user("b"), assistant("c")]
    thinking = [user("a"), assistant("", reasoning_content="hm")]
    for messages in (two, greeting, partly_empty, thinking):
        assert read({"messages": messages}).messages == messages


def test_messages_alone():
    turns = [{"from": "human", "value": "<image>?"}]
    messages, media = normalise(turns, row({"images": ["1.png"]}))
    assert (messages, media) == ([user([IMAGE, words("?")])], [Medium("image", "1.png")])
    with pytest.raises(BadRow):
        normalise([], row({}))


def test_the_row_itself_is_left_as_it_was():
    value = {
        "messages": [user("<image>", weight=1), assistant("x", tool_calls=json.dumps([CALL]))],
        "images": ["1.png"],
    }
    before = json.dumps(value)
    read(value)
    assert json.dumps(value) == before


def test_formats_are_checked_by_name():
    assert list(formats.check("auto", "pairs")) == []
    assert list(formats.check("preference", "pairs")) == []
    (wrong_kind,) = formats.check("alpaca", "pairs")
    assert "pairs are trained on, which alpaca rows are not" in wrong_kind.message
    assert "preference" in wrong_kind.fix
    (unknown,) = formats.check("alpacca", "conversations", "data.sources.0.format")
    assert (unknown.key, unknown.message) == (
        "data.sources.0.format",
        "there is no format alpacca; did you mean alpaca?",
    )


def test_every_format_belongs_to_a_kind_and_is_described():
    assert {form for forms in KINDS.values() for form in forms} == set(LAYOUTS)
    assert formats.names()[: len(LAYOUTS) + 1] == ["auto", *LAYOUTS]
    assert {"input", "conversations", "labels", "scores", "margin", "audios", "kto_tag"} <= formats.COLUMNS
    assert formats.about("prompt") == "prompt, or messages, or instruction"
    assert formats.about("prompt_completion") == "prompt and completion"
    assert formats.about("preference") == "chosen and rejected, or ranked, or responses and scores"


FIELDS = ("role", "content", "from", "value", "type", "text", "image", "name", "arguments", "function", "tool_calls",
          "weight", "train", "url", "bytes", "data", "reasoning_content")  # fmt: skip
LEAVES = (None, True, 0, -1, 1.5, float("nan"), "", "x", " ", "a\0", "\ud800", "<image>", '{"name": "f"}', b"b", 10**30)


def junk(draw: random.Random, depth: int = 0) -> Any:
    """Return some JSON, or nearly."""
    shape = draw.random()
    if shape < 0.4 or depth > 4:
        return draw.choice(LEAVES)
    if shape < 0.6:
        return [junk(draw, depth + 1) for _ in range(draw.randrange(4))]
    role = {"role": draw.choice(list(ROLES)), "content": draw.choice(["x", junk(draw, depth + 1)])}
    return (role if shape < 0.9 else {}) | {
        name: junk(draw, depth + 1) for name in draw.sample(FIELDS, draw.randrange(3))
    }


def test_no_row_is_a_crash():
    draw = random.Random(0)
    columns = sorted(formats.COLUMNS)
    understood = 0
    for _ in range(20_000):
        value = {name: junk(draw) for name in draw.sample(columns, draw.randrange(1, 6))}
        kind = draw.choice(list(KINDS))
        value |= {
            name: junk(draw) for name in draw.choice(draw.choice([LAYOUTS[form] for form in KINDS[kind]]).ways)[0]
        }
        try:
            understood += len(understand(row(value), kind))
        except BadRow:
            continue
    assert understood
