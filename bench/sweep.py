"""What a sweep costs beyond its training.

    python bench/sweep.py              # all of it but the peer
    python bench/sweep.py jobs         # sixteen two-step jobs in a pool, beside sixteen plain starts
    python bench/sweep.py jobs --peer VENV/bin/llamafactory-cli ROWS.json MODEL
    python bench/sweep.py freeze       # freezing 10,000 points
    python bench/sweep.py runs         # `ftrun runs` over 10,000 jobs
    python bench/sweep.py slurm        # submitting 1,000 jobs, to a cluster that is up

Everything at OMP_NUM_THREADS=1; CPU seconds are user plus system time of a process and all that it started.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ENV, cpu_seconds
from rich.console import Console
from rich.table import Table

PYTHON = sys.executable
FTRUN = [str(Path(PYTHON).with_name("ftrun"))]
RUN = ["model=tiny", "hardware=cpu", "train.max_steps=2", "stage.num_samples=0"]
SEEDS = 16
ROUNDS = 1

console = Console(width=140)


def jobs(folder: Path) -> None:
    """Sixteen jobs in a pool of two slots; sixteen plain starts one after another; the training alone."""
    pool: list[tuple[float, float]] = []
    plain: list[tuple[float, float]] = []
    for number in range(ROUNDS):
        sweep = [*FTRUN, "-m", *RUN, f"seed=range(0,{SEEDS})", "hydra.launcher.slots=2", f"output_dir=sweep{number}"]
        pool.append(timed(sweep, folder))
        starts = [
            timed([*FTRUN, *RUN, f"seed={seed}", f"output_dir=plain{number}/{seed}"], folder) for seed in range(SEEDS)
        ]
        plain.append((sum(cpu for cpu, _ in starts), sum(wall for _, wall in starts)))
    training = train_seconds(folder)
    table = Table(f"{SEEDS} two-step jobs of model=tiny", "CPU s", "CPU s a job", "wall s")
    best = {"pool of two slots": min(pool), "plain starts": min(plain)}
    for name, (cpu, wall) in best.items():
        table.add_row(name, f"{cpu:.1f}", f"{cpu / SEEDS:.2f}", f"{wall:.1f}")
    table.add_row("two steps alone, in a process that has everything loaded", "", f"{training:.3f}", "")
    console.print(table)
    cpu, wall = best["pool of two slots"]
    console.print(f"beyond the training: {cpu / SEEDS - training:.2f} s of CPU a job (wanted: at most 1.0)")
    console.print(f"wall: {best['plain starts'][1] / wall:.1f} times less than plain starts (wanted: 8)\n")


def peer(folder: Path, command: str, rows: str, model: str) -> None:
    """The other command line's start, for as many steps of as small a model."""
    info = {"rows": {"file_name": rows}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    words = [
        command, "train", "--stage", "sft", "--do_train", "--model_name_or_path", model, "--dataset", "rows",
        "--dataset_dir", str(folder), "--template", "qwen", "--finetuning_type", "lora", "--max_steps", "2",
        "--output_dir", str(folder / "peer"), "--overwrite_output_dir", "--max_samples", "64",
    ]  # fmt: skip
    found = [timed(words, folder) for _ in range(ROUNDS)]
    console.print(f"the peer's start: {min(found)[0]:.1f} s of CPU, {min(found)[1]:.1f} s of wall\n")


def train_seconds(folder: Path) -> float:
    """Return the CPU seconds of the two optimizer steps themselves."""
    code = f"""
import json, time, sys
from pathlib import Path
from ftrun import launch, record
from ftrun.config import Config
from ftrun.worker import training
from transformers import TrainerCallback
words = {RUN!r} + ["output_dir=alone"]
run_file = launch.freeze(launch.check(words), words) / record.RUN
cfg = Config.load(run_file)
marks = []
class Clock(TrainerCallback):
    def on_step_begin(self, *a, **k): marks.append(-time.process_time())
    def on_step_end(self, *a, **k): marks.append(time.process_time())
was = training.RunTrainer.__init__
def init(self, **given):
    was(self, **given)
    self.add_callback(Clock())
training.RunTrainer.__init__ = init
cfg.stage.run(cfg)
Path("seconds").write_text(str(sum(marks)))
"""
    subprocess.run([PYTHON, "-c", code], cwd=folder, env=ENV, check=True, capture_output=True)
    return float((folder / "seconds").read_text())


def freeze(folder: Path) -> None:
    """Freeze 10,000 points, and see whether memory grows with their number."""
    table = Table("frozen points", "s", "points a second", "wanted", "memory beyond the imports")
    for count in (1_000, 10_000):
        code = f"""
import resource, time
from pathlib import Path
from ftrun.sweep import freeze, points
from ftrun.sweep.ledger import Ledger
Path("frozen{count}").mkdir()
words = ["model=tiny", "hardware=cpu", "optimizer.lr=1e-4,2e-4,3e-4,4e-4,5e-4", "seed=range(0,{count // 5})"]
grid = points.grid(words)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.monotonic()
jobs = freeze.freeze(grid.points(), Ledger(Path("frozen{count}").resolve()), 1)
seconds = time.monotonic() - began
print(len(jobs), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
        done = subprocess.run([PYTHON, "-c", code], cwd=folder, env=ENV, check=True, capture_output=True, text=True)
        frozen, seconds, grown = done.stdout.split()
        rate = float(frozen) / float(seconds)
        table.add_row(
            f"{int(frozen):,}", f"{float(seconds):.1f}", f"{rate:.0f}", ">= 300", f"{int(grown) / 1024:.0f} MiB"
        )
    console.print(table)


def runs(folder: Path) -> None:
    """List 10,000 jobs that have ended."""
    frozen = folder / "frozen10000"
    if not frozen.exists():
        freeze(folder)
    line = {"step": 2, "loss": 1.5, "eval_loss": 1.6}
    result = {"status": "completed", "step": 2, "metrics": line, "objective": 1.6, "wall_seconds": 3.0}
    for run in frozen.iterdir():
        if run.is_dir():
            (run / "metrics.jsonl").write_text((json.dumps(line) + "\n") * 20)
            (run / "result.json").write_text(json.dumps(result))
    cpu, wall = min(timed([*FTRUN, "runs", str(frozen)], folder) for _ in range(ROUNDS))
    console.print(f"`ftrun runs` over 10,000 jobs: {wall:.2f} s, {cpu:.2f} s of CPU (wanted: under 2 s)\n")


def slurm(folder: Path) -> None:
    """Submit 1,000 jobs and return; nothing waits for them, and they are cancelled."""
    words = [*RUN, "seed=range(0,1000)", "hydra/launcher=slurm", "hydra.launcher.wait=false", "output_dir=submitted"]
    cpu = cpu_seconds([*FTRUN, "-m", *words], folder)
    console.print(f"submitting 1,000 jobs, freezing included: {cpu:.1f} s of the driver's CPU (wanted: under 10 s)\n")
    subprocess.run([*FTRUN, "cancel", "submitted"], cwd=folder, env=ENV, check=True)


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Return CPU and wall seconds of a command."""
    began = time.monotonic()
    return cpu_seconds(command, folder), time.monotonic() - began


if __name__ == "__main__":
    asked, *rest = [*sys.argv[1:], ""] if len(sys.argv) == 1 else sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        for measure in (jobs, freeze, runs, slurm):
            if asked == measure.__name__ or (not asked and measure is not slurm):
                measure(Path(name))
        if rest[:1] == ["--peer"]:
            peer(Path(name), *rest[1:])
