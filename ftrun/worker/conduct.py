"""What happens between the steps of a run: logging, evaluating, saving, skipping, stopping."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftrun import events
from ftrun.errors import RunFailed
from ftrun.worker import stop
from ftrun.worker.best import objective_of
from ftrun.worker.schedule import PlateauLR

if TYPE_CHECKING:
    from ftrun.worker.training import Run, RunTrainer


class Conduct(TrainerCallback):
    """Decides before each step whether it is taken, and after it whether to log, evaluate, save or stop."""

    def __init__(self, trainer: RunTrainer, run: Run, checkpoint: Path | None) -> None:
        self.trainer, self.run, self.checkpoint = trainer, run, checkpoint
        self._mark = 0.0  # when training was last (re)started
        self._take_back: Callable[[], None] | None = None
        self._step_left_out: Callable[..., Any] | None = None

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

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what a step that is skipped must not change."""
        self.trainer.guard.begin()
        self._take_back = self.trainer.remember()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave a bad step out: neither weights nor the optimizer's state move, nor do the metrics."""
        if not self.trainer.guard.refuses():
            return
        assert self._take_back is not None
        self._take_back()
        optimizer, scaler = kwargs["optimizer"], self.trainer.accelerator.scaler
        self._step_left_out = optimizer.step
        # A scaler that has looked at the gradients must be told that this step is over.
        optimizer.step = lambda *_: scaler.update() if scaler else None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the next step be taken again."""
        if self._step_left_out:
            kwargs["optimizer"].step, self._step_left_out = self._step_left_out, None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set what the loop does before the next step."""
        train, step = self.run.cfg.train, state.global_step
        now = time.monotonic()
        self.trainer.busy += now - self._mark
        self._mark = now
        events.send("step", step=step)
        last = step >= state.max_steps
        told = self._told_to_stop() and not last
        control.should_log = step % train.log_every == 0 or step == 1 or last
        control.should_evaluate = bool(self.run.rows.evals) and (
            last or bool(train.eval_every and step % train.eval_every == 0)
        )
        control.should_save = told or (bool(train.save_every) and step % train.save_every == 0 and not last)
        control.should_training_stop = told or last
        if control.should_log or control.should_evaluate or control.should_save:
            self.trainer.guard.settle()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw the consequences of an evaluation, and leave the time it took out of the speed."""
        if state.global_step and self.run.cfg.train.judged_by_evaluation:
            self._judge(kwargs["metrics"], state, control)
        self._mark = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the time it took out of the speed."""
        self._mark = time.monotonic()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the steps since the last line logged where a run ends before its last step."""
        control.should_log = control.should_log or self.trainer.stopped_early

    def _judge(self, metrics: dict[str, float], state: TrainerState, control: TrainerControl) -> None:
        """Save a checkpoint of the best evaluation so far, lower the rate on a plateau, stop where nothing betters.

        Raises:
            RunFailed: The evaluation has no objective.
        """
        trainer, train, last = self.trainer, self.run.cfg.train, state.global_step >= state.max_steps
        name = objective_of(self.run.cfg, metrics)
        if name is None:
            wanted = self.run.cfg.objective or "objective"
            raise RunFailed(f"the evaluation gives no {wanted}, which {train.judged_by_evaluation[0]} goes by")
        # Every process must come to the same decision, so the first one's number is taken by all.
        (value,) = trainer.over_processes([metrics[name] if self.run.is_main else 0.0])
        is_best = trainer.best.note(state.global_step, value, self.run.cfg)
        if isinstance(trainer.lr_scheduler, PlateauLR):
            trainer.lr_scheduler.observe(value)
        if train.keep_best and is_best and not last:
            control.should_save = True
        if train.early_stopping_patience and trainer.best.waited >= train.early_stopping_patience and not last:
            # Like the last step of a run it has no checkpoint, from which a resumed run would go on training.
            trainer.stopped_early, control.should_training_stop, control.should_save = True, True, False
            best = trainer.best
            text = (
                f"stopped early: {name} was best after step {best.step}, {best.value}" if best.step else "stopped early"
            )
            events.send("note", text=text)

    def _told_to_stop(self) -> bool:
        """Tell whether any process was: all must stop after the same step."""
        return bool(self.trainer.over_processes([float(stop.requested() is not None)])[0])
