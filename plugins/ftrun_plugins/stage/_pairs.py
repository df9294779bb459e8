"""What the stages that train on pairs of a better and a worse reply have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ftrun.data import MESSAGES, ROWS
from ftrun.plugin import Stage

_OF_PAIRS = (
    "rewards_accuracies", "rewards_margins", "rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected",
    "nll_chosen",
)  # fmt: skip


@dataclass(kw_only=True)
class PairStage(Stage):
    """Trains on pairs."""

    default_data: ClassVar[str] = "demo:preferences"
    default_lr: ClassVar[float] = 1e-6
    rows: ClassVar[str] = "pairs"
    reads: ClassVar[tuple[str, ...]] = ("model.*", "template.*", "train.*", *ROWS, *MESSAGES)
    metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "loss", *(f"eval_{name}" for name in _OF_PAIRS), *_OF_PAIRS)
