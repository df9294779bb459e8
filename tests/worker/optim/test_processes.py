"""Every optimizer in two processes: averaged gradients (DDP), and weights of which each holds a shard (FSDP2)."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ftrun import plugin
from ftrun.conformance import _small_model, _small_run

STEPS = 6

OPTIONS = [name for name in plugin.names("optimizer") if name not in ("lomo", "adalomo")]
"""All but those that refuse several processes."""

NEEDS = {
    "loraplus": ("adapter=lora",),
    "schedule_free": ("train.scheduler=constant", "train.warmup=0"),
    "torch": ("optimizer.cls=torch.optim.RAdam",),
    "hf": ("optimizer.optim=ademamix",),
}
"""What some need besides being chosen."""

SMALL = {"update_interval": 2, "rank": 4, "n_layers": 1}
"""Values of keys by which what projects or switches does so within the steps."""


def takes_shards(name: str) -> bool:
    return plugin.get("optimizer", name).takes_shards  # type: ignore[attr-defined]


def run_of(name: str, folder: Path) -> Any:
    keys = plugin.get("optimizer", name).__dataclass_fields__
    small = [f"optimizer.{key}={value}" for key, value in SMALL.items() if key in keys]
    words = ["model=tiny", "hardware=cpu", "adapter=full", "optimizer.lr=1e-3", f"optimizer={name}", *small]
    return _small_run(folder / name, [*words, *NEEDS.get(name, ())])


def trained(run: Any, parts: list[list[dict[str, torch.Tensor]]], kind: str) -> dict[str, torch.Tensor]:
    """Return the weights after a step for each part of the batches; the loss of one is the mean of its batches'."""
    model: Any = run.cfg.adapter.apply(_small_model(run), run).eval()
    if kind == "fsdp":
        for module in (*(one for one in model.modules() if isinstance(one, LlamaDecoderLayer)), model):
            fully_shard(module)
    optimizer = run.cfg.optimizer.build(model, run)
    skips = run.cfg.optimizer.skips_weights
    seen = DistributedDataParallel(model, find_unused_parameters=skips) if kind == "ddp" else model
    for part in parts:
        for batch in part:
            (seen(**batch).loss / len(part)).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return {name: weight.full_tensor() if isinstance(weight, DTensor) else weight for name, weight in weights.items()}


def parts_of(run: Any) -> list[list[dict[str, torch.Tensor]]]:
    batches = run.batches(2 * STEPS)
    return [batches[2 * number : 2 * number + 2] for number in range(STEPS)]


def one_of_two(rank: int, port: int, runs: dict[str, Any], folder: Path) -> None:
    """Train with every optimizer on this process's half of each part, and write what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, run in runs.items():
        mine = [part[rank : rank + 1] for part in parts_of(run)]
        for kind in ("ddp", "fsdp") if takes_shards(name) else ("ddp",):
            try:
                found: Any = trained(run, mine, kind)
            except Exception:
                found = traceback.format_exc()
            torch.save(found, folder / f"{name}-{kind}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[Any]]:
    """What two processes came to, by option and kind; they train with all options one after another."""
    folder = tmp_path_factory.mktemp("two")
    runs = {name: run_of(name, folder) for name in OPTIONS}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=one_of_two, args=(rank, port, runs, folder)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
        process.kill()
    return lambda name, kind: [torch.load(folder / f"{name}-{kind}-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in OPTIONS for kind in ("ddp", "fsdp") if kind == "ddp" or takes_shards(name)],
)
def test_two_processes_come_to_what_one_comes_to(name, kind, of_two, tmp_path):
    run = run_of(name, tmp_path)
    alone = trained(run, parts_of(run), "alone")
    first, second = of_two(name, kind)
    assert not isinstance(first, str), first
    for key, weight in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], weight, rtol=1e-4, atol=1e-5)
