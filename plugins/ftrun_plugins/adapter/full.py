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

    media_encoders: bool = False
    """Train also what turns media into embeddings in a multimodal model: vision tower, projector."""

    def apply(self, model: nn.Module, run: Run) -> nn.Module:
        """Return the model, everything trainable; of a multimodal one, its language model at least.

        Raises:
            ConfigError: ``media_encoders``, and the model has none.
        """
        from ftrun.worker.media import encoders

        model.requires_grad_(True)
        for weight in encoders.parameters(model, wanted=self.media_encoders).values():
            weight.requires_grad_(self.media_encoders)
        return model
