"""No quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftrun.plugin import Quant, register


@register
@dataclass(kw_only=True)
class NoQuant(Quant):
    """Weights are stored as ``model.dtype`` says."""

    name: str = "none"

    def load_arguments(self) -> dict[str, Any]:
        """Nothing is added to how the model is loaded."""
        return {}
