"""Which questions make a rollout, and which replies a mini batch."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from ftrun.train import Train
from ftrun.worker.batches import padding_collator
from ftrun.worker.rollout import KNOWN, Rollout, RolloutBatches, minibatch, seed_of
from ftrun.worker.sampling import Budget


def batches(rows, size, accumulation, steps=1, minibatches=1, rank=0, world_size=1):
    train = Train(micro_batch_size=size, grad_accumulation=accumulation, epochs=1)
    budget = Budget(size * minibatches, None, padded=True)
    return RolloutBatches(np.ones(rows), budget, train, steps=steps, seed=1, rank=rank, world_size=world_size)


def rollouts(found: RolloutBatches) -> list[list[list[int]]]:
    """The rows of each step of each rollout."""
    drawn = list(found)
    assert len(drawn) == len(found) == found.steps_per_epoch * found.train.grad_accumulation
    parts = found.train.grad_accumulation
    steps = [list(chain(*drawn[at : at + parts])) for at in range(0, len(drawn), parts)]
    return [steps[at : at + found.steps] for at in range(0, len(steps), found.steps)]


@pytest.mark.parametrize(("rows", "count"), [(16, 2), (20, 3), (3, 1)])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_rollout_has_the_same_questions_however_its_batch_is_split(rows, count, steps):
    whole = rollouts(batches(rows, 8, 1, steps))
    for size, accumulation in ((4, 2), (1, 8)):
        assert rollouts(batches(rows, size, accumulation, steps)) == whole
    assert len(whole) == count
    assert all(step == rollout[0] for rollout in whole for step in rollout)
    assert sorted(chain(*(rollout[0] for rollout in whole))) == list(range(rows))


def test_several_mini_batches_make_a_larger_rollout():
    found = rollouts(batches(24, 2, 2, steps=6, minibatches=3))
    assert [len(rollout) for rollout in found] == [6, 6]
    assert [len(rollout[0]) for rollout in found] == [12, 12]


def test_processes_share_a_rollout():
    shares = [rollouts(batches(13, 2, 2, steps=2, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]
    first, last = ([row for share in shares for row in share[at][0]] for at in (0, 1))
    assert (len(first), len(last)) == (8, 5)
    assert sorted(first + last) == list(range(13))


def test_each_pass_takes_every_reply_once_in_a_new_order():
    passes = []
    for done in range(2):
        steps = [minibatch(10, 3 * done + part, 3, 2, seeds=(0,)) for part in range(3)]
        assert all(len(parts) == 2 for parts in steps)
        passes.append([number for parts in steps for part in parts for number in part])
        assert sorted(passes[-1]) == list(range(10))
    assert passes[0] != passes[1]
    assert minibatch(10, 0, 3, 2, seeds=(0,)) == minibatch(10, 0, 3, 2, seeds=(0,))


def test_a_step_has_the_same_replies_however_it_is_split():
    for step in range(4):
        whole = minibatch(8, step, 2, 1, seeds=(3, 4))[0]
        assert list(chain(*minibatch(8, step, 2, 4, seeds=(3, 4)))) == whole


def test_where_replies_are_few_no_step_is_empty():
    assert all(sum(map(len, minibatch(2, step, 3, 2, seeds=(0,)))) == 1 for step in range(6))
    assert minibatch(0, 1, 3, 2, seeds=(0,)) == [[], []]


def test_a_batch_has_replies_behind_their_questions_and_what_is_known_of_their_tokens():
    known = {name: torch.tensor([1.0, 2.0, 3.0]) + number for number, name in enumerate(KNOWN)}
    rollout = Rollout([7, 5], [[11], [12, 13]], known, {"kl": 0.1})
    questions = {7: {"input_ids": [1, 2, 3]}, 5: {"input_ids": [4]}}
    batch = rollout.batch(questions.__getitem__, padding_collator(0), [1, 0])
    assert batch["input_ids"].tolist() == [[4, 12, 13, 0], [1, 2, 3, 11]]
    assert batch["labels"].tolist() == [[-100, 12, 13, -100], [-100, -100, -100, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["old_values"].tolist() == [3.0, 4.0, 2.0]
    empty = rollout.batch(questions.__getitem__, padding_collator(0), [])
    assert empty["advantages"].tolist() == []


def test_a_rollout_survives_being_saved_to_the_bit():
    known = {name: torch.rand(3) for name in KNOWN}
    rollout = Rollout([7, 5], [[11], [12, 13]], known, {"kl": 0.1})
    again = Rollout.of(rollout.state())
    assert (again.rows, again.replies, again.metrics) == (rollout.rows, rollout.replies, rollout.metrics)
    assert all(torch.equal(again.known[name], known[name]) for name in KNOWN)


def test_seeds_differ_where_anything_does():
    found = {seed_of(*parts) for parts in ((1, 2), (2, 1), (1, 3), (0, 2))}
    assert len(found) == 4
