"""What all training stages share: bad losses, early stopping, the best checkpoint, precision, noise, evaluation."""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from ftrun import config, plugin, record
from ftrun.errors import ConfigError
from tests.ended import comparable, cut_off

TINY = ("model=tiny", "train.log_every=1", "train.micro_batch_size=2", "train.warmup=0", "stage.num_samples=0")


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def weights(folder: Path) -> bytes:
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


def cut_off_after(whole: Path, step: int) -> Path:
    """Return a copy of a run as a kill after a step would have left it."""
    copy = whole.with_name(f"{whole.name}_from{step}")
    shutil.copytree(whole, copy)
    cut_off(copy, step)
    return copy


# AdamW in a run where batches with a "~" are made bad, and whose updates of some steps are left out.
POISON = """
from dataclasses import dataclass, field
from ftrun.plugin import register
from ftrun_plugins.optimizer.adamw import AdamW

@register
@dataclass(kw_only=True)
class Poison(AdamW):
    \"\"\"Makes batches bad.\"\"\"
    name: str = "poison"
    factor: float = 0.0
    \"\"\"What the last hidden states of such a batch are multiplied by; 0 makes them NaN.\"\"\"
    left_out: list[int] = field(default_factory=list)
    \"\"\"Updates that are not done, counted from 1.\"\"\"

    def build(self, model, run):
        optimizer, done = super().build(model, run), 0
        plain = optimizer.step

        def step(closure=None):
            nonlocal done
            done += 1
            if done not in self.left_out:
                plain(closure)

        optimizer.step = step
        return optimizer

    def callbacks(self, model, run):
        (token,) = run.tokenizer.encode("~", add_special_tokens=False)
        found = {}

        def look(module, args, kwargs):
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            found["bad"] = module.training and bool((ids == token).any())

        def spoil(module, args, output):
            return output * (self.factor or float("nan")) if found["bad"] else output

        model.register_forward_pre_hook(look, with_kwargs=True)
        last = [module for name, module in model.named_modules() if name.endswith("model.norm")]
        last[-1].register_forward_hook(spoil)
        return []
"""

ROWS = [chat(f"What is {n}?", "~" if n == 5 else f"A number, {n}.") for n in range(8)]

POISONED = (
    *TINY, "plugins=[poison.py]", "optimizer=poison", "optimizer.lr=1e-2", "data.path=rows.jsonl", "adapter=full",
    "train.grad_accumulation=2", "train.max_steps=6", "train.shuffle=false",
)  # fmt: skip


@pytest.fixture
def poisoned(write):
    write("poison.py", POISON)
    write("rows.jsonl", ROWS)


def test_a_loss_that_is_no_number_stops_the_run_and_its_rows_are_named(ftrun, poisoned):
    done = ftrun(*POISONED, "train.save_every=1").sees(1)
    assert "at step 2 the loss is nan" in done.err
    # The rows of the micro batch, not of the whole step, which has lines 5 to 8.
    assert "rows.jsonl:5, " in done.err
    assert "rows.jsonl:6;" in done.err
    assert "rows.jsonl:7" not in done.err
    assert [line["step"] for line in done.metrics] == [1]
    assert done.result.checkpoint == "checkpoints/step-1"


@pytest.mark.slow
def test_rows_of_another_process_are_named_too(ftrun, poisoned, write):
    write("rows.jsonl", [*ROWS[:5], ROWS[6], ROWS[7], ROWS[5]])
    both = ("hardware.num_processes=2", "train.grad_accumulation=1")
    stopped = ftrun(*POISONED, *both).sees(1)
    assert "at step 2 the loss is nan" in stopped.err
    assert stopped.err.count("rows.jsonl:7, ") == 1
    assert "rows.jsonl:8;" in stopped.err
    assert "rows.jsonl:5" not in stopped.err
    skipping = ftrun(*POISONED, *both, "train.on_bad_loss=skip").sees(0)
    assert skipping.result.metrics["skipped_steps"] == 3
    one = ftrun(*POISONED, "train.on_bad_loss=skip", "train.micro_batch_size=4", "train.grad_accumulation=1").sees(0)
    assert skipping.losses == pytest.approx(one.losses, abs=1e-5)


