"""The losses of sft through the command line, against the formulas on all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ftrun import record
from ftrun.config import Config
from ftrun.worker import dataset, loading

RUN = (
    "stage=sft", "model=tiny", "adapter=full", "data.rows=8", "train.micro_batch_size=4", "train.shuffle=false",
    "train.log_every=1", "train.warmup=0", "optimizer.lr=1e-2", "stage.num_samples=0",
)  # fmt: skip


def logits_of(folder: Any, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) in float64, and labels (N,), of the first rows of a run, one row at a time, before it trained."""
    cfg = Config.load(folder / record.RUN)
    tokenizer = loading.tokenizer(cfg)
    rows, model = dataset.load(cfg, tokenizer).train, loading.model(cfg, tokenizer)
    logits, targets = [], []
    for index in range(count):
        labels = torch.tensor(rows[index]["labels"]).long()[1:]
        with torch.no_grad():
            found = model(torch.tensor(rows[index]["input_ids"])[None].long()).logits[0, :-1].double()
        logits.append(found[labels != -100])
        targets.append(labels[labels != -100])
    return torch.cat(logits), torch.cat(targets)


def nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -(logits - logits.exp().sum(-1, keepdim=True).log()).gather(-1, targets[:, None])[:, 0]


def smoothed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    everywhere = -(logits - logits.exp().sum(-1, keepdim=True).log()).mean(-1)
    return 0.9 * nll(logits, targets) + 0.1 * everywhere


def dft(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nll(logits, targets) * (-nll(logits, targets)).exp()


def eaft(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    likely = logits.sort(-1, descending=True).values[:, :20].exp()
    share = likely / likely.sum(-1, keepdim=True)
    return nll(logits, targets) * (-(share * share.log()).sum(-1) / 3) ** 2


FORMULAS = {
    "nll": (nll, ()),
    "smoothed": (smoothed, ("stage.label_smoothing=0.1",)),
    "dft": (dft, ("stage.loss=dft",)),
    "eaft": (eaft, ("stage.loss=eaft", "stage.eaft_alpha=2")),
    "asft": (dft, ("stage.loss=asft",)),  # at first it does not differ from the reference
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_first_loss_is_the_formula(ftrun, name):
    formula, words = FORMULAS[name]
    done = ftrun(*RUN, *words, "train.max_steps=2").sees(0)
    expected = float(formula(*logits_of(done.folder)).mean())
    assert done.losses[0] == pytest.approx(expected, rel=2e-6)
    assert done.losses[1] != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("reference", ["auto", "copy", "model"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_asft_stays_closer_to_the_reference_the_more_it_weighs(ftrun, reference, adapter):
    words = [f"adapter={adapter}", "stage.loss=asft", f"stage.reference={reference}", "train.max_steps=4"]
    if reference == "model":
        words.append("stage.reference_path=builtin:tiny")
    free, held = (ftrun(*RUN, *words, f"stage.asft_alpha={alpha}").sees(0) for alpha in (0.0, 100.0))
    start = free.metrics[0]["eval_perplexity"]
    moved = [abs(done.metrics[-1]["eval_perplexity"] - start) for done in (free, held)]
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage.eaft_alpha=2"], "stage.eaft_alpha: stage.loss=nll does not read it"),
        (["stage.loss=dft", "stage.label_smoothing=0.1"], "stage.label_smoothing: stage.loss=dft does not read it"),
        (["stage.loss=dft", "stage.reference=copy"], "stage.reference: stage.loss=dft does not read it"),
        (["stage.loss=asft", "stage.reference=precomputed"], "stage.reference: "),
    ],
)
def test_a_key_that_the_loss_does_not_read_is_refused(driver, words, message):
    assert message in driver("check", "model=tiny", *words).sees(2).err
