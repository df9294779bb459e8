"""What optimizers cost: the time of a step and of a search for a subspace, the state, the memory and loss of a run.

    python bench/optimizers.py --rows alpaca.json                  # all of it, eleven minutes on two cores
    python bench/optimizers.py step refresh --quick                # parts of it, here those that need no model
    python bench/optimizers.py memory --rows alpaca.json           # or state

``alpaca.json`` holds rows with instruction, input and output; ``--quick`` leaves out what needs SmolLM2-135M. Steps and
searches are timed in this process, in turn, by its CPU time at one thread; on a GPU, if there is one, by the clock
after it has finished. Runs are made by the command, two at a time, each of one thread. glibc keeps what is freed for
later, in which one would find no peak of anything; so that it gives memory back at once, all of them run with
``MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536``.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import ENV, alternate
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ftrun import launch, record
from ftrun.config import Config
from ftrun.worker import dataset, loading, parameters, weights
from ftrun.worker.optim import adam_mini, blocks
from ftrun.worker.optim.adamw import AdamW
from ftrun.worker.optim.ruled import Rule, Ruled
from ftrun.worker.optim.subspace import leading
from ftrun.worker.parameters import Role, Weight
from ftrun.worker.training import Run
from ftrun_plugins.optimizer._projected import Method
from ftrun_plugins.optimizer._scaled import Scaling
from ftrun_plugins.optimizer.apollo import Apollo
from ftrun_plugins.optimizer.fira import Fira
from ftrun_plugins.optimizer.galore import GaLore
from ftrun_plugins.optimizer.muon import Muon

console = Console(width=160)
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SHAPES = [(1024, 2816), (2816, 1024)] * 2
RANK, STEPS = 128, 200
LR = 1e-5
FUSED = "torch's AdamW, fused"
NO_RUN: Any = SimpleNamespace(cfg=SimpleNamespace(seed=0))
"""All that the rules ask of a run."""


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that something takes: of this process on a CPU, which no other work on it changes."""
    clock = time.perf_counter if GPU else time.process_time
    if GPU:
        torch.cuda.synchronize()
    begun = clock()
    work()
    if GPU:
        torch.cuda.synchronize()
    return clock() - begun


