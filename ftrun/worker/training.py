"""What every training stage shares: the trainer around transformers' loop, checkpoints, records, and how a run ends."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import seed_worker

from ftrun import events, record
from ftrun.config import Config
from ftrun.errors import ConfigError, Problem, RunFailed
from ftrun.hardware import CheckpointForm, Sharding
from ftrun.record import Result
from ftrun.worker import dataset, ending, loading, pack, parameters, sampling, schedule, sharding, stop
from ftrun.worker.arguments import arguments
from ftrun.worker.batches import (
    Batch,
    Collate,
    collator,
    is_flat,
    model_inputs,
    num_tokens,
    sequence_collator,
    shares_sequences,
    with_places,
)
from ftrun.worker.best import Best
from ftrun.worker.conduct import Conduct
from ftrun.worker.guard import Guard
from ftrun.worker.head import Head
from ftrun.worker.media import processor
from ftrun.worker.optim.ruled import Layerwise, Ruled
from ftrun.worker.stream import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ftrun.worker.dataset import Rows

_STATE = "ftrun_state.json"
"""In each checkpoint: what transformers' own state does not carry over a resume."""


class Run:
    """What a plugin may know of the run it takes part in. Read-only."""

    def __init__(self, cfg: Config, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
        self.cfg = cfg
        self.rows = rows
        self.tokenizer = tokenizer
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self.media = processor.of(tokenizer)
        """The processor of the model, if that takes more than text."""

        self.folder = cfg.folder
        self.name = self.folder.name
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.is_main = self.rank == 0
        self.unique_id: str = json.loads((self.folder / record.MANIFEST).read_text())["id"]
        """The same for a run and its resumption, for trackers that can go on with a run."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.cfg.train.max_steps or self.epoch_batches.total_steps

    @cached_property
    def epoch_batches(self) -> sampling.EpochBatches:
        """The training rows that this process draws, batch by batch."""
        return sampling.EpochBatches(
            self.tokens_in_a_batch(self.rows.train),
            self.budget(padded=not is_flat(self.cfg)),
            self.cfg.train,
            seed=self.cfg.seed,
            rank=self.rank,
            world_size=self.world_size,
        )

    def budget(self, *, padded: bool) -> sampling.Budget:
        """Return how many rows a batch takes."""
        return sampling.Budget(self.cfg.train.micro_batch_size, self.cfg.train.micro_batch_tokens, padded)

    def in_file_order(self, rows: Any, *, padded: bool) -> Iterator[list[Any]]:
        """Yield this process's share of a data set in batches of rows, each row once over all processes."""
        lengths, budget = self.tokens_in_a_batch(rows), self.budget(padded=padded)
        ranks = range(self.world_size) if self.cfg.hardware.sharding.cuts_weights else [self.rank]
        shares = {
            rank: [*sampling.in_file_order(lengths, budget, rank=rank, world_size=self.world_size)] for rank in ranks
        }
        mine, most = shares[self.rank], max(map(len, shares.values()))
        # Where a forward pass takes all processes, those with fewer batches go along with empty ones.
        for batch in [*mine, *[[]] * (most - len(mine))]:
            yield [rows[index] for index in batch]

    def tokens_in_a_batch(self, rows: Any) -> sampling.Array:
        """Return how many tokens each row adds to a batch: of a pair, both sides as long as the longer one."""
        return np.asarray(rows.lengths) * (2 if self.cfg.stage.rows == "pairs" else 1)

    def batches(self, count: int) -> list[Batch]:
        """Return the first ``count`` batches of the training rows, in file order, on the CPU; of pairs, the chosen."""
        collate = sequence_collator(self.cfg, self.pad_id, self.media)
        found = [collate([row.get("chosen", row) for row in rows]) for rows in islice(self._first_rows(), count)]
        return [model_inputs(batch) | {"labels": batch["labels"]} for batch in found]

    def _first_rows(self) -> Iterator[list[Any]]:
        rows, budget = self.rows.train, self.budget(padded=not is_flat(self.cfg))
        if self.cfg.data.streaming:
            stream = iter(rows)
            while True:
                yield list(islice(stream, self.cfg.train.micro_batch_size))
        for batch in sampling.in_file_order(np.asarray(rows.lengths), budget):
            yield [rows[index] for index in batch]


class RunTrainer(Trainer):
    """transformers' trainer, with the run's optimizer, row order, records and checkpoints."""

    run: Run
    guard: Guard
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LRScheduler | None
    control: TrainerControl
    tokens = 0
    """Tokens trained on so far by this process, padding not counted."""

    busy = 0.0
    """Seconds of training since the last line of metrics, evaluating and saving not counted."""

    stopped_early = False
    """Whether evaluations that did not get better have ended the run before its last step."""

    _tokens_logged = 0
    _step_logged = 0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sums: dict[str, list[float]] = {}
        self.best = Best()

    @cached_property
    def head(self) -> Head:
        """The model's output head, computed where there is a label."""
        return Head(self.model)

    @property
    def _stream(self) -> Stream | None:
        return self.train_dataset if isinstance(self.train_dataset, Stream) else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Cut the model up, if processes share it out, and build the optimizer that the config chooses."""
        if self.optimizer is None:
            if self.run.cfg.hardware.sharding is Sharding.fsdp2:
                sharding.shard(self.model, self.run.cfg, self.args.device)
            self.optimizer = self.run.cfg.optimizer.build(model or self.model, self.run)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Build the schedule that the config chooses."""
        if self.lr_scheduler is None:
            found = optimizer or self.optimizer
            assert found is not None
            self.lr_scheduler = schedule.build(self.run.cfg, found, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Go forward and backward with a batch, and show its loss to the guard."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.see(loss)
        return loss

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager[None]:
        """Average the gradients of each micro batch into shards: kept whole to the last, they would fill the device."""
        return contextlib.nullcontext()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the step's gradient, which the guard sees too."""
        layerwise: Layerwise | None = getattr(self._optimizer, "layerwise", None)
        norm = layerwise.norm if layerwise else super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.guard.see_norm(norm)
        return norm

    @property
    def _optimizer(self) -> Any:
        """The optimizer that the config chooses, out of what accelerate wraps it in."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """While inside, have the weights that the run would end with, if its optimizer trains at others."""
        sharding.reshard(self.model)
        with self._optimizer.averaged() if isinstance(self._optimizer, Ruled) else contextlib.nullcontext():
            yield
            sharding.reshard(self.model)

    def on_the_first(self) -> contextlib.AbstractContextManager[None]:
        """While inside, have the whole model on the first process, to be saved. All processes must enter."""
        if self.run.cfg.hardware.sharding is Sharding.zero3:
            return sharding.gathered_by_deepspeed(self.model)
        return sharding.whole(self.model, lambda *_: True, here=self.run.is_main)

    def remember(self) -> Callable[[], None]:
        """Return what takes back the metrics of the step that begins now."""
        loss, sums = self._tr_loss.clone(), {name: [*pair] for name, pair in self._sums.items()}

        def take_back() -> None:
            self._tr_loss.copy_(loss)
            self._sums = sums

        return take_back

    def evaluated(self, metrics: dict[str, float]) -> dict[str, float]:
        """Log what an evaluation found, tell the callbacks, and return it."""
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def batches_in_file_order(self, rows: Any) -> Iterator[Batch]:
        """Yield this process's share of a data set in batches of training's kind, on its device."""
        for found in self.run.in_file_order(rows, padded=not is_flat(self.run.cfg)):
            yield self.on_device(self.collate(found))

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate what the run would end with, and let training go on afterwards as it would have without."""
        with own_randomness(self.args.device), self.averaged():
            return super()._evaluate(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoaderShard:
        """Draw the batches that are planned for this process, without a second division among the processes."""
        args, collate = self.args, self.collate
        drawn: dict[str, Any]
        if self._stream:
            drawn = {"batch_size": args.train_batch_size, "collate_fn": partial(with_places, collate=collate)}
        else:
            drawn = {"batch_sampler": self.run.epoch_batches, "collate_fn": collate}
        return DataLoaderShard(
            self.train_dataset,
            **drawn,
            device=args.device,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )

    @property
    def collate(self) -> Collate:
        """What makes a training batch of rows."""
        return collator(self.run.cfg, self.run.pad_id, self.run.media)

    def on_device(self, batch: Batch) -> Batch:
        """Return a batch on the device of this process."""
        return {name: value.to(self.args.device) for name, value in batch.items()}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Count the tokens of a step's batches on their way."""
        found, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if stream := self._stream:
            for batch in found:
                self._note(stream, batch.pop("at"))
        self.tokens += sum(num_tokens(batch) for batch in found)
        return found, num_items

    def _note(self, stream: Stream, places: list[dict[str, Any]]) -> None:
        """Take down where a stream is, and say for which new reason rows are left out."""
        known = set(stream.counts)
        stream.note(places)
        for reason in set(stream.counts) - known - {"rows read", "rows cut"}:
            text = f"rows are left out: {reason}"
            print(json.dumps({"note": text}), flush=True)  # noqa: T201 (log.txt)
            events.send("note", text=text)

    def _rows_streamed(self, stream: Stream) -> dict[str, float]:
        """Return how many rows all processes have read, cut and left out so far."""
        read, cut = stream.counts["rows read"], stream.counts["rows cut"]
        each = [float(count) for count in (read, cut, stream.counts.total() - read - cut)]
        return dict(zip(("rows_read", "rows_cut", "rows_left_out"), self.over_processes(each), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write one line of metrics, and tell the trackers and the driver."""
        if "train_runtime" in logs:  # transformers' closing summary, which counts from the last resume only
            return
        if "learning_rate" in logs:
            self._leave_out_skipped(logs)
            logs |= self._counted() | self._speed()
            logs |= self._rows_streamed(self._stream) if self._stream else {}
        super().log(logs)
        values = {"lr" if name == "learning_rate" else name: value for name, value in logs.items() if name != "epoch"}
        at = {"step": self.state.global_step, "epoch": round(self.state.epoch or 0.0, 6), "time": round(time.time(), 3)}
        if self.run.is_main:
            record.append_line(self.run.folder / record.METRICS, at | values)
            print(json.dumps(at | values), flush=True)  # noqa: T201 (log.txt)
            events.send("log", **at, **values)

    def _leave_out_skipped(self, logs: dict[str, float]) -> None:
        """Make a line's loss the mean of the steps that were taken, and say how many of the run were not."""
        steps, skipped = self.state.global_step - self._step_logged, self.guard.since_log
        self._step_logged, self.guard.since_log = self.state.global_step, 0
        if skipped:
            summed = logs.pop("loss") * steps
            logs |= {"loss": summed / (steps - skipped)} if steps > skipped else {}
        if not math.isfinite(logs.get("grad_norm", 0.0)):  # of a step that was skipped, here or by the loss scaling
            del logs["grad_norm"]
        if self.guard.skips:
            logs["skipped_steps"] = self.guard.skipped

    def count(self, metrics: dict[str, torch.Tensor]) -> None:
        """Take a batch's metrics, one value an example, into the means of the next line."""
        add(self._sums, metrics)

    def _counted(self) -> dict[str, float]:
        """Return the means over all processes since the last line."""
        sums, self._sums = self._sums, {}
        return self.means(sums)

    def means(self, sums: dict[str, list[float]]) -> dict[str, float]:
        """Return the mean of each metric over all processes, from each process's [sum, count]."""
        totals = self.over_processes([value for pair in sums.values() for value in pair])
        return {name: totals[2 * n] / totals[2 * n + 1] for n, name in enumerate(sums) if totals[2 * n + 1]}

    def over_processes(self, values: list[float]) -> list[float]:
        """Return each value summed over all processes."""
        if self.run.world_size == 1 or not values:
            return values
        tensor = torch.tensor(values, device=self.args.device, dtype=torch.float64)
        return self.accelerator.reduce(tensor).tolist()

    def _speed(self) -> dict[str, float]:
        """Return the tokens of all processes so far, and per second of training since the last line."""
        total = int(self.over_processes([float(self.tokens)])[0])
        rate = (total - self._tokens_logged) / max(self.busy, 1e-9)
        self._tokens_logged, self.busy = total, 0.0
        return {"tokens": total, "tokens_per_second": round(rate, 1)}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights, which the first process is given whole; shards are saved with the optimizer's state instead."""
        if not sharding.is_cut(self.model):
            super().save_model(output_dir, _internal_call)
        elif not self._saves_shards:
            with sharding.whole(self.model, self._is_saved, here=self.run.is_main):
                super().save_model(output_dir, _internal_call)

    @property
    def _saves_shards(self) -> bool:
        return sharding.is_cut(self.model) and self.run.cfg.hardware.checkpoint is CheckpointForm.sharded

    def _is_saved(self, name: str, weight: nn.Parameter) -> bool:
        """Tell whether a weight may be in a checkpoint: beside an adapter, of the model's own only its ends may."""
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        of_ends = any(weight is one for end in ends if end is not None for one in end.parameters())
        return weight.requires_grad or of_ends or self.run.cfg.adapter.trains_base_weights

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save weights under the names that they have here.

        Some models are kept on disk under other names, and transformers does not find those again when it resumes: it
        would go on, without a word, with the weights that the run began with.
        """
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel):
            super()._save(output_dir, state_dict)
            return
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del model.save_pretrained

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the optimizer's state: whole, so that any number of processes goes on from it, or as shards."""
        if self._saves_shards:
            sharding.save_shards(Path(output_dir), self.model, self._optimizer, is_main=self.run.is_main)
            if self.args.should_save:
                assert self.lr_scheduler is not None
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        elif sharding.is_cut(self.model):
            with sharding.whole_state(self._optimizer, here=self.run.is_main):
                super()._save_optimizer_and_scheduler(output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights: into a model that is not cut up yet, or, at the end of a run, into one that is."""
        model = model or self.model
        if (Path(resume_from_checkpoint) / sharding.SHARDS).is_dir():
            sharding.load_weights(Path(resume_from_checkpoint), model)
        elif sharding.is_cut(model):
            with sharding.taking_whole_weights(model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's state, of which each process takes its own shard, and the schedule's."""
        folder = Path(checkpoint or "")
        of_shards = (folder / sharding.SHARDS).is_dir()
        if checkpoint is None or not (of_shards or sharding.is_cut(self.model)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if of_shards:
            sharding.load_state(folder, self._optimizer)
        else:
            state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
            sharding.load_whole_state(self._optimizer, state)
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that does not hold the model's weights, where transformers would warn and go on.

        Raises:
            RunFailed: Weights are missing, other than those that are another one's under a second name.
        """
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        missing = {name for name in load_result.missing_keys if name in weights}
        loaded = {id(weight) for name, weight in weights.items() if name not in missing}
        lost = sorted(name for name in missing if id(weights[name]) not in loaded)
        if lost or load_result.unexpected_keys:
            names = ", ".join([*lost, *load_result.unexpected_keys][:3])
            raise RunFailed(f"the checkpoint does not hold the weights of this model ({names}, ...)")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save under transformers' name, and rename when everything is on disk: complete or absent."""
        super()._save_checkpoint(model, trial)
        partial = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (partial / f"{_STATE}.{self.args.process_index}").write_text(json.dumps(self._loop_state()))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
            _flush(partial)
            partial.rename(partial.with_name(f"step-{self.state.global_step}"))
            for old in record.checkpoints(self.run.folder)[: -self.run.cfg.train.keep_checkpoints]:
                if not (self.run.cfg.train.keep_best and record.step_of(old) == self.best.step):
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _loop_state(self) -> dict[str, Any]:
        """Return what transformers' own state does not carry over a resume."""
        return {
            "tokens": self.tokens,
            "tokens_logged": self._tokens_logged,
            "loss_logged": self._total_loss_scalar,
            "sums": self._sums,
            "loss_since_log": self._tr_loss.item(),
            "step_of_log": self._globalstep_last_logged,
            "guard": self.guard.state(),
            "best": asdict(self.best),
            "stream": self._stream.state(self.args.dataloader_num_workers) if self._stream else None,
            "streamed": dict(self._stream.counts) if self._stream else None,
            "rows_to_a_step": self._rows_to_a_step,
            "total_steps": self.run.total_steps,
            "own": self.own_state(),
        }

    def own_state(self) -> dict[str, Any]:
        """Return what else this kind of trainer needs to go on exactly as it would have, as JSON can hold it."""
        return {}

    def take_own_state(self, state: dict[str, Any]) -> None:
        """Take up what `own_state` has returned."""

    @property
    def mean_loss(self) -> float:
        """The mean loss of all steps that were taken, over interruptions, once the last one is logged."""
        return self._total_loss_scalar / max(1, self.state.global_step - self.guard.skipped)

    def restore(self, checkpoint: Path) -> None:
        """Take up the counts and the unlogged loss where the checkpoint left them."""
        state = self._loop_state_of(checkpoint)
        self.tokens, self._tokens_logged = state["tokens"], state["tokens_logged"]
        self._total_loss_scalar, self._sums = state["loss_logged"], state["sums"]
        self._tr_loss.fill_(state["loss_since_log"])
        self._globalstep_last_logged = self._step_logged = state["step_of_log"]
        self.guard.restore(state["guard"])
        self.best = Best(**state["best"])
        if self._stream:
            self._stream.begins, self._stream.counts = state["stream"], Counter(state["streamed"])
        self.take_own_state(state["own"])

    def _loop_state_of(self, checkpoint: Path) -> dict[str, Any]:
        """Return what this process goes on with, whose checkpoint may be of another number of processes.

        Raises:
            ConfigError: A step would be of other rows.
        """
        ranks = range(len([*checkpoint.glob(f"{_STATE}.*")]))
        states = [json.loads((checkpoint / f"{_STATE}.{rank}").read_text()) for rank in ranks]
        if problems := [*self._changed(states[0])]:
            raise ConfigError(problems)
        if len(states) == self.run.world_size:
            return dict(states[self.run.rank])
        if self.run.is_main:
            text = f"the checkpoint is of {len(states)} processes: dropout draws anew for {self.run.world_size}"
            events.send("note", text=text)
        return sharding.divided(states, self.run.rank, self.run.world_size)

    @property
    def _rows_to_a_step(self) -> int:
        train = self.run.cfg.train
        return train.micro_batch_size * train.grad_accumulation * self.run.world_size

    def _changed(self, state: dict[str, Any]) -> Iterator[Problem]:
        """Yield what would make the rest of the run another than its beginning."""
        now, was = self._rows_to_a_step, state.get("rows_to_a_step", self._rows_to_a_step)
        if now != was:
            each = self.run.cfg.train.micro_batch_size * self.run.world_size
            message = f"a step was of {was} rows so far, and would now be of {now}"
            fits = (
                f"train.grad_accumulation={was // each}" if was % each == 0 else "a train.micro_batch_size with which"
            )
            fix = fits if was % each == 0 else f"{fits} it comes to {was} rows on {self.run.world_size} processes"
            yield Problem("train.grad_accumulation", message, fix)
        elif (steps := state.get("total_steps", self.run.total_steps)) != self.run.total_steps:
            message = f"the schedule was one of {steps} steps so far, and would now be one of {self.run.total_steps}"
            yield Problem("train.max_steps", message, f"train.max_steps={steps}")

    def load_best(self) -> None:
        """Go back to the weights of the best evaluation, if those of the last step are others."""
        if self.best.step and self.best.step < self.state.global_step:
            best = self.run.folder / record.CHECKPOINTS / f"step-{self.best.step}"
            self._load_from_checkpoint(str(best), self.model)
            if getattr(self._optimizer, "averages", False):  # its state tells of what
                self._load_optimizer_and_scheduler(str(best))


def add(sums: dict[str, list[float]], metrics: dict[str, torch.Tensor]) -> None:
    """Add a batch's metrics, one value an example, to each metric's [sum, count], in place."""
    for name, values in metrics.items():
        total = sums.setdefault(name, [0.0, 0.0])
        total[0] += float(values.sum())
        total[1] += len(values)


@contextlib.contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """While inside, draw from random generators whose state is put back at the end."""
    python, arrays = random.getstate(), np.random.get_state()
    on_device = [] if device.type in ("cpu", "mps") else [torch.accelerator.current_device_index()]
    with torch.random.fork_rng(on_device, device_type=device.type if on_device else "cuda"):
        yield
    random.setstate(python)
    np.random.set_state(arrays)


Run_ = TypeVar("Run_", bound=Run)
Trainer_ = TypeVar("Trainer_", bound=RunTrainer)


def _flush(folder: Path) -> None:
    """Force a folder's files to disk, so that a name that says complete outlives a power cut."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@overload
def prepare(cfg: Config) -> tuple[nn.Module, Run]: ...
@overload
def prepare(cfg: Config, kind: type[Run_]) -> tuple[nn.Module, Run_]: ...
def prepare(cfg: Config, kind: type[Run] = Run) -> tuple[nn.Module, Run]:
    """Load what every training stage starts with: tokenizer, rows, model, adapter.

    Raises:
        ConfigError: An option cannot do its part where processes share out the training.
    """
    if problems := [*cfg.hardware.check_with(cfg)]:
        raise ConfigError(problems)
    tokenizer = loading.tokenizer(cfg)
    rows = dataset.load(cfg, tokenizer)
    model = loading.model(cfg, tokenizer)
    if cfg.hardware.sharding is Sharding.fsdp2:
        model._is_distributed_loading_by_transformers = True  # neither moved to a device whole nor wrapped for DDP
    run = kind(cfg, rows, tokenizer)
    return cfg.adapter.apply(model, run), run


def build(cls: type[Trainer_], model: nn.Module, run: Run) -> Trainer_:
    """Make a trainer of the class that a stage names, with the callbacks of every plugin of the run."""
    _say_what_trains(model)
    _refuse_blind(run)
    args = TrainingArguments(**arguments(run, model))
    trainer = cls(model=model, args=args, train_dataset=run.rows.train, processing_class=run.tokenizer)
    trainer.run = run
    trainer.guard = Guard(trainer)
    trainer.remove_callback(PrinterCallback)
    for option in run.cfg.chosen:
        for callback in option.callbacks(model, run):
            trainer.add_callback(callback)
    return trainer


def _refuse_blind(run: Run) -> None:
    """Refuse what goes by evaluations where there are none.

    Raises:
        ConfigError: There are no rows to evaluate on.
    """
    message = "it goes by how evaluations come out, and there are no rows to evaluate on"
    fix = "data.eval_path=FILE, or data.eval_size=0.1 to hold out a tenth of the rows"
    if (keys := run.cfg.train.judged_by_evaluation) and not run.rows.evals:
        raise ConfigError([Problem(key, message, fix) for key in keys])


def _say_what_trains(model: nn.Module) -> None:
    total, trained = loading.count(model)
    if not parameters.trained(model):
        raise RunFailed("no weight of the model trains")
    events.send("note", text=f"{trained:,} of {total:,} parameters train ({trained / total:.2%})")


def fit(trainer: RunTrainer) -> Result:
    """Train to the end, from the newest checkpoint if there is one, and leave what a run leaves.

    Raises:
        Stopped: The run was told to stop; what it had done is saved.
    """
    run = trainer.run
    checkpoint = record.latest_checkpoint(run.folder)
    if run.is_main:
        record.remove_incomplete_checkpoints(run.folder)
        record.cut_back(run.folder, record.step_of(checkpoint) if checkpoint else -1)
        ending.add_to_manifest(run)
    trainer.args.eval_on_start = bool(run.rows.evals) and checkpoint is None
    trainer.add_callback(Conduct(trainer, run, checkpoint))
    _refuse_leaks(trainer)
    with stop.deferred(), _profiled(trainer, run), _failure_told(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    at_the_end = trainer.stopped_early or trainer.state.global_step >= trainer.state.max_steps
    if (status := stop.requested()) and not at_the_end:
        raise stop.Stopped(status)
    if run.cfg.train.keep_best:
        trainer.load_best()
    trainer.accelerator.wait_for_everyone()
    with trainer.averaged(), trainer.on_the_first():
        return ending.finish(trainer, run) if run.is_main else Result()


def _refuse_leaks(trainer: RunTrainer) -> None:
    """Try whether the model keeps rows of one sequence apart, where the run puts several into one.

    A model with a recurrent state or with attention code of its own may not, and no error would say so.

    Raises:
        ConfigError: It does not.
    """
    cfg, device = trainer.run.cfg, trainer.args.device.type
    attention = str(getattr(trainer.model.config, "_attn_implementation", ""))
    # Flex attention takes a minute to compile on the CPU, and flash attention does not run there.
    if not shares_sequences(cfg) or (device == "cpu" and attention.startswith("fl")):
        return
    with trainer.accelerator.autocast():
        if not pack.leaks(trainer.model):
            return
    key = "train.padding_free" if cfg.train.padding_free else "data.packing"
    message = f"{cfg.model.path} does not keep rows that share a sequence apart: the tokens of one change the next"
    fix = "train.padding_free=false" if cfg.train.padding_free else "data.packing=none"
    raise ConfigError([Problem(key, message, fix)])


@contextlib.contextmanager
def _failure_told(trainer: RunTrainer) -> Iterator[None]:
    """Tell the callbacks that want to know if training raises: they never get to ``on_train_end``."""
    try:
        yield
    except BaseException:
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "on_failure"):
                callback.on_failure()
        raise


@contextlib.contextmanager
def _profiled(trainer: RunTrainer, run: Run) -> Iterator[None]:
    """Trace some steps with torch's profiler, where that is asked for."""
    if not run.cfg.train.profile_steps or not run.is_main:
        yield
        return
    from torch.profiler import profile, schedule, tensorboard_trace_handler

    folder = run.folder / "profile"
    plan = schedule(wait=1, warmup=2, active=run.cfg.train.profile_steps, repeat=1)
    with profile(schedule=plan, on_trace_ready=tensorboard_trace_handler(str(folder))) as profiler:

        class Step(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                profiler.step()

        trainer.add_callback(Step())
        yield
    summary = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
    record.write_whole(folder / "summary.txt", summary)