def test_packed_rows_are_named_too(ftrun, poisoned):
    done = ftrun(*POISONED, "data.packing=best_fit", "data.max_length=64", "train.grad_accumulation=1").sees(1)
    assert "rows.jsonl:6" in done.err


def test_a_step_that_is_skipped_changes_neither_weights_nor_optimizer(ftrun, poisoned):
    skipping = ftrun(*POISONED, "train.on_bad_loss=skip").sees(0)
    # Two steps an epoch, of which the second is bad.
    lines = [line for line in skipping.metrics if "lr" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 2, 2, 3]
    assert ["loss" in line for line in lines] == [True, False] * 3
    assert skipping.result.metrics["skipped_steps"] == 3
    assert all(math.isfinite(value) for line in skipping.metrics for value in line.values())
    # The same run with sound batches, whose second, fourth and sixth update are not done.
    without = ftrun(*POISONED, "optimizer.factor=1", "optimizer.left_out=[2,4,6]").sees(0)
    assert skipping.losses == without.losses[::2]
    assert weights(skipping.folder / "model") == weights(without.folder / "model")
    assert skipping.result.metrics["loss"] == pytest.approx(sum(skipping.losses) / 3)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_run_with_skipped_steps_resumes(ftrun, poisoned, step):
    words = ("train.on_bad_loss=skip", "train.log_every=4", "train.save_every=1", "train.keep_checkpoints=9")
    whole = ftrun(*POISONED, *words).sees(0)
    lines = [line for line in whole.metrics if "lr" in line]
    assert [(line["step"], line["skipped_steps"]) for line in lines] == [(1, 0), (4, 2), (6, 3)]
    copy = cut_off_after(whole.folder, step)
    resumed = ftrun("resume", copy.name).sees(0)
    assert comparable(copy) == comparable(whole.folder)
    assert weights(copy / "model") == weights(whole.folder / "model")
    assert resumed.result.metrics == whole.result.metrics


def test_steps_without_end_are_not_skipped(ftrun, write):
    write("poison.py", POISON)
    write("rows.jsonl", [chat("~", "Yes.")] * 4)
    done = ftrun(*POISONED, "train.on_bad_loss=skip", "train.max_steps=30").sees(1)
    assert "at step 11 the loss is nan" in done.err
    assert "10 steps before it were skipped already" in done.err


def test_a_leap_counts_as_bad_once_there_is_something_to_compare_with(ftrun, write):
    write("poison.py", POISON)
    rows = [chat(f"What is {n}?", f"A number, {n}.") for n in range(30)]
    write("rows.jsonl", [*rows[:2], chat("What is 2?", "~"), *rows[3:27], chat("What is 27?", "~"), *rows[28:]])
    words = (
        *POISONED, "train.grad_accumulation=1", "train.max_steps=15", "optimizer.factor=30", "optimizer.lr=1e-3",
        "train.max_loss_spike=3",
    )  # fmt: skip
    done = ftrun(*words, "train.on_bad_loss=skip", "train.save_every=5", "train.keep_checkpoints=9").sees(0)
    assert done.result.metrics["skipped_steps"] == 1  # the one in the second step comes too early
    assert done.losses[1] > 1.5 * done.losses[0]
    log = (done.folder / "log.txt").read_text()
    assert "skipped: at step 14 the gradient's norm is" in log
    assert "more than 3 times its usual" in log
    assert "rows.jsonl:28" in log
    copy = cut_off_after(done.folder, 10)
    ftrun("resume", copy.name).sees(0)
    assert comparable(copy) == comparable(done.folder)
    stopped = ftrun(*words).sees(1)
    assert "at step 14 the gradient's norm is" in stopped.err


