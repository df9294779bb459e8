"""What a run leaves when it ends: weights, model card, plots, result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ftrun
from ftrun import events, record
from ftrun.record import Result
from ftrun.worker import device
from ftrun.worker.best import objective_of

if TYPE_CHECKING:
    from ftrun.worker.training import Run, RunTrainer


def add_to_manifest(run: Run) -> None:
    """Add what only the worker knows: what became of the rows, and the key of their content."""
    path = run.folder / record.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["data"] = {"content_key": run.rows.content_key, **run.rows.report}
    record.write_whole(path, json.dumps(manifest, indent=2) + "\n")


def finish(trainer: RunTrainer, run: Run) -> Result:
    """Save the model and say how the run went. Called by the first process only."""
    events.send("phase", text="saving")
    lines = record.read_lines(run.folder / record.METRICS)
    metrics = record.last_values(lines)
    metrics["loss"] = trainer.mean_loss
    if run.cfg.train.keep_best and trainer.best.step:
        metrics |= _evaluated_after(trainer.best.step, lines) | {"best_step": trainer.best.step}
    save_model(trainer, run, metrics)
    plot(run, lines)
    objective = objective_of(run.cfg, metrics)
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return Result(
        metrics=metrics,
        objective=metrics[objective] if objective else None,
        step=trainer.state.global_step,
        reason="stopped early: evaluations got no better" if trainer.stopped_early else "",
        tokens_per_second=round(sum(speeds) / len(speeds), 1) if speeds else None,
        peak_memory_bytes=device.peak_memory_bytes(run.cfg.hardware.device),
    )


def _evaluated_after(step: int, lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return what the evaluation after a step gave: of the weights that the run ends with, where they are the best."""
    found = record.last_values([line for line in lines if line["step"] == step])
    return {name: value for name, value in found.items() if name.startswith("eval_")}


def save_model(trainer: RunTrainer, run: Run, metrics: dict[str, float]) -> None:
    """Write ``model/`` whole: weights or adapter, tokenizer, model card."""
    folder = run.folder / record.MODEL
    partial = folder.with_name(f".{folder.name}")
    for left in (partial, folder):  # by a process that was killed between here and its result
        shutil.rmtree(left, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    run.cfg.adapter.save(model, partial, run)
    if run.media:
        run.media.save(partial)
    run.tokenizer.save_pretrained(partial)  # after the processor, which has a chat template of its own
    (partial / "README.md").write_text(card(run, metrics))
    partial.rename(folder)


def card(run: Run, metrics: dict[str, float]) -> str:
    """Return the model card: what it was made from and how."""
    cfg = run.cfg
    manifest = json.loads((run.folder / record.MANIFEST).read_text())
    base = cfg.model.path or ""
    front = f"base_model: {base}\n" if cfg.model.source.value in ("hub", "wheel") else ""
    numbers = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    data = ", ".join(source.path for source in cfg.data.sources) or cfg.data.path
    return f"""---
{front}library_name: {"peft" if not cfg.adapter.trains_base_weights else "transformers"}
tags: [ftrun, {cfg.stage.name}]
---

# {run.name}

Made with ftrun {ftrun.__version__}.

- Stage `{cfg.stage.name}`, adapter `{cfg.adapter.name}`, optimizer `{cfg.optimizer.name}`
- Started from: `{base}` ({cfg.model.source.value}, {cfg.model.revision or "no revision"})
- Rows: `{data}`
- Command: `{manifest["command"]}`

| metric | value |
|---|---|
{numbers}
"""


_NOT_PLOTTED = {"step", "epoch", "time", "tokens", "tokens_per_second", "rows_read", "rows_cut", "rows_left_out"}

_Panels = dict[str, dict[str, list[tuple[int, float]]]]
"""By title, by metric: the points (step, value)."""


def plot(run: Run, lines: list[dict[str, Any]]) -> None:
    """Draw the metrics over the steps: the loss and its evaluations in ``loss.png``, all others in ``metrics.png``."""
    panels = _panels(lines, run.cfg.data.eval_sets)
    folder = run.folder / record.PLOTS
    folder.mkdir(exist_ok=True)
    loss = {title: curves for title, curves in panels.items() if title == "loss"}
    rest = {title: curves for title, curves in sorted(panels.items()) if title != "loss"}
    for name, shown in (("loss", loss), ("metrics", rest)):
        if shown:
            _draw(shown, run.name, folder / f"{name}.png")


def _panels(lines: list[dict[str, Any]], eval_sets: Iterable[str]) -> _Panels:
    """Put what belongs together into one panel: a metric, its evaluations, and that of chosen and rejected replies."""
    found: _Panels = {}
    for line in lines:
        for name in (name for name in line if name not in _NOT_PLOTTED):
            title = name.removeprefix("eval_")
            for each in eval_sets if title != name else ():
                title = title.removeprefix(f"{each}_")
            title = title.removesuffix("_chosen").removesuffix("_rejected")
            found.setdefault(title, {}).setdefault(name, []).append((line["step"], line[name]))
    return found


def _draw(panels: _Panels, name: str, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width, height = (7.0, 4.0) if len(panels) == 1 else (5.0 * columns, 3.0 * rows)
    figure = Figure(figsize=(width, height))
    # Pictures take as long as many a short run. So there are few labels, and nothing looks for its place by itself:
    # margins and titles would by laying out all that is drawn once more.
    margins = {"left": 0.7 / width, "right": 1 - 0.2 / width, "bottom": 0.6 / height, "top": 1 - 0.8 / height}
    grid = figure.add_gridspec(rows, columns, wspace=0.25, hspace=0.5, **margins)
    for number, (title, curves) in enumerate(panels.items()):
        panel = figure.add_subplot(grid[number])
        for label, points in curves.items():
            panel.plot(*zip(*points, strict=True), label=label, lw=1.5, marker="o" if len(points) < 20 else None)
        panel.set_xlabel("step")
        panel.set_title(title, y=1.0)
        panel.locator_params(nbins=5)
        panel.grid(alpha=0.3)
        if [*curves] != [title]:
            panel.legend()
    figure.suptitle(name)
    FigureCanvasAgg(figure).print_figure(file, dpi=120)
