"""What reading, tokenising and packing cost, beside the tokenizer alone and, where it is installed, LLaMA-Factory.

    python bench/data.py --rows alpaca.json --tokenizer FOLDER                      # all of it, about ten minutes
    python bench/data.py --rows alpaca.json --tokenizer FOLDER --only encode        # or second-start, or packing
    python bench/data.py --rows alpaca.json --tokenizer FOLDER --peer PEER/bin/python

``alpaca.json`` is a list of rows with instruction, input and output, of which 20,000 distinct ones are made; by default
the rows that ship with ftrun, and its own small tokenizer. Every figure is a median over alternating runs, each in a
process of its own, at OMP_NUM_THREADS=1; CPU seconds are user plus system time, imports not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import ENV, alternate
from rich.console import Console
from rich.table import Table

ROWS = 20_000
MILLION = 1_000_000
console = Console(width=140)

# What each measurement does in a process of its own; it prints a JSON object.
COMMON = """
import json, os, resource, sys, time
from pathlib import Path
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from ftrun import config, launch
from ftrun.data import sources
from ftrun.worker import dataset, loading, store
rows, model, processes = sys.argv[1], sys.argv[2], sys.argv[3]
words = ["stage=sft", f"model.path={model}", f"data.path={rows}", f"data.processes={processes}"]
cfg = config.compose(words)
launch.settle(cfg)
tokenizer = loading.tokenizer(cfg)

def cpu():
    of = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in of)

def peak():
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
"""

ENCODE = (
    COMMON
    + """
before, begun, held = cpu(), time.perf_counter(), peak()
(opened,) = sources.resolve(cfg.data, "conversations").train
stored = store.fetch(cfg, tokenizer, opened, lambda text: None)
print(json.dumps({"cpu": cpu() - before, "wall": time.perf_counter() - begun, "kilobytes": peak() - held,
                  "rows": len(stored), "tokens": stored.report.tokens}))
"""
)

CEILING = (
    COMMON
    + """
(opened,) = sources.resolve(cfg.data, "conversations").train
stored = store.fetch(cfg, tokenizer, opened, lambda text: None)
texts = [tokenizer.decode(stored[index]["input_ids"]) for index in range(len(stored))]
before = cpu()
found = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
spent = cpu() - before
equal = sum(one.ids == stored[index]["input_ids"].tolist() for index, one in enumerate(found))
print(json.dumps({"cpu": spent, "rows": len(stored), "equal": equal}))
"""
)

SECOND = (
    COMMON
    + """
cfg.data.packing = type(cfg.data.packing)(sys.argv[4])
cfg.data.max_length = 2048
before = cpu()
found = dataset.load(cfg, tokenizer)
print(json.dumps({"cpu": cpu() - before, "rows": len(found.train), "report": found.report}))
"""
)

PEER = """
import json, os, resource, sys
folder, model, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.environ["DISABLE_VERSION_CHECK"] = "1"
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
arguments = dict(model_name_or_path=model, template="qwen", dataset="rows", dataset_dir=folder, cutoff_len=1024,
                 stage="sft", do_train=True, finetuning_type="lora", output_dir=folder + "/out", overwrite_cache=True,
                 preprocessing_num_workers=processes if processes > 1 else None, use_cpu=True, report_to="none")
model_args, data_args, training_args, _, _ = get_train_args(arguments)
module = load_tokenizer(model_args)
template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
def cpu():
    of = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in of)
before = cpu()
found = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)
print(json.dumps({"cpu": cpu() - before, "rows": len(found["train_dataset"])}))
"""


def measured(code: str, *words: str, python: str = sys.executable, **env: str) -> dict[str, Any]:
    """Run a piece of code in a process of its own, and return what it printed."""
    done = subprocess.run([python, "-c", code, *words], env=ENV | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def distinct(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Make rows that are all different of rows with instruction, input and output: a word more in each text."""
    draw = random.Random(0)
    known = sorted({word for row in rows for word in row["output"].split()})
    made = []
    for number, row in zip(range(count), itertools.cycle(rows)):
        words = row["output"].split(" ")
        words.insert(draw.randrange(len(words) + 1), draw.choice(known))
        made.append(
            row | {"instruction": f"{draw.choice(known)} {number} {row['instruction']}", "output": " ".join(words)}
        )
    return made


def demo_rows() -> list[dict[str, Any]]:
    """Return the conversations that ship with ftrun as rows with instruction and output."""
    from ftrun.data import places, read

    (file,) = places.find("data.path", "demo:identity").train
    messages = [row.value["messages"] for row in read.read(file)]
    return [{"instruction": one[-2]["content"], "input": "", "output": one[-1]["content"]} for one in messages]