# No weight moves at such a rate, so no evaluation is better than the first.
STILL = (
    *TINY, "data.rows=12", "data.eval_size=2", "optimizer.lr=1e-30", "train.max_steps=20", "train.eval_every=2",
    "train.early_stopping_patience=2",
)  # fmt: skip


def test_a_run_stops_early_and_as_early_when_resumed(ftrun):
    whole = ftrun(*STILL, "train.save_every=1", "train.keep_checkpoints=99", "train.log_every=4").sees(0)
    assert whole.result.status == "completed"
    assert "stopped early" in whole.result.reason
    assert whole.result.step == 6
    assert [line["step"] for line in whole.metrics if "eval_loss" in line] == [0, 2, 4, 6]
    assert [line["step"] for line in whole.metrics if "lr" in line] == [1, 4, 6]
    assert (whole.folder / "model").is_dir()
    assert "step-6" not in {path.name for path in record.checkpoints(whole.folder)}
    for step in (3, 4, 5):
        copy = cut_off_after(whole.folder, step)
        resumed = ftrun("resume", copy.name).sees(0)
        assert comparable(copy) == comparable(whole.folder)
        assert weights(copy / "model") == weights(whole.folder / "model")
        assert resumed.result.reason == whole.result.reason


def test_an_improvement_below_the_threshold_is_none(ftrun):
    learns = (*STILL, "optimizer.lr=1e-3", "train.max_steps=8")
    assert ftrun(*learns).sees(0).result.step == 8
    assert ftrun(*learns, "train.early_stopping_threshold=5").sees(0).result.step == 6


# What is held out contradicts what is learned, so that the evaluations get better first, and then worse.
BEST = (
    *TINY, "data.path=learned.jsonl", "data.eval_path=held_out.jsonl", "optimizer.lr=1e-2", "train.max_steps=24",
    "train.eval_every=2", "train.keep_best=true", "train.scheduler=constant", "train.keep_checkpoints=1",
)  # fmt: skip


@pytest.fixture
def contradicting(write):
    write("learned.jsonl", [chat("What is it?", "It is a number.")] * 8)
    write("held_out.jsonl", [chat("What is it?", "It is no colour at all.")] * 2)


@pytest.mark.parametrize(
    ("adapter", "lr"), [("adapter=full", "1e-2"), ("adapter=lora", "1e-1"), ("adapter.init=pissa", "1e-1")]
)
def test_the_run_ends_with_the_weights_of_its_best_evaluation(ftrun, contradicting, adapter, lr):
    done = ftrun(*BEST, adapter, f"optimizer.lr={lr}", "train.save_every=3").sees(0)
    values = {line["step"]: line["eval_loss"] for line in done.metrics if "eval_loss" in line and line["step"]}
    best = min(values, key=values.__getitem__)
    assert 0 < best < 24
    result = done.result
    assert (result.metrics["best_step"], result.step) == (best, 24)
    assert result.metrics["eval_loss"] == result.objective == values[best] < values[24]
    names = [path.name for path in record.checkpoints(done.folder)]
    assert names == [f"step-{best}"] + (["step-21"] if best < 21 else [])
    if "pissa" not in adapter:  # whose adapter is written as one for the weights that the run started from
        assert weights(done.folder / "model") == weights(done.folder / "checkpoints" / f"step-{best}")
    again = ftrun(*TINY, f"model.path={done.folder}", "data.path=learned.jsonl", "data.eval_path=held_out.jsonl",
                  "train.max_steps=1").sees(0)  # fmt: skip
    assert again.metrics[0]["eval_loss"] == pytest.approx(values[best], abs=1e-5)


