"""What a run will take, found without its weights: its step is rehearsed on tensors that have a shape and no content.

Every operation of the forward and the backward pass says what it allocates and how much it computes. So whatever the
architecture, the adapter, the types and checkpointing do to memory is counted, and not modelled. With ``probe``, two
steps are taken for real instead, on the longest rows there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as trees
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import TrainerCallback

from ftrun import record
from ftrun.anchor import Anchored, Reference
from ftrun.config import Config
from ftrun.data import Packing, sources
from ftrun.data.sources import Opened
from ftrun.errors import ConfigError, Problem
from ftrun.estimate import Estimate, Probed
from ftrun.hardware import Device, Offload, Sharding
from ftrun.model import Attention
from ftrun.plugin import ModelHead, Tracker
from ftrun.train import Precision
from ftrun.worker import batches, dataset, device, encode, loading, sampling, store, weights
from ftrun.worker.dataset import Rows, Selected
from ftrun.worker.encode import EncodedRow, RowEncoder
from ftrun.worker.head import Head, intercepted
from ftrun.worker.losses.tokens import nll
from ftrun.worker.optim.blocks import InTurns
from ftrun.worker.stored import META
from ftrun.worker.weights import Outline


def answer(cfg: Config, output: TextIO, folders: Sequence[str] = (), probe: bool = False) -> None:
    """Write an `Estimate` for each of some frozen configs, a line each, or what two real steps of one took.

    Args:
        cfg: The config to probe; else only its device counts, on which the speed is measured.
        output: Takes the lines.
        folders: Where the configs are.
        probe: Whether two steps are taken for real.
    """
    if probe:
        measured = _probed(cfg)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(dataclasses.asdict(measured)), file=output)
        return
    for folder in folders:
        theirs = Config.load(Path(folder) / record.RUN)
        theirs.output_dir = folder
        print(json.dumps(dataclasses.asdict(_estimated(theirs, cfg.hardware.device))), file=output)


def _estimated(cfg: Config, here: Device) -> Estimate:
    """Return what is known of a run beforehand.

    Args:
        cfg: Its config.
        here: What this process computes on: the run's own kind of device, or the CPU where this machine has none.

    Raises:
        ConfigError: The run would be refused for its rows, or for what trains.
    """
    found = Estimate(world_size=cfg.hardware.world_size)
    with _or_unknown(found, "rows"):
        _look_at_rows(found, cfg)
    with _or_unknown(found, "memory"):
        _look_at_model(found, cfg)
    if here is cfg.hardware.device:
        found.rate = _rate(cfg)
        found.memory_total, found.memory_free = _memory(here)
        found.sharers = cfg.hardware.num_processes or 1 if here is Device.cpu else 1
    return found


@contextlib.contextmanager
def _or_unknown(found: Estimate, what: str) -> Iterator[None]:
    """Note why something is not known, whatever stands in the way."""
    try:
        yield
    except ConfigError:
        raise  # the run would be refused for it
    except Exception as error:
        found.unknown[what] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


# ---------------------------------------------------------------------------------------------------------------- rows

_SMALL = 1_000_000
"""Bytes of a file up to which it is tokenised at once, where it has not been."""

_SAMPLE = 512
"""Rows of a larger file that are tokenised to see how long they are."""

_MOST_COUNTED = 200_000
"""Rows of a larger file beyond which no more are counted."""


def _look_at_rows(found: Estimate, cfg: Config) -> None:
    """Find out how many steps there are, and of how many tokens."""
    train, run = cfg.train, _Outline(cfg)
    found.rows, found.length, found.steps = train.micro_batch_size, cfg.data.max_length, train.max_steps
    if not cfg.stage.rows or cfg.data.streaming:
        found.how = "rows are read while training, each of data.max_length tokens at most"
    else:
        tokenizer = loading.tokenizer(cfg)
        resolved = sources.resolve(cfg.data, cfg.stage.rows)
        named = [*resolved.train, *(one for several in resolved.eval.values() for one in several)]
        if all(_is_at_hand(cfg, tokenizer, one) for one in named):
            rows = dataset.load(cfg, tokenizer)
            lengths, found.how, found.is_exact = np.asarray(rows.train.lengths), "the rows are tokenised", True
        else:
            lengths, found.how = _like_the_first(cfg, tokenizer, resolved.train)
        run.rows = Rows(_Lengths(lengths))
        found.length, found.steps = int(lengths.max()), run.total_steps
        found.rows = min(found.rows, len(lengths))
        each = run.tokens_in_a_batch(run.rows.train)
        found.tokens = int(each.sum() / run.epoch_batches.steps_per_epoch * found.steps)
    found.rows *= 2 if cfg.stage.rows == "pairs" else 1
    if train.micro_batch_tokens is not None:
        found.rows = max(1, train.micro_batch_tokens // found.length)


@dataclass
class _Lengths:
    """Rows of which nothing but their lengths is known."""

    lengths: Any


class _Outline(Outline):
    """A run that is looked at before it starts, with all of its processes."""

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.world_size = cfg.hardware.world_size


def _is_at_hand(cfg: Config, tokenizer: Any, opened: Opened) -> bool:
    """Tell whether a source is tokenised, or so quickly that it may as well be done now: the run then finds it."""
    size = sources.size(opened)
    if size is not None and size <= _SMALL:
        return True
    key = store._digest(store.material(cfg, tokenizer, opened))[:32]
    return (store.folder() / key / META).is_file()


def _like_the_first(cfg: Config, tokenizer: Any, opened: Sequence[Opened]) -> tuple[sampling.Array, str]:
    """Return the lengths that sequences will have if all rows are like the first ones, and say what was looked at."""
    encoder, data = RowEncoder(cfg, tokenizer), cfg.data
    lengths: list[int] = []
    read = counted = 0
    for one in opened:
        rows = iter(sources.read(one))
        first = list(islice(rows, _SAMPLE))
        items, origins, _ = encode.understood(((one, row) for row in first), cfg.stage.rows)
        kept = [row for row in encoder.encode(items, origins) if isinstance(row, EncodedRow)]
        lengths += [max(len(sequence.ids) for sequence in row.sequences) + row.grown for row in kept]
        read += len(first)
        counted += len(first) + sum(1 for _ in islice(rows, _MOST_COUNTED))
    if not lengths:
        raise ConfigError([Problem("data", f"of the first {read} rows none can be trained on", "ftrun preview")])
    held_out = data.eval_size if data.eval_size >= 1 else data.eval_size * counted
    sequences = max(1, round((counted - held_out) * len(lengths) / read))
    how = f"{counted:,} rows are counted, and the first {read:,} tokenised"
    if counted > _MOST_COUNTED:
        how = f"there are {counted:,} rows or more, and the first {read:,} are tokenised"
    if data.packing is not Packing.none:
        packed = max(1, round(sequences * float(np.mean(lengths)) / data.max_length))
        return np.full(packed, data.max_length), f"{how}; packed as if no room were left"
    return np.resize(np.asarray(lengths), sequences), how


# --------------------------------------------------------------------------------------------------------------- model


def _look_at_model(found: Estimate, cfg: Config) -> None:
    """Count the weights, what training keeps beside them, and what a step takes."""
    model, optimizer = weights.outlined(cfg)
    states = weights.states(optimizer)
    found.groups = weights.groups(optimizer, states)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    found.parameters, found.weights = _numbers(model.parameters()), _bytes(model.parameters())
    found.trained, trained_bytes = _numbers(trained), _bytes(trained)
    found.is_adapter = isinstance(model, PeftModel)
    found.saved = trained_bytes if found.is_adapter else found.weights
    active = optimizer.with_state() if isinstance(optimizer, InTurns) else trained
    found.gradients = _bytes(active)
    kept = [] if states is None else [one for state in states.values() for one in state.values()]
    tensors = [one for one in kept if isinstance(one, Tensor)]
    found.state = None if states is None else _bytes(tensors)
    found.checkpoint = found.saved + (found.state or 0)
    found.reference, other = _reference(cfg, trained_bytes)
    if cfg.quant.load_arguments():
        found.unknown["memory"] = f"quant={cfg.quant.name} stores weights in a way that is only known when it has"
        found.weights = None
        return
    if found.state is None:
        found.unknown["memory"] = f"optimizer={cfg.optimizer.name} takes no step without weights"
        return
    if cfg.stage.rows == "questions":
        found.unknown["memory"] = "replies are written while training, and nobody knows how long they will be"
        return
    step = _Rehearsal(model, cfg, found)
    step.hold(tensors, found.reference)
    step.prepare(
        trained, {id(weight) for weight in active}, layerwise=getattr(optimizer, "layerwise", None) is not None
    )
    step.do()
    found.activations, found.peak, found.flops = step.activations, max(step.peak, found.weights + other), step.flops
    _share_out(found, cfg, model)


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(one.numel() for one in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(one.nbytes for one in tensors)


def _reference(cfg: Config, trained_bytes: int) -> tuple[int, int]:
    """Return the bytes that a reference model takes while training, and those that it takes before."""
    stage: Any = cfg.stage
    kind = getattr(stage, "reference", None)
    is_plain = isinstance(stage, Anchored) and getattr(stage, "loss", None) == "nll"
    if kind is None or is_plain or getattr(stage, "loss", None) in ("dft", "eaft"):
        return 0, 0
    if kind is Reference.model:
        theirs = loading.outline(dataclasses.replace(cfg, model=stage.reference_model(cfg)))
        size = _bytes(theirs.parameters())
        # Of rows that are known beforehand it is asked beforehand, and then let go of.
        return (0, size) if stage.rows in ("pairs", "feedback") else (size, 0)
    if stage.rows in ("pairs", "feedback"):
        return (trained_bytes if kind is Reference.copy else 0), 0
    is_off = kind is Reference.adapter_off or (kind is Reference.auto and cfg.adapter.off_is_start)
    return (0 if is_off else trained_bytes), 0


class _Reached(Exception):
    """The model has come to its head."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _Rehearsal:
    """A training step of a model without weights, as one process takes it, on tensors that have no content.

    The tensors are said to be on a CPU whatever the device is, since that is where operations choose the attention
    that keeps no scores, as they do on a GPU.
    """

    def __init__(self, model: nn.Module, cfg: Config, found: Estimate) -> None:
        self.cfg, self.rows, self.length = cfg, found.rows, found.length
        self._scores = cfg.stage.head is ModelHead.score and hasattr(model, "score")
        self._mode, self._memory = FakeTensorMode(), _Memory()
        self._fake: dict[int, Tensor] = {}
        self._real: list[Tensor] = []  # kept, or the id of one would become another's
        if cfg.model.attention is Attention.eager:
            model.set_attn_implementation("eager")  # type: ignore[operator]
        if cfg.train.gradient_checkpointing:
            plain: Any = model
            name = "activation_checkpointing_enable"
            enable = getattr(plain, name, None) or plain.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.model = self._without_content(model.train())
        self._held: list[Tensor] = [*self.model.parameters(), *self.model.buffers()]
        self.activations = self.peak = 0
        self.flops = 0.0

    def _without_content(self, model: nn.Module) -> nn.Module:
        """Exchange every tensor of a model, in place; one that it has twice stays one."""
        for module in model.modules():
            for named in (module._parameters, module._buffers):
                for name, tensor in named.items():
                    if tensor is not None:
                        named[name] = self._faked(tensor)  # type: ignore[assignment]
        return model

    def _faked(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._fake:
            made = self._empty(tensor.shape, tensor.dtype)
            is_weight = isinstance(tensor, nn.Parameter)
            self._fake[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_weight else made
            self._real.append(tensor)
        return self._fake[id(tensor)]

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self._mode:
            return torch.empty(tuple(shape), dtype=dtype)

    def hold(self, tensors: Iterable[Tensor], size: int) -> None:
        """Have in memory what is like these tensors, and so many bytes more."""
        self._held += [self._empty(one.shape, one.dtype) for one in tensors]
        self._held.append(self._empty((size,), torch.uint8))

    def prepare(self, trained: Sequence[Tensor], active: set[int], *, layerwise: bool) -> None:
        """Have gradients where the run has them.

        Args:
            trained: The weights that train, of the model as it was given.
            active: The ids of those whose turn it is.
            layerwise: Whether each gradient is used up in the backward pass.
        """
        for weight in trained:
            self._fake[id(weight)].requires_grad_(id(weight) in active)
            if layerwise:
                self._fake[id(weight)].register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
        if self.cfg.hardware.world_size > 1 and self.cfg.hardware.sharding is Sharding.none:
            self.hold([weight for weight in trained if id(weight) in active], 0)  # what DDP sends

    def do(self) -> None:
        """Go forward and backward; twice, if gradients wait for further micro batches."""
        memory = self._memory
        with self._mode, memory:
            for tensor in self._held:
                memory.hold(tensor)
            for _ in range(min(2, self.cfg.train.grad_accumulation)):
                before, memory.flops = memory.now, 0
                with self._autocast():
                    loss = self._loss()
                self.activations = memory.now - before
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
        self.peak = memory.peak
        self.flops = memory.flops / (self.rows * self.length)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        kind = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}.get(self.cfg.train.precision)
        is_pure = all(one.dtype is torch.bfloat16 for one in self.model.parameters() if one.is_floating_point())
        if kind is None or (is_pure and kind is torch.bfloat16):
            return contextlib.nullcontext()
        return torch.autocast("cpu", kind)

    def _loss(self) -> Tensor:
        """Return the summed loss of a batch whose rows are all as long as the longest, and learned from end to end."""
        hidden = self._hidden()
        if self._scores:
            score: Any = getattr(self.model, "score")  # noqa: B009 (a module that only these models have)
            return score(hidden[:, -1].float()).sum()
        flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        targets = torch.zeros(len(flat), dtype=torch.int64)
        summed = self.cfg.stage.rows not in ("pairs", "feedback")
        (each,) = Head(self.model)._in_parts(flat, _cross_entropy, (targets,), summed)
        return each.sum()

    def _hidden(self) -> Tensor:
        """Return what the head is given."""
        flat = batches.is_flat(self.cfg)
        shape = (1, self.rows * self.length) if flat else (self.rows, self.length)
        inputs: dict[str, Any] = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
        if not self.cfg.model.attention.value.startswith("fl"):  # the others are given which tokens see which
            inputs["attention_mask"] = torch.ones((shape[0], 1, shape[1], shape[1]), dtype=torch.bool)
        if batches.shares_sequences(self.cfg):
            inputs["position_ids"] = torch.zeros(shape, dtype=torch.int64)
        plain: Any = self.model
        head = plain.score if self._scores else plain.get_output_embeddings()

        def stop(hidden: Tensor) -> Tensor:
            raise _Reached(hidden)

        try:
            with intercepted(head, stop):
                self.model(**inputs, use_cache=False)
        except _Reached as reached:
            return reached.hidden
        raise RuntimeError("the model does not call its head")


def _drop(weight: Tensor) -> None:
    weight.grad = None


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return (nll(logits, targets),)


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are alive, and what is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self._known: dict[int, int] = {}

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor until nothing holds its memory any more."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += self._known[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in trees.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        self.flops += _flops(func, args, kwargs or {}, out)
        return out


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    kind = func._overloadpacket
    if kind is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(one.shape for one in args[:3])))  # type: ignore[no-untyped-call]
    if kind is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(one.shape for one in args[:4])))  # type: ignore[no-untyped-call]
    return int(flop_registry[kind](*args, **kwargs, out_val=out)) if kind in flop_registry else 0