def gradient(rows: int, columns: int, seed: int) -> Tensor:
    """Return what has a falling spectrum, as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    left = torch.randn(rows, size, generator=generator) / torch.arange(1, size + 1)
    return (left @ torch.randn(size, columns, generator=generator) / size).to(DEVICE)


# ---------------------------------------------------------------------------------------------------------------- step


@dataclass
class Kind:
    """Something that takes steps with matrices of its own."""

    weights: list[nn.Parameter]
    take: Callable[[], Any]


def new_weights(shapes: Sequence[tuple[int, int]] = SHAPES) -> list[nn.Parameter]:
    """Return matrices to train."""
    return [nn.Parameter(0.02 * torch.randn(shape, device=DEVICE)) for shape in shapes]


def ours(rule: Rule, shapes: Sequence[tuple[int, int]] = SHAPES) -> Kind:
    """One of our rules, applied as in a run."""
    made = new_weights(shapes)
    return Kind(made, Ruled([group(made)], {"rule": rule}).step)


def group(made: Sequence[nn.Parameter]) -> dict[str, Any]:
    """Return a parameter group of all."""
    return {"params": made, "lr": LR, "weight_decay": 0.0, "rule": "rule", "name": "matrices"}


def theirs(cls: Any, shapes: Sequence[tuple[int, int]] = SHAPES, **settings: Any) -> Kind:
    """An optimizer of torch."""
    made = new_weights(shapes)
    return Kind(made, cls(made, lr=LR, **settings).step)


def in_turns() -> Kind:
    """BAdam, whose blocks here are the matrices, with turns as long as in a run."""
    made = new_weights()
    turns = blocks.one_after_another(len(made), start=0, stride=1)
    optimizer = blocks.InTurns([group(made)], {"rule": blocks.Mastered()}, [[one] for one in made], turns, lambda: 50)
    optimizer.begin()
    return Kind(made, optimizer.step)


def floor(rank: int, *, back: bool, passes: bool) -> Kind:
    """What no implementation can leave out: the products in their layouts, and torch's fused AdamW between them.

    Args:
        rank: Of the projection, from the smaller side.
        back: Whether there is a product back to the weight's shape, into the weight.
        passes: Count also one over the gradient for its norm, and one that adds it to the weight.
    """
    made, adam = new_weights(), AdamW()
    bases = [torch.linalg.qr(torch.randn(min(one.shape), rank, device=DEVICE))[0] for one in made]
    states = [adam.start(left_over(one, rank)) for one in made]

    @torch.no_grad()
    def take() -> None:
        for weight, basis, state in zip(made, bases, states, strict=True):
            grad, wide = weight.grad, weight.shape[0] <= weight.shape[1]
            assert grad is not None
            projected = basis.mT @ grad if wide else grad @ basis
            way = adam.direction(projected, state)
            if back:
                first, second = (basis, way) if wide else (way, basis.mT)
                (grad if passes else weight).addmm_(first, second, alpha=LR)
            if passes:
                torch.linalg.vector_norm(grad)
                weight.add_(grad, alpha=-LR)

    return Kind(made, take)


def left_over(weight: Tensor, rank: int) -> Tensor:
    """Return what has the projected shape."""
    rows, columns = weight.shape
    return weight.new_empty((rank, columns) if rows <= columns else (rows, rank))


def many_steps(kinds: dict[str, Kind], steps: int) -> dict[str, list[float]]:
    """Take steps of all kinds in turn, and return their times. The first, in which states are made, does not count."""
    grads: dict[tuple[int, torch.Size], Tensor] = {}
    for kind in kinds.values():
        for number, weight in enumerate(kind.weights):
            grads.setdefault((number, weight.shape), gradient(weight.shape[0], weight.shape[1], seed=number))
    noise = {shape: 0.1 * grad.std() * torch.randn_like(grad) for (_, shape), grad in grads.items()}
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for step in range(steps + 1):
        for name, kind in kinds.items():
            for number, weight in enumerate(kind.weights):
                if weight.requires_grad:
                    weight.grad = torch.add(grads[number, weight.shape], noise[weight.shape], alpha=(-1) ** step)
            took = timed(kind.take)
            for weight in kind.weights:
                weight.grad = None
            if step:
                found[name].append(took)
    return found


def step(asked: argparse.Namespace) -> None:
    """Print the time of a step."""
    galore, fira, apollo = GaLore(rank=RANK), Fira(rank=RANK), Apollo(rank=RANK)
    mini = Apollo(rank=1, scaling=Scaling.tensor, scale=128.0)
    kinds = {
        "galore": ours(galore.rules(NO_RUN)["projected"]),
        "fira": ours(fira.rules(NO_RUN)["projected"]),
        "apollo": ours(apollo.rules(NO_RUN)["projected"]),
        "apollo_mini": ours(mini.rules(NO_RUN)["projected"]),
        "adam_mini": ours(adam_mini.AdamMini(blocks=adam_mini.ROW)),
        "badam": in_turns(),
        FUSED: theirs(torch.optim.AdamW, weight_decay=0.0, fused=True),
        "torch's AdamW": theirs(torch.optim.AdamW, weight_decay=0.0),
    }
    ranks = {"galore": (RANK, True), "fira": (RANK, True), "apollo": (RANK, False), "apollo_mini": (1, False)}
    for name, (rank, back) in ranks.items():
        for passes in (False, True) if name != "galore" else (False,):
            kinds[f"{name} floor {passes}"] = floor(rank, back=back, passes=passes)
    found = many_steps(kinds, asked.steps)
    mean = {name: statistics.mean(times) for name, times in found.items()}
    table = Table(
        "", "ms", "/ (products + fused AdamW)", "/ (those + norm + write)", "/ fused AdamW", "p95 / median",
        "longest / median", "wanted",
        title=f"{len(SHAPES)} matrices of 1024 x 2816 and 2816 x 1024, rank {RANK}, means over {asked.steps} steps",
    )  # fmt: skip
    for name in list(kinds)[:8]:
        floors = [mean.get(f"{name} floor {passes}") for passes in (False, True)]
        median = statistics.median(found[name])
        ordered = sorted(found[name])
        table.add_row(
            name,
            f"{1000 * mean[name]:.1f}",
            *[f"{mean[name] / one:.2f}" if one else "" for one in floors],
            f"{mean[name] / mean[FUSED]:.2f}",
            f"{ordered[int(0.95 * len(ordered))] / median:.2f}",
            f"{ordered[-1] / median:.2f}",
            _wanted_of_step(name),
        )
    console.print(table)
    muon()


def _wanted_of_step(name: str) -> str:
    if name not in ("galore", "fira", "apollo", "apollo_mini"):
        return ""
    if GPU:
        return "<= 1.2 times fused AdamW" if name in ("galore", "apollo") else ""
    return "<= 1.25 times the floor, p95 < 3"


def muon() -> None:
    """Print the time of Muon's step beside torch's, which takes one matrix after the other."""
    sets = {
        "28 matrices of 4 layers of SmolLM2-135M": [
            *[(576, 576)] * 8, *[(192, 576)] * 8, *[(1536, 576)] * 8, *[(576, 1536)] * 4,
        ],
        "1024 x 2816 and 2816 x 1024": SHAPES[:2],
    }  # fmt: skip
    table = Table("", "muon, ms", "torch.optim.Muon, ms", "torch's / ours", "wanted", title="a step of Muon")
    for name, shapes in sets.items():
        kinds = {"ours": ours(Muon().rules(NO_RUN)["muon"], shapes), "torch": theirs(torch.optim.Muon, shapes)}
        median = {kind: statistics.median(times) for kind, times in many_steps(kinds, 8).items()}
        cells = (
            f"{1000 * median['ours']:.0f}",
            f"{1000 * median['torch']:.0f}",
            f"{median['torch'] / median['ours']:.2f}",
        )
        table.add_row(name, *cells, ">= 1.5" if GPU else ">= 1")
    console.print(table)


# ------------------------------------------------------------------------------------------------------------- refresh


def refresh(asked: argparse.Namespace) -> None:
    """Print how long a search for a subspace takes, and how much of a model's gradients it finds."""
    table = Table("", "svd, ms", "randomized", "subspace", "wanted", title=f"a search, rank {RANK}, beside an SVD")
    for shape in [(1024, 2816), (2816, 1024), (576, 1536), (576, 576)]:
        median = {method: statistics.median(times) for method, times in alternate(searches(*shape), 3).items()}
        shares = [f"{median[method] / median[Method.svd]:.1%}" for method in (Method.randomized, Method.subspace)]
        table.add_row(f"{shape[0]} x {shape[1]}", f"{1000 * median[Method.svd]:.0f}", *shares, "<= 5 %")
    console.print(table)
    if not asked.quick:
        energy(asked)


