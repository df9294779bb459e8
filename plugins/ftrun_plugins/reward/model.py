"""Rewards of a reward model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.fields import MISSING
from ftrun.model import Dtype, Model
from ftrun.plugin import register
from ftrun_plugins.reward._learned import Learned

if TYPE_CHECKING:
    from torch import nn

    from ftrun.completions import Completion
    from ftrun.config import Config
    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class RewardModel(Learned):
    """The score that a reward model gives a reply; it is loaded whole, beside the policy."""

    name: str = "model"

    path: str = MISSING
    """Folder of a run of stage=rm, folder of a model or adapter with a score head, or hub id."""

    revision: str | None = None
    """Its commit, tag or branch on the hub. Default: the newest; run.yaml holds the commit it was."""

    dtype: Dtype = Dtype.auto
    """Stored type of its weights. Default: the files' own; float32 on CPU. The score head is float32 in any case."""

    def files(self, cfg: Config) -> Model:
        """Return its weights as a model of their own."""
        return dataclasses.replace(super().files(cfg), revision=self.revision)

    def _settled(self, found: Model) -> None:
        super()._settled(found)
        self.revision = found.revision

    def prepare(self, run: Run, model: nn.Module) -> None:
        """Load it to where the policy is."""
        from ftrun.worker import scoring
        from ftrun_plugins.reward._learned import Judge

        device = next(model.parameters()).device
        default = "float32" if device.type in ("cpu", "mps") else "auto"
        dtype = default if self.dtype is Dtype.auto else self.dtype.value
        with self.said_of_mine():
            scorer = scoring.load_scorer(self.files(run.cfg), device, dtype)
        self._judge = Judge(scorer, scorer.tokenizer, run.tokenizer, "reward.model.path")

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """Ask it about prompt and reply together."""
        return self._judge.scores(completions, self.batch_size)
