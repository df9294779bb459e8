"""How much ftrun costs before and while it trains, beside a bare script that does the same training.

    python bench/startup.py            # all of it, about ten minutes
    python bench/startup.py driver     # only the commands that start no worker
    python bench/startup.py first-step # from the command to the first optimizer step
    python bench/startup.py step       # the step time on the 135M model

Every figure is a median over alternating runs at OMP_NUM_THREADS=1; CPU seconds are user plus system time of a process
and all that it started.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ENV, alternate, cpu_seconds
from rich.console import Console
from rich.table import Table

PYTHON = sys.executable
FTRUN = [str(Path(PYTHON).with_name("ftrun"))]
SMALL = ["model=tiny", "debug=smoke", "train.max_steps=1", "stage.num_samples=0"]

console = Console(width=140)


def driver(folder: Path) -> None:
    """The commands that start no worker."""
    many = folder / "many" / "ftrun_plugins" / "optimizer"
    many.mkdir(parents=True)
    for number in range(100):
        (many / f"foo{number}.py").write_text(PLUGIN.replace("NUMBER", str(number)))
    show = ["show", "stage=sft", "model=qwen2", "adapter=lora"]
    commands = {"ftrun --help": ["--help"], "ftrun list": ["list"], f"ftrun {' '.join(show)}": show}
    measures = {name: (lambda words=words: cpu_seconds([*FTRUN, *words], folder)) for name, words in commands.items()}
    with_more = f"ftrun {' '.join(show)}, 100 more plugin files"
    measures[with_more] = lambda: cpu_seconds([*FTRUN, *show], folder, PYTHONPATH=str(folder / "many"))
    found = alternate(measures)
    table = Table("command", "CPU s (median)", "min", "max", "wanted")
    wanted = {"ftrun --help": "<= 0.15", "ftrun list": "<= 0.15", with_more: "within 10 % of the above"}
    for name, values in found.items():
        table.add_row(
            name,
            f"{statistics.median(values):.3f}",
            f"{min(values):.3f}",
            f"{max(values):.3f}",
            wanted.get(name, "<= 0.35"),
        )
    console.print(table)
    plain, more = statistics.median(found[f"ftrun {' '.join(show)}"]), statistics.median(found[with_more])
    console.print(f"with 100 more plugin files: {more / plain:.3f} times\n")


PLUGIN = '''"""An optimizer."""
from dataclasses import dataclass
from ftrun.plugin import Optimizer, register

@register
@dataclass(kw_only=True)
class Foo(Optimizer):
    """Foo."""
    name: str = "fooNUMBER"
'''

# The same training without ftrun: what it needs of torch, transformers and peft, and the same trainer.
BARE = """
import json, os, sys, time
import torch
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

path, steps, rows_file, times_file, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
torch.set_num_threads(1)
set_seed(42)
rows = json.load(open(rows_file))
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
weights = [p for p in model.parameters() if p.requires_grad]

class Clock(TrainerCallback):
    def __init__(self): self.times, self.first = [], None
    def on_step_end(self, *args, **kwargs):
        self.first = self.first or time.process_time()
        self.times.append(time.perf_counter())

clock = Clock()
arguments = TrainingArguments(
    output_dir=out, per_device_train_batch_size=4, max_steps=steps, learning_rate=5e-4, lr_scheduler_type="cosine",
    use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=5, disable_tqdm=True,
    remove_unused_columns=False, dataloader_pin_memory=False,
)
trainer = Trainer(
    model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer),
    optimizers=(AdamW(weights, lr=5e-4, weight_decay=0.0, fused=True), None), callbacks=[clock],
)
trainer.train()
json.dump({"first_step_cpu": clock.first, "ends": clock.times}, open(times_file, "w"))
"""

# The same clock inside ftrun: an optimizer plugin that is AdamW and notes when each step ends.
CLOCK = '''"""AdamW that notes the time of each step."""
import json, time
from dataclasses import dataclass
from ftrun.plugin import register
from ftrun_plugins.optimizer.adamw import AdamW

@register
@dataclass(kw_only=True)
class Clock(AdamW):
    """AdamW with a clock."""
    name: str = "clock"

    def callbacks(self, model, run):
        from transformers import TrainerCallback

        class Note(TrainerCallback):
            times, first = [], None
            def on_step_end(self, *args, **kwargs):
                self.first = self.first or time.process_time()
                self.times.append(time.perf_counter())
            def on_train_end(self, *args, **kwargs):
                noted = {"first_step_cpu": self.first, "ends": self.times}
                (run.folder / "times.json").write_text(json.dumps(noted))

        return [Note()]
'''


def encoded_rows(folder: Path, model: str, target: Path) -> Path:
    """Write the tokens that ftrun trains on, and return the folder of the model it trains."""
    code = f"""
