"""What a run is computed on: the ``hardware`` group, and finding out what this machine has.

Nothing here imports torch: accelerators are found by what their drivers leave on the machine, and the worker, which has
torch, refuses to start where torch does not agree.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from ftrun import plugin
from ftrun.errors import ConfigError, Problem
from ftrun.fields import out_of_range, ranged
from ftrun.model import Dtype
from ftrun.train import BadLoss, Precision, Train

if TYPE_CHECKING:
    from ftrun.config import Config


class Device(StrEnum):
    """A kind of accelerator."""

    auto = "auto"
    cuda = "cuda"
    rocm = "rocm"
    npu = "npu"
    xpu = "xpu"
    mps = "mps"
    cpu = "cpu"

    @property
    def torch_name(self) -> str:
        """What torch calls it: ROCm answers to ``cuda``."""
        return "cuda" if self is Device.rocm else self.value

    @property
    def is_one(self) -> bool:
        """Whether a machine has one at most, which all processes share."""
        return self in (Device.cpu, Device.mps)


VISIBLE = {
    Device.cuda: "CUDA_VISIBLE_DEVICES",
    Device.rocm: "HIP_VISIBLE_DEVICES",
    Device.npu: "ASCEND_RT_VISIBLE_DEVICES",
    Device.xpu: "ZE_AFFINITY_MASK",
}
"""By which environment variable a process is shown some of the machine's devices only."""