def encode(folder: Path, rows: list[dict[str, Any]], tokenizer: str, peer: str | None) -> None:
    """Twenty thousand rows from a file to a finished cache, masks included."""
    file = folder / "rows.json"
    file.write_text(json.dumps(distinct(rows, ROWS)))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    count = itertools.count()
    walls: dict[str, list[float]] = {"1": [], "2": []}
    seen: dict[str, Any] = {}

    def ours(processes: str) -> float:
        found = measured(ENCODE, str(file), tokenizer, processes, FTRUN_CACHE=str(folder / f"cache{next(count)}"))
        walls[processes].append(found["wall"])
        seen["ours"] = found
        return float(found["cpu"])

    def ceiling() -> float:
        seen["ceiling"] = measured(CEILING, str(file), tokenizer, "1", FTRUN_CACHE=str(folder / "kept"))
        return float(seen["ceiling"]["cpu"])

    measures = {
        "tokenizers, one batch of whole texts": ceiling,
        "ftrun": lambda: ours("1"),
        "ftrun, 2 processes": lambda: ours("2"),
    }
    if peer:
        measures["LLaMA-Factory"] = lambda: float(
            measured(PEER, str(folder), tokenizer, "1", python=peer, HF_HOME=str(folder / f"hf{next(count)}"))["cpu"]
        )
    found = alternate(measures)
    medians = {name: statistics.median(values) for name, values in found.items()}
    table = Table("20,000 rows, from the file to the cache", "CPU s", "us a row", "tokenizers' CPU / this")
    for name, median in medians.items():
        ratio = medians["tokenizers, one batch of whole texts"] / median
        table.add_row(name, f"{median:.2f}", f"{median / ROWS * 1e6:.0f}", f"{ratio:.2f}")
    console.print(table)
    speedup = statistics.median(walls["1"]) / statistics.median(walls["2"])
    console.print(f"{seen['ours']['tokens']:,} tokens; wall time of 1 process / of 2: {speedup:.2f}")
    console.print(f"rows equal to the whole text tokenised at once: {seen['ceiling']['equal']:,} of {ROWS:,}")
    console.print(f"memory beyond the imports: {seen['ours']['kilobytes'] / 1024:.0f} MiB\n")


def second_start(folder: Path, rows: list[dict[str, Any]], tokenizer: str, _: str | None) -> None:
    """A million rows that are tokenised already."""
    file = folder / "million.jsonl"
    short = [{**row, "output": " ".join(row["output"].split()[:20])} for row in rows]
    with file.open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in distinct(short, MILLION))
    cache = str(folder / "cache")
    table = Table("1,000,000 rows tokenised before", "CPU s", "wanted")
    for packing in ("none", "best_fit"):
        measured(SECOND, str(file), tokenizer, "2", packing, FTRUN_CACHE=cache)
        spent = [measured(SECOND, str(file), tokenizer, "2", packing, FTRUN_CACHE=cache)["cpu"] for _ in range(10)]
        table.add_row(f"data.packing={packing}", f"{statistics.median(spent):.2f}", "< 1")
    console.print(table)


def packing(folder: Path, rows: list[dict[str, Any]], tokenizer: str, _: str | None) -> None:
    """A million lengths as those of the rows, into sequences of 2048 tokens."""
    import time

    import numpy as np

    from ftrun.worker import pack

    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    code = ENCODE.replace('"rows": len(stored)', '"lengths": stored.lengths.tolist()')
    lengths = np.array(measured(code, str(file), tokenizer, "1", FTRUN_CACHE=str(folder / "cache"))["lengths"])
    drawn = np.random.default_rng(0).choice(lengths, MILLION)
    spent = []
    for _ in range(10):
        begun = time.process_time()
        bins = pack.best_fit(drawn, 2048)
        spent.append(time.process_time() - begun)
    table = Table("packing 1,000,000 lengths at 2048", "measured", "wanted")
    table.add_row("CPU s", f"{statistics.median(spent):.2f}", "< 5")
    table.add_row("efficiency", f"{bins.efficiency(2048):.4f}", ">= 0.98")
    console.print(table)


def main() -> None:
    """Measure what was asked for."""
    parts = {"encode": encode, "second-start": second_start, "packing": packing}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="a JSON list of rows with instruction, input and output")
    parser.add_argument("--tokenizer", default="builtin:tiny", help="a model's folder")
    parser.add_argument("--peer", help="the Python of an environment with LLaMA-Factory")
    parser.add_argument("--only", choices=parts)
    asked = parser.parse_args()
    rows = json.loads(asked.rows.read_text()) if asked.rows else demo_rows()
    console.print(f"python {' '.join(sys.argv)}\n", markup=False)
    for name, part in parts.items():
        if asked.only in (None, name):
            with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
                part(Path(folder), rows, asked.tokenizer, asked.peer)


if __name__ == "__main__":
    main()
