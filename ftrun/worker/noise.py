"""What is random in a model that trains, switched off for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """While inside, nothing in the model is random: dropout is off, and afterwards on again if it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
