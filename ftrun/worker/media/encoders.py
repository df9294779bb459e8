"""The parts of a multimodal model that turn media into embeddings: all of it but the language model and its head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftrun.errors import ConfigError, Problem

if TYPE_CHECKING:
    from torch import nn


def parameters(model: Any, *, wanted: bool = False) -> dict[str, nn.Parameter]:
    """Return the weights, by name, that only media go through; none if the model takes text alone.

    Raises:
        ConfigError: There are none, and they are wanted.
    """
    if model.config.get_text_config() is model.config:
        if wanted:
            message = f"{model.config.model_type} takes text alone: it has nothing that turns media into embeddings"
            raise ConfigError([Problem("adapter.media_encoders", message, "adapter.media_encoders=false")])
        return {}
    language = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    kept = {id(weight) for part in language if part is not None for weight in part.parameters()}
    return {name: weight for name, weight in model.named_parameters() if id(weight) not in kept}


def linear_layers(model: Any, *, wanted: bool = False) -> list[str]:
    """Return the names of the linear layers that only media go through.

    Raises:
        ConfigError: There are none, and they are wanted.
    """
    from torch import nn

    found = parameters(model, wanted=wanted)
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and f"{name}.weight" in found
    ]
