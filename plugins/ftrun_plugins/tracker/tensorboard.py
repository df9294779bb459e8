"""TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.plugin import Tracker, register

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class TensorBoard(Tracker):
    """Event files that ``tensorboard --logdir outputs`` shows (https://www.tensorflow.org/tensorboard)."""

    requires: ClassVar[tuple[str, ...]] = ("tensorboard",)
    name: str = "tensorboard"

    folder: str = "tensorboard"
    """Where the event files go; a relative path is below the run's folder."""

    def callbacks(self, model: nn.Module, run: Run) -> Sequence[TrainerCallback]:
        """Return transformers' callback with a writer of our own folder."""
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        return [TensorBoardCallback(SummaryWriter(log_dir=str(run.folder / self.folder)))] if run.is_main else []