class Sharding(StrEnum):
    """What of the training the processes share out, instead of each holding all of it."""

    none = "none"
    """Nothing: each process holds everything, and gradients are averaged (DDP)."""

    fsdp2 = "fsdp2"
    """Weights, gradients and the optimizer's state, by torch."""

    zero1 = "zero1"
    """The optimizer's state, by DeepSpeed."""

    zero2 = "zero2"
    """The optimizer's state and gradients, by DeepSpeed."""

    zero3 = "zero3"
    """Weights, gradients and the optimizer's state, by DeepSpeed."""

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed does it."""
        return self.value.startswith("zero")

    @property
    def cuts_weights(self) -> bool:
        """Whether no process holds the whole model: what one computes with it, all must."""
        return self in (Sharding.fsdp2, Sharding.zero3)


class Wrap(StrEnum):
    """What is gathered at one time of weights that are cut up."""

    layer = "layer"
    """A layer of the model, as its architecture names them."""

    size = "size"
    """The smallest modules that have ``hardware.wrap_min_parameters``."""


class Offload(StrEnum):
    """Where something waits that the device does not compute with at the moment."""

    none = "none"
    """On the device."""

    cpu = "cpu"
    """In the memory of the machine."""

    nvme = "nvme"
    """On a disk."""


class CheckpointForm(StrEnum):
    """How a checkpoint of weights that are cut up is written."""

    whole = "whole"
    """By the first process, in the files of a run that is not sharded."""

    sharded = "sharded"
    """Each process its own shards."""


@dataclass(kw_only=True)
class Hardware:
    """What a run is computed on."""

    device: Device = Device.auto
    """Kind of accelerator. Default: the first that this machine has of cuda, rocm, npu, xpu, mps, cpu."""

    num_nodes: int = ranged(1, ge=1)
    """Machines that train together, each with ``num_processes`` processes."""

    num_processes: int | None = ranged(None, ge=1)
    """Processes of each machine that train together, each on a device of its own. Default: one for each accelerator,
    one on CPU."""

    num_threads: int | None = ranged(None, ge=1)
    """CPU threads of each process. Default: $OMP_NUM_THREADS, or the CPUs this process may use, shared evenly."""

    data_workers: int = ranged(0, ge=0)
    """Processes that prepare batches ahead, for each training process; 0 prepares them in between."""

    sharding: Sharding = Sharding.none
    """What the processes share out instead of each holding all of it: nothing (DDP), by torch weights, gradients and
    the optimizer's state (fsdp2), or by DeepSpeed the optimizer's state (zero1), gradients too (zero2), weights too
    (zero3)."""

    wrap: Wrap = Wrap.layer
    """What fsdp2 gathers at one time: a layer of the model, or each module of ``wrap_min_parameters``."""

    wrap_min_parameters: int = ranged(100_000_000, ge=1)
    """Parameters from which on a module is gathered by itself, with ``wrap=size``."""

    reshard_after_forward: bool = True
    """Let go of a layer's gathered weights after the forward pass and gather them again for the backward pass; false
    keeps them, for more memory and less traffic (fsdp2)."""

    offload_weights: Offload = Offload.none
    """Where weights wait while they are not computed with: on the device, in the machine's memory (fsdp2, whose
    gradients and optimizer's state go with them, and zero3), on a disk (zero3)."""

    offload_optimizer: Offload = Offload.none
    """Where the optimizer's state is and its step is taken, with DeepSpeed: a disk only with zero3."""

    nvme_path: str | None = None
    """Folder on a local disk that ``nvme`` means."""

    checkpoint: CheckpointForm = CheckpointForm.whole
    """How fsdp2 writes a checkpoint: whole, in the files of a run that is not sharded, through the first process; or
    sharded, each process its own part. A run goes on from both with any number of processes. What it ends with is
    always whole."""

    accelerate_config: str | None = None
    """A YAML file of ``accelerate config``, of which every key is taken over into those here, or refused."""

    cpus: int | None = ranged(None, ge=1)
    """CPUs of each machine that the run gets; a cluster is asked for them. Default: those that this process may use."""

    memory_gb: float | None = ranged(None, gt=0)
    """Memory of each machine that a cluster is asked for, in GiB. Default: the cluster's."""

    minutes: int | None = ranged(None, ge=1)
    """Time that a cluster is asked for, in minutes. Default: the cluster's."""

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.num_nodes * (self.num_processes or 1)

    @property
    def accelerators(self) -> int:
        """Accelerators of each machine that a run takes."""
        return 0 if self.device.is_one else self.num_processes or 1

    @property
    def busy_cpus(self) -> int:
        """CPUs of each machine that a run keeps busy, or is to get."""
        return self.cpus or (self.num_processes or 1) * ((self.num_threads or 1) + self.data_workers)

    @property
    def in_a_group(self) -> bool:
        """Whether its processes find each other: several, or one whose weights wait elsewhere by FSDP2 or ZeRO."""
        return self.world_size > 1 or self.sharding is not Sharding.none

    def check(self, train: Train) -> Iterator[Problem]:
        """Yield what cannot be, after taking over what a file of accelerate says."""
        if self.accelerate_config is not None:
            from ftrun import accelerate

            yield from accelerate.take_over(self, train)
            yield from out_of_range(self, "hardware.")
        yield from self._unread()
        yield from self._offloads()
        yield from self._with_deepspeed(train)
        yield from self.check_device(train, settled=False)

    def _unread(self) -> Iterator[Problem]:
        """Yield the keys that are off their defaults and that the chosen sharding does not read."""
        for key in fields(self):
            readers = _READ_BY.get(key.name)
            if readers and self.sharding not in readers and getattr(self, key.name) != key.default:
                message = f"hardware.sharding={self.sharding} does not read it, so it would change nothing"
                yield Problem(f"hardware.{key.name}", message, f"hardware.sharding={' or '.join(readers)}")
        if self.wrap is not Wrap.size and self.wrap_min_parameters != Hardware().wrap_min_parameters:
            message = f"hardware.wrap={self.wrap} does not read it, so it would change nothing"
            yield Problem("hardware.wrap_min_parameters", message, "hardware.wrap=size")

    def _offloads(self) -> Iterator[Problem]:
        offloads = (self.offload_weights, self.offload_optimizer)
        if Offload.nvme in offloads and self.nvme_path is None:
            yield Problem("hardware.nvme_path", "nvme needs a folder to write to", "hardware.nvme_path=FOLDER")
        if Offload.nvme not in offloads and self.nvme_path is not None:
            yield Problem("hardware.nvme_path", "nothing is offloaded to a disk", "hardware.offload_optimizer=nvme")
        if self.sharding is Sharding.fsdp2 and self.offload_weights is Offload.nvme:
            message = "FSDP2 moves weights to the memory of the machine, and no further"
            yield Problem("hardware.offload_weights", message, "cpu, or hardware.sharding=zero3")
        if self.sharding in (Sharding.zero1, Sharding.zero2) and self.offload_optimizer is Offload.nvme:
            message = f"DeepSpeed writes the optimizer's state to a disk with zero3 only, not with {self.sharding}"
            yield Problem("hardware.offload_optimizer", message, "cpu, or hardware.sharding=zero3")

    def _with_deepspeed(self, train: Train) -> Iterator[Problem]:
        """Yield what DeepSpeed cannot do, which takes the step itself, within the backward pass."""
        if not self.sharding.uses_deepspeed:
            return
        if not plugin.is_installed("deepspeed"):
            message = f"{self.sharding} needs the package deepspeed, which is not installed"
            yield Problem("hardware.sharding", message, "pip install deepspeed, or hardware.sharding=fsdp2")
        wanted = {"on_bad_loss": train.on_bad_loss is BadLoss.skip, "max_loss_spike": train.max_loss_spike is not None}
        for key in (key for key, is_set in wanted.items() if is_set):
            message = "DeepSpeed takes a step within the backward pass, before it can be known whether it is a bad one"
            yield Problem(f"train.{key}", message, f"leave train.{key} out, or hardware.sharding=fsdp2")

    def check_device(self, train: Train, *, settled: bool) -> Iterator[Problem]:
        """Yield what the device, or the number of processes, cannot do.

        Args:
            train: The loop.
            settled: Whether all is known that was left to the machine.
        """
        if self.device is Device.cpu and train.precision is Precision.fp16:
            yield Problem(
                "train.precision", "fp16 needs a GPU: CPUs have no loss scaling", "train.precision=bf16, or fp32"
            )
        if self.device is Device.mps and self.world_size > 1:
            yield Problem("hardware.num_processes", "an Apple GPU takes one process", "hardware.num_processes=1")
        if self.device is Device.cpu and self.sharding.uses_deepspeed:
            message = "accelerate leaves DeepSpeed out on a CPU without a word, and nothing would be sharded"
            yield Problem("hardware.sharding", message, "hardware.sharding=fsdp2")
        if self.device is Device.cpu and self.sharding is Sharding.fsdp2 and self.offload_weights is Offload.cpu:
            message = "on a CPU the weights are in the memory of the machine already"
            yield Problem("hardware.offload_weights", message, "hardware.offload_weights=none")
        offloads = (self.offload_weights, self.offload_optimizer) != (Offload.none, Offload.none)
        known = settled or self.num_processes is not None
        if self.sharding is not Sharding.none and known and self.world_size == 1 and not offloads:
            message = f"with {self.sharding} processes share out the training, and one has nobody to share it with"
            fix = "hardware.num_processes=2, or more, or hardware.sharding=none"
            yield Problem("hardware.num_processes", message, fix)

    def check_with(self, cfg: Config) -> Iterator[Problem]:
        """Yield what the chosen options cannot do where the training is shared out."""
        chosen = cfg.optimizer
        if self.sharding.uses_deepspeed and not chosen.elementwise:
            message = f"optimizer={chosen.name} needs the model's own weights, and ZeRO gives it pieces of flat copies"
            yield Problem("optimizer", message, f"optimizer=adamw, or another hardware.sharding than {self.sharding}")
        if self.sharding is Sharding.fsdp2 and not chosen.takes_shards:
            message = f"optimizer={chosen.name} looks at whole weights, and FSDP2 gives it shards of them"
            yield Problem("optimizer", message, "optimizer=adamw, or hardware.sharding=none")
        if self.sharding.cuts_weights and not cfg.stage.takes_shards:
            message = f"stage={cfg.stage.name} looks at whole weights while it trains, and {self.sharding} cuts them up"
            yield Problem("stage", message, "hardware.sharding=none")


