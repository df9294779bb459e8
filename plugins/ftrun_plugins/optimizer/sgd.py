"""Gradient descent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.optimizer._ruled import Ruled

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.worker.optim.ruled import Rule
    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class SGD(Ruled):
    """Plain gradient descent: no state at all, or with momentum as much as the weights."""

    # A step is the rate times a gradient whose norm over the whole model is about 1, where Adam moves each element by
    # about the rate. LOMO's paper (https://arxiv.org/abs/2306.09782) fine-tunes with 0.03: sft's rate 600 times.
    lr_scale: ClassVar[float] = 600.0
    elementwise: ClassVar[bool] = True
    name: str = "sgd"

    momentum: float = ranged(0.0, ge=0, lt=1)
    """Share of the last step's direction that the next one keeps; 0.9 makes steady steps about ten times as long."""

    nesterov: bool = False
    """Look ahead along the momentum: the newest gradient counts for more."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield a way of using momentum where there is none."""
        yield from super().check(cfg)
        if self.nesterov and not self.momentum:
            message = "it looks ahead along the momentum, and there is none"
            yield Problem("optimizer.nesterov", message, "optimizer.momentum=0.9, or optimizer.nesterov=false")

    def rule(self, run: Run) -> Rule:
        """Return the one rule."""
        from ftrun.worker.optim import sgd

        return sgd.SGD(momentum=self.momentum, nesterov=self.nesterov)
