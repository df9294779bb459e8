"""Rows into tokens and labels, against ids worked out by hand, and where a sequence that is too long is cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ftrun.data import Data, Packing, TooLong, TrainOn
from ftrun.data.formats import understand
from ftrun.data.rows import BadRow, Row
from ftrun.data.tokens import IGNORED
from ftrun.template import Template
from ftrun.worker import builtin
from ftrun.worker.encode import EncodedRow, RowEncoder, TooLongRow
from ftrun.worker.sequence import Encoded, learn
from ftrun.worker.sequence import arrays as arrays_of
from ftrun.worker.truncation import cut, cut_each_at_its_end, cut_turns, share

TOKENIZER: Any = builtin.tokenizer()


def encoder(kind: str = "conversations", template: Template | None = None, **data: Any) -> RowEncoder:
    stage = SimpleNamespace(rows=kind)
    return RowEncoder(SimpleNamespace(data=Data(**data), template=template or Template(), stage=stage), TOKENIZER)  # type: ignore[arg-type]


def encoded(value: dict[str, Any], kind: str = "conversations", **data: Any) -> Any:
    """Return what becomes of a row; it must be one."""
    (found,) = encoder(kind, **data).encode(understand(Row(value, "rows.jsonl", 7), kind))
    return found


def arrays(found: EncodedRow) -> list[dict[str, Any]]:
    return [arrays_of(s.ids, s.spans, s.weights, s.labels) for s in found.sequences]


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Fair winds!"}]}
PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_by_hand_token_by_token():
    (found,) = arrays(encoded(CHAT))
    prompt, reply, after = ids_of(PROMPT), ids_of("Fair winds!<|im_end|>"), ids_of("\n")
    assert found["input_ids"].tolist() == prompt + reply + after
    assert found["labels"].tolist() == [IGNORED] * len(prompt) + reply + [IGNORED] * len(after)
    assert found["input_ids"].dtype == found["labels"].dtype == np.int32


@pytest.mark.parametrize("reply", ["\nHello", " Hello", "s", "assistant", "ééé"])
def test_no_token_spans_the_border_of_a_reply(reply):
    (found,) = arrays(encoded({"prompt": "Hi", "completion": reply}))
    prompt = ids_of(PROMPT)
    assert found["input_ids"][: len(prompt)].tolist() == prompt
    assert found["labels"][len(prompt) :].tolist() == [*ids_of(f"{reply}<|im_end|>"), IGNORED]


def test_a_text_is_learned_whole_with_its_end():
    (found,) = arrays(encoded({"text": "Fair winds!"}, "texts"))
    assert found["input_ids"].tolist() == ids_of("Fair winds!<|im_end|>")
    assert found["labels"].tolist() == found["input_ids"].tolist()


def test_a_text_begins_as_the_tokenizer_begins_a_text():
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = builtin.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    cfg: Any = SimpleNamespace(data=Data(), template=Template(), stage=SimpleNamespace(rows="texts"))
    found = RowEncoder(cfg, tokenizer).encode(understand(Row({"text": "Fair winds!"}, "f", 1), "texts"))
    (sequence,) = arrays(found[0])  # type: ignore[arg-type]
    assert sequence["input_ids"].tolist() == [0, *ids_of("Fair winds!<|im_end|>")]
    assert sequence["labels"].tolist() == sequence["input_ids"].tolist()


def test_of_a_pair_only_the_replies_are_learned():
    found = encoded({"prompt": "Hi", "chosen": "Yes.", "rejected": "No way.", "margin": 0.5}, "pairs")
    assert found.extra == 0.5
    for side, reply in zip(arrays(found), ("Yes.", "No way."), strict=True):
        learned = [label for label in side["labels"].tolist() if label != IGNORED]
        assert learned == ids_of(f"{reply}<|im_end|>")
        assert side["input_ids"][: len(ids_of(PROMPT))].tolist() == ids_of(PROMPT)


def test_feedback_keeps_its_label_and_a_question_its_answer():
    found = encoded({"prompt": "Hi", "completion": "Yes.", "label": False}, "feedback")
    assert found.extra is False
    assert [label for label in arrays(found)[0]["labels"].tolist() if label != IGNORED] == ids_of("Yes.<|im_end|>")
    found = encoded({"prompt": "Hi", "answer": "4"}, "questions")
    assert found.extra == {"prompt": [{"role": "user", "content": "Hi"}], "answer": "4"}
    assert (found.sequences[0].ids, found.sequences[0].spans) == (ids_of(PROMPT), [])


def test_a_row_that_is_tokenised_already_is_taken_as_it_is():
    (found,) = arrays(encoded({"input_ids": [5, 6, 7, 8], "labels": [-100, 9, 7, -100]}))
    assert (found["input_ids"].tolist(), found["labels"].tolist()) == ([5, 6, 7, 8], [-100, 9, 7, -100])
    (found,) = arrays(encoded({"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}))
    assert found["labels"].tolist() == [-100, -100, 7, 8]


def test_weights_stand_at_their_messages():
    messages = [
        *CHAT["messages"],
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "So.", "weight": 0.5},
    ]
    (found,) = arrays(encoded({"messages": messages}))
    first, second = ids_of("Fair winds!<|im_end|>"), ids_of("So.<|im_end|>")
    learned = found["weights"][found["labels"] != IGNORED].tolist()
    assert learned == [1.0] * len(first) + [0.5] * len(second)


def test_an_end_that_a_template_writes_once_is_learned_after_every_reply():
    template = Template(
        user="U:{content}|", generation="A:", assistant="{content}", single_eos=True, system="{content}"
    )
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = Row({"messages": [{"role": role, "content": text} for role, text in turns]}, "f", 1)
    (one,) = encoder(template=template).encode(understand(row, "conversations"))
    (found,) = arrays(one)  # type: ignore[arg-type]
    eos = TOKENIZER.eos_token_id
    prompts, replies = [ids_of("U:a|A:"), ids_of("U:c|A:")], [ids_of("b"), ids_of("d")]
    assert found["input_ids"].tolist() == [*prompts[0], *replies[0], *prompts[1], *replies[1], eos]
    later = [eos, *[IGNORED] * (len(prompts[1]) - 1)]
    assert found["labels"].tolist() == [*[IGNORED] * len(prompts[0]), *replies[0], *later, *replies[1], eos]


# (prompt, reply, room) -> the prompt's share; the first six are those by which LLaMA-Factory tests its own rule.
SHARES = {
    (3000, 2000, 1000): 600, (2000, 3000, 1000): 400, (1000, 100, 1000): 900, (100, 1000, 1000): 100,
    (500, 400, 500): 278, (90, 30, 100): 70, (5000, 4000, 8): 5, (10_000_000, 60, 100): 99,
}  # fmt: skip


@pytest.mark.parametrize(("lengths", "prompt"), SHARES.items())
def test_the_room_is_shared_and_a_reply_always_keeps_some(lengths, prompt):
    assert share(*lengths) == prompt


def sequence(*parts: tuple[str, int]) -> Encoded:
    """Return a sequence of parts: prompts (p), replies that are learned (r), and replies that are not (x)."""
    out = Encoded([])
    for kind, length in parts:
        start = len(out.ids)
        out.ids += range(start, start + length)
        if kind != "p":
            out.replies.append((start, start + length))
        if kind == "r":
            out.spans += (start, start + length)
            out.weights.append(1.0)
    return out


def test_a_prompt_that_is_too_long_loses_its_middle():
    (short,) = cut([sequence(("p", 100), ("r", 20))], 50)
    assert short.ids == [*range(15), *range(85, 120)]
    assert short.spans == [30, 50]


def test_a_reply_that_is_too_long_loses_its_end():
    (short,) = cut([sequence(("p", 10), ("r", 100))], 50)
    assert (short.ids, short.spans) == (list(range(50)), [10, 50])


def test_a_conversation_is_cut_at_its_end_and_never_behind_a_prompt():
    turns = sequence(("p", 10), ("r", 10), ("p", 10), ("r", 10), ("p", 10), ("r", 10))
    assert cut([turns], 45)[0].ids == list(range(40))  # the third prompt would have no reply
    assert cut([turns], 35)[0].spans == [10, 20, 30, 35]
    assert cut([turns], 25)[0].ids == list(range(20))


def test_of_a_conversation_that_is_learned_whole_the_end_is_cut():
    whole = encoded(CHAT, train_on=TrainOn.all).sequences[0].ids
    assert encoded(CHAT, train_on=TrainOn.all, max_length=8).sequences[0].ids == whole[:8]


def test_of_a_conversation_whose_last_reply_is_learned_that_one_stays():
    (short,) = cut([sequence(("p", 40), ("x", 40), ("p", 40), ("r", 10))], 50)
    assert short.ids == [*range(20), *range(100, 130)]
    assert short.spans == [40, 50]


def test_both_sides_of_a_pair_keep_the_same_part_of_the_prompt():
    chosen, rejected = cut([sequence(("p", 100), ("r", 10)), sequence(("p", 100), ("r", 20))], 50)
    assert chosen.ids[:30] == rejected.ids[:30] == [*range(15), *range(85, 100)]
    assert (len(chosen.ids), len(rejected.ids)) == (40, 50)


@pytest.mark.parametrize("prompt", [1, 5, 20, 400])
@pytest.mark.parametrize("reply", [1, 5, 20, 400])
def test_no_cut_ever_leaves_a_row_without_its_reply(prompt, reply):
    for limit in (8, 9, 64):
        (short,) = cut([sequence(("p", prompt), ("r", reply), ("p", 3), ("r", 3))], limit)
        assert len(short.ids) <= limit
        assert short.learned >= 1


def test_at_the_end_of_each_turn_as_llama_factory_cuts():
    """Worked out by its rule: a turn that does not fit shares what room is left, and the next finds none."""
    turns = sequence(("p", 10), ("r", 10), ("p", 40), ("r", 40), ("p", 5), ("r", 5))
    short = cut_turns(turns, 60, last_first=False)
    assert short.ids == [*range(20), *range(20, 40), *range(60, 80)]
    assert short.spans == [0 + 10, 20, 40, 60]
    last = cut_turns(turns, 60, last_first=True)
    assert last.ids == [*range(20, 45), *range(60, 85), *range(100, 110)]
    chosen, rejected = cut_each_at_its_end([sequence(("p", 100), ("r", 10)), sequence(("p", 100), ("r", 20))], 50)
    assert chosen.ids[:30] == rejected.ids[:30] == list(range(30))
    assert (chosen.spans, rejected.spans) == ([30, 40], [30, 50])
    history = sequence(("p", 40), ("x", 40), ("p", 20), ("r", 10))
    assert cut_each_at_its_end([history], 50)[0].ids == [*range(40), *range(100, 110)]


def test_a_reply_of_several_parts_is_one_reply():
    out = Encoded([])
    for length, reply in ((5, False), (3, True), (1, True), (2, True)):
        start = len(out.ids)
        out.ids += range(start, start + length)
        learn(out, start, float(reply), reply=reply)
    assert (out.replies, out.spans) == ([(5, 11)], [5, 11])


LONG = {"prompt": "Hi " * 100, "completion": "Ho " * 100}


def test_a_long_row_is_cut_left_out_or_an_error():
    assert len(encoded(LONG, max_length=64).sequences[0].ids) == 64
    assert encoded(LONG, max_length=64).truncated
    for what in (TooLong.drop, TooLong.error):
        found = encoded(LONG, max_length=64, too_long=what)
        assert isinstance(found, TooLongRow)
        assert "longer than data.max_length=64" in found.problem.message
    assert not encoded(CHAT, max_length=64, too_long=TooLong.drop).truncated


def test_text_to_be_concatenated_is_not_cut():
    found = encoded({"text": "word " * 500}, "texts", max_length=64, packing=Packing.concatenate)
    assert len(found.sequences[0].ids) > 400
    assert len(encoded({"text": "word " * 500}, "texts", max_length=64).sequences[0].ids) == 64


def test_a_row_with_nothing_to_learn_is_bad():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes.", "weight": 0}]
    (found,) = encoder().encode(understand(Row({"messages": messages}, "rows.jsonl", 7), "conversations")) or [None]
    assert isinstance(found, BadRow)
    assert found.problem.key == "rows.jsonl:7"
    found = encoded(CHAT, train_on=TrainOn.roles, train_roles=["tool"])
    assert isinstance(found, BadRow)


def test_what_follows_a_prompt_is_generated_from_the_tokens_that_training_had():
    messages = CHAT["messages"][:1]
    assert encoder().prompt_ids(messages, Row({}, "f", 1)) == ids_of(PROMPT)
