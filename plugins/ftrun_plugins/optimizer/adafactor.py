"""Adafactor, as torch has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.fields import ranged
from ftrun.plugin import Optimizer, register

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class Adafactor(Optimizer):
    """Adam without momentum, and of a matrix's second moment only rows and columns (https://arxiv.org/abs/1804.04235).

    ``lr`` is no length but a share: a step is ``min(lr, 1 / sqrt(t))`` times the root mean square of the weight, where
    ``t`` counts the steps: late in a long run, a high rate is more than is given. The paper's own is 0.01. Weight decay
    is decoupled, and goes by ``lr`` alone. In a stack of matrices each has its own rows and columns, and all have one
    root mean square.
    """

    # A weight's root mean square is a few hundredths, so that steps of AdamW's length would be some 50 times its rate.
    # T5 was fine-tuned at 0.001 (https://arxiv.org/abs/1910.10683, 2.1), which is 20 times sft's rate for AdamW.
    lr_scale: ClassVar[float] = 20.0
    name: str = "adafactor"

    beta2_decay: float = ranged(-0.8, le=0)
    """The newest squared gradient counts for ``t`` to this power: the lower, the longer the memory late in a run."""

    eps1: float | None = ranged(None, ge=0)
    """Least root of the second moment, which bounds the step where gradients vanish. Default: the precision of the
    weight's type, 1.2e-7 in float32. The paper's 1e-30 is inside the moment instead."""

    eps2: float = ranged(1e-3, ge=0)
    """Least root mean square that steps are measured by: without it, a weight that starts at 0 would stay there."""

    d: float = ranged(1.0, ge=1)
    """Root mean square, in units of the rate, at which a step is clipped."""

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        """Return torch's optimizer."""
        import torch

        from ftrun.worker import parameters

        assert self.lr is not None
        return torch.optim.Adafactor(
            parameters.groups(model, self, lambda _: "adafactor"),
            lr=self.lr,
            beta2_decay=self.beta2_decay,
            eps=(self.eps1, self.eps2),
            d=self.d,
        )
