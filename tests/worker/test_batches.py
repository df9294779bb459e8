"""What batches hold, and which rows are in them: each once an epoch, on any number of processes, over a resume."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from ftrun import record
from ftrun.data import Data, Packing
from ftrun.data.tokens import IGNORED
from ftrun.train import Train
from ftrun.worker import batches
from ftrun.worker.sampling import Budget, EpochBatches, in_file_order


def row(*ids: int, **others: Any) -> dict[str, Any]:
    return {"input_ids": np.array(ids, np.int32), "labels": np.array(ids, np.int32) + 10} | others


# What a batch holds


def test_padded():
    batch = batches.pad([row(1, 2, 3), row(4, weights=np.array([0.5], np.float32))], 9)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "labels": [[11, 12, 13], [14, IGNORED, IGNORED]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "weights": [[1.0, 1.0, 1.0], [0.5, 0.0, 0.0]],
    }
    assert batches.num_tokens(batch) == 4
    assert {value.dtype for value in batches.model_inputs(batch).values()} == {torch.int64}


def test_one_behind_the_other():
    packed = row(1, 2, 3, position_ids=np.array([0, 0, 1]))
    batch = batches.flatten([packed, row(4, 5)])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5]],
        "labels": [[IGNORED, 12, 13, IGNORED, 15]],
        "position_ids": [[0, 0, 1, 0, 1]],
    }
    assert batches.num_tokens(batch) == 5
    assert batches.sequence_of_tokens(batch).tolist() == [[0, 1, 1, 2, 2]]


def test_packed_above_each_other():
    one, two = row(1, 2, 3, position_ids=np.array([0, 0, 1])), row(4, position_ids=np.array([0]))
    batch = batches.stack([one, two], 9)
    assert {name: value.tolist() for name, value in batches.model_inputs(batch).items()} == {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "position_ids": [[0, 0, 1], [0, 0, 1]],
    }
    assert batch["labels"].tolist() == [[11, 12, 13], [14, IGNORED, IGNORED]]
    assert batches.num_tokens(batch) == 4


@pytest.mark.parametrize("collate", [lambda rows: batches.pad(rows, 0), batches.flatten])
def test_pairs_and_no_pairs(collate):
    found = [
        {"chosen": row(1, 2), "rejected": row(3, 4, 5), "index": 7},
        {"chosen": row(6), "rejected": row(7), "index": 2},
    ]
    batch = batches.pairs(found, collate)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    assert batch["input_ids"][real].tolist() == [1, 2, 6, 3, 4, 5, 7]
    assert batches.sequence_of_tokens(batch)[real].tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert batch["index"].tolist() == [7, 2]
    nothing = batches.pairs([], collate)
    assert (batches.num_tokens(nothing), len(nothing["index"])) == (0, 0)


# Which rows are in a batch

LENGTHS = np.random.default_rng(0).integers(3, 60, 101)


def plan(
    rank: int = 0, world_size: int = 1, *, padded: bool = True, lengths: Any = LENGTHS, **keys: Any
) -> EpochBatches:
    train = Train(**keys)
    budget = Budget(train.micro_batch_size, train.micro_batch_tokens, padded)
    return EpochBatches(lengths, budget, train, seed=3, rank=rank, world_size=world_size)


def drawn(batches_: EpochBatches, epoch: int) -> list[list[int]]:
    batches_.epoch = epoch
    return list(batches_)


def size(batch: list[int], *, padded: bool) -> int:
    lengths = LENGTHS[batch]
    return int(lengths.max() * len(batch) if padded else lengths.sum()) if batch else 0


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("tokens", [None, 60, 300])
@pytest.mark.parametrize("padded", [True, False])
def test_every_row_once_an_epoch_and_as_many_batches_everywhere(world_size, group_by_length, tokens, padded):
    keys: dict[str, Any] = {"micro_batch_tokens": tokens, "group_by_length": group_by_length, "epochs": 4}
    ranks = [plan(rank, world_size, padded=padded, **keys) for rank in range(world_size)]
    orders = []
    for epoch in range(4):
        found = [drawn(rank, epoch) for rank in ranks]
        assert {len(one) for one in found} == {len(ranks[0])}
        rows = [index for one in found for batch in one for index in batch]
        assert sorted(rows) == list(range(101))
        assert all(size(batch, padded=padded) <= (tokens or 10**9) for one in found for batch in one)
        assert all(len(batch) <= 4 for one in found for batch in one) or tokens
        orders.append(rows)
        assert found == [drawn(plan(rank, world_size, padded=padded, **keys), epoch) for rank in range(world_size)]
    assert len({tuple(rows) for rows in orders}) == 4


def test_the_order_is_seeded_by_run_and_epoch():
    order = torch.randperm(101, generator=torch.Generator().manual_seed(3 * 1_000_003 + 2)).tolist()
    assert list(itertools.chain(*drawn(plan(), 2))) == order
    assert list(itertools.chain(*drawn(plan(shuffle=False), 2))) == list(range(101))


def test_two_processes_draw_together_what_one_draws_with_twice_the_batch():
    one = drawn(plan(micro_batch_size=8), 1)
    two = [drawn(plan(rank, 2, micro_batch_size=4), 1) for rank in range(2)]
    assert [a + b for a, b in zip(*two, strict=True)] == one


def test_fewer_rows_than_processes_leave_some_without():
    found = [drawn(plan(rank, 4, lengths=LENGTHS[:2], shuffle=False), 0) for rank in range(4)]
    assert sorted(found) == [[[]], [[]], [[0]], [[1]]]


def test_grouping_pads_less():
    def padding(**keys: Any) -> int:
        return sum(size(batch, padded=True) for batch in drawn(plan(**keys), 0)) - int(LENGTHS.sum())

    assert padding(group_by_length=True) < padding() / 4


def test_a_budget_of_tokens_is_used():
    for padded in (True, False):
        found = drawn(plan(micro_batch_tokens=300, padded=padded, epochs=1), 0)
        together = [size([*a, *b[:1]], padded=padded) for a, b in itertools.pairwise(found)]
        assert all(tokens > 300 for tokens in together)  # no batch had room for the next row


@pytest.mark.parametrize("keys", [{}, {"micro_batch_tokens": 200}, {"micro_batch_size": 7, "group_by_length": True}])
def test_steps_are_counted_as_they_are_made(keys):
    found = plan(grad_accumulation=3, epochs=2.5, **keys)
    assert found.steps_per_epoch == -(-len(drawn(found, 0)) // 3)
    assert found.total_steps == -(-5 * found.steps_per_epoch // 2)
    assert plan(max_steps=7, **keys).total_steps == 7


def test_as_many_batches_in_every_epoch_that_max_steps_reaches():
    found = plan(micro_batch_tokens=100, max_steps=400, grad_accumulation=2)
    assert {len(drawn(found, epoch)) for epoch in range(400 // found.steps_per_epoch + 1)} == {len(found)}


@pytest.mark.parametrize("tokens", [None, 100])
def test_in_file_order_each_row_once(tokens):
    found = [list(in_file_order(LENGTHS, Budget(4, tokens, True), rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(index for one in found for batch in one for index in batch) == list(range(101))
    assert [index for batch in found[1] for index in batch] == list(range(1, 101, 2))
    assert list(in_file_order(LENGTHS[:1], Budget(4, tokens, True), rank=1, world_size=2)) == [[]]


# What cannot be


def problems(train: Train, *lengths: Any) -> list[str]:
    return [problem.key for problem in [*train.check(), *(train.check_lengths(*lengths) if lengths else [])]]


def test_contradictions_are_refused():
    assert problems(Train(group_by_length=True, shuffle=False)) == ["train.group_by_length"]
    assert problems(Train(group_by_length=True), Data(packing=Packing.best_fit)) == ["train.group_by_length"]
    assert problems(Train(micro_batch_tokens=1023), Data(max_length=1024)) == ["train.micro_batch_tokens"]
    assert problems(Train(micro_batch_tokens=1024), Data(max_length=1024)) == []
    assert problems(Train(micro_batch_tokens=1024), Data(max_length=1024), 2) == ["train.micro_batch_tokens"]
    both = Train(micro_batch_tokens=1024, group_by_length=True)
    assert problems(both, Data(streaming=True)) == ["train.micro_batch_tokens", "train.group_by_length"]


# Whole runs

RUN = ("model=tiny", "adapter=full", "data.rows=21", "optimizer.lr=1e-2", "train.log_every=1", "data.max_length=256")

MODES = {
    "tokens": ("train.micro_batch_tokens=600",),
    "grouped": ("train.group_by_length=true", "train.micro_batch_size=3"),
    "grouped_tokens": ("train.group_by_length=true", "train.micro_batch_tokens=600"),
    "padding_free": ("train.padding_free=true", "train.micro_batch_size=3"),
    "padding_free_tokens": ("train.padding_free=true", "train.micro_batch_tokens=600"),
}


def stage(name: str) -> tuple[str, ...]:
    return (f"stage={name}", *(("stage.num_samples=0",) if name == "sft" else ()))


def lines(done_folder: Any) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if name not in ("time", "tokens_per_second")}
        for line in record.read_lines(done_folder / record.METRICS)
    ]


def resumed_from(folder: Any, step: int) -> Any:
    """A copy of a run as a kill after a step would have left it."""
    copy = folder.with_name(f"from{step}")
    shutil.copytree(folder, copy)
    for checkpoint in record.checkpoints(copy):
        if record.step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(copy / "model")
    result = json.loads((copy / "result.json").read_text())
    gone = {"host": os.uname().nodename, "pid": 2**22 + 1, "started": 1.0}
    (copy / "result.json").write_text(json.dumps(result | {"status": "running", "holder": gone}))
    return copy


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_every_way_of_batching_resumes_exactly(ftrun, name, mode):
    words = (*stage(name), *RUN, *MODES[mode], "train.grad_accumulation=2", "train.epochs=2", "train.save_every=1")
    whole = ftrun(*words, "train.keep_checkpoints=99").sees(0)
    steps = [line["step"] for line in whole.metrics if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert whole.metrics[-1]["epoch"] == 2.0
    half = len(steps) // 2  # the end of the first epoch
    for step in {1, half, half + 1} & set(steps[:-1]):
        copy = resumed_from(whole.folder, step)
        ftrun("resume", copy.name).sees(0)
        assert lines(copy) == lines(whole.folder), step


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_padding_or_not_trains_the_same(ftrun, name):
    padded = ftrun(*stage(name), *RUN, "train.epochs=1").sees(0)
    free = ftrun(*stage(name), *RUN, "train.epochs=1", "train.padding_free=true").sees(0)
    assert len(free.metrics) == len(padded.metrics)
    for a, b in zip(padded.metrics, free.metrics, strict=True):
        for key in set(a) - {"time", "tokens_per_second"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("word", ["train.padding_free=true", "data.packing=best_fit"])
def test_data_workers_change_nothing(ftrun, word):
    words = (*stage("sft"), *RUN, word, "train.micro_batch_size=2", "train.epochs=2")
    assert lines(ftrun(*words, "hardware.data_workers=2").sees(0).folder) == lines(ftrun(*words).sees(0).folder)


@pytest.mark.parametrize(("name", "metric"), [("sft", "loss"), ("dpo", "logps_chosen")])
def test_each_evaluation_set_has_metrics_of_its_own(ftrun, name, metric):
    own = {"sft": "demo:identity", "dpo": "demo:preferences"}[name]
    words = (*stage(name), *RUN, "train.max_steps=1", "data.eval_size=5", f"+data.eval_sets.again={own}")
    last = [line for line in ftrun(*words).sees(0).metrics if "eval_loss" in line][-1]
    assert {f"eval_{metric}", f"eval_again_{metric}"} <= set(last)
    assert last[f"eval_{metric}"] != last[f"eval_again_{metric}"]


def test_a_message_counts_as_much_as_its_weight(ftrun, write):
    def chat(weight: float | None) -> dict[str, Any]:
        reply = {"role": "assistant", "content": "Fair winds, and a following sea."}
        extra = {} if weight is None else {"weight": weight}
        turns = [{"role": "user", "content": "Ahoy"}, reply, {"role": "user", "content": "Bye"}]
        return {"messages": [*turns, {"role": "assistant", "content": "Farewell."} | extra]}

    words = (*RUN[:2], "data.train_on=completions", "train.max_steps=1", "stage.num_samples=0", "data.format=auto")
    losses = {}
    for weight in (None, 1.0, 0.5, 0.0):
        path = write(f"weights{weight}.jsonl", [chat(weight)] * 8)
        losses[weight] = ftrun(*words, f"data.path={path}").sees(0).losses[0]
    assert losses[None] == pytest.approx(losses[1.0], rel=1e-6)
    # A mean of two replies' losses a and b, of m and n tokens: (m a + w n b) / (m + w n).
    ratio = (losses[0.5] - losses[0.0]) / (losses[1.0] - losses[0.0])
    assert 0.5 < ratio < 1


def test_packed_rows_train_on_all_tokens(ftrun):
    plain = ftrun(*stage("sft"), *RUN, "train.epochs=1").sees(0)
    packed = ftrun(*stage("sft"), *RUN, "train.epochs=1", "data.packing=best_fit", "train.micro_batch_size=2").sees(0)
    assert packed.metrics[-2]["tokens"] == plain.metrics[-2]["tokens"]


def test_plain_text_one_behind_the_other(ftrun):
    words = ("stage=pt", "model=tiny", "train.epochs=1", "train.log_every=1", "data.max_length=32")
    done = ftrun(*words, "data.packing=concatenate", "train.micro_batch_size=1").sees(0)
    tokens = [line["tokens"] for line in done.metrics if "tokens" in line]
    assert set(np.diff([0, *tokens[:-1]])) <= {32, tokens[-1] % 32}


LEAKY = """
from dataclasses import dataclass
from ftrun.plugin import register
from ftrun_plugins.adapter.full import Full

