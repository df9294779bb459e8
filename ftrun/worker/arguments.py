"""The arguments that transformers' and TRL's trainers take, from a run's config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainingArguments

from ftrun import record
from ftrun.errors import ConfigError, Problem
from ftrun.train import Precision
from ftrun.worker import sharding

if TYPE_CHECKING:
    from ftrun.worker.training import Run


def arguments(run: Run, model: nn.Module | None = None) -> dict[str, Any]:
    """Return the arguments that every trainer of transformers and TRL takes.

    Logging, evaluating and saving are decided by `ftrun.worker.conduct`, and the learning rate by
    `ftrun.worker.schedule`, so transformers' own rules are off.

    Raises:
        ConfigError: The device cannot compute in the wanted type.
    """
    train, hardware = run.cfg.train, run.cfg.hardware
    sharding.open_group(hardware)
    return {
        "output_dir": str(run.folder / record.CHECKPOINTS),
        "run_name": run.name,
        "seed": run.cfg.seed,
        "learning_rate": run.cfg.optimizer.lr,
        "max_steps": run.total_steps,
        "per_device_train_batch_size": train.micro_batch_size,
        "per_device_eval_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.grad_accumulation,
        "max_grad_norm": train.max_grad_norm,
        **_precision(run, model),
        **_checkpointing(train.gradient_checkpointing),
        "neftune_noise_alpha": train.neftune or None,
        "dataloader_num_workers": hardware.data_workers,
        "dataloader_pin_memory": hardware.device.torch_name == "cuda",
        "use_cpu": hardware.device.torch_name == "cpu",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,  # it would log the last good loss in place of a NaN
        "disable_tqdm": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": run.cfg.optimizer.skips_weights,
        "deepspeed": sharding.deepspeed_config(run.cfg) if hardware.sharding.uses_deepspeed else None,
        "ignore_data_skip": run.cfg.data.streaming,  # a stream goes on by itself where it was
    }


def _precision(run: Run, model: nn.Module | None) -> dict[str, bool]:
    """Return the arguments for autocast, which is off where all weights are stored in the type already: pure bf16."""
    precision = run.cfg.train.precision
    if precision is Precision.fp16 and run.cfg.hardware.device.torch_name == "cpu":
        message = "fp16 needs a GPU: on a CPU, accelerate would compute in float32 without a word"
        raise ConfigError([Problem("train.precision", message, "train.precision=bf16, or fp32")])
    weights = [] if model is None else [one.dtype for one in model.parameters() if one.is_floating_point()]
    pure = bool(weights) and all(dtype is torch.bfloat16 for dtype in weights)
    return {"bf16": precision is Precision.bf16 and not pure, "fp16": precision is Precision.fp16}


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Return the arguments for recomputing activations, under the name that this transformers knows them by."""
    if not wanted:
        return {}
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
