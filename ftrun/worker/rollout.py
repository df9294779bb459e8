"""Rollouts: which questions are answered together, the replies, and the mini batches that are made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ftrun.data.tokens import IGNORED
from ftrun.train import Train
from ftrun.worker import sampling
from ftrun.worker.batches import Batch, Collate

KNOWN = ("old_logps", "old_values", "advantages", "returns")
"""What is known of each token of a reply when training on it begins."""


class RolloutBatches(sampling.EpochBatches):
    """The questions of each micro batch of one process, those of a rollout for as many steps as it is trained on.

    An epoch is a whole number of rollouts: where its rows do not go round, the last one has fewer questions.

    Args:
        lengths: Tokens of each question.
        budget: How many questions a micro batch's share of a rollout takes.
        train: The loop's keys.
        steps: Optimizer steps to a rollout.
        seed: The run's.
        rank: Of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        lengths: sampling.Array,
        budget: sampling.Budget,
        train: Train,
        *,
        steps: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__(lengths, budget, train, seed=seed, rank=rank, world_size=world_size)
        self.steps = steps
        self._parts = train.grad_accumulation * world_size
        self._questions = budget.rows * self._parts

    @cached_property
    def num_batches(self) -> int:
        """Micro batches of an epoch on each process."""
        return math.ceil(len(self.lengths) / self._questions) * self.train.grad_accumulation * self.steps

    def plan(self, epoch: int) -> tuple[sampling.Array, sampling.Array]:
        """Return the rows of an epoch in their order, and where in it each batch of all processes begins."""
        order = self._order(epoch)
        rows: list[sampling.Array] = []
        sizes = [0]
        for start in range(0, len(order), self._questions):
            questions = order[start : start + self._questions]
            rows += [questions] * self.steps
            sizes += [len(part) for part in np.array_split(questions, self._parts)] * self.steps
        return np.concatenate(rows), np.cumsum(sizes)


@dataclass
class Rollout:
    """Replies of one process to its questions of a rollout, and what is known of each of their tokens."""

    rows: list[int]
    """Where each question is in the data set."""

    replies: list[list[int]]
    """Each reply's tokens."""

    known: dict[str, torch.Tensor]
    """By name (`KNOWN`): of the tokens of all replies, behind one another, of shape (N,), in float32 on the CPU."""

    metrics: dict[str, float]
    """What its lines of metrics say of it, the same on every process."""

    @property
    def lengths(self) -> list[int]:
        """The tokens of each reply."""
        return [len(ids) for ids in self.replies]

    def batch(self, questions: Callable[[int], Any], collate: Collate, which: Sequence[int]) -> Batch:
        """Return some of the replies, each behind its question, and what is known of their tokens.

        Args:
            questions: Gives the row of the data set that is at a position.
            collate: Makes a batch of rows.
            which: Numbers of the replies.
        """
        batch = collate([answered(questions(self.rows[number]), self.replies[number]) for number in which])
        for name in KNOWN:
            of_replies = torch.split(self.known[name], self.lengths)
            batch[name] = torch.cat([torch.zeros(0), *(of_replies[number] for number in which)])
        return batch

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON can hold it, which loses no bit."""
        return vars(self) | {"known": {name: values.tolist() for name, values in self.known.items()}}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Rollout:
        """Return what `state` was returned of."""
        known = {name: torch.tensor(values, dtype=torch.float32) for name, values in state["known"].items()}
        return cls(**state | {"known": known})


def answered(question: Any, reply: Sequence[int]) -> dict[str, Any]:
    """Return a question with a reply behind it, of which the reply has labels."""
    prompt = np.asarray(question["input_ids"], np.int32)
    reply_ids = np.asarray(reply, np.int32)
    row = {name: question[name] for name in ("media", "place") if name in question}
    labels = np.concatenate([np.full_like(prompt, IGNORED), reply_ids])
    return row | {"input_ids": np.concatenate([prompt, reply_ids]), "labels": labels}


def minibatch(count: int, step: int, minibatches: int, parts: int, seeds: Sequence[int]) -> list[list[int]]:
    """Return which of a rollout's replies each micro batch of a step has.

    Each pass over the replies takes them in a new order. Where there are fewer than mini batches, some are in several.

    Args:
        count: Replies of this process.
        step: Of the rollout, counted from 0.
        minibatches: Steps of one pass.
        parts: Micro batches of a step.
        seeds: What the order depends on besides the pass.
    """
    if not count:
        return [[] for _ in range(parts)]
    done, part = divmod(step, minibatches)
    order = np.random.default_rng([*seeds, done]).permutation(count)
    mine = np.array_split(order, minibatches)[part] if count >= minibatches else order[[part % count]]
    return [found.tolist() for found in np.array_split(mine, parts)]


def seed_of(*parts: int) -> int:
    """Return a seed below 2**32, another one where any part is another, as good as always."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def padded(values: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return the values (N,) of tokens that stand behind one another as a matrix (B, T), one reply a row."""
    return torch.nn.utils.rnn.pad_sequence(list(torch.split(values, list(lengths))), batch_first=True)
