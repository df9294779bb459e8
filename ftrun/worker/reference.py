"""What the reference model says: computed once and kept beside the rows, or in each step beside the policy."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
import transformers
from torch import nn

from ftrun import events
from ftrun.anchor import Anchored, Reference, of_reference
from ftrun.errors import ConfigError, Problem
from ftrun.model import identity
from ftrun.worker import loading, noise, parameters, sampling, sharding
from ftrun.worker.batches import Batch, is_flat
from ftrun.worker.head import Head
from ftrun.worker.store import locked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ftrun.worker.dataset import Selected
    from ftrun.worker.stored import StoredRows
    from ftrun.worker.training import RunTrainer

VERSION = 1
"""Raised when the same model says something else of the same rows than before."""

Values = Callable[[nn.Module, Batch], torch.Tensor]
"""What is wanted of a model: of a batch of n rows, values of shape (k, n)."""


class Said(Protocol):
    """What the reference says of the rows of a batch."""

    def __call__(self, batch: Batch, of: str | None = None) -> torch.Tensor:
        """Return values of shape (k, n); ``of`` is the evaluation set that the batch is of, or None in training."""


def said(trainer: RunTrainer, values: Values, count: int) -> Said:
    """Return what tells the values of the reference that a stage's config asks for. Call it before the first step.

    Args:
        trainer: Of a stage whose rows have an ``index``.
        values: What is wanted of a model.
        count: How many values a row has.
    """
    stage = cast(Anchored, trainer.run.cfg.stage)
    if stage.reference in (Reference.copy, Reference.adapter_off):
        return Beside(trainer, values)
    return Kept(trainer, values, count)


class Kept:
    """Values of all rows, computed before the first step: no second model is in memory while training."""

    def __init__(self, trainer: RunTrainer, values: Values, count: int) -> None:
        events.send("phase", text="computing the reference's log-probabilities")
        trainer.model.to(trainer.args.device)
        other = _other_model(trainer)
        key = _key(trainer, with_policy=other is None)
        with _called(trainer, other or trainer.model, adapter_off=not other and trainer.run.cfg.adapter.off_is_start):

            def of(rows: Selected) -> torch.Tensor:
                return _of_rows(trainer, rows, lambda batch: values(other or trainer.model, batch), count, key)

            self._train = of(trainer.run.rows.train)
            self._evals = {name: of(rows) for name, rows in trainer.run.rows.evals.items()}

    def __call__(self, batch: Batch, of: str | None = None) -> torch.Tensor:
        """Look them up."""
        return (self._train if of is None else self._evals[of])[:, batch["index"]]


class Beside:
    """Values that the reference computes of each batch as it comes."""

    def __init__(self, trainer: RunTrainer, values: Values) -> None:
        self._live, self._values = Live(trainer), values

    def __call__(self, batch: Batch, of: str | None = None) -> torch.Tensor:
        """Have the reference compute them."""
        with self._live.model() as model:
            return self._values(model, batch)


class Live:
    """A reference model at hand while training. Make it before the first step, and before a checkpoint is loaded.

    Of the policy as it was, only the weights that train are held twice, and none where the adapter can be switched off.
    """

    def __init__(self, trainer: RunTrainer) -> None:
        self._trainer, cfg = trainer, trainer.run.cfg
        trainer.model.to(trainer.args.device)
        kind = cast(Anchored, cfg.stage).reference
        self._adapter_off = kind is Reference.adapter_off or (kind is Reference.auto and cfg.adapter.off_is_start)
        self._other = _other_model(trainer)
        self._start: dict[str, torch.Tensor] = {}
        if not self._adapter_off and self._other is None:
            self._start = {name: weight.detach().clone() for name, weight in parameters.trained(trainer.model)}
        self.head = self._head_as_it_is()

    @contextlib.contextmanager
    def model(self) -> Iterator[nn.Module]:
        """Give the reference, to be called without a gradient, in the run's precision."""
        policy = self._trainer.model
        start = self._swapped(policy) if self._start else contextlib.nullcontext()
        with _called(self._trainer, self._other or policy, adapter_off=self._adapter_off), start:
            yield self._other or policy

    def _head_as_it_is(self) -> Head:
        """Return the reference's head, which can be called while the policy is what it has become."""
        plain = self._other or self._trainer.model
        module = plain.get_output_embeddings()
        if any(weight.requires_grad for weight in module.parameters()):
            module = copy.deepcopy(module).requires_grad_(False)
        return Head(plain, module)

    @contextlib.contextmanager
    def _swapped(self, policy: nn.Module) -> Iterator[None]:
        """While inside, have the weights that train be what they were."""
        # Not all of them may train at this time: optimizers let blocks take turns.
        if sharding.is_cut(policy):
            with sharding.swapped(policy, self._start):
                yield
            return
        weights = {name: weight for name, weight in policy.named_parameters() if name in self._start}
        now = {name: weight.data for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.data = self._start[name]
            torch.clear_autocast_cache()  # it holds casts by tensor, whatever that tensor now holds
            yield
        finally:
            for name, weight in weights.items():
                weight.data = now[name]
            torch.clear_autocast_cache()


@contextlib.contextmanager
def _called(trainer: RunTrainer, model: nn.Module, *, adapter_off: bool) -> Iterator[None]:
    """While inside, have a model compute without dropout and gradients, in the run's precision."""
    off = trainer.model.disable_adapter() if adapter_off else contextlib.nullcontext()
    with noise.off(model), torch.no_grad(), trainer.accelerator.autocast(), off:
        yield


def _other_model(trainer: RunTrainer) -> PreTrainedModel | None:
    """Load the other model that the reference is, if it is another one.

    Raises:
        ConfigError: It cannot be loaded, or has another vocabulary.
    """
    cfg = trainer.run.cfg
    stage = cast(Anchored, cfg.stage)
    if stage.reference is not Reference.model:
        return None
    events.send("phase", text="loading the reference model")
    with of_reference():
        theirs = dataclasses.replace(cfg, model=stage.reference_model(cfg))
        _refuse_other_tokens(trainer, loading.tokenizer(theirs))
        other = loading.model(theirs, trainer.run.tokenizer)
    return other.requires_grad_(False).eval().to(trainer.args.device)


def _refuse_other_tokens(trainer: RunTrainer, theirs: PreTrainedTokenizerBase) -> None:
    known = theirs.get_vocab()
    ours = trainer.run.tokenizer.get_vocab()
    if other := [token for token, number in ours.items() if known.get(token) != number]:
        message = f"its tokenizer is another one: to it, {other[0]!r} is not token {ours[other[0]]}"
        raise ConfigError([Problem("model.path", message, "a model of the same family as the one that trains")])


def _of_rows(
    trainer: RunTrainer, rows: Selected, values: Callable[[Batch], torch.Tensor], count: int, key: str
) -> torch.Tensor:
    """Return the values of rows, of shape (count, rows)."""
    found = torch.zeros(count, len(rows), device=trainer.args.device)
    for number, stored in enumerate(rows.stores):
        mine = rows.which == number
        if mine.any():
            of_store = _of_store(trainer, stored, rows.index[mine], values, count, key)
            found[:, torch.from_numpy(mine)] = of_store[:, torch.from_numpy(rows.index[mine])].to(found.device)
    return found


def _of_store(
    trainer: RunTrainer,
    stored: StoredRows,
    wanted: np.ndarray[Any, Any],
    values: Callable[[Batch], torch.Tensor],
    count: int,
    key: str,
) -> torch.Tensor:
    """Return the values of a source's rows, of shape (count, all its rows), of which those of ``wanted`` are numbers.

    What was computed before is found beside the rows. The batches are those of the whole source, in file order, so that
    a value has the same bits whoever computes it first, and whichever rows of the source a run holds out.
    """
    run, place = trainer.run, stored.place / f"reference-{key}.npy"
    with _locked(place) if run.is_main else contextlib.nullcontext():
        trainer.accelerator.wait_for_everyone()
        known = _read(place, (count, len(stored)))
        lacking = np.isnan(known[0, wanted])
        needed = set(wanted[lacking].tolist())
        budget = run.budget(padded=not is_flat(run.cfg))
        batches = sampling.in_file_order(run.tokens_in_a_batch(stored), budget)
        mine = [batch for batch in batches if needed.intersection(batch)][run.rank :: run.world_size]
        found = torch.zeros(known.shape, device=trainer.args.device)
        computed = torch.zeros(len(stored), device=trainer.args.device)
        for batch in mine:
            events.mark()
            collated = trainer.on_device(trainer.collate([_row(stored, index) for index in batch]))
            found[:, batch], computed[batch] = values(collated), 1.0
        found, computed = trainer.accelerator.reduce(found).cpu(), trainer.accelerator.reduce(computed).cpu()
        whole = torch.where(computed > 0, found, torch.from_numpy(known))
        if run.is_main and needed:
            _write(place, whole)
        trainer.accelerator.wait_for_everyone()
    return whole


def _row(stored: StoredRows, index: int) -> dict[str, Any]:
    return stored[index] | {"index": index, "extra": stored.extra_of(index)}


def _key(trainer: RunTrainer, *, with_policy: bool) -> str:
    """Return a hash of everything but the rows that the values depend on.

    Where the adapter can be switched off the values are the base's: runs with other adapters share them.
    """
    cfg = trainer.run.cfg
    stage = cast(Anchored, cfg.stage)
    adapter = [] if cfg.adapter.off_is_start or not with_policy else [dataclasses.asdict(cfg.adapter), cfg.seed]
    if with_policy and cfg.adapter.trains_base_weights:
        adapter = []  # before the first step it has changed nothing
    model = cfg.model if with_policy else stage.reference_model(cfg)
    train = cfg.train
    material = [
        VERSION, torch.__version__, transformers.__version__, identity(model), adapter,
        str(next(trainer.model.parameters()).dtype), model.dtype, cfg.model.attention, dataclasses.asdict(cfg.quant),
        getattr(stage, "ld_alpha", 1.0),
        train.precision, cfg.hardware.device, train.micro_batch_size, train.micro_batch_tokens, train.padding_free,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(material, sort_keys=True, default=str).encode()).hexdigest()[:24]


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Be the only one who computes these values, where locks can be made."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            held.enter_context(locked(Path(f"{place}.lock")))
        yield


def _read(place: Path, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Return the values that are kept, NaN where there is none."""
    try:
        known = np.load(place, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        known = None
    return known if known is not None and known.shape == shape else np.full(shape, np.nan, np.float32)


def _write(place: Path, values: torch.Tensor) -> None:
    """Keep values, where that is allowed."""
    partial = place.with_name(f".{place.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        with partial.open("wb") as file:
            np.save(file, values.numpy())
        partial.replace(place)
