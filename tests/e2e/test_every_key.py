"""Every key of the shared groups does something: no option is accepted and ignored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from ftrun.data import Data
from ftrun.hardware import Hardware
from ftrun.model import Model
from ftrun.template import Template
from ftrun.train import Train

BASE = (
    "model=tiny", "hardware=cpu", "adapter=full", "optimizer.lr=1e-2", "data.path=demo:identity", "data.rows=24",
    "train.micro_batch_size=4", "train.max_steps=6", "train.log_every=1", "stage.num_samples=1",
)  # fmt: skip

Look = Callable[[Any], Any]


def losses(done: Any) -> Any:
    return done.losses


def steps_of(name: str) -> Look:
    return lambda done: [line["step"] for line in done.metrics if name in line]


def lrs(done: Any) -> Any:
    return [line["lr"] for line in done.metrics if "lr" in line]


def report(name: str) -> Look:
    return lambda done: done.manifest["data"]["train"].get(name)


def evaluated(done: Any) -> Any:
    return done.metrics[0]["eval_loss"]


def replies(done: Any) -> Any:
    return (done.folder / "samples.jsonl").read_text()


def report_of_tokens(done: Any) -> Any:
    return done.metrics[-2]["tokens"]


def checkpoints(done: Any) -> Any:
    return sorted(path.name for path in (done.folder / "checkpoints").iterdir())


def files_saved(done: Any) -> Any:
    return {path.name for path in (done.folder / "checkpoints" / "step-3").iterdir()}


SHARDED = ("hardware.num_processes=2", "hardware.sharding=fsdp2", "train.save_every=3")


def fact(name: str) -> Look:
    return lambda done: json.loads((done.folder / "facts.json").read_text())[name]


# AdamW that notes what it finds when training begins.
PROBE = """
import json
from dataclasses import dataclass
from ftrun.plugin import register
from ftrun_plugins.optimizer.adamw import AdamW

@register
@dataclass(kw_only=True)
class Probe(AdamW):
    \"\"\"Notes what it finds.\"\"\"
    name: str = "probe"

    def callbacks(self, model, run):
        import torch
        from transformers import TrainerCallback

        class Note(TrainerCallback):
            def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
                facts = {
                    "checkpointing": any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
                    "attention": model.config._attn_implementation,
                    "threads": torch.get_num_threads(),
                    "workers": train_dataloader.num_workers,
                    "device": str(args.device),
                    "shape": list(next(iter(train_dataloader))["input_ids"].shape),
                }
                (run.folder / "facts.json").write_text(json.dumps(facts))

        return [Note()]
