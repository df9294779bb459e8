"""What every training stage shares: the trainer around transformers' loop, checkpoints, records, and how a run ends."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import seed_worker

from ftrun import events, record
from ftrun.config import Config
from ftrun.errors import ConfigError, Problem, RunFailed
from ftrun.record import Result
from ftrun.train import Precision, Scheduler
from ftrun.worker import dataset, ending, loading, pack, parameters, sampling, stop
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
from ftrun.worker.media import processor
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
            self._tokens_in_a_batch(self.rows.train),
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
        lengths, budget = self._tokens_in_a_batch(rows), self.budget(padded=padded)
        for batch in sampling.in_file_order(lengths, budget, rank=self.rank, world_size=self.world_size):
            yield [rows[index] for index in batch]

    def _tokens_in_a_batch(self, rows: Any) -> sampling.Array:
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


def arguments(run: Run) -> dict[str, Any]:
    """Return the arguments that every trainer of transformers and TRL takes.

    Logging, evaluating and saving are decided by `Conduct`, so transformers' own rules are off.
    """
    train, hardware = run.cfg.train, run.cfg.hardware
    return {
        "output_dir": str(run.folder / record.CHECKPOINTS),
        "run_name": run.name,
        "seed": run.cfg.seed,
        "learning_rate": run.cfg.optimizer.lr,
        "max_steps": run.total_steps,
        "per_device_train_batch_size": train.micro_batch_size,
        "per_device_eval_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.grad_accumulation,
        # What transformers calls constant skips the warm-up.
        "lr_scheduler_type": "constant_with_warmup" if train.scheduler is Scheduler.constant else train.scheduler.value,
        "warmup_steps": train.warmup_steps(run.total_steps),
        "max_grad_norm": train.max_grad_norm,
        "bf16": train.precision is Precision.bf16,
        "fp16": train.precision is Precision.fp16,
        **_checkpointing(train.gradient_checkpointing),
        "neftune_noise_alpha": train.neftune or None,
        "dataloader_num_workers": hardware.data_workers,
        "dataloader_pin_memory": hardware.device.torch_name == "cuda",
        "use_cpu": hardware.device.torch_name == "cpu",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,  # it would log the last good loss in place of a NaN
        "disable_tqdm": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "ignore_data_skip": run.cfg.data.streaming,  # a stream goes on by itself where it was
    }


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Return the arguments for recomputing activations, under the name that this transformers knows them by."""
    if not wanted:
        return {}
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


