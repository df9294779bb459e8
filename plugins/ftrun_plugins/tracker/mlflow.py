"""MLflow."""

from __future__ import annotations

import os
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
class MLflow(Tracker):
    """MLflow (https://mlflow.org)."""

    requires: ClassVar[tuple[str, ...]] = ("mlflow",)
    name: str = "mlflow"

    experiment: str = "ftrun"
    """The experiment that the run appears in."""

    uri: str | None = None
    """The tracking server or database. Default: $MLFLOW_TRACKING_URI, else MLflow's own."""

    def callbacks(self, model: nn.Module, run: Run) -> Sequence[TrainerCallback]:
        """Return transformers' callback, which starts the MLflow run when training begins."""
        if not run.is_main:
            return []
        from transformers.integrations import MLflowCallback

        os.environ["MLFLOW_EXPERIMENT_NAME"] = self.experiment
        if self.uri:
            os.environ["MLFLOW_TRACKING_URI"] = self.uri
        return [MLflowCallback()]
