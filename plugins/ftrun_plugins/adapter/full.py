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
    """Train every weight."""

    trains_base_weights: ClassVar[bool] = True
    name: str = "full"

    def apply(self, model: nn.Module, run: Run) -> nn.Module:
        """Return the model as it is, everything trainable."""
        return model.requires_grad_(True)
