"""No adapter: the model itself trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.plugin import Adapter, register

if TYPE_CHECKING:
    from torch import nn

    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class Full(Adapter):
    """Train every weight; of a multimodal model, every weight of its language model."""

    trains_base_weights: ClassVar[bool] = True
    name: str = "full"

    def apply(self, model: nn.Module, run: Run) -> nn.Module:
        """Return the model, everything trainable; of a multimodal one, its language model."""
        from ftrun.worker.media import encoders

        model.requires_grad_(True)
        for weight in encoders.parameters(model).values():
            weight.requires_grad_(False)
        return model
