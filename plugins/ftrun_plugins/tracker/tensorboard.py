"""TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ftrun import record
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
    """Where the event files go: below the run's folder, or, of an absolute path, into a folder of the run's own."""

    def callbacks(self, model: nn.Module, run: Run) -> Sequence[TrainerCallback]:
        """Return transformers' callback with a writer of our own folder."""
        if not run.is_main:
            return []
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        from ftrun_plugins.tracker._reporter import reporter, starting, unique_name

        folder = Path(self.folder).expanduser()
        folder = folder / unique_name(run) if folder.is_absolute() else run.folder / folder
        checkpoint = record.latest_checkpoint(run.folder)
        # What was logged after the checkpoint is about to be logged again, so TensorBoard is told to drop it.
        again_from = record.step_of(checkpoint) + 1 if checkpoint else 0
        with starting(self, "tracker.tensorboard.folder=FOLDER that can be written to"):
            writer = SummaryWriter(log_dir=str(folder), purge_step=again_from)
        return [reporter(self, TensorBoardCallback(writer))]