"""


@dataclasses.dataclass
class Case:
    key: str
    words: tuple[str, ...]
    look: Look
    base: tuple[str, ...] = ()
    """What both runs have besides the common words."""


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


FILES = {
    "probe.py": PROBE,
    "thinking.jsonl": [chat("2+2?", "<think>so</think>\n\nFour.")] * 8,
    "some_bad.jsonl": [chat("Hi", "Hello.")] * 8 + [chat("Hi", "")],
    "held_out.jsonl": [chat("Hi", "Hello.")] * 2,
    "both.jsonl": [chat("Hi", "Hello.") | {"prompt": "Bye", "completion": "So long, then."}] * 8,
    "long.jsonl": [chat("Hi " * 30, "Hello.") | {"other": chat("Bye", "So long.")["messages"]}] * 8,
    "lengths.jsonl": [chat("Hi", "Hello. " * length) for length in (1, 30, 2, 29, 3, 28, 4, 27)],
    "special.jsonl": [chat("What is <|im_end|>?", "An end.")] * 8,
    "turns.jsonl": [
        {"messages": [*chat("2+2?", "<think>so</think>\n\nFour.")["messages"], *chat("Why?", "So.")["messages"]]}
    ]
    * 8,
    "a/train.jsonl": [chat("a", "A.")] * 4,
    "a/other.jsonl": [chat("other", "Other.")] * 8,
    "b.jsonl": [chat("b", "Bee.")] * 8,
    "info/dataset_info.json": '{"mine": {"file_name": "rows.json", "formatting": "sharegpt"}}',
    "info/rows.json": '[{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]',
    "info/mine": '{"prompt": "x", "completion": "y"}',
}

TWO = ("data.path=null", "data.rows=null", "data.sources=[{path: a/train.jsonl}, {path: b.jsonl}]")
STREAM = ("data.streaming=true", "data.path=lengths.jsonl", "data.eval_path=held_out.jsonl")

PROBED = ("plugins=[probe.py]", "optimizer=probe")

EVALUATED = ("data.eval_size=4", "train.eval_every=1", "train.save_every=4")
STILL = (*EVALUATED, "optimizer.lr=1e-30")
PLATEAU = (*STILL, "train.scheduler=reduce_lr_on_plateau")

CASES = [
    Case("train.epochs", ("train.epochs=2",), steps_of("loss"), ("train.max_steps=null", "train.epochs=1")),
    Case("train.max_steps", ("train.max_steps=4",), steps_of("loss")),
    Case("train.micro_batch_size", ("train.micro_batch_size=3",), losses),
    Case("train.grad_accumulation", ("train.grad_accumulation=2",), losses),
    Case("train.shuffle", ("train.shuffle=false",), losses),
    Case("train.scheduler", ("train.scheduler=linear",), lrs),
    Case("train.warmup", ("train.warmup=3",), lrs),
    Case("train.min_lr_ratio", ("train.min_lr_ratio=0.5",), lrs),
    Case("train.num_cycles", ("train.num_cycles=3",), lrs, ("train.scheduler=cosine_with_restarts",)),
    Case("train.power", ("train.power=2",), lrs, ("train.scheduler=polynomial",)),
    Case("train.decay", ("train.decay=4",), lrs, ("train.scheduler=wsd",)),
    Case("train.decay_shape", ("train.decay_shape=sqrt",), lrs, ("train.scheduler=wsd", "train.decay=4")),
    Case("train.plateau_patience", ("train.plateau_patience=0",), lrs, PLATEAU),
    Case("train.plateau_factor", ("train.plateau_factor=0.1",), lrs, (*PLATEAU, "train.plateau_patience=0")),
    Case("train.on_bad_loss", ("train.on_bad_loss=skip",), lambda done: done.code, ("optimizer.lr=1e20",)),
    Case(
        "train.max_loss_spike",
        ("train.max_loss_spike=1.01",),
        lambda done: done.code,
        ("train.max_steps=20", "optimizer.lr=1e-6"),
    ),
    Case("train.early_stopping_patience", ("train.early_stopping_patience=1",), steps_of("loss"), STILL),
    Case(
        "train.early_stopping_threshold",
        ("train.early_stopping_threshold=10",),
        steps_of("loss"),
        (*EVALUATED, "train.early_stopping_patience=1"),
    ),
    Case("train.keep_best", ("train.keep_best=true",), checkpoints, EVALUATED),
    Case("train.max_grad_norm", ("train.max_grad_norm=0.01",), losses, ("optimizer.eps=1e-2",)),
    Case("train.precision", ("train.precision=bf16",), losses),
    Case("train.gradient_checkpointing", ("train.gradient_checkpointing=true",), fact("checkpointing"), PROBED),
    Case("train.neftune", ("train.neftune=15",), losses),
    Case("train.log_every", ("train.log_every=2",), steps_of("loss")),
    Case("train.eval_every", ("train.eval_every=2",), steps_of("eval_loss")),
    Case("train.save_every", ("train.save_every=2",), checkpoints),
    Case("train.keep_checkpoints", ("train.keep_checkpoints=1",), checkpoints, ("train.save_every=2",)),
    Case("train.stall_minutes", ("train.stall_minutes=0.0005",), lambda done: done.code),
    Case("train.profile_steps", ("train.profile_steps=2",), lambda done: (done.folder / "profile").exists()),
    Case("data.path", ("data.path=thinking.jsonl",), losses),
    Case("data.rows", ("data.rows=20",), report("rows")),
    Case(
        "data.sources",
        ("data.sources=[{path:demo:identity,rows:20}]",),
        report("rows"),
        ("data.path=null", "data.rows=null"),
    ),
    Case("data.format", ("data.format=prompt_completion",), report("tokens"), ("data.path=both.jsonl",)),
    Case("data.max_length", ("data.max_length=40",), report("truncated")),
    Case("data.too_long", ("data.too_long=drop",), report("too_long"), ("data.max_length=64",)),
    Case("data.cut", ("data.cut=end",), losses, ("data.path=long.jsonl", "data.max_length=24")),
    Case("data.columns", ("data.columns={messages: other}",), report("tokens"), ("data.path=long.jsonl",)),
    Case("data.system", ("data.system=Be brief.",), report("tokens")),
    Case(
        "data.control_tokens_in_text",
        ("data.control_tokens_in_text=true",),
        report("tokens"),
        ("data.path=special.jsonl",),
    ),
    Case(
        "data.history_reasoning",
        ("data.history_reasoning=true",),
        report("tokens"),
        ("data.path=turns.jsonl", "data.train_on=last"),
    ),
    Case("data.mix", ("data.mix=interleave",), report("rows"), TWO),
    Case("data.mix_until", ("data.mix_until=last",), report("rows"), (*TWO, "data.mix=interleave")),
    Case("data.dataset_info", ("data.dataset_info=info",), lambda done: done.code, ("data.path=mine",)),
    Case("data.split", ("data.split=other",), report("rows"), ("data.path=a",)),
    Case(
        "data.eval_sets", ("data.eval_sets={more: held_out.jsonl}",), lambda done: done.metrics[0].get("eval_more_loss")
    ),
    Case(
        "data.max_bad_share",
        ("data.max_bad_share=0.2",),
        lambda done: done.code,
        ("data.path=some_bad.jsonl", "data.on_bad_row=skip"),
    ),
    Case("data.streaming", ("data.streaming=true",), report("streamed_from"), ("data.eval_path=held_out.jsonl",)),
    Case("data.shuffle_buffer", ("data.shuffle_buffer=2",), losses, STREAM),
    Case("train.micro_batch_tokens", ("train.micro_batch_tokens=1200",), losses),
    Case(
        "train.group_by_length",
        ("train.group_by_length=true",),
        losses,
        ("data.path=lengths.jsonl", "train.micro_batch_size=2"),
    ),
    Case("train.padding_free", ("train.padding_free=true",), fact("shape"), PROBED),
    Case("data.packing", ("data.packing=best_fit",), report("packed_into")),
    Case("data.train_on", ("data.train_on=all",), report("tokens_learned")),
    Case(
        "data.train_roles",
        ("data.train_roles=[user]",),
        report("tokens_learned"),
        ("data.train_on=roles", "data.train_roles=[assistant]"),
    ),
    Case("data.reasoning", ("data.reasoning=strip",), report("tokens"), ("data.path=thinking.jsonl",)),
    Case("data.eval_path", ("data.eval_path=held_out.jsonl",), evaluated),
    Case("data.eval_size", ("data.eval_size=4",), report("rows")),
    Case(
        "data.on_bad_row",
        ("data.on_bad_row=skip", "data.max_bad_share=0.2"),
        lambda done: done.code,
        ("data.path=some_bad.jsonl",),
    ),
    Case("model.path", ("model.path=other",), losses),
    Case("model.dtype", ("model.dtype=bfloat16",), losses),
    Case("model.attention", ("model.attention=eager",), fact("attention"), PROBED),
    Case("template.chat_template", ("template=alpaca",), losses),
    Case("template.stop", ("template.stop=['a']",), replies, ("optimizer.lr=1e-6",)),
    Case("hardware.device", ("hardware.device=cuda",), lambda done: done.code),
    Case("hardware.num_processes", ("hardware.num_processes=2",), report_of_tokens),
    Case("hardware.num_threads", ("hardware.num_threads=2",), fact("threads"), PROBED),
    Case("hardware.data_workers", ("hardware.data_workers=1",), fact("workers"), PROBED),
    Case("hardware.checkpoint", ("hardware.checkpoint=sharded",), files_saved, SHARDED),
]

ELSEWHERE = {
    "model.size": "tests of the families",
    "model.sizes": "written by presets",
    "model.revision": "tests of locating",
    "model.source": "tests of locating",
    "model.trust_remote_code": "needs a model with code of its own",
    "data.subset": "tests of the hub",
    "data.processes": "tests of the store",
    "data.media_folder": "tests of media",
    "data.media_urls": "tests of media",
    **{
        f"hardware.{name}": "tests of processes and sharding"
        for name in (
            "num_nodes",
            "sharding",
            "wrap",
            "wrap_min_parameters",
            "reshard_after_forward",
            "offload_weights",
            "offload_optimizer",
            "nvme_path",
            "accelerate_config",
            "cpus",
        )
    },
    **{f"hardware.{name}": "tests of clusters" for name in ("memory_gb", "minutes")},
    **{
        f"template.{f.name}": "tests of templates"
        for f in dataclasses.fields(Template)
        if f.name not in ("chat_template", "stop")
    },
}


def test_every_key_has_a_case():
    schemas = {"train": Train, "data": Data, "model": Model, "template": Template, "hardware": Hardware}
    keys = {f"{group}.{f.name}" for group, schema in schemas.items() for f in dataclasses.fields(schema)}
    assert keys == {case.key for case in CASES} | set(ELSEWHERE)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_a_key_does_something(case, ftrun, write):
    for name, content in FILES.items():
        write(name, content)
    if case.key == "model.path":
        ftrun("model=tiny", "adapter=full", "train.max_steps=2", "optimizer.lr=1e-1", "output_dir=other").sees(0)
    without = ftrun(*BASE, *case.base)
    with_it = ftrun(*BASE, *case.base, *case.words)
    assert (without.code, with_it.code) == (0, 0) or case.look(without) in (0, 1, 2)
    assert case.look(with_it) != case.look(without)
