"""The parts of a multimodal model that turn media into embeddings: all of it but the language model and its head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return the weights, by name, that only media go through; none if the model takes text alone."""
    if model.config.get_text_config() is model.config:
        return {}
    language = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    kept = {id(weight) for part in language if part is not None for weight in part.parameters()}
    return {name: weight for name, weight in model.named_parameters() if id(weight) not in kept}


def linear_layers(model: Any) -> list[str]:
    """Return the names of the linear layers that only media go through."""
    from torch import nn

    found = parameters(model)
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and f"{name}.weight" in found
    ]