def searches(rows: int, columns: int) -> dict[str, Callable[[], float]]:
    """Return what times the search by each method, on the smaller side."""
    matrix = gradient(rows, columns, seed=1)
    matrix = matrix if rows <= columns else matrix.mT
    last = leading(matrix, RANK, Method.svd)

    def search(method: Method) -> Callable[[], float]:
        return lambda: timed(lambda: leading(matrix, RANK, method, last))

    return {method: search(method) for method in Method}


WATCHED = ["layers.5.mlp.gate_proj", "layers.15.self_attn.q_proj", "layers.15.mlp.down_proj", "layers.25.mlp.up_proj"]


def energy(asked: argparse.Namespace) -> None:
    """Print how much of the energy that the exact subspace holds is in one that is searched for."""
    kept: dict[str, dict[Method, list[float]]] = {name: {} for name in WATCHED}
    last: dict[tuple[str, Method], Tensor] = {}
    for grads in gradients_of_model(asked, steps=3):
        for name, grad in grads.items():
            matrix = grad if grad.shape[0] <= grad.shape[1] else grad.mT
            found = {}
            for method in Method:
                basis = last[name, method] = leading(matrix, RANK, method, last.get((name, method)))
                found[method] = float((basis.mT @ matrix).square().sum())
            for method, held in found.items():
                kept[name].setdefault(method, []).append(held / found[Method.svd])
    title = f"energy of SmolLM2-135M's gradients in the subspace of rank {RANK}, of what the exact one holds: the least"
    table = Table("", "randomized", "subspace", "wanted", title=f"{title} of 3 steps")
    for name, of in kept.items():
        table.add_row(name, f"{min(of[Method.randomized]):.2%}", f"{min(of[Method.subspace]):.2%}", ">= 98 %")
    console.print(table)