def _share_out(found: Estimate, cfg: Config, model: nn.Module) -> None:
    """Take off, in place, what other processes, or the machine's memory, hold of what one would; by formula."""
    hardware = cfg.hardware
    if hardware.sharding is Sharding.none:
        return
    assert None not in (found.weights, found.state, found.gradients, found.activations)
    share, layer = 1 / hardware.world_size, _largest_layer(model)
    whole, kept, grads = found.weights or 0, found.state or 0, found.gradients or 0
    shards_weights = hardware.sharding in (Sharding.fsdp2, Sharding.zero3)
    gathered = 0
    if shards_weights:
        gathered = 2 * layer if hardware.sharding is Sharding.zero3 or hardware.reshard_after_forward else whole
    waits = hardware.offload_weights is not Offload.none
    found.weights = 0 if waits else int(whole * share) if shards_weights else whole
    found.gradients = 0 if waits else grads if hardware.sharding is Sharding.zero1 else int(grads * share)
    found.state = 0 if waits or hardware.offload_optimizer is not Offload.none else int(kept * share)
    found.gathered = gathered
    base = found.weights + found.state + found.reference + gathered
    waiting = found.gradients if cfg.train.grad_accumulation > 1 else 0
    found.peak = base + max((found.activations or 0) + waiting, found.gradients)
    found.is_shared_out = True


