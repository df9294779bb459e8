"""How fast stages train, and in how much memory, beside a bare loop and, where it is installed, LLaMA-Factory.

    python bench/stages.py --rows alpaca.json --pairs dpo.json --peer PEER/bin/python     # all of it, about an hour
    python bench/stages.py --rows alpaca.json --only sft                                  # or dpo

``alpaca.json`` holds rows with instruction, input and output, ``dpo.json`` ShareGPT conversations with chosen and
rejected. The model is a random Llama of 26 million parameters with a vocabulary of 8,192, whose tokenizer is trained on
the rows; micro batch 4, length 512, float32 on the CPU, every run in a process of its own, in turn. Real tokens are
those that are not padding. The first step is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import ENV, alternate
from rich.console import Console
from rich.table import Table

console = Console(width=140)
STEPS = 8
PAIRS = 32
"""Pairs that are trained on, each of which the reference is asked about once."""

# What is measured of any trainer of transformers, whoever has made it, in its own process.
WATCH = """
import json, re, resource, sys, threading, time, types
import transformers

begun, tokens, seen, marks = [], [], [0], {}

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

def watch():
    while True:
        seen[0] = max(seen[0], anonymous())
        time.sleep(0.005)

step = transformers.Trainer.training_step
def training_step(self, model, inputs, *args, **kwargs):
    begun.append(cpu())
    mask = next((inputs[n] for n in ("token_mask", "attention_mask") if n in inputs and inputs[n].ndim == 2), None)
    tokens.append(int(inputs["input_ids"].numel() if mask is None else (mask != 0).sum()))
    return step(self, model, inputs, *args, **kwargs)
transformers.Trainer.training_step = training_step

load = transformers.PreTrainedModel.from_pretrained.__func__
def from_pretrained(cls, *args, **kwargs):
    model = load(cls, *args, **kwargs)
    if "loaded" not in marks:
        marks["loaded"] = seen[0] = anonymous()
        threading.Thread(target=watch, daemon=True).start()
    return model
transformers.PreTrainedModel.from_pretrained = classmethod(from_pretrained)

def report():
    found = {"cpu": begun[-1] - begun[1], "steps": len(begun) - 2, "tokens": sum(tokens[1:-1])}
    print(json.dumps(found | {"MiB": (seen[0] - marks["loaded"]) / 1024}))
"""

OURS = (
    WATCH
    + """
from ftrun import launch, record
from ftrun.config import Config
words = sys.argv[1:]
cfg = Config.load(launch.freeze(launch.check(words), words) / record.RUN)
cfg.stage.run(cfg)
report()
"""
)

PEER = (
    WATCH
    + """
from llamafactory.train.tuner import run_exp
run_exp(args=json.loads(sys.argv[1]))
report()
"""
)

BARE = (
    WATCH
    + """
