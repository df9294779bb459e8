"""Whose reply a row takes, and the batches of replies: decided once for all rows, whatever a batch holds."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftrun import config
from ftrun.data.tokens import IGNORED
from ftrun.worker import batches, builtin, dataset, feedback
from ftrun.worker.dataset import Selected
from ftrun.worker.losses.feedback import apo_zero_unpaired, kto

TOKENIZER: Any = builtin.tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def verdicts(*prompts: str, first: int = 0) -> list[dict[str, Any]]:
    """Rows of these prompts, each with a reply of its own."""
    return [
        {"prompt": prompt, "completion": f"reply {number} to it", "label": number % 3 > 0}
        for number, prompt in enumerate(prompts, first)
    ]


def load(*words: str) -> Selected:
    return dataset.load(config.compose(["model=tiny", "stage=kto", *words]), TOKENIZER).train


def parts(row: Any) -> tuple[list[int], list[int]]:
    """The prompt's and the reply's tokens of a row."""
    begin = int(np.argmax(row["labels"] != IGNORED))
    return row["input_ids"][:begin].tolist(), row["input_ids"][begin:].tolist()


def partners(rows: Selected, seed: int = 0, max_length: int = 512) -> list[int]:
    """The position of the row whose reply each row takes; replies are all different."""
    found = feedback.with_mismatched(rows, seed, max_length)
    replies = [parts(rows[position])[1] for position in range(len(rows))]
    return [replies.index(parts(found[position]["mismatched"])[1]) for position in range(len(rows))]


def test_a_row_takes_the_reply_to_another_prompt_behind_its_own(write):
    rows = load(f"data.path={write('rows.jsonl', verdicts(*'abcdefabcaaab'))}")
    found = feedback.with_mismatched(rows, 0, 512)
    for position, partner in enumerate(partners(rows)):
        (prompt, _), (other_prompt, other_reply) = parts(rows[position]), parts(rows[partner])
        assert prompt != other_prompt
        row = found[position]
        assert row["input_ids"].tolist() == rows[position]["input_ids"].tolist()
        assert (row["extra"], row["index"]) == (rows[position]["extra"], position)
        assert parts(row["mismatched"]) == (prompt, other_reply)
        labels = rows[partner]["labels"][-len(other_reply) :]
        assert row["mismatched"]["labels"].tolist() == [IGNORED] * len(prompt) + labels.tolist()


def test_it_depends_on_the_seed_and_on_nothing_that_was_asked_before(write):
    rows = load(f"data.path={write('rows.jsonl', verdicts(*'abcdefabcaaab'))}")
    expected = partners(rows)
    assert partners(rows) == expected
    assert len({tuple(partners(rows, seed)) for seed in range(4)}) == 4
    for turn in range(10):
        found, order = feedback.Mismatches(rows, 0, 512), np.random.default_rng(turn).permutation(len(rows)).tolist()
        assert {position: found.partner(0, position)[1] for position in order} == dict(enumerate(expected))


def test_each_reply_is_taken_about_once(write):
    rows = load(f"data.path={write('rows.jsonl', verdicts(*(f'question {n}' for n in range(50))))}")
    assert sorted(partners(rows)) == list(range(50))


def test_where_there_is_one_prompt_only_it_is_another_row_of_it(write):
    rows = load(f"data.path={write('rows.jsonl', verdicts('a', 'a', 'a'))}")
    for order in itertools.permutations(range(3)):
        found = feedback.Mismatches(rows, 0, 512)
        taken = {position: found.partner(0, position)[1] for position in order}
        assert sorted(taken.values()) == [0, 1, 2]
        assert all(position != partner for position, partner in taken.items())
    alone = load(f"data.path={write('one.jsonl', verdicts('a'))}")
    assert partners(alone) == [0]


def test_rows_of_several_sources_lend_each_other_replies(write):
    paths = [write("a.jsonl", verdicts(*"aaaa")), write("b.jsonl", verdicts(*"bb", first=4))]
    rows = load(f"data.sources=[{{path: {paths[0]}}}, {{path: {paths[1]}}}]")
    assert len(rows.stores) == 2
    for position, partner in enumerate(partners(rows)):
        assert (position < 4) != (partner < 4)


def test_rows_that_are_held_out_lend_nothing(write):
    path = write("rows.jsonl", verdicts(*(f"question {n}" for n in range(20))))
    cfg = config.compose(["model=tiny", "stage=kto", f"data.path={path}", "data.eval_size=5"])
    found = dataset.load(cfg, TOKENIZER)
    for rows in (found.train, found.evals[""]):
        assert sorted(partners(rows)) == list(range(len(rows)))
        # What the reference says is noted by sources, so the others must have something to be asked about too.
        stored = feedback.with_mismatched(rows, 0, 512).stores[0]
        assert all(len(parts(stored[index]["mismatched"])[1]) for index in range(20))


def test_what_the_reference_says_is_kept_apart_where_other_replies_are_taken(write):
    path = f"data.path={write('rows.jsonl', verdicts(*'abcdef'))}"
    rows, fewer = load(path), load(path, "data.eval_size=2")
    places = [
        feedback.with_mismatched(*which).stores[0].place
        for which in ((rows, 0, 512), (rows, 0, 512), (rows, 1, 512), (fewer, 0, 512))
    ]
    assert places[0] == places[1]
    assert len(set(places)) == 3
    assert all(place.parent == rows.stores[0].place for place in places)


def test_a_reply_is_cut_where_the_row_would_be_too_long(write):
    rows = load(f"data.path={write('rows.jsonl', verdicts('a' * 40, 'b'))}")
    longest = len(parts(rows[0])[0]) + 3
    found = feedback.with_mismatched(rows, 0, longest)
    prompt, reply = parts(found[0]["mismatched"])
    assert len(prompt) + len(reply) == longest
    assert reply == parts(rows[1])[1][:3]


@pytest.mark.parametrize("collate", [lambda rows: batches.pad(rows, 0), batches.flatten], ids=["padded", "flat"])
def test_a_batch_holds_both_kinds_of_sequences_apart(write, collate):
    rows = load(f"data.path={write('rows.jsonl', verdicts(*'abcd'))}")
    joined = feedback.with_mismatched(rows, 0, 512)
    batch = feedback.batch_of([joined[2], joined[0]], collate, mismatched=True)
    assert batch["index"].tolist() == [2, 0]
    assert batch["good"].tolist() == [True, False]
    plain = collate([rows[2], rows[0]])
    assert set(feedback.own(batch)) == set(plain)
    assert all(torch.equal(value, plain[name]) for name, value in feedback.own(batch).items())
    expected = collate([joined[2]["mismatched"], joined[0]["mismatched"]])
    assert all(torch.equal(value, expected[name]) for name, value in feedback.mismatched(batch).items())
    alone = feedback.batch_of([rows[1]], collate, mismatched=False)
    assert not feedback.mismatched(alone)


def test_a_batch_of_no_rows_stands_in_for_one():
    batch = feedback.batch_of([], lambda rows: batches.pad(rows, 0), mismatched=True)
    assert len(batch["good"]) == len(batch["index"]) == 0
    for part in (feedback.own(batch), feedback.mismatched(batch)):
        assert part["input_ids"].shape == (1, 1)


REPLIES = feedback.Replies(
    policy=torch.tensor([-3.0, -5.0, -2.0]),
    reference=torch.tensor([-4.0, -4.0, -4.0]),
    length=torch.tensor([3.0, 5.0, 0.0]),
    good=torch.tensor([True, False, True]),
)


def test_the_objective_passes_on_what_it_was_given():
    weights = {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0}
    objective = feedback.Objective(loss=kto, compares_with_mismatched=True, **weights)
    expected = kto(torch.tensor([1.0, -1.0, 2.0]), REPLIES.good, torch.tensor(0.25), **weights)
    assert torch.equal(objective.of(REPLIES, 0.25), expected)
    objective = feedback.Objective(loss=apo_zero_unpaired, compares_with_mismatched=False, **weights)
    assert torch.equal(objective.of(REPLIES, 9.0), kto(REPLIES.logratio, REPLIES.good, torch.zeros(()), **weights))


def test_what_is_logged_of_good_and_bad_replies():
    found = REPLIES.metrics(0.5)
    assert {name: values.tolist() for name, values in found.items()} == {
        "rewards_chosen": [0.5, 1.0],
        "rewards_rejected": [-0.5],
        "logps_chosen": [-3.0, -2.0],
        "logps_rejected": [-5.0],
    }
    assert REPLIES.nll_of_good.tolist() == [1.0, 2.0]
