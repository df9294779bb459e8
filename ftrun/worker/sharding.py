"""Training that the processes share out: FSDP2 by torch, ZeRO by DeepSpeed.

With FSDP2 each process holds a shard of every weight. Those of a layer are gathered for as long as it computes, and
gradients are averaged into shards (https://arxiv.org/abs/2304.11277). `fully_shard` is called here and not through
accelerate, which leaves FSDP out on a CPU without a word: so what runs on a CPU is what runs on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import empty as empty_shard
from transformers import PreTrainedModel

from ftrun.errors import ConfigError, Problem, RunFailed
from ftrun.hardware import Hardware, Offload, Sharding, Wrap
from ftrun.train import Precision, Train
from ftrun.worker import parameters
from ftrun.worker.optim.ruled import Ruled

if TYPE_CHECKING:
    from ftrun.config import Config

SHARDS = "shards"
"""Folder in a checkpoint that each process writes its shards to."""

_REST = "optimizer_rest.pt"
"""Beside it: what of the optimizer's state is no tensor."""


def open_group(hardware: Hardware) -> None:
    """Have processes talk about tensors in the machine's memory, too, where weights wait there."""
    device = hardware.device.torch_name
    if hardware.sharding is Sharding.fsdp2 and hardware.offload_weights is Offload.cpu and not dist.is_initialized():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(f"cpu:gloo,{device}:{dist.get_default_backend_for_device(device)}")


def shard(model: nn.Module, cfg: Config, device: torch.device) -> None:
    """Leave each process its shards of a model that all of them hold whole, in place.

    Embeddings, the last norm and the output head are gathered for the whole of a step: the loss is computed by the head
    itself, outside of its call.

    Raises:
        ConfigError: The model does not say what its layers are.
        RunFailed: Something of it is still whole.
    """
    plain, hardware = base_of(model), cfg.hardware
    _agree(model, device)
    mesh = init_device_mesh(device.type, (hardware.world_size,), mesh_dim_names=("shard",))
    how: dict[str, Any] = {"mesh": mesh, "mp_policy": _precision(cfg.train)}
    if hardware.offload_weights is Offload.cpu:
        how["offload_policy"] = CPUOffloadPolicy()
    for module in _units(plain, hardware):
        fully_shard(module, reshard_after_forward=hardware.reshard_after_forward, **how)
    fully_shard(plain, reshard_after_forward=False, **how)
    check(model)


def check(model: nn.Module) -> None:
    """Make sure that a model is cut up.

    Raises:
        RunFailed: A weight that trains is whole.
    """
    whole = [name for name, weight in parameters.trained(model) if not isinstance(weight, DTensor)]
    if whole:
        raise RunFailed(f"hardware.sharding=fsdp2 left weights whole, {whole[0]} for one")


def is_cut(model: nn.Module) -> bool:
    """Tell whether each process holds shards of a model."""
    return isinstance(base_of(model), FSDPModule)


def base_of(model: nn.Module) -> nn.Module:
    """Return the model that peft may have wrapped: what is called to generate."""
    return next((one for one in model.modules() if isinstance(one, PreTrainedModel)), model)


def _agree(model: nn.Module, device: torch.device) -> None:
    """Have every process start from the weights of the first: what is drawn or learned from rows may differ."""
    for tensor in [*(weight for _, weight in parameters.trained(model)), *model.buffers()]:
        there = tensor.data.to(device)
        dist.broadcast(there, src=0)
        tensor.data.copy_(there)


def _precision(train: Train) -> MixedPrecisionPolicy:
    """Return in which types weights are gathered and gradients averaged; the weights themselves stay as stored."""
    types = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
    if (computed := types.get(train.precision)) is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32)


def _units(plain: nn.Module, hardware: Hardware) -> list[nn.Module]:
    """Return the modules that are gathered one by one, those within others first.

    Raises:
        ConfigError: The model does not say what its layers are.
    """
    ends = [plain.get_input_embeddings(), plain.get_output_embeddings()] if isinstance(plain, PreTrainedModel) else []
    shared = {id(weight) for end in ends if end is not None for weight in end.parameters()}
    if hardware.wrap is Wrap.size:
        return _of_size(plain, hardware.wrap_min_parameters, shared)
    names = set(getattr(plain, "_no_split_modules", None) or ())
    found = [module for module in plain.modules() if type(module).__name__ in names and module is not plain]
    if not found:
        message = f"{type(plain).__name__} does not say which of its modules are layers"
        raise ConfigError([Problem("hardware.wrap", message, "hardware.wrap=size")])
    return list(reversed(found))


def _of_size(plain: nn.Module, fewest: int, left_out: set[int]) -> list[nn.Module]:
    """Return the smallest modules that have so many parameters, beside those of modules within them."""
    taken, found = set(left_out), []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            visit(child)
        own = {id(weight): weight.numel() for weight in module.parameters() if id(weight) not in taken}
        callable_ = type(module).forward is not nn.Module.forward
        if module is not plain and callable_ and own and sum(own.values()) >= fewest:
            found.append(module)
            taken.update(own)

    visit(plain)
    return found