def _largest_layer(model: nn.Module) -> int:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max((_bytes(layer.parameters()) for layers in lists for layer in layers), default=0)


# ---------------------------------------------------------------------------------------------------------- the device

_PRODUCT = 1024
"""Rows and columns of the matrices by which a CPU's speed is measured; of an accelerator's, eight times as many."""


def _rate(cfg: Config) -> float:
    """Return the floating-point operations a second of a product of matrices, as the run computes it."""
    name = cfg.hardware.device.torch_name
    size = _PRODUCT if name == "cpu" else 8 * _PRODUCT
    kind = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}.get(cfg.train.precision, torch.float32)
    torch.set_num_threads(cfg.hardware.num_threads or 1)
    matrix = torch.ones((size, size), dtype=kind, device=name)
    took = []
    for _ in range(4):
        begun = time.perf_counter()
        matrix @ matrix
        _wait_for(name)
        took.append(time.perf_counter() - begun)
    return 2 * size**3 / min(took)


def _wait_for(name: str) -> None:
    if name != "cpu":
        torch.accelerator.synchronize()


def _memory(kind: Device) -> tuple[int | None, int | None]:
    """Return how much memory a device has, and how much of that is free, in bytes."""
    if kind is Device.cpu:
        known = Path("/proc/meminfo")
        text = known.read_text() if known.exists() else ""
        sizes = [re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE) for name in ("MemTotal", "MemAvailable")]
        total, free = (int(size[1]) * 1024 if size else None for size in sizes)
        return total, free
    module = getattr(torch, kind.torch_name, None)
    if not hasattr(module, "mem_get_info"):
        return None, None
    free, total = module.mem_get_info()  # type: ignore[union-attr]
    return int(total), int(free)


