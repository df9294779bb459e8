"""What optimizers made of rules share: Adam's settings, and updating in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.errors import ConfigError, Problem
from ftrun.fields import ranged
from ftrun.plugin import Optimizer
from ftrun.train import BadLoss, Precision

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.config import Config
    from ftrun.worker.optim import ruled
    from ftrun.worker.optim.adamw import AdamW
    from ftrun.worker.optim.ruled import Rule
    from ftrun.worker.parameters import Weight
    from ftrun.worker.training import Run


@dataclass(kw_only=True)
class LayerwiseRuled(Optimizer):
    """An optimizer made of rules, each for one kind of weight, that updates in the backward pass."""

    takes_shards: ClassVar[bool] = True
    asked: ClassVar[tuple[str, str]] = ("optimizer", "another optimizer")
    """The key that asks for updates in the backward pass, and what to type for others."""

    @property
    def in_backward(self) -> bool:
        """Whether each weight is updated in the backward pass."""
        return True

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield what needs the gradients of the whole model at one time."""
        yield from super().check(cfg)
        if self.in_backward:
            yield from layerwise_problems(cfg, *self.asked)

    def settle(self, cfg: Config) -> None:
        """Refuse what may be known only now: several processes, fp16.

        Raises:
            ConfigError: It is so.
        """
        if self.in_backward and (problems := list(layerwise_problems(cfg, *self.asked))):
            raise ConfigError(problems)

    def rule(self, run: Run) -> Rule:
        """Return the rule for all weights, of an optimizer that has one."""
        raise NotImplementedError

    def rules(self, run: Run) -> dict[str, Rule]:
        """Return the rules by name."""
        return {self.name: self.rule(run)}

    def rule_of(self, weight: Weight) -> str:
        """Return the name of the rule for a weight."""
        return self.name

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        """Return the optimizer that applies each rule to its weights."""
        from ftrun.worker import parameters

        return self.finished(self.applying()(parameters.groups(model, self, self.rule_of), self.rules(run)), run)

    def finished(self, made: ruled.Ruled, run: Run) -> ruled.Ruled:
        """Return an optimizer that updates in the backward pass, if this one is to."""
        from ftrun.worker.optim.ruled import Layerwise

        if self.in_backward:
            made.layerwise = Layerwise(made, run.cfg.train.max_grad_norm)
        return made

    def applying(self) -> type[ruled.Ruled]:
        """Return what applies the rules."""
        from ftrun.worker.optim import ruled

        return ruled.Ruled


@dataclass(kw_only=True)
class Ruled(LayerwiseRuled):
    """One that updates in the backward pass only where it is told to."""

    asked = ("optimizer.layerwise", "optimizer.layerwise=false")

    layerwise: bool = False
    """Update each weight in the backward pass and free its gradient at once, so that the gradients of the whole model
    are never in memory together. Each gradient is then clipped to ``train.max_grad_norm`` by its own norm."""

    @property
    def in_backward(self) -> bool:
        """Whether it is told to."""
        return self.layerwise


def layerwise_problems(cfg: Config, key: str, instead: str) -> Iterator[Problem]:
    """Yield what a run asks for that cannot be done where gradients are used up in the backward pass.

    Args:
        cfg: The run.
        key: What asks for that.
        instead: What to type in order not to.
    """
    train = cfg.train
    if (cfg.hardware.num_processes or 1) > 1:
        message = "several processes average their gradients after the backward pass, and by then each is used up"
        yield Problem(key, message, f"hardware.num_processes=1, or {instead}")
    if train.grad_accumulation > 1:
        message = "the gradients of several micro batches would have to be kept until the last one, all of them"
        fix = f"train.grad_accumulation=1 with a larger train.micro_batch_size, or {instead}"
        yield Problem(key, message, fix)
    if train.precision is Precision.fp16:
        message = "fp16 scales the loss, and whether by too much is known only when the backward pass is over"
        yield Problem(key, message, f"train.precision=bf16, or {instead}")
    for asked, name in (
        (train.on_bad_loss is BadLoss.skip, "on_bad_loss=skip"),
        (train.max_loss_spike, "max_loss_spike"),
    ):
        if asked:
            message = f"train.{name} decides on a step when its gradient is whole, and by then the weights have moved"
            yield Problem(key, message, f"leave train.{name.partition('=')[0]} out, or {instead}")


@dataclass(kw_only=True)
class AdamLike(Ruled):
    """One of whose rules is Adam's, or made of Adam's moments."""

    beta1: float = ranged(0.9, ge=0, lt=1)
    """Decay of the mean of gradients."""

    beta2: float = ranged(0.999, ge=0, lt=1)
    """Decay of the mean of squared gradients; 0.95 is usual for large batches."""

    eps: float = ranged(1e-8, gt=0)
    """Added to the denominator."""

    def adamw(self) -> AdamW:
        """Return Adam's rule."""
        from ftrun.worker.optim.adamw import AdamW

        return AdamW(beta1=self.beta1, beta2=self.beta2, eps=self.eps)
