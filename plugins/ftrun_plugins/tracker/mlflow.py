"""MLflow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

from ftrun.errors import Problem
from ftrun.plugin import Tracker, register
from ftrun.record import Status

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

    from ftrun.config import Config
    from ftrun.worker.training import Run

_TAG = "ftrun.id"
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "5",
}
"""A server that is gone is given up after 13 seconds, not four minutes, and five seconds' logs share one request: the
end of a run waits for every request that is queued."""

_STATES = {Status.completed: "FINISHED", Status.failed: "FAILED"}


@register
@dataclass(kw_only=True)
class MLflow(Tracker):
    """MLflow (https://mlflow.org)."""

    requires: ClassVar[tuple[str, ...]] = ("mlflow",)
    name: str = "mlflow"

    experiment: str = "ftrun"
    """The experiment that the run appears in."""

    uri: str | None = None
    """The tracking server (``http://HOST:5000``) or database (``sqlite:////FOLDER/mlflow.db``). Default:
    $MLFLOW_TRACKING_URI, else a database in the run's folder."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """A password must not stand in a config."""
        if self.uri and urlsplit(self.uri).password:
            why = "a password typed here would end up in run.yaml"
            fix = "export MLFLOW_TRACKING_URI=..., or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            yield Problem("tracker.mlflow.uri", why, fix)

    def callbacks(self, model: nn.Module, run: Run) -> Sequence[TrainerCallback]:
        """Start the MLflow run, or go on with it where this run is resumed, and return transformers' callback."""
        if not run.is_main:
            return []
        import mlflow
        from transformers.integrations import MLflowCallback

        from ftrun_plugins.tracker._reporter import reporter, starting

        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{run.folder / 'mlflow.db'}")
        for variable, value in _PATIENCE.items():
            os.environ.setdefault(variable, value)
        with starting(self, "a server that answers, or tracker.mlflow.uri=sqlite:////FOLDER/mlflow.db"):
            if self.uri:
                mlflow.set_tracking_uri(self.uri)
            experiment = mlflow.set_experiment(self.experiment)
            earlier = mlflow.search_runs(
                [experiment.experiment_id], f"tags.`{_TAG}` = '{run.unique_id}'", max_results=1, output_format="list"
            )
            if earlier:
                mlflow.start_run(run_id=earlier[0].info.run_id)
                os.environ["MLFLOW_MAX_LOG_PARAMS"] = "0"  # they are there, and MLflow lets none be changed
            else:
                mlflow.start_run(run_name=run.name, tags={_TAG: run.unique_id})
        return [reporter(self, MLflowCallback(), end=lambda status: mlflow.end_run(_STATES.get(status, "KILLED")))]