# --------------------------------------------------------------------------------------------------------------- probe

_PROBE_STEPS = 2


def _probed(cfg: Config) -> Probed:
    """Take two steps of a run on its longest rows, and return what they took.

    Raises:
        ConfigError: The run cannot start.
    """
    from ftrun.worker import training  # noqa: F401 (so that what it imports counts as there before)

    watch = _Watch(cfg)
    load = dataset.load

    def longest(cfg: Config, tokenizer: Any) -> Rows:
        rows = load(cfg, tokenizer)
        return Rows(_longest_first(rows.train, cfg), content_key=rows.content_key, report=rows.report)

    dataset.load = longest
    cfg.tracker = {"probe": _Probe(watch)}
    try:
        cfg.stage.run(cfg)
    except _Measured:
        return watch.measured()
    raise RuntimeError(f"the run was over before it had taken {_PROBE_STEPS} steps")


def _longest_first(rows: Any, cfg: Config) -> Any:
    """Return as many of the longest rows as the steps take, the longest first; packed and streamed ones as they are."""
    if not isinstance(rows, Selected):
        return rows
    train = cfg.train
    wanted = _PROBE_STEPS * train.grad_accumulation * cfg.hardware.world_size * train.micro_batch_size
    if train.micro_batch_tokens is not None:
        wanted *= max(1, train.micro_batch_tokens // int(rows.lengths.max()))
    order = np.resize(np.argsort(-np.asarray(rows.lengths), kind="stable")[: wanted or None], wanted)
    return Selected(rows.stores, rows.which[order], rows.index[order])


class _Measured(Exception):
    """The steps have been taken."""


@dataclass
class _Probe(Tracker):
    """Puts what watches the steps into the loop, as trackers are."""

    def __init__(self, watch: _Watch) -> None:
        self.name, self._watch = "probe", watch

    def callbacks(self, model: nn.Module, run: Any) -> Sequence[TrainerCallback]:
        """Return it."""
        return [self._watch]


class _Watch(TrainerCallback):
    """Takes the time of each step and the most memory, and ends the loop after the last one."""

    def __init__(self, cfg: Config) -> None:
        self._device, self._name = cfg.hardware.device, cfg.hardware.device.torch_name
        self._begun, self._seconds = 0.0, 0.0
        self._before = self._most = _resident()
        if self._device is Device.cpu:
            threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self._most = max(self._most, _resident())
            time.sleep(0.002)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        _wait_for(self._name)
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note how long it was; the first one, in which much is made, does not count.

        Raises:
            _Measured: It was the last.
        """
        _wait_for(self._name)
        self._seconds = time.perf_counter() - self._begun
        if state.global_step >= _PROBE_STEPS:
            raise _Measured

    def measured(self) -> Probed:
        """Return what the last step took."""
        on_cpu = self._device is Device.cpu
        peak = self._most - self._before if on_cpu else device.peak_memory_bytes(self._device)
        return Probed(step_seconds=self._seconds, peak=peak)


def _resident() -> int:
    """Return the memory of this process in bytes."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmRSS:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) * 1024 if found else device.peak_memory_bytes(Device.cpu)
