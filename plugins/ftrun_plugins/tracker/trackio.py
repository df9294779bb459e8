"""Trackio."""

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
class Trackio(Tracker):
    """Trackio, a local dashboard by Hugging Face (https://github.com/gradio-app/trackio)."""

    requires: ClassVar[tuple[str, ...]] = ("trackio",)
    name: str = "trackio"

    project: str = "ftrun"
    """The project that the run appears in; ``trackio show`` opens it."""

    space: str | None = None
    """A Hugging Face Space to send metrics to. Default: this machine only."""

    def callbacks(self, model: nn.Module, run: Run) -> Sequence[TrainerCallback]:
        """Return transformers' callback, told the project and the Space."""
        if not run.is_main:
            return []
        from transformers.integrations import TrackioCallback

        plugin = self

        class Callback(TrackioCallback):
            def setup(self, args, state, model, **kwargs):  # type: ignore[no-untyped-def]
                args.project, args.trackio_space_id = plugin.project, plugin.space
                super().setup(args, state, model, **kwargs)

        return [Callback()]
