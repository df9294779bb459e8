"""Trackio."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.plugin import Tracker, register

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class Trackio(Tracker):
    """Trackio, a local dashboard by Hugging Face (https://github.com/gradio-app/trackio)."""

    requires: ClassVar[tuple[str, ...]] = ("trackio",)
    name: str = "trackio"

    project: str = "ftrun"
    """The project that the run appears in; ``trackio show`` opens it."""

    space: str | None = None
    """A Hugging Face Space (``USER/NAME``) to send metrics to. Default: $TRACKIO_SPACE_ID, else this machine, in
    $TRACKIO_DIR or Trackio's own folder below $HF_HOME."""

    def callbacks(self, model: nn.Module, run: Run) -> Sequence[TrainerCallback]:
        """Return transformers' callback, told the project, the Space and a name that only this run has."""
        if not run.is_main:
            return []
        from transformers.integrations import TrackioCallback

        from ftrun_plugins.tracker._reporter import reporter, starting, unique_name

        tracker = self

        class Callback(TrackioCallback):
            def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
                mine = copy.copy(args)
                mine.project, mine.trackio_space_id = tracker.project, tracker.space
                mine.run_name = unique_name(run)  # Trackio goes on with a run of the same name
                args.trackio_static_space_id = False  # or a second, public Space would be made when training ends
                with starting(tracker, "tracker.trackio.space=null, or `hf auth login`"):
                    super().setup(mine, state, model, **kwargs)

        return [reporter(self, Callback())]