def reshard(model: nn.Module) -> None:
    """Let go of what is gathered. Whoever looks at weights outside of a step must: they may be of the last one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


Wanted = Callable[[str, nn.Parameter], bool]
"""Says of which weights something is wanted."""


@contextlib.contextmanager
def whole(model: nn.Module, wanted: Wanted, *, here: bool) -> Iterator[None]:
    """While inside, have a cut model hold whole weights on the CPU, where that is asked for. All processes must enter.

    Args:
        model: What nobody may call meanwhile.
        wanted: Says of which weights.
        here: Whether this process gets them; the others only give.
    """
    reshard(model)
    asked = {id(weight) for name, weight in model.named_parameters() if wanted(name, weight)}
    gathered: dict[int, nn.Parameter] = {}
    cut: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) not in asked or not isinstance(weight, DTensor):
                continue
            if id(weight) not in gathered:
                full = cast(DTensor, weight.detach()).full_tensor()
                gathered[id(weight)] = nn.Parameter(full.cpu() if here else full[:0].clone(), weight.requires_grad)
            cut.append((module, name, weight))
    for module, name, weight in cut if here else []:
        module._parameters[name] = gathered[id(weight)]
    try:
        yield
    finally:
        for module, name, weight in cut if here else []:
            module._parameters[name] = weight


@contextlib.contextmanager
def taking_whole_weights(model: nn.Module) -> Iterator[None]:
    """While inside, have ``load_state_dict`` of a cut model take whole weights, of which each process cuts its own."""
    reshard(model)
    load = model.load_state_dict

    def load_cut(state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        weights = dict(model.named_parameters(remove_duplicate=False))
        cut = {name: isinstance(weights.get(name), DTensor) for name in state}
        return load(
            {name: _cut_like(value, weights[name]) if cut[name] else value for name, value in state.items()},
            *args,
            **kwargs,
        )

    cast(Any, model).load_state_dict = load_cut
    try:
        yield
    finally:
        del model.load_state_dict


@contextlib.contextmanager
def swapped(model: nn.Module, others: Mapping[str, Tensor]) -> Iterator[None]:
    """While inside, have a cut model compute with other weights, given whole by name. All processes must enter.

    What is gathered is so again afterwards: the backward pass of what went forward before may count on it.
    """
    gathered = [module for module in model.modules() if isinstance(module, FSDPModule) and _is_gathered(module)]
    reshard(model)
    weights: list[tuple[Any, Tensor]] = [
        (weight, others[name]) for name, weight in model.named_parameters() if name in others
    ]
    now = [weight.detach().to_local().clone() for weight, _ in weights]
    for weight, other in weights:
        weight.detach().to_local().copy_(_cut_like(other, weight).to_local())
    try:
        yield
    finally:
        reshard(model)
        for (weight, _), before in zip(weights, now, strict=True):
            weight.detach().to_local().copy_(before)
        for module in gathered:
            module.unshard()


def _is_gathered(module: nn.Module) -> bool:
    return any(not isinstance(weight, DTensor) for weight in module.parameters())


@contextlib.contextmanager
def whole_state(optimizer: torch.optim.Optimizer, *, here: bool) -> Iterator[None]:
    """While inside, have an optimizer hold its whole state on the CPU, where asked for. All processes must enter."""
    cut = []
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, DTensor):
                full = value.full_tensor()
                cut.append((state, name, value, full.cpu() if here else None))
    for state, name, _, full_value in cut:
        if here:
            state[name] = full_value
    try:
        yield
    finally:
        for state, name, value, _ in cut:
            state[name] = value


def load_whole_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state that was saved whole: of what is a shard like its weight's, this process's shard.

    Args:
        optimizer: Of a cut model.
        state: Its ``state_dict``, on the CPU.
    """
    for number, (weight, is_cut_alike) in enumerate(_weights(optimizer)):
        for name, value in state["state"].get(number, {}).items():
            if is_cut_alike and isinstance(value, Tensor) and value.shape == weight.shape:
                state["state"][number][name] = _cut_like(value, weight)
    optimizer.load_state_dict(state)


def _weights(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, bool]]:
    """Return an optimizer's weights in the order of their numbers, and whether each's state is cut as it is.

    Rules that are not elementwise keep a state of the whole weight in every process. Torch's own optimizers are.
    """
    found = []
    for group in optimizer.param_groups:
        elementwise = not isinstance(optimizer, Ruled) or optimizer.rules[group["rule"]].elementwise
        found += [(weight, elementwise and isinstance(weight, DTensor)) for weight in group["params"]]
    return found


