"""ftrun: the experiment runner for fine-tuning language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ftrun.record import Result

__version__ = "0.1.0"


def run(overrides: Sequence[str] = ()) -> Result:
    """Do from Python what ``ftrun OVERRIDES`` does from a shell.

    Args:
        overrides: What would be typed, one string a word: ``["stage=sft", "model=tiny", "train.epochs=1"]``.

    Returns:
        What the run ended with. ``status`` is ``completed``, ``interrupted`` or ``preempted``.

    Raises:
        ConfigError: The input is wrong; ``problems`` lists everything that is.
        RunFailed: The run started and failed.
    """
    from ftrun import launch

    return launch.run(overrides)
