"""The weights that train, in the groups an optimizer treats alike."""

from __future__ import annotations

from typing import Any

from torch import nn


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the weights that train, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the weights that train into those that decay and those that do not.

    Matrices decay. Vectors (norms, biases, DoRA's magnitudes) do not: they scale or shift, and pulling them to zero
    fights the model rather than its complexity.

    Returns:
        Up to two parameter groups; an empty one is left out.
    """
    weights = trained(model)
    matrices = [parameter for _, parameter in weights if parameter.ndim >= 2]
    vectors = [parameter for _, parameter in weights if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
