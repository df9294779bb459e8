"""What a run's outcome depends on besides its config: versions, machine, git state."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from typing import Any

import ftrun
from ftrun import hardware, model

PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "hydra-core",
    "omegaconf", "huggingface-hub", "numpy", "deepspeed", "bitsandbytes", "flash-attn",
)  # fmt: skip


def facts() -> dict[str, Any]:
    """Return versions, hardware and git state, as the manifest holds them."""
    found = hardware.find()
    return {
        "versions": versions(),
        "machine": {
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "accelerators": list(found.names),
        },
        "git": git_state(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter, of those installed."""
    known = {}
    for package in PACKAGES:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            continue
    return known


def git_state() -> dict[str, Any] | None:
    """Return the commit of the working folder and whether anything differs from it."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode or changed.returncode:
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(changed.stdout.strip())}


def torch_build() -> str:
    """Return what torch was built for, read from its files: importing it would take seconds."""
    try:
        text = (distribution("torch").locate_file("torch/version.py")).read_text()
    except (PackageNotFoundError, OSError):
        return "not installed"
    for name in ("cuda", "hip", "xpu"):
        if match := re.search(rf"^{name}\b[^=]*= '([^']+)'", text, re.MULTILINE):
            return f"{name} {match[1]}"
    return "cpu"


def report() -> list[tuple[str, str]]:
    """Return what a bug report needs, as rows of a table."""
    known = facts()
    machine = known["machine"]
    rows = [("ftrun", ftrun.__version__), ("python", machine["python"]), ("platform", machine["platform"])]
    rows += [*known["versions"].items(), ("torch built for", torch_build()), ("CPUs", str(machine["cpus"]))]
    rows += [("accelerators", ", ".join(machine["accelerators"]) or "none"), ("cache", str(model.cache_folder()))]
    variables = (
        "HF_HOME",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "SLURM_JOB_ID",
        "FTRUN_CACHE",
    )
    return rows + [(f"${name}", os.environ[name]) for name in variables if name in os.environ]