def _cut_like(value: Tensor, weight: Any) -> DTensor:
    """Return this process's shard of a tensor that every process has whole."""
    place = weight.to_local().device
    return distribute_tensor(value.to(place), weight.device_mesh, weight.placements, src_data_rank=None)


def save_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, is_main: bool) -> None:
    """Write the weights that train and the optimizer's state, each process its own part."""
    reshard(model)
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {f"weight.{name}": weight.detach() for name, weight in parameters.trained(model)}
    rest: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
        rest[number] = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    save_tensors(tensors, storage_writer=FileSystemWriter(folder / SHARDS))
    if is_main:
        torch.save({"state": rest, "param_groups": state["param_groups"]}, folder / _REST)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load the weights that train from a checkpoint of shards, into a model that is cut or whole.

    Raises:
        RunFailed: The checkpoint holds others.
    """
    reshard(model)
    weights: dict[str, Tensor] = {f"weight.{name}": one.detach() for name, one in parameters.trained(model)}
    if lost := weights.keys() ^ {name for name in _saved(folder) if name.startswith("weight.")}:
        raise RunFailed(f"the checkpoint does not hold the weights of this model ({min(lost).partition('.')[2]}, ...)")
    _read(folder, weights)


def load_state(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load an optimizer's state from a checkpoint of shards, whether its weights are cut or whole."""
    state = torch.load(folder / _REST, weights_only=True)
    weights = _weights(optimizer)
    tensors: dict[str, Tensor] = {}
    for key, saved in _saved(folder).items():
        kind, _, rest = key.partition(".")
        if kind != "optimizer":
            continue
        weight, is_cut_alike = weights[int(rest.partition(".")[0])]
        size, dtype = saved.size, saved.properties.dtype
        if is_cut_alike and size == weight.shape:
            cut: Any = weight
            tensors[key] = empty_shard(size, dtype=dtype, device_mesh=cut.device_mesh, placements=cut.placements)
        else:
            tensors[key] = torch.empty(size, dtype=dtype)
    _read(folder, tensors)
    for key, tensor in tensors.items():
        _, number, name = key.split(".", 2)
        state["state"][int(number)][name] = tensor
    optimizer.load_state_dict(state)


def _saved(folder: Path) -> dict[str, Any]:
    metadata = FileSystemReader(folder / SHARDS).read_metadata()
    return dict(metadata.state_dict_metadata)


def _read(folder: Path, tensors: dict[str, Tensor]) -> None:
    reader = FileSystemReader(folder / SHARDS)
    load_tensors(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def deepspeed_config(cfg: Config) -> dict[str, Any]:
    """Return what DeepSpeed is told; ``auto`` is filled in by transformers from the trainer's own arguments."""
    hardware, train = cfg.hardware, cfg.train
    stage = int(hardware.sharding.value.removeprefix("zero"))
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    for key, where in (("offload_optimizer", hardware.offload_optimizer), ("offload_param", hardware.offload_weights)):
        if where is Offload.cpu:
            zero[key] = {"device": "cpu", "pin_memory": True}
        elif where is Offload.nvme:
            zero[key] = {"device": "nvme", "nvme_path": hardware.nvme_path}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.grad_accumulation,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": train.precision is Precision.bf16},
        "fp16": {"enabled": train.precision is Precision.fp16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # ours are not among those that DeepSpeed knows by name
        "zero_force_ds_cpu_optimizer": False,
    }


@contextlib.contextmanager
def gathered_by_deepspeed(model: nn.Module) -> Iterator[None]:
    """While inside, have the first process hold whole weights that ZeRO has cut up. All processes must enter."""
    deepspeed = importlib.import_module("deepspeed")
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


def divided(states: list[dict[str, Any]], rank: int, count: int) -> dict[str, Any]:
    """Return what one of ``count`` processes goes on with, of what others than so many have saved.

    Args:
        states: What each process had counted, as a checkpoint holds it.
        rank: Of this process.
        count: Processes that go on.

    Raises:
        ConfigError: What they had saved cannot be divided otherwise.
    """
    first = states[0]
    for what, is_there in (("where each process was in a stream", first["stream"]), ("replies", first["own"])):
        if is_there:
            message = f"the checkpoint is of {len(states)} processes and holds {what}, which {count} cannot go on with"
            raise ConfigError([Problem("hardware.num_processes", message, f"{len(states)} processes in all")])
    tokens = sum(state["tokens"] for state in states)
    sums: dict[str, list[float]] = {}
    for state in states:
        for name, (total, number) in state["sums"].items():
            before = sums.get(name, [0.0, 0.0])
            sums[name] = [before[0] + total, before[1] + number]
    loss = sum(state["loss_since_log"] for state in states) / len(states)  # the processes' mean is what is logged
    if rank:
        tokens, sums = 0, {name: [0.0, 0.0] for name in sums}
    return first | {"tokens": tokens, "sums": sums, "loss_since_log": loss}
