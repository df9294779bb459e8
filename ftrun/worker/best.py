"""The best evaluation of a run so far: what early stopping waits for, and which checkpoint is kept."""

from __future__ import annotations

from dataclasses import dataclass

from ftrun.config import Config, ObjectiveMode


@dataclass
class Best:
    """Which evaluation was best. Plain numbers, which a checkpoint holds."""

    step: int = 0
    """The step after which it was; 0 where there was none. The one before the first step does not count."""

    value: float | None = None
    """Its objective."""

    waited: int = 0
    """Evaluations in a row that did not better it by more than the threshold."""

    def note(self, step: int, value: float, cfg: Config) -> bool:
        """Take in an evaluation, and tell whether it is the best so far. One that is not a number is not."""
        gain = self._gain(value, cfg.objective_mode)
        self.waited = 0 if gain > cfg.train.early_stopping_threshold else self.waited + 1
        if gain > 0:
            self.step, self.value = step, value
        return gain > 0

    def _gain(self, value: float, mode: ObjectiveMode) -> float:
        """Return by how much a value is better than the best."""
        if value != value:
            return -1.0
        if self.value is None:
            return float("inf")
        return self.value - value if mode is ObjectiveMode.min else value - self.value


def objective_of(cfg: Config, metrics: dict[str, float]) -> str | None:
    """Return the name of the metric that says how good a run is, among those that there are.

    The stage says which come first; one of evaluation rows may be that of any set of them, in their order.
    """
    if cfg.objective:
        return cfg.objective if cfg.objective in metrics else None
    for name in (*cfg.stage.metrics, "loss"):
        of_sets = [f"eval_{each}_{name.removeprefix('eval_')}" for each in cfg.data.eval_sets]
        if found := [each for each in (name, *(of_sets if name.startswith("eval_") else ())) if each in metrics]:
            return found[0]
    return None
