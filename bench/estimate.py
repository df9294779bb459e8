"""How far the estimate of ``ftrun check`` is from what two real steps take: memory, and the rough time.

    python bench/estimate.py                # all cases, about four minutes on two cores
    python bench/estimate.py lora           # those that have a word in their name
    python bench/estimate.py --glibc        # with glibc's allocator as it is, which keeps what is freed for later

Random models of several shapes train on this machine's CPU, on rows of full length, each in a process forked from a
server, which is what ``ftrun check --probe`` does. What a process grows by is compared with the estimate.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ftrun import estimate, forkserver, launch

console = Console(width=160)

RETURN_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Has glibc give memory back at once: it keeps what is freed for later, in which one would find no peak of anything."""

MIB = 2**20
GRADIENT = "train.gradient_checkpointing=true"
MODELS = {
    "llama": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8},
    "qwen2": {
        "hidden_size": 384,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "gpt2": {"n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 2048},
}
CASES = [
    "model=tiny adapter=full data.max_length=1024 train.micro_batch_size=8",
    "model=tiny adapter=lora data.max_length=1024 train.micro_batch_size=16",
    "llama adapter=full data.max_length=128 train.micro_batch_size=2",
    "llama adapter=full data.max_length=128 train.micro_batch_size=8",
    "llama adapter=full data.max_length=512 train.micro_batch_size=2",
    f"llama adapter=full data.max_length=512 train.micro_batch_size=2 {GRADIENT}",
    "llama adapter=full data.max_length=128 train.micro_batch_size=2 train.grad_accumulation=2",
    "llama adapter=full data.max_length=128 train.micro_batch_size=4 train.precision=bf16",
    "llama adapter=lora data.max_length=128 train.micro_batch_size=2",
    "llama adapter=lora data.max_length=512 train.micro_batch_size=2",
    f"llama adapter=lora data.max_length=512 train.micro_batch_size=2 {GRADIENT}",
    "llama adapter=full optimizer=galore data.max_length=128 train.micro_batch_size=2",
    f"llama adapter=full optimizer=galore data.max_length=512 train.micro_batch_size=2 {GRADIENT}",
    "llama adapter=full optimizer=lomo data.max_length=128 train.micro_batch_size=2",
    "llama adapter=full optimizer=badam data.max_length=128 train.micro_batch_size=2",
    "llama adapter=lora stage=dpo data.max_length=128 train.micro_batch_size=2",
    "llama adapter=full model.attention=eager data.max_length=128 train.micro_batch_size=4",
    "qwen2 adapter=full data.max_length=128 train.micro_batch_size=4",
    "qwen2 adapter=freeze data.max_length=128 train.micro_batch_size=4",
    "gpt2 adapter=full data.max_length=128 train.micro_batch_size=4",
    f"gpt2 adapter=lora data.max_length=128 train.micro_batch_size=8 {GRADIENT}",
]


def make(folder: Path) -> None:
    """Write the models, random ones, and rows longer than any run takes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftrun.worker import builtin

    tokenizer = builtin.tokenizer()
    for name, shape in MODELS.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **shape)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    text = "The quick brown fox jumps over the lazy dog. " * 400
    message = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
    pair = {"prompt": message[:1], "chosen": message[1:], "rejected": [{"role": "assistant", "content": text[1:]}]}
    for file, row in (("rows", {"messages": message}), ("pairs", pair)):
        (folder / f"{file}.jsonl").write_text((json.dumps(row) + "\n") * 32)


def measure(folder: Path, case: str) -> list[str]:
    """Return a row of the table."""
    first, *words = case.split()
    model = first if "=" in first else f"model.path={folder / first}"
    rows = "pairs" if "stage=dpo" in words else "rows"
    cfg = launch.check(
        [model, *words, f"data.path={folder / rows}.jsonl", "hardware=cpu", f"output_dir={folder / 'x'}"]
    )
    (found,) = estimate._ask([cfg])
    probed = estimate._probe(cfg)
    assert found.peak is not None, found.unknown
    assert found.flops is not None
    assert found.rate is not None
    tokens = cfg.train.grad_accumulation * found.rows * found.length
    rough = tokens * found.flops / found.rate
    shown = [size and f"{size / MIB:.0f}" for size in (found.weights, found.gradients, found.state, found.activations)]
    return [
        case.replace("train.", "").replace("data.", ""),
        *(str(one or 0) for one in shown),
        f"{found.peak / MIB:.0f}",
        f"{probed.peak / MIB:.0f}",
        f"{found.peak / probed.peak - 1:+.0%}",
        f"{rough:.2f}",
        f"{probed.step_seconds:.2f}",
        f"{rough / probed.step_seconds:.0%}",
    ]


def main() -> None:
    """Print the table."""
    cases = [case for case in CASES if all(word in case for word in sys.argv[1:] if word != "--glibc")]
    columns = ("", "weights", "gradients", "state", "activations", "estimated", "measured", "off")
    table = Table(*columns, "floor, s", "a step, s", "of it", title="MiB")
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= RETURN_MEMORY if "--glibc" not in sys.argv else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        server = forkserver.start(str(folder / "server"))
        os.environ[forkserver.VARIABLE] = str(folder / "server")
        os.environ["FTRUN_CACHE"] = str(folder / "cache")
        try:
            for case in cases:
                table.add_row(*(row := measure(folder, case)))
                print(*row, file=sys.stderr)
        finally:
            server.terminate()
            server.wait()
    console.print(table)


if __name__ == "__main__":
    main()
