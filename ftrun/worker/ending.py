"""What a run leaves when it ends: weights, model card, plots, result."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import ftrun
from ftrun import events, record
from ftrun.record import Result
from ftrun.worker import device

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
    save_model(trainer, run, metrics)
    plot(run, lines)
    objective = run.cfg.objective or next(name for name in (*run.cfg.stage.metrics, "loss") if name in metrics)
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return Result(
        metrics=metrics,
        objective=metrics.get(objective),
        step=trainer.state.global_step,
        tokens_per_second=round(sum(speeds) / len(speeds), 1) if speeds else None,
        peak_memory_bytes=device.peak_memory_bytes(run.cfg.hardware.device),
    )


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


def plot(run: Run, lines: list[dict[str, Any]]) -> None:
    """Draw the loss over the steps, with the evaluations where there are any."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, style in (("loss", {"lw": 1.5}), ("eval_loss", {"marker": "o", "lw": 1.5})):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xlabel="step", ylabel="loss", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    folder = run.folder / record.PLOTS
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)
