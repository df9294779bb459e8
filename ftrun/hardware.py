"""What a run is computed on: the ``hardware`` group, and finding out what this machine has.

Nothing here imports torch: accelerators are found by what their drivers leave on the machine, and the worker, which has
torch, refuses to start where torch does not agree.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.model import Dtype
from ftrun.train import Precision, Train


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


@dataclass(kw_only=True)
class Hardware:
    """What a run is computed on."""

    device: Device = Device.auto
    """Kind of accelerator. Default: the first that this machine has of cuda, rocm, npu, xpu, mps, cpu."""

    num_processes: int | None = ranged(None, ge=1)
    """Processes that train together, each on a device of its own. Default: one for each accelerator, one on CPU."""

    num_threads: int | None = ranged(None, ge=1)
    """CPU threads of each process. Default: $OMP_NUM_THREADS, or the CPUs this process may use, shared evenly."""

    data_workers: int = ranged(0, ge=0)
    """Processes that prepare batches ahead, for each training process; 0 prepares them in between."""

    def check(self, train: Train) -> Iterator[Problem]:
        """Yield what the device cannot do."""
        if self.device is Device.cpu and train.precision is Precision.fp16:
            yield Problem(
                "train.precision", "fp16 needs a GPU: CPUs have no loss scaling", "train.precision=bf16, or fp32"
            )
        if self.device is Device.mps and (self.num_processes or 1) > 1:
            yield Problem("hardware.num_processes", "an Apple GPU takes one process", "hardware.num_processes=1")


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
    """
    found = find(hardware.device)
    hardware.device = found.device
    hardware.num_processes = hardware.num_processes or max(1, len(found.names))
    hardware.num_threads = hardware.num_threads or default_threads(hardware.num_processes)
    if train.precision is Precision.auto:
        on_gpu = Precision.bf16 if found.bf16 else Precision.fp16
        elsewhere = Precision.bf16 if stored is Dtype.bfloat16 else Precision.fp32
        train.precision = elsewhere if found.device in (Device.cpu, Device.mps) else on_gpu


def default_threads(num_processes: int) -> int:
    """Return the CPU threads each process gets where nothing is said."""
    if (set_by_user := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        return max(1, int(set_by_user))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // num_processes)


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
        visible = _visible("HIP_VISIBLE_DEVICES", len(nodes))
        yield Found(Device.rocm, ("AMD GPU",) * visible, bf16=True)
    if npus := list(Path("/dev").glob("davinci[0-9]*")):
        yield Found(Device.npu, ("Ascend NPU",) * _visible("ASCEND_RT_VISIBLE_DEVICES", len(npus)), bf16=True)
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
    return [(name.strip(), capability.strip()) for name, _, capability in lines][
        : _visible("CUDA_VISIBLE_DEVICES", len(lines))
    ]


def _visible(variable: str, count: int) -> int:
    """Return how many of ``count`` devices an environment variable leaves visible."""
    value = os.environ.get(variable)
    if value is None:
        return count
    return min(count, len([part for part in value.split(",") if part.strip() not in ("", "-1")]))