import torch
from ftrun import launch, record
from ftrun.config import Config
from ftrun.worker import dataset, loading
from ftrun.worker.batches import collator, model_inputs, num_tokens
from ftrun.worker.training import Run
words = sys.argv[1:]
cfg = Config.load(launch.freeze(launch.check(words), words) / record.RUN)
tokenizer = loading.tokenizer(cfg)
run = Run(cfg, dataset.load(cfg, tokenizer), tokenizer)
model = cfg.adapter.apply(loading.model(cfg, tokenizer), run).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.optimizer.lr)
collate = collator(cfg, run.pad_id)
for indices in list(run.epoch_batches)[: cfg.train.max_steps]:
    batch = collate([run.rows.train[index] for index in indices])
    begun.append(cpu())
    tokens.append(num_tokens(batch))
    model(**model_inputs(batch), labels=batch["labels"], use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
report()
"""
)


def make_model(folder: Path, rows: Path) -> None:
    """Write a random Llama, and a tokenizer trained on the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([rows.read_text()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


class Bench:
    """Runs of the same model and rows, by different programs."""

    def __init__(self, folder: Path, rows: Path, pairs: Path, peer: str | None, runs: int) -> None:
        self.folder, self.rows, self.pairs, self.peer, self.runs = folder, rows, pairs, peer, runs
        self._numbers = itertools.count()
        make_model(folder / "model", rows)
        info = {
            "rows": {"file_name": str(rows)},
            "pairs": {
                "file_name": str(pairs), "ranking": True, "formatting": "sharegpt",
                "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
            },
        }  # fmt: skip
        (folder / "dataset_info.json").write_text(json.dumps(info))

    def ours(self, stage: str, *words: str, script: str = OURS) -> dict[str, float]:
        """Train with ftrun."""
        rows, words = (self.pairs, (*words, f"data.rows={PAIRS}")) if stage == "dpo" else (self.rows, words)
        common = [
            f"stage={stage}", f"model.path={self.folder / 'model'}", f"data.path={rows}", "template=qwen",
            "data.max_length=512", "hardware=cpu", f"train.max_steps={STEPS}", "train.micro_batch_size=4",
            "train.scheduler=constant", "train.log_every=100", "train.save_every=0", "optimizer.lr=1e-5", "seed=1",
            f"output_dir={self.folder / f'ours{next(self._numbers)}'}",
        ]  # fmt: skip
        return self._run(sys.executable, script, [*common, *words])

    def theirs(self, stage: str, adapter: str, **more: Any) -> dict[str, float]:
        """Train with LLaMA-Factory."""
        config = {
            "stage": stage, "model_name_or_path": str(self.folder / "model"), "dataset_dir": str(self.folder),
            "dataset": "pairs" if stage == "dpo" else "rows", "template": "qwen", "cutoff_len": 512, "do_train": True,
            "finetuning_type": adapter, "lora_rank": 16, "lora_alpha": 32, "lora_target": "all",
            "per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-5, "use_cpu": True, "bf16": False,
            "lr_scheduler_type": "constant", "logging_steps": 100, "save_strategy": "no", "report_to": "none",
            "optim": "adamw_torch", "overwrite_output_dir": True, "overwrite_cache": True, "seed": 1,
            "output_dir": str(self.folder / f"theirs{next(self._numbers)}"),
            **({"max_samples": PAIRS} if stage == "dpo" else {}), **more,
        }  # fmt: skip
        assert self.peer
        return self._run(self.peer, PEER, [json.dumps(config)])

    def _run(self, python: str, script: str, words: list[str]) -> dict[str, float]:
        done = subprocess.run([python, "-c", script, *words], cwd=self.folder, env=ENV, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"cpu"')]
        assert lines, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return json.loads(lines[-1])

    def measured(self, ways: dict[str, Any], value: str) -> dict[str, dict[str, float]]:
        """Return each way's medians of the named amount per CPU second, and of MiB."""
        kept: dict[str, list[float]] = {name: [] for name in ways}

        def measure(name: str) -> float:
            found = ways[name]()
            kept[name].append(found["MiB"])
            return found[value] / found["cpu"]

        speeds = alternate({name: (lambda name=name: measure(name)) for name in ways}, self.runs)
        return {
            name: {"speed": statistics.median(speeds[name]), "MiB": statistics.median(kept[name][1:])} for name in ways
        }


def sft(bench: Bench, adapter: str) -> None:
    """Print real tokens per CPU second of supervised fine-tuning."""
    words = [f"adapter={adapter}", "stage.num_samples=0"]
    packed = [*words, "data.packing=best_fit"]
    ways: dict[str, Any] = {
        "a bare loop, on ftrun's packed batches": lambda: bench.ours("sft", *packed, script=BARE),
        "ftrun": lambda: bench.ours("sft", *words),
        "ftrun, train.padding_free=true": lambda: bench.ours("sft", *words, "train.padding_free=true"),
        "ftrun, data.packing=best_fit": lambda: bench.ours("sft", *packed),
    }
    if bench.peer:
        ways["LLaMA-Factory"] = lambda: bench.theirs("sft", adapter, disable_gradient_checkpointing=True)
        ways["LLaMA-Factory, packing"] = lambda: bench.theirs(
            "sft", adapter, packing=True, disable_gradient_checkpointing=True
        )
    found = bench.measured(ways, "tokens")
    _print(f"sft, adapter={adapter}: real tokens per CPU second", found)


def dpo(bench: Bench, adapter: str) -> None:
    """Print pairs per CPU second of preference training, and how much memory it takes."""
    ways: dict[str, Any] = {
        "ftrun": lambda: bench.ours("dpo", f"adapter={adapter}"),
        "ftrun, train.padding_free=true": lambda: bench.ours("dpo", f"adapter={adapter}", "train.padding_free=true"),
        "ftrun, stage.reference=copy": lambda: bench.ours("dpo", f"adapter={adapter}", "stage.reference=copy"),
    }
    if bench.peer:
        ways["LLaMA-Factory"] = lambda: bench.theirs("dpo", adapter, disable_gradient_checkpointing=True)
    found = bench.measured(ways, "steps")
    for each in found.values():
        each["speed"] *= 4
    _print(f"dpo, adapter={adapter}: pairs per CPU second", found)


def _print(title: str, found: dict[str, dict[str, float]]) -> None:
    table = Table("", "", "times the last", "MiB beyond the loaded model", title=title)
    last = list(found.values())[-1]["speed"]
    for name, each in found.items():
        table.add_row(name, f"{each['speed']:.2f}", f"{each['speed'] / last:.2f}", f"{each['MiB']:.0f}")
    console.print(table)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--peer", help="the Python of an environment that has llamafactory 0.9.5")
    parser.add_argument("--only", choices=["sft", "dpo"])
    parser.add_argument("--adapter", choices=["full", "lora"])
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    console.print(f"python {' '.join(sys.argv)}")
    with tempfile.TemporaryDirectory() as folder:
        pairs = (asked.pairs or asked.rows).resolve()
        bench = Bench(Path(folder), asked.rows.resolve(), pairs, asked.peer, asked.runs)
        for adapter in [asked.adapter] if asked.adapter else ["full", "lora"]:
            if asked.only != "dpo":
                sft(bench, adapter)
            if asked.only != "sft" and asked.pairs:
                dpo(bench, adapter)


if __name__ == "__main__":
    main()