_ZERO = (Sharding.zero1, Sharding.zero2, Sharding.zero3)

_READ_BY: dict[str, tuple[Sharding, ...]] = {
    "wrap": (Sharding.fsdp2,),
    "wrap_min_parameters": (Sharding.fsdp2,),
    "reshard_after_forward": (Sharding.fsdp2,),
    "checkpoint": (Sharding.fsdp2,),
    "offload_weights": (Sharding.fsdp2, Sharding.zero3),
    "offload_optimizer": _ZERO,
}
"""The shardings that read a key, for keys that not all of them do."""


@dataclass(frozen=True)
class Found:
    """The accelerators of this machine."""

    device: Device
    names: tuple[str, ...] = ()
    bf16: bool = False


def settle(hardware: Hardware, train: Train, stored: Dtype = Dtype.auto) -> None:
    """Replace every ``auto`` by what this machine has, in place, so that run.yaml says what was used.

    Args:
        hardware: The group.
        train: Says what is computed in.
        stored: The type that the model's weights are to have.

    Raises:
        ConfigError: What was left to this machine turns out not to go together.
    """
    hardware.accelerate_config = None  # it has been taken over
    found = find(hardware.device)
    hardware.device = found.device
    hardware.num_processes = hardware.num_processes or max(1, len(found.names))
    hardware.num_threads = hardware.num_threads or default_threads(hardware.num_processes, hardware.cpus)
    if train.precision is Precision.auto:
        on_gpu = Precision.bf16 if found.bf16 else Precision.fp16
        elsewhere = Precision.bf16 if stored is Dtype.bfloat16 else Precision.fp32
        train.precision = elsewhere if found.device in (Device.cpu, Device.mps) else on_gpu
    if problems := list(hardware.check_device(train, settled=True)):
        raise ConfigError(problems)


