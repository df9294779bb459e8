"""Schedule-free AdamW, whose weights are averaged where a schedule would lower the rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun.train import Scheduler
from ftrun_plugins.optimizer._ruled import Ruled

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.worker.optim import ruled
    from ftrun.worker.optim.ruled import Rule
    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class ScheduleFree(Ruled):
    """AdamW whose weights are averaged in place of a falling rate (https://arxiv.org/abs/2405.15682).

    What is evaluated, and what the run ends with, is the mean of all steps so far; it needs no end to be planned. Takes
    as much memory as AdamW in float32, and while evaluating a copy of the weights that train.
    """

    # ZeRO is left out (`elementwise`): what it updates are flat copies, and the average would not reach the model.
    name: str = "schedule_free"

    beta1: float = ranged(0.9, gt=0, lt=1)
    """Where gradients are taken: 0 at the newest weights, 1 at the mean. Long runs may need 0.95 or 0.98."""

    beta2: float = ranged(0.999, ge=0, lt=1)
    """Decay of the mean of squared gradients."""

    eps: float = ranged(1e-8, gt=0)
    """Added to the denominator."""

    r: float = ranged(0.0, ge=0)
    """A step counts in the mean by its number to the power of this: higher forgets the early ones sooner."""

    weight_lr_power: float = ranged(2.0, ge=0)
    """A step counts in the mean by the highest rate so far to the power of this, so that a warm-up counts little."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield schedules, which the mean is there to replace, and a power of a rate that never moves."""
        yield from super().check(cfg)
        if cfg.train.scheduler is not Scheduler.constant:
            message = (
                f"the mean of the weights is in place of a schedule, and would count the steps of a rate that falls"
                f" (train.scheduler={cfg.train.scheduler}) as much as those at the peak"
            )
            yield Problem(
                "train.scheduler", message, "train.scheduler=constant; train.warmup goes before it all the same"
            )
        if self.weight_lr_power != ScheduleFree.weight_lr_power and not cfg.train.warmup:
            message = "without a warm-up all steps have one rate and count alike, so it would change nothing"
            yield Problem("optimizer.weight_lr_power", message, "train.warmup=0.03, or leave it out")

    def rule(self, run: Run) -> Rule:
        """Return the one rule."""
        from ftrun.worker.optim.schedule_free import ScheduleFree

        return ScheduleFree(
            beta1=self.beta1, beta2=self.beta2, eps=self.eps, r=self.r, weight_lr_power=self.weight_lr_power
        )

    def applying(self) -> type[ruled.Ruled]:
        """Return what can show the mean."""
        from ftrun.worker.optim.schedule_free import Averaging

        return Averaging