def gradients_of_model(asked: argparse.Namespace, steps: int) -> list[dict[str, Tensor]]:
    """Return the gradients of a few matrices in the first steps of a run."""
    words = [*words_of_run(asked, max_length=256), f"output_dir={asked.folder / 'gradients'}"]
    cfg = Config.load(launch.freeze(launch.check(words), words) / record.RUN)
    tokenizer = loading.tokenizer(cfg)
    run = Run(cfg, dataset.load(cfg, tokenizer), tokenizer)
    model = cfg.adapter.apply(loading.model(cfg, tokenizer), run).train()
    optimizer = cfg.optimizer.build(model, run)
    found = []
    for batch in run.batches(steps):
        model(**batch, use_cache=False).loss.backward()
        grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        found.append({name: grads[f"model.{name}.weight"].clone() for name in WATCHED})
        optimizer.step()
        optimizer.zero_grad()
    return found


# --------------------------------------------------------------------------------------------------------------- state


def state(asked: argparse.Namespace) -> None:
    """Print the state of each optimizer as ``ftrun check`` counts it, and as the papers do."""
    model = outline(config(asked, "adamw"))
    listed = parameters.weights(model)
    table = Table(
        "optimizer", "of m x n, m <= n", "formula, MiB", "ftrun check, MiB", "off by", "wanted",
        title="state on SmolLM2-135M, adapter=full, float32",
    )  # fmt: skip
    for words, (text, formula) in formulas().items():
        cfg, output = config(asked, words), io.StringIO()
        weights.answer(cfg, output)
        groups = [json.loads(line) for line in output.getvalue().splitlines()]
        if any(one["state_bytes"] is None for one in groups):
            table.add_row(words, text, f"{formula(listed) / 2**20:.2f}", "unknown", "", "")
            continue
        counted, expected = sum(one["state_bytes"] for one in groups), formula(listed)
        off = f"{counted / expected - 1:+.2%}" if expected else f"{counted} bytes"
        table.add_row(words, text, f"{expected / 2**20:.2f}", f"{counted / 2**20:.2f}", off, "within 1 %")
    console.print(table)


def config(asked: argparse.Namespace, words: str) -> Config:
    """Return the config of a run with an optimizer."""
    typed = [*words_of_run(asked), *f"optimizer={words}".split()]
    cfg = launch.check([*typed, f"output_dir={asked.folder / 'outline'}"], to_run=False)
    launch.settle(cfg)
    return cfg


def outline(cfg: Config) -> nn.Module:
    """Return the model without its weights."""
    return cfg.adapter.outline(loading.outline(cfg), weights.Outline(cfg)).to("meta")


Formula = Callable[[Sequence[Weight]], float]


