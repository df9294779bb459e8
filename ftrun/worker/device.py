"""The device that a process computes on, as torch sees it."""

from __future__ import annotations

import os
import resource

import torch

from ftrun.errors import ConfigError, Problem
from ftrun.hardware import Device, Hardware


def check(hardware: Hardware) -> None:
    """Refuse to start on other hardware than the config says.

    Raises:
        ConfigError: torch does not see the device, or the number of processes is another.
    """
    problems = []
    name = hardware.device.torch_name
    if name != "cpu" and not _available(name):
        built = f"torch {torch.__version__} does not see a {hardware.device} device"
        problems.append(Problem("hardware.device", built, "hardware=cpu, or a torch build for this device"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != hardware.num_processes:
        message = f"run.yaml says {hardware.num_processes} processes, and {world_size} were started"
        problems.append(
            Problem("hardware.num_processes", message, f"start {hardware.num_processes}, as `ftrun` does by itself")
        )
    if problems:
        raise ConfigError(problems)


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
