"""What the stages that learn from rewards have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ftrun.errors import Problem

if TYPE_CHECKING:
    from ftrun.config import Config


def check_direction(cfg: Config) -> Iterator[Problem]:
    """Yield an objective that points down where something goes by it: more reward is better."""
    objective = cfg.objective or cfg.stage.metrics[0]
    if cfg.train.judged_by_evaluation and "rewards" in objective and cfg.objective_mode.value == "min":
        message = f"{cfg.train.judged_by_evaluation[0]} goes by {objective}, of which it would look for the lowest"
        yield Problem("objective_mode", message, "objective_mode=max")