class RunTrainer(Trainer):
    """transformers' trainer, with the run's optimizer, row order, records and checkpoints."""

    run: Run
    optimizer: torch.optim.Optimizer | None
    control: TrainerControl
    tokens = 0
    """Tokens trained on so far by this process, padding not counted."""

    busy = 0.0
    """Seconds of training since the last line of metrics, evaluating and saving not counted."""

    _tokens_logged = 0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sums: dict[str, list[float]] = {}

    @property
    def _stream(self) -> Stream | None:
        return self.train_dataset if isinstance(self.train_dataset, Stream) else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer that the config chooses."""
        if self.optimizer is None:
            self.optimizer = self.run.cfg.optimizer.build(model or self.model, self.run)
        return self.optimizer

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
        if "loss" in logs:
            logs |= self._counted() | self._speed()
            logs |= self._rows_streamed(self._stream) if self._stream else {}
        super().log(logs)
        values = {"lr" if name == "learning_rate" else name: value for name, value in logs.items() if name != "epoch"}
        at = {"step": self.state.global_step, "epoch": round(self.state.epoch or 0.0, 6), "time": round(time.time(), 3)}
        if self.run.is_main:
            record.append_line(self.run.folder / record.METRICS, at | values)
            print(json.dumps(at | values), flush=True)  # noqa: T201 (log.txt)
            events.send("log", **at, **values)
        if not math.isfinite(logs.get("loss", 0.0) + logs.get("grad_norm", 0.0)):
            numbers = f"the loss is {logs['loss']} and its gradient's norm {logs.get('grad_norm')}"
            raise RunFailed(f"{numbers} at step {at['step']}; a lower optimizer.lr, or train.max_grad_norm=1, may help")

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
        return {name: totals[2 * n] / totals[2 * n + 1] for n, name in enumerate(sums)}

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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save weights under the names that they have here.

        Some models are kept on disk under other names, and transformers does not find those again when it resumes: it
        would go on, without a word, with the weights that the run began with.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel):
            super()._save(output_dir, state_dict)
            return
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del model.save_pretrained

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
        state = {
            "tokens": self.tokens,
            "tokens_logged": self._tokens_logged,
            "loss_logged": self._total_loss_scalar,
            "sums": self._sums,
            "loss_since_log": self._tr_loss.item(),
            "step_of_log": self._globalstep_last_logged,
            "stream": self._stream.state(self.args.dataloader_num_workers) if self._stream else None,
            "streamed": dict(self._stream.counts) if self._stream else None,
        }
        (partial / f"{_STATE}.{self.args.process_index}").write_text(json.dumps(state))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
            _flush(partial)
            partial.rename(partial.with_name(f"step-{self.state.global_step}"))
            for old in record.checkpoints(self.run.folder)[: -self.run.cfg.train.keep_checkpoints]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    @property
    def mean_loss(self) -> float:
        """The mean loss of all steps, over interruptions, once the last one is logged."""
        return self._total_loss_scalar / self.state.global_step

    def restore(self, checkpoint: Path) -> None:
        """Take up the counts and the unlogged loss where the checkpoint left them."""
        state = json.loads((checkpoint / f"{_STATE}.{self.args.process_index}").read_text())
        self.tokens, self._tokens_logged = state["tokens"], state["tokens_logged"]
        self._total_loss_scalar, self._sums = state["loss_logged"], state["sums"]
        self._tr_loss.fill_(state["loss_since_log"])
        self._globalstep_last_logged = state["step_of_log"]
        if self._stream:
            self._stream.begins, self._stream.counts = state["stream"], Counter(state["streamed"])


def add(sums: dict[str, list[float]], metrics: dict[str, torch.Tensor]) -> None:
    """Add a batch's metrics, one value an example, to each metric's [sum, count], in place."""
    for name, values in metrics.items():
        total = sums.setdefault(name, [0.0, 0.0])
        total[0] += float(values.sum())
        total[1] += len(values)


Trainer_ = TypeVar("Trainer_", bound=RunTrainer)


def _flush(folder: Path) -> None:
    """Force a folder's files to disk, so that a name that says complete outlives a power cut."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Conduct(TrainerCallback):
    """Decides after each step whether to log, evaluate, save or stop."""

    def __init__(self, trainer: RunTrainer, run: Run, checkpoint: Path | None) -> None:
        self.trainer, self.run, self.checkpoint = trainer, run, checkpoint
        self._mark = 0.0  # when training was last (re)started

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up where a checkpoint left off, or evaluate the model as it starts."""
        assert state.max_steps == self.run.total_steps, (state.max_steps, self.run.total_steps)
        if self.checkpoint:
            self.trainer.restore(self.checkpoint)
        events.send("start", step=state.global_step, total=state.max_steps)
        self._mark = time.monotonic()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say which epoch's batches to draw."""
        if not self.run.cfg.data.streaming:
            self.run.epoch_batches.epoch = int(state.epoch or 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set what the loop does before the next step."""
        train, step = self.run.cfg.train, state.global_step
        now = time.monotonic()
        self.trainer.busy += now - self._mark
        self._mark = now
        events.send("step", step=step)
        last = step >= state.max_steps
        control.should_log = step % train.log_every == 0 or step == 1 or last
        control.should_evaluate = bool(self.run.rows.evals) and (
            last or bool(train.eval_every and step % train.eval_every == 0)
        )
        control.should_save = bool(train.save_every) and step % train.save_every == 0 and not last
        if self._told_to_stop() and not last:
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True
        control.should_training_stop = control.should_training_stop or last

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the time it took out of the speed."""
        self._mark = time.monotonic()

    on_save = on_evaluate

    def _told_to_stop(self) -> bool:
        """Tell whether any process was: all must stop after the same step."""
        return bool(self.trainer.over_processes([float(stop.requested() is not None)])[0])


def prepare(cfg: Config) -> tuple[nn.Module, Run]:
    """Load what every training stage starts with: tokenizer, rows, model, adapter."""
    tokenizer = loading.tokenizer(cfg)
    rows = dataset.load(cfg, tokenizer)
    model = loading.model(cfg, tokenizer)
    run = Run(cfg, rows, tokenizer)
    return cfg.adapter.apply(model, run), run


def build(cls: type[Trainer_], model: nn.Module, run: Run) -> Trainer_:
    """Make a trainer of the class that a stage names, with the callbacks of every plugin of the run."""
    _say_what_trains(model)
    args = TrainingArguments(**arguments(run))
    trainer = cls(model=model, args=args, train_dataset=run.rows.train, processing_class=run.tokenizer)
    trainer.run = run
    trainer.remove_callback(PrinterCallback)
    for option in run.cfg.chosen:
        for callback in option.callbacks(model, run):
            trainer.add_callback(callback)
    return trainer


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
    if (status := stop.requested()) and trainer.state.global_step < trainer.state.max_steps:
        raise stop.Stopped(status)
    trainer.accelerator.wait_for_everyone()
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
