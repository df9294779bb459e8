"""A sweep's folder as its jobs would have left it, written in no time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG = """\
stage:
  name: {stage}
  loss: nll
optimizer:
  name: adamw
seed: {seed}
objective: {objective}
objective_mode: {mode}
output_dir: {folder}
plugins: []
schema_version: 1
"""


class FakeSweep:
    """Writes jobs into a sweep's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sweep.yaml").write_text("- {words: [], cwd: /, time: ''}\n")

    def job(
        self,
        point: str,
        objective: float | None = None,
        *,
        seed: int = 1,
        status: str | None = "completed",
        reason: str = "",
        stage: str = "sft",
        name: str = "eval_loss",
        wanted: str = "null",
        mode: str = "min",
        metrics: Mapping[str, float] | None = None,
        step: int = 10,
        seconds: float = 60.0,
        memory: int | None = 2**30,
        log: str = "",
        lines: list[dict[str, Any]] | None = None,
    ) -> Path:
        """Write a job; one without a status has only been frozen."""
        words = [*point.split(), f"seed={seed}"]
        folder = self.folder / ",".join(words).replace("/", "_")
        folder.mkdir()
        text = CONFIG.format(stage=stage, seed=seed, objective=wanted, mode=mode, folder=folder)
        (folder / "run.yaml").write_text(text)
        line = {"id": self.count, "overrides": words, "key": f"{self.count:016x}", "folder": folder.name}
        with (self.folder / "jobs.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.count += 1
        if lines:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
        if log:
            (folder / "log.txt").write_text(log)
        if status:
            known = {} if objective is None else {name: objective, "loss": 9.0}
            result = {
                "status": status, "reason": reason, "metrics": {**known, **(metrics or {})}, "objective": objective,
                "step": step, "tokens_per_second": 1000.0, "peak_memory_bytes": memory, "checkpoint": None,
                "wall_seconds": seconds, "problems": [], "holder": None,
            }  # fmt: skip
            (folder / "result.json").write_text(json.dumps(result))
        return folder
