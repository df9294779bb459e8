"""LoRA+."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.optimizer._ruled import AdamLike

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.config import Config
    from ftrun.worker.optim.ruled import Rule
    from ftrun.worker.parameters import Weight
    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class LoRAPlus(AdamLike):
    """AdamW with a higher rate for the B of each pair of factors (https://arxiv.org/abs/2402.12354).

    In a wide model both factors learn only if the rate of B is by far the higher one; at one rate for both, A moves as
    it should and B hardly does. Weight decay is part of a step, so B's is higher, too. Both factors of an embedding
    have the rate of embeddings.
    """

    # With 16 times the rate for B, the two rates are on both sides of LoRA's usual one: a quarter and four times.
    lr_scale: ClassVar[float] = 0.25
    elementwise: ClassVar[bool] = True
    name: str = "loraplus"

    ratio: float = ranged(16.0, ge=1)
    """Rate of the B factors over that of all else. A rate that ``optimizer.groups`` gives is left as it is."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield an adapter that has no two factors."""
        yield from super().check(cfg)
        if not cfg.adapter.two_factors:
            message = f"adapter={cfg.adapter.name} has no factors A and B, so no weight would have the higher rate"
            yield Problem("optimizer", message, "adapter=lora, or optimizer=adamw")

    def rules(self, run: Run) -> dict[str, Rule]:
        """Adam's, under a second name for the B factors."""
        return {"adamw": self.adamw(), "factor_b": self.adamw()}

    def rule_of(self, weight: Weight) -> str:
        """Set the B factors apart: ``layers.0.self_attn.q_proj.lora_B.default.weight``."""
        return "factor_b" if ".lora_B." in weight.name else "adamw"

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        """Raise the rate of the groups of B factors."""
        made = super().build(model, run)
        fixed = {group.weights for group in self.groups if group.lr is not None}
        for group in made.param_groups:
            if group["rule"] == "factor_b" and group["name"] not in fixed:
                group["lr"] *= self.ratio
        return made