def test_the_best_checkpoint_outlives_a_resume(ftrun, contradicting):
    whole = ftrun(*BEST, "adapter=full", "train.save_every=3").sees(0)
    copy = cut_off_after(whole.folder, 21)
    resumed = ftrun("resume", copy.name).sees(0)
    assert comparable(copy) == comparable(whole.folder)
    assert resumed.result.metrics == whole.result.metrics
    assert weights(copy / "model") == weights(whole.folder / "model")


def test_the_best_is_the_highest_where_that_is_good(ftrun, contradicting):
    done = ftrun(*BEST, "objective=eval_loss", "objective_mode=max").sees(0)
    values = {line["step"]: line["eval_loss"] for line in done.metrics if "eval_loss" in line and line["step"]}
    assert done.result.objective == max(values.values())
    assert values[done.result.metrics["best_step"]] == max(values.values())


def test_the_best_may_be_the_last(ftrun, contradicting):
    done = ftrun(*BEST, "data.eval_path=learned.jsonl", "train.max_steps=4").sees(0)
    assert done.result.metrics["best_step"] == 4
    assert done.result.objective == done.metrics[-1]["eval_loss"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.early_stopping_patience=2", "data.eval_size=2"), "train.early_stopping_patience: .* only one"),
        (
            ("train.keep_best=true", "data.eval_size=2", "train.eval_every=2", "objective=loss"),
            "train.keep_best: .* loss is not measured",
        ),
        (("train.early_stopping_threshold=1",), "train.early_stopping_threshold: nothing stops early"),
        (("model.dtype=float16", "adapter=full"), "model.dtype: weights that train lose small updates"),
        (("model.dtype=bfloat16", "train.precision=fp32"), "train.precision: weights that are stored in bfloat16"),
    ],
)
def test_what_cannot_work_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        config.compose(["model=tiny", *words])


# AdamW that notes in which types weights, products and its own state are.
DTYPES = """
import json
from dataclasses import dataclass
from ftrun.plugin import register
from ftrun_plugins.optimizer.adamw import AdamW

@register
@dataclass(kw_only=True)
class Dtypes(AdamW):
    \"\"\"Notes types.\"\"\"
    name: str = "dtypes"

    def callbacks(self, model, run):
        import torch
        from transformers import TrainerCallback

        facts = {"autocast": [], "product": []}

        def note(module, args, output):
            facts["autocast"].append(torch.is_autocast_enabled("cpu"))
            facts["product"].append(str(output.dtype))

        layer = next(module for name, module in model.named_modules() if name.endswith("up_proj"))
        layer.register_forward_hook(note)

        class Note(TrainerCallback):
            def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
                state = [value for each in optimizer.state.values() for value in each.values()]
                noted = {name: sorted(set(values)) for name, values in facts.items()}
                noted["weights"] = sorted({str(weight.dtype) for weight in model.parameters()})
                noted["state"] = sorted({str(value.dtype) for value in state if value.ndim})
                (run.folder / "dtypes.json").write_text(json.dumps(noted))

        return [Note()]
"""


@pytest.mark.parametrize(
    ("words", "autocast", "product", "stored", "state"),
    [
        (("adapter=full", "train.precision=fp32"), False, "float32", ["float32"], "float32"),
        (("adapter=full", "train.precision=bf16"), True, "bfloat16", ["float32"], "float32"),
        (("adapter=full", "train.precision=bf16", "model.dtype=bfloat16"), False, "bfloat16", ["bfloat16"], "bfloat16"),
        (("train.precision=bf16", "model.dtype=bfloat16"), True, "bfloat16", ["bfloat16", "float32"], "float32"),
    ],
)
def test_what_is_stored_and_computed_in_which_type(ftrun, write, words, autocast, product, stored, state):
    write("dtypes.py", DTYPES)
    done = ftrun(*TINY, "plugins=[dtypes.py]", "optimizer=dtypes", "optimizer.lr=1e-2", "train.max_steps=3",
                 "data.rows=8", "data.eval_size=2", "train.log_every=1", *words).sees(0)  # fmt: skip
    noted = json.loads((done.folder / "dtypes.json").read_text())
    assert noted == {
        "autocast": [autocast],
        "product": [f"torch.{product}"],
        "weights": [f"torch.{dtype}" for dtype in stored],
        "state": [f"torch.{state}"],
    }
    assert done.losses[-1] < done.losses[0]