import json, sys
from pathlib import Path
from ftrun import launch, record
from ftrun.config import Config
from ftrun.worker import dataset, loading
words = ["model={model}", "hardware=cpu", "output_dir={target}.run"]
cfg = Config.load(launch.freeze(launch.check(words), words) / record.RUN)
tokenizer = loading.tokenizer(cfg)
rows = dataset.load(cfg, tokenizer).train
listed = [{{name: values.tolist() for name, values in rows[index].items()}} for index in range(len(rows))]
Path("{target}").write_text(json.dumps(listed))
loaded = loading.model(cfg, tokenizer)
loaded.save_pretrained("{target}.model")
tokenizer.save_pretrained("{target}.model")
"""
    subprocess.run([PYTHON, "-c", code], cwd=folder, env=ENV, check=True, capture_output=True)
    return Path(f"{target}.model")


def first_step(folder: Path) -> None:
    """From the command to the end of the first optimizer step, on a model whose own cost is next to nothing."""
    from ftrun import forkserver

    script, rows, clock = folder / "bare.py", folder / "tiny.json", folder / "clock.py"
    script.write_text(BARE)
    clock.write_text(CLOCK)
    model = encoded_rows(folder, "tiny", rows)
    times = folder / "times.json"
    command = [PYTHON, str(script), str(model), "1", str(rows), str(times), str(folder / "bare")]
    words = [*SMALL, f"plugins=[{clock}]", "optimizer=clock"]
    address = str(folder / "server")
    os.environ.update(ENV)
    server = forkserver.start(address)

    def bare() -> float:
        cpu_seconds(command, folder)
        return float(json.loads(times.read_text())["first_step_cpu"])

    def worker(run: Path) -> float:
        return float(json.loads((run / "times.json").read_text())["first_step_cpu"])

    driver_alone = []

    def forked() -> float:
        run = fresh(folder / "forked")
        spent = cpu_seconds([*FTRUN, *words, f"output_dir={run}"], folder, FTRUN_FORK_SERVER=address)
        driver_alone.append(spent)  # the worker is the server's child, so this is the driver's share
        return spent + worker(run)

    def cold() -> float:
        run = fresh(folder / "cold")
        cpu_seconds([*FTRUN, *words, f"output_dir={run}"], folder)
        return worker(run) + (driver_alone[-1] if driver_alone else 0.0)

    found = alternate({"bare script": bare, "ftrun, from the fork server": forked, "ftrun, cold": cold})
    server.terminate()
    base = statistics.median(found["bare script"])
    table = Table("to the first step of model=tiny", "CPU s (median)", "min", "max", "of the bare script", "wanted")
    wanted = {"bare script": "", "ftrun, cold": "<= 1.3", "ftrun, from the fork server": "<= 1 s"}
    for name, values in found.items():
        median = statistics.median(values)
        row = [f"{value:.2f}" for value in (median, min(values), max(values), median / base)]
        table.add_row(name, *row, wanted[name])
    console.print(f"ftrun {' '.join(SMALL)}   (driver and worker together)")
    console.print(table)
    console.print(f"of it the driver: {statistics.median(driver_alone):.2f} s\n")


def fresh(run: Path) -> Path:
    """Return a run folder that is not there."""
    shutil.rmtree(run, ignore_errors=True)
    return run


def step(folder: Path, steps: int = 12) -> None:
    """The step time on the 135M model."""
    script, rows, clock = folder / "bare.py", folder / "smollm2.json", folder / "clock.py"
    script.write_text(BARE)
    clock.write_text(CLOCK)
    model = encoded_rows(folder, "smollm2", rows)
    words = ["model=smollm2", f"plugins=[{clock}]", "optimizer=clock", f"train.max_steps={steps}", "hardware=cpu"]
    words += ["stage.num_samples=0"]

    def intervals(times: Path) -> float:
        ends = json.loads(times.read_text())["ends"]
        return statistics.median(later - earlier for earlier, later in itertools.pairwise(ends[1:]))

    def bare() -> float:
        command = [
            PYTHON,
            str(script),
            str(model),
            str(steps),
            str(rows),
            str(folder / "times.json"),
            str(folder / "bare"),
        ]
        cpu_seconds(command, folder)
        return intervals(folder / "times.json")

    def ours() -> float:
        run = fresh(folder / "ours")
        cpu_seconds([*FTRUN, *words, f"output_dir={run}"], folder)
        return intervals(run / "times.json")

    found = alternate({"bare script": bare, "ftrun": ours})
    base = statistics.median(found["bare script"])
    table = Table(
        "step of SmolLM2-135M, LoRA, 4 rows", "wall s (median of medians)", "min", "max", "of the bare script", "wanted"
    )
    for name, values in found.items():
        median = statistics.median(values)
        table.add_row(
            name,
            f"{median:.3f}",
            f"{min(values):.3f}",
            f"{max(values):.3f}",
            f"{median / base:.3f}",
            "<= 1.03" if name == "ftrun" else "",
        )
    console.print(f"ftrun {' '.join(words)}", markup=False)
    console.print(table)


def main() -> None:
    """Measure what was asked for."""
    parts = {"driver": driver, "first-step": first_step, "step": step}
    for name in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder))


if __name__ == "__main__":
    main()
