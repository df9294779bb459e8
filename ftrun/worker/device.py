"""The device that a process computes on, as torch sees it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import torch

from ftrun.errors import ConfigError, Problem
from ftrun.hardware import Device, Hardware, Offload, Sharding


def check(hardware: Hardware) -> None:
    """Refuse to start on other hardware than the config says.

    Raises:
        ConfigError: torch does not see the device, or the number of processes or the sharding is another.
    """
    problems = []
    name = hardware.device.torch_name
    if name != "cpu" and not _available(name):
        built = f"torch {torch.__version__} does not see a {hardware.device} device"
        problems.append(Problem("hardware.device", built, "hardware=cpu, or a torch build for this device"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != hardware.world_size:
        message = f"run.yaml says {hardware.world_size} processes, and {world_size} were started"
        problems.append(
            Problem("hardware.num_processes", message, f"start {hardware.world_size}, as `ftrun` does by itself")
        )
    problems += _told_otherwise(hardware)
    if problems:
        raise ConfigError(problems)


_TOLD = {
    "ACCELERATE_USE_FSDP": (Sharding.fsdp2,),
    "ACCELERATE_USE_DEEPSPEED": (Sharding.zero1, Sharding.zero2, Sharding.zero3),
    "ACCELERATE_USE_MEGATRON_LM": (),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (),
}
"""By which environment variable ``accelerate launch`` says that training is shared out, and what that may be here."""


def _told_otherwise(hardware: Hardware) -> Iterator[Problem]:
    """Yield where ``accelerate launch`` says something else of sharding than run.yaml, and take back where it agrees.

    FSDP is not left to accelerate, which would cut up the model a second time.
    """
    told = [name for name in _TOLD if os.environ.get(name, "").lower() in ("true", "1")]
    for name in told:
        if hardware.sharding not in _TOLD[name]:
            yield _says_otherwise(f"{name}=true", f"hardware.sharding={hardware.sharding}")
    said = {"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": str(hardware.reshard_after_forward)}
    said |= {"FSDP_OFFLOAD_PARAMS": str(hardware.offload_weights is Offload.cpu)}
    if hardware.sharding is Sharding.fsdp2 and "ACCELERATE_USE_FSDP" in told:
        for name, ours in said.items():
            if os.environ.get(name, ours).lower() != ours.lower():
                yield _says_otherwise(f"{name}={os.environ[name]}", f"{name}={ours.lower()}")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if hardware.sharding.uses_deepspeed and stage and f"zero{stage}" != hardware.sharding:
        yield _says_otherwise(f"ACCELERATE_DEEPSPEED_ZERO_STAGE={stage}", f"{hardware.sharding}")
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ.pop(name, None)


def _says_otherwise(launcher: str, ours: str) -> Problem:
    message = f"run.yaml says {ours}, and what started this process says {launcher}"
    return Problem("hardware.sharding", message, "the same in both, or torchrun, which says nothing of sharding")


def _available(name: str) -> bool:
    if name == "mps":
        return torch.backends.mps.is_available()
    module = getattr(torch, name, None)
    return bool(module and module.is_available())


def peak_memory_bytes(device: Device) -> int:
    """Return the most memory this process has used: allocated on its accelerator, or resident on CPU."""
    module = getattr(torch, device.torch_name, None)
    if device is not Device.cpu and module and hasattr(module, "max_memory_allocated"):
        return int(module.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