def test_fp16_without_a_gpu_is_refused(ftrun):
    assert "fp16 needs a GPU" in ftrun(*TINY, "train.precision=fp16", "hardware.device=cpu").sees(2).err
    assert "fp16 needs a GPU" in ftrun(*TINY, "train.precision=fp16").sees(2).err


def test_pictures_of_all_metrics_are_drawn(ftrun):
    done = ftrun("stage=dpo", "model=tiny", "data.rows=8", "data.eval_size=2", "train.max_steps=2").sees(0)
    assert {path.name for path in (done.folder / "plots").iterdir()} == {"loss.png", "metrics.png"}


TRAINING = [name for name in plugin.names("stage") if "loss" in plugin.get("stage", name).metrics]
SHORT = ("model=tiny", "data.rows=12", "train.micro_batch_size=4", "train.log_every=1", "train.max_steps=3")


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINING)
def test_what_every_stage_has_of_the_loop(ftrun, write, stage):
    """Evaluations along the way, recomputed activations, noise and bf16: each does what it says, and no more."""
    write("dtypes.py", DTYPES)
    base = [f"stage={stage}", *SHORT, "adapter=full", "optimizer.lr=1e-3"]
    base += ["stage.max_new_tokens=8"] * (plugin.get("stage", stage).rows == "questions")
    plain = ftrun(*base).sees(0)
    evaluated = ftrun(*base, "data.eval_size=2", "data.rows=14", "train.eval_every=1").sees(0)
    lines = [line for line in evaluated.metrics if any(name.startswith("eval_") for name in line)]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    recomputed = ftrun(*base, "train.gradient_checkpointing=true").sees(0)
    assert recomputed.losses == pytest.approx(plain.losses, abs=1e-5)
    noisy = ftrun(*base, "train.neftune=50")
    if any(fnmatch.fnmatchcase("train.neftune", pattern) for pattern in plugin.get("stage", stage).reads):
        assert noisy.sees(0).losses != pytest.approx(plain.losses, abs=1e-4)
    else:
        assert "train.neftune" in noisy.sees(2).err
    rounded = ftrun(*base, "train.precision=bf16", "plugins=[dtypes.py]", "optimizer=dtypes").sees(0)
    assert json.loads((rounded.folder / "dtypes.json").read_text())["product"] == ["torch.bfloat16"]
    assert rounded.losses != plain.losses or not any(plain.losses)  # where no reply is worth more than another
    assert rounded.losses == pytest.approx(plain.losses, rel=0.05, abs=0.05)


def test_without_rows_to_evaluate_on_there_is_no_best(ftrun, write):
    write("rows.jsonl", [chat("Hi", "Hello.")] * 4)
    done = ftrun("model=tiny", "data.path=rows.jsonl", "train.keep_best=true", "train.eval_every=1").sees(2)
    assert "train.keep_best: it goes by how evaluations come out, and there are no rows to evaluate on" in done.err


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_evaluating_changes_nothing_of_training(ftrun, write, stage):
    pair = {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}
    write("held_out.jsonl", [pair if stage == "dpo" else chat("Hi", "Hello.")] * 2)
    base = (f"stage={stage}", *SHORT, "adapter.dropout=0.3", "data.eval_path=held_out.jsonl", "optimizer.lr=1e-2")
    rarely = ftrun(*base).sees(0)
    often = ftrun(*base, "train.eval_every=1").sees(0)
    assert often.losses == rarely.losses
    assert weights(often.folder / "model") == weights(rarely.folder / "model")