def formulas() -> dict[str, tuple[str, Formula]]:
    """Return for each optimizer how many bytes its paper says that it keeps, in words and computed."""

    def per_weight(matrix: Callable[[Tensor], float], other: Callable[[Tensor], float] | None = None) -> Formula:
        """Bytes of each hidden matrix, and of all else; by default AdamW's."""
        rest = other or (lambda weight: 8 * weight.numel())
        return lambda listed: sum((matrix if one.role is Role.matrix else rest)(one.parameter) for one in listed)

    def projected(of: Callable[[int, int], float], rank: int = RANK) -> Formula:
        """Bytes by the sides of matrices that are larger than the rank; AdamW's of all else."""
        return per_weight(lambda one: of(*sorted(one.shape)) if min(one.shape) > rank else 8 * one.numel())

    def means(one: Tensor) -> float:
        return 4 * sum(one.shape) if one.ndim == 2 else 4 * one.numel()

    def blocks_of(listed: Sequence[Weight]) -> float:
        heads = {"q_proj": 64, "k_proj": 64}
        size = 0
        for one in listed:
            rows = one.parameter.shape[0] // heads.get(one.name.split(".")[-2], 1)
            size += one.parameter.numel() + (rows if one.parameter.ndim == 2 else 1)
        return 4 * size

    def in_turn(listed: Sequence[Weight], *, others: bool, layers: int) -> float:
        """AdamW's of some of the layers, with what is outside of them or without."""
        inside = [one for one in listed if ".layers." in one.name]
        layer = 8 * sum(one.parameter.numel() for one in inside if ".layers.0." in one.name)
        outside = 8 * sum(one.parameter.numel() for one in listed if ".layers." not in one.name)
        return layers * layer + (outside if others else 0)

    def each(bytes_: float) -> Formula:
        return per_weight(lambda one: bytes_ * one.numel(), lambda one: bytes_ * one.numel())

    def eight_bit(moments: int) -> Formula:
        """A byte a number and a scale for 256 of them; small weights and embeddings keep 32 bits."""
        return lambda listed: sum(
            moments * one.parameter.numel() * (4 if one.role is not Role.matrix else 1 + 4 / 256) for one in listed
        )

    def vectors(listed: Sequence[Weight]) -> int:
        return sum(one.parameter.numel() for one in listed if one.parameter.ndim < 2)

    def embeddings(listed: Sequence[Weight]) -> float:
        return sum(8 * one.parameter.numel() for one in listed if one.role is Role.embedding)

    r = RANK
    return {
        "adamw": ("2mn", each(8)),
        "galore": ("rm + 2rn", projected(lambda m, n: 4 * (r * m + 2 * r * n))),
        "galore optimizer.inner=adamw8bit": (
            "rm + 2rn / 4", projected(lambda m, n: 4 * r * m + 2 * r * n * (1 + 4 / 256)),
        ),
        "fira": ("rm + 2rn + 1", projected(lambda m, n: 4 * (r * m + 2 * r * n + 1))),
        "apollo": ("2rn", projected(lambda _, n: 4 * 2 * r * n)),
        "apollo_mini": ("2n", projected(lambda _, n: 4 * 2 * n, rank=1)),
        "badam": ("2mn of the largest block", embeddings),
        "badam_ratio": ("2mn / 20", lambda listed: each(8 / 20)(listed) + 8 * 19 / 20 * vectors(listed)),
        "lisa": ("2mn of 2 layers and what is outside", lambda listed: in_turn(listed, others=True, layers=2)),
        "muon": ("mn", per_weight(lambda one: 4 * one.numel())),
        "adam_mini": ("mn + blocks", blocks_of),
        "adafactor": ("m + n", per_weight(means, means)),
        "lion": ("mn", each(4)),
        "sgd optimizer.momentum=0.9": ("mn", each(4)),
        "schedule_free": ("2mn", each(8)),
        "lomo": ("0", each(0)),
        "adalomo": ("m + n", per_weight(means, means)),
        "adamw_8bit": ("2mn bytes, embeddings 8mn", eight_bit(2)),
        "lion_8bit": ("mn bytes, embeddings 4mn", eight_bit(1)),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- memory

WATCH = '''"""The whole model, in a process that watches its memory and its steps from when the model is loaded."""

import atexit, json, re, resource, threading, time
from dataclasses import dataclass

from ftrun.plugin import register
from ftrun_plugins.adapter.full import Full

@register
@dataclass(kw_only=True)
class Watched(Full):
    """Train every weight, and be watched."""

    name: str = "watched"

    def apply(self, model, run):
        import torch, transformers

        gpu, begun, seen = torch.cuda.is_available(), [], [0]

        def anonymous():
            return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

        def watch():
            while True:
                seen[0] = max(seen[0], anonymous())
                time.sleep(0.005)

        step = transformers.Trainer.training_step
        def training_step(self, model, inputs, *args, **kwargs):
            begun.append(time.perf_counter() if gpu else time.process_time())
            return step(self, model, inputs, *args, **kwargs)
        transformers.Trainer.training_step = training_step

        def report():
            MiB = (seen[0] - loaded) / 1024
            if gpu:
                MiB = torch.cuda.max_memory_allocated() / 2**20 - sum(w.nbytes for w in model.parameters()) / 2**20
            found = {"MiB": MiB, "seconds": begun[-1] - begun[1], "loaded": loaded / 1024}
            (run.folder / "watched.json").write_text(json.dumps(found))

        model = super().apply(model, run)
        loaded = anonymous()
        threading.Thread(target=watch, daemon=True).start()
        atexit.register(report)
        return model
'''

RETURN_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LAYERWISE = " optimizer.layerwise=true"
RUNS = [
    "adamw", f"adamw{LAYERWISE}", "galore", f"galore{LAYERWISE}", f"apollo{LAYERWISE}", f"apollo_mini{LAYERWISE}",
    "badam optimizer.order=ascending optimizer.update_interval=2", "lisa", "muon", "adam_mini", "adamw_8bit", "lomo",
]  # fmt: skip
RUN_STEPS = 8


def words_of_run(asked: argparse.Namespace, max_length: int = 64) -> list[str]:
    """Return what all runs have in common."""
    return [
        "model=smollm2", f"data.path={asked.rows}", f"data.max_length={max_length}", "adapter=full", "seed=1",
        "train.micro_batch_size=4", f"train.max_steps={RUN_STEPS}", "train.gradient_checkpointing=true",
        f"train.log_every={RUN_STEPS // 2}", "train.save_every=0", "stage.num_samples=0", "train.warmup=0",
        "train.scheduler=constant", "train.precision=fp32", *([] if GPU else ["hardware=cpu"]),
    ]  # fmt: skip


def one_run(asked: argparse.Namespace, words: str) -> dict[str, float]:
    """Train by the command, and return what was seen and logged."""
    folder = asked.folder / "runs" / str(RUNS.index(words))
    command = [
        str(Path(sys.executable).with_name("ftrun")), *words_of_run(asked), f"plugins=[{asked.folder / 'watched.py'}]",
        *f"optimizer={words}".split(), "adapter=watched", f"output_dir={folder}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=asked.folder, env=ENV | RETURN_MEMORY, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    found = json.loads((folder / "watched.json").read_text())
    # From the second step to the beginning of the last.
    tokens = logged[-1]["tokens"] - logged[0]["tokens"]
    speed = tokens * (RUN_STEPS - 2) / (RUN_STEPS - 1) / found["seconds"]
    return {"MiB": found["MiB"], "loaded": found["loaded"], "speed": speed, "loss": logged[-1]["loss"]}


def expected(asked: argparse.Namespace, words: str) -> float:
    """Return the MiB of state and gradients that are in memory together by the formulas."""
    listed = parameters.weights(outline(config(asked, "adamw")))
    name = words.split()[0]
    kept = formulas()[name][1](listed)
    grads: dict[str, float] = {"badam": kept / 2, "lisa": kept / 2}
    largest = 4 * max(one.parameter.numel() for one in listed)
    layerwise = LAYERWISE in words or name == "lomo"
    whole = 4 * sum(one.parameter.numel() for one in listed)
    return (kept + (largest if layerwise else grads.get(name, whole))) / 2**20


def memory(asked: argparse.Namespace) -> None:
    """Print the memory, speed and loss of runs on the same rows."""
    (asked.folder / "watched.py").write_text(WATCH)
    with ThreadPoolExecutor(1 if GPU else 2) as pool:
        found = dict(zip(RUNS, pool.map(lambda words: one_run(asked, words), RUNS), strict=True))
    base, base_expected = found["adamw"]["MiB"], expected(asked, "adamw")
    table = Table(
        "optimizer=", "MiB beyond the model", "state + gradients, MiB", "saved, MiB", "expected",
        "tokens / s" if GPU else "tokens / CPU s",
        "loss of the last half",
        title=f"SmolLM2-135M, adapter=full, {RUN_STEPS} steps of 4 rows of at most 64 tokens, checkpointed activations",
    )  # fmt: skip
    for words, one in found.items():
        formula = expected(asked, words)
        table.add_row(
            words.replace(" optimizer.", " "),
            f"{one['MiB']:.0f}",
            f"{formula:.0f}",
            f"{base - one['MiB']:.0f}",
            f"{base_expected - formula:.0f}",
            f"{one['speed']:.0f}",
            f"{one['loss']:.3f}",
        )
    console.print(table)
    console.print(f"{found['adamw']['loaded']:.0f} MiB when the model is loaded")


PARTS = {"step": step, "refresh": refresh, "state": state, "memory": memory}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them by default")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--quick", action="store_true", help="nothing that needs SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=STEPS, help="of those that are timed")
    asked = parser.parse_args()
    parts = asked.parts or [*PARTS]
    if asked.quick:
        parts = [part for part in parts if part in ("step", "refresh")]
    elif asked.rows is None and set(parts) - {"step"}:
        parser.error("what trains SmolLM2-135M needs --rows; --quick leaves it out")
    asked.rows = asked.rows and asked.rows.resolve()
    console.print(f"python {' '.join(sys.argv)}")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        asked.folder = Path(folder)
        for part in parts:
            begun = time.monotonic()
            PARTS[part](asked)
            console.print(f"{part}: {time.monotonic() - begun:.0f} s\n")


if __name__ == "__main__":
    main()