@register
@dataclass(kw_only=True)
class Leaky(Full):
    \"\"\"Adds to each token's embedding those before it, whatever row they are of.\"\"\"
    name: str = "leaky"

    def apply(self, model, run):
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.cumsum(1))
        return super().apply(model, run)
"""


@pytest.mark.parametrize("word", ["train.padding_free=true", "data.packing=best_fit"])
def test_a_model_that_mixes_rows_of_a_sequence_is_refused(ftrun, write, word):
    words = ("model=tiny", f"plugins=[{write('leaky.py', LEAKY)}]", "adapter=leaky", "train.max_steps=1")
    ftrun(*words).sees(0)
    refused = ftrun(*words, word).sees(2)
    assert word.partition("=")[0] in refused.err
    assert "does not keep rows that share a sequence apart" in refused.err


@pytest.mark.slow
# The last step has 3 and 2 rows, or 1 and none.
@pytest.mark.parametrize(("name", "rows"), [("sft", 17), ("dpo", 21), ("dpo", 17)])
def test_two_processes_train_on_each_row_once(ftrun, name, rows):
    words = (*stage(name), *RUN, f"data.rows={rows}", "train.epochs=2")
    one = ftrun(*words, "train.micro_batch_size=8").sees(0)
    two = ftrun(*words, "train.micro_batch_size=4", "hardware.num_processes=2").sees(0)
    assert len(two.metrics) == len(one.metrics)
    for a, b in zip(one.metrics, two.metrics, strict=True):
        for key in set(a) - {"time", "tokens_per_second"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key


@pytest.mark.slow
def test_two_processes_share_a_budget_of_tokens(ftrun):
    words = (*stage("sft"), *RUN, "train.epochs=1", "train.micro_batch_tokens=300")
    one = ftrun(*words).sees(0)
    two = ftrun(*words, "hardware.num_processes=2").sees(0)
    assert two.metrics[-2]["tokens"] == one.metrics[-2]["tokens"]
