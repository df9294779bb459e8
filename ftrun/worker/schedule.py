"""The learning rate of each step: a curve over the steps, or one that waits for evaluations to stop getting better.

A curve gives the share of the peak for a step, counted from 0. Those that transformers has too are its curves, number
for number, but for a plateau's, which has the warm-up that transformers leaves out there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from torch.optim.lr_scheduler import LambdaLR

from ftrun.config import ObjectiveMode
from ftrun.errors import ConfigError, Problem
from ftrun.train import DecayShape, Scheduler, Train

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ftrun.config import Config

Curve = Callable[[int], float]

_BETTER_BY = 1e-4
"""By which share of the best objective an evaluation must better it, or a plateau goes on; torch's default."""

_NO_WARMUP = 10_000
"""Steps over which inverse_sqrt falls to 0.7 where nothing warms up; transformers' number."""


def build(cfg: Config, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Return what sets the rate of each parameter group before each step.

    Raises:
        ConfigError: Warm-up and decay are more than the whole run.
    """
    train = cfg.train
    assert cfg.optimizer.lr is not None
    if train.scheduler is Scheduler.reduce_lr_on_plateau:
        return PlateauLR(optimizer, Plateau(train, train.warmup_steps(total_steps), cfg.objective_mode))
    return LambdaLR(optimizer, curve(train, cfg.optimizer.lr, total_steps))


def curve(train: Train, peak: float, total_steps: int) -> Curve:
    """Return the rate of each step as a share of the peak.

    Raises:
        ConfigError: Warm-up and decay are more than the whole run.
    """
    warm = train.warmup_steps(total_steps)
    after = _after_warmup(train, warm, total_steps)
    least = lowest(train, peak)

    def rate(step: int) -> float:
        if step < warm:
            return step / warm
        return least + (1 - least) * after(step)

    return rate


def lowest(train: Train, peak: float) -> float:
    """Return the share of the peak that a curve goes down to."""
    if train.min_lr_ratio is not None:
        return train.min_lr_ratio
    if train.scheduler is Scheduler.polynomial:
        return min(1.0, 1e-7 / peak)
    return 0.1 if train.scheduler is Scheduler.cosine_with_min_lr else 0.0


def _after_warmup(train: Train, warm: int, total_steps: int) -> Curve:
    """Return a curve from 1 to 0, or to where it happens to end, over the steps after the warm-up."""
    left = max(1, total_steps - warm)

    def done(step: int) -> float:
        return min(1.0, (step - warm) / left)

    match train.scheduler:
        case Scheduler.linear:
            return lambda step: 1 - done(step)
        case Scheduler.cosine | Scheduler.cosine_with_min_lr:
            return lambda step: _half_cosine(done(step))
        case Scheduler.cosine_with_restarts:
            return lambda step: _half_cosine(train.num_cycles * done(step) % 1.0) if done(step) < 1 else 0.0
        case Scheduler.polynomial:
            return lambda step: (1 - done(step)) ** train.power
        case Scheduler.inverse_sqrt:
            scale = warm or _NO_WARMUP
            return lambda step: math.sqrt(scale / (step - warm + scale))
        case Scheduler.wsd:
            return _stable_then_decay(train, warm, total_steps)
        case _:
            return lambda _: 1.0


def _half_cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


_DECAYS: dict[DecayShape, Callable[[float], float]] = {
    DecayShape.cosine: _half_cosine,
    DecayShape.linear: lambda done: 1 - done,
    DecayShape.sqrt: lambda done: 1 - math.sqrt(done),
}


def _stable_then_decay(train: Train, warm: int, total_steps: int) -> Curve:
    steps, shape = train.decay_steps(total_steps), _DECAYS[train.decay_shape]
    if warm + steps > total_steps:
        message = f"{steps} steps of decay and {warm} of warm-up are more than the run has, which is {total_steps}"
        raise ConfigError([Problem("train.decay", message, "train.decay= a share below 1, or fewer steps")])
    begin = total_steps - steps
    return lambda step: shape(min(1.0, (step - begin) / steps)) if step > begin else 1.0


class Plateau:
    """A curve that goes down when evaluations stop getting better.

    What it holds is plain numbers: torch saves and loads them with the schedule.
    """

    def __init__(self, train: Train, warm: int, mode: ObjectiveMode) -> None:
        self.warm, self.patience, self.factor = warm, train.plateau_patience, train.plateau_factor
        self.least = train.min_lr_ratio or 0.0
        self.sign = 1.0 if mode is ObjectiveMode.min else -1.0
        self.share = 1.0
        """Of the peak, after the warm-up."""

        self.best: float | None = None
        self.waited = 0
        """Evaluations in a row that were not better."""

    def __call__(self, step: int) -> float:
        """Return the rate of a step as a share of the peak."""
        return self.share * (step / self.warm if step < self.warm else 1.0)

    def observe(self, objective: float) -> None:
        """Take in an evaluation: after too many that are no better, the rate goes down, and the wait begins anew."""
        value = self.sign * objective
        if self.best is None or value < self.best - _BETTER_BY * abs(self.best):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.share, self.waited = max(self.least, self.share * self.factor), 0


class PlateauLR(LambdaLR):
    """Sets the rate that a plateau gives, from the evaluation on. A checkpoint holds the plateau's numbers."""

    def __init__(self, optimizer: Optimizer, plateau: Plateau) -> None:
        super().__init__(optimizer, plateau)

    def observe(self, objective: float) -> None:
        """Take in an evaluation; the next step has the new rate already."""
        plateau = cast(Plateau, self.lr_lambdas[0])
        plateau.observe(objective)
        rate = plateau(self.last_epoch)
        self._last_lr = [base * rate for base in self.base_lrs]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr
