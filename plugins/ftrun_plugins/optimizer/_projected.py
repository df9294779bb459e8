"""What optimizers share that keep their moments in a smaller space than the gradient's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from ftrun.errors import ConfigError, Problem, did_you_mean
from ftrun.fields import ranged
from ftrun_plugins.optimizer._ruled import AdamLike

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.config import Config
    from ftrun.worker.parameters import Weight
    from ftrun.worker.training import Run


class Method(StrEnum):
    """How the leading subspace of a gradient is found."""

    svd = "svd"
    randomized = "randomized"
    subspace = "subspace"


ALL_LINEAR = "all-linear"
"""The target that stands for every linear map but the output head."""


@dataclass(kw_only=True)
class Projected(AdamLike):
    """One whose rule ``projected`` keeps moments of ``rank`` rows or columns for each target; AdamW has the others."""

    rank: int = ranged(128, ge=1)
    """Rows or columns of the moments: more follows AdamW closer, and takes more memory. A matrix whose smaller side is
    no larger is left to AdamW, which would take no more memory for it."""

    update_interval: int = ranged(200, ge=1)
    """Steps after which the space that gradients are projected to is chosen anew."""

    targets: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """The modules whose matrices are projected: names (``[q_proj,v_proj]``), or all but the embedding and the head.
    AdamW updates what is left."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield adapters that leave no large matrix to train."""
        yield from super().check(cfg)
        if not cfg.adapter.trains_base_weights:
            message = (
                f"adapter={cfg.adapter.name} trains small factors, whose moments take hardly any memory, and would "
                "project what is of low rank already"
            )
            yield Problem("optimizer", message, "adapter=full, or optimizer=adamw")
        if not self.targets:
            yield Problem("optimizer.targets", "names nothing to project", f"optimizer.targets=[{ALL_LINEAR}]")

    def rule_of(self, weight: Weight) -> str:
        """Project the matrices of the targets that are larger than their projection."""
        fits = weight.role == "matrix" and min(weight.parameter.shape[-2:]) > self.rank
        return "projected" if fits and any(_names(target, weight.module) for target in self.targets) else "adamw"

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        """Return the optimizer that applies each rule to its weights.

        Raises:
            ConfigError: No matrix that trains belongs to a module of a target's name.
        """
        from ftrun import events
        from ftrun.worker import parameters

        weights = parameters.weights(model)
        modules = [weight.module for weight in weights if weight.role == "matrix"]
        known = sorted({module.rpartition(".")[2] for module in modules})
        missing = [target for target in self.targets if not any(_names(target, module) for module in modules)]
        if missing:
            fix = f"names among {', '.join(known)}"
            message = "no matrix that trains is in a module"
            raise ConfigError(
                [Problem("optimizer.targets", f"{message} {one}{did_you_mean(one, known)}", fix) for one in missing]
            )
        if not any(self.rule_of(weight) == "projected" for weight in weights):
            text = f"no target is larger than optimizer.rank={self.rank} on both sides: AdamW updates every weight"
            events.send("note", text=text)
        return super().build(model, run)


def _names(target: str, module: str) -> bool:
    return target == ALL_LINEAR or module == target or module.endswith(f".{target}")