LIMITS = ("memory_gb", "minutes")
"""What a cluster is asked for, and nothing else looks at."""


def unread_limits(hardware: Hardware, read: Sequence[str] = ()) -> Iterator[Problem]:
    """Yield the limits that nobody would look at where a run is to be started."""
    for name in LIMITS:
        if name not in read and getattr(hardware, name) is not None:
            message = "is a limit for a cluster to keep, and nothing here would keep it"
            yield Problem(f"hardware.{name}", message, "hydra/launcher=slurm, or leave it out")


def default_threads(num_processes: int, cpus: int | None = None) -> int:
    """Return the CPU threads each process gets where nothing is said, of those that a run has or this process may use.

    Example:
        ``default_threads(2, cpus=8)`` is 4.
    """
    set_by_user = os.environ.get("OMP_NUM_THREADS", "")
    if cpus is None and set_by_user.isdigit():
        return max(1, int(set_by_user))
    return max(1, (cpus or usable_cpus()) // num_processes)


def usable_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find(wanted: Device = Device.auto) -> Found:
    """Return the accelerators of the wanted kind, or of the first kind that is there."""
    if wanted is Device.cpu:
        return Found(Device.cpu)
    for found in _accelerators():
        if wanted in (Device.auto, found.device):
            return found
    return Found(Device.cpu if wanted is Device.auto else wanted)


def _accelerators() -> Iterator[Found]:
    if names := _nvidia():
        capable = all(float(capability) >= 8 for _, capability in names)
        yield Found(Device.cuda, tuple(name for name, _ in names), bf16=capable)
    if Path("/dev/kfd").exists() and (nodes := list(Path("/dev/dri").glob("renderD*"))):
        visible = _visible(Device.rocm, len(nodes))
        yield Found(Device.rocm, ("AMD GPU",) * visible, bf16=True)
    if npus := list(Path("/dev").glob("davinci[0-9]*")):
        yield Found(Device.npu, ("Ascend NPU",) * _visible(Device.npu, len(npus)), bf16=True)
    if shutil.which("xpu-smi"):
        yield Found(Device.xpu, ("Intel GPU",), bf16=True)
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        yield Found(Device.mps, ("Apple GPU",))


def _nvidia() -> list[tuple[str, str]]:
    """Return name and compute capability of each visible NVIDIA GPU."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    lines = [line.rpartition(",") for line in done.stdout.strip().splitlines()] if done.returncode == 0 else []
    return [(name.strip(), capability.strip()) for name, _, capability in lines][: _visible(Device.cuda, len(lines))]


def _visible(device: Device, count: int) -> int:
    """Return how many of ``count`` devices an environment variable leaves visible."""
    value = os.environ.get(VISIBLE[device])
    if value is None:
        return count
    return min(count, len([part for part in value.split(",") if part.strip() not in ("", "-1")]))
