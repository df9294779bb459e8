"""What happens between the steps of a run: logging, evaluating, saving, skipping, pausing, stopping."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftrun import events, record
from ftrun.errors import RunFailed
from ftrun.record import Pause, Rung, Status
from ftrun.worker import device, stop
from ftrun.worker.best import objective_of
from ftrun.worker.schedule import PlateauLR

if TYPE_CHECKING:
    from ftrun.worker.training import Run, RunTrainer


class Conduct(TrainerCallback):
    """Decides before each step whether it is taken, and after it whether to log, evaluate, save, pause or stop."""

    def __init__(self, trainer: RunTrainer, run: Run, checkpoint: Path | None) -> None:
        self.trainer, self.run, self.checkpoint = trainer, run, checkpoint
        self._mark = 0.0  # when training was last (re)started
        self._take_back: Callable[[], None] | None = None
        self._step_left_out: Callable[..., Any] | None = None
        self._pause = Pause.load(run.folder)
        self._pause_step: int | None = None
        self._judges = True  # whether the evaluation under way has consequences
        self._pauses = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up where a checkpoint left off, or evaluate the model as it starts."""
        assert state.max_steps == self.run.total_steps, (state.max_steps, self.run.total_steps)
        if self.checkpoint:
            self.trainer.restore(self.checkpoint)
        self._find_pause(state.max_steps)
        if self._pause_step and self._pause_step <= state.global_step:
            self._pause_here(state)
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
        self._pauses = step == self._pause_step
        self._judges = last or bool(train.eval_every and step % train.eval_every == 0)
        control.should_log = step % train.log_every == 0 or step == 1 or last
        control.should_evaluate = bool(self.run.rows.evals) and (self._judges or self._pauses)
        regular = bool(train.save_every) and step % train.save_every == 0 and not last
        control.should_save = told or self._pauses or regular
        control.should_training_stop = told or self._pauses or last
        if control.should_log or control.should_evaluate or control.should_save:
            self.trainer.guard.settle()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw the consequences of an evaluation, and leave the time it took out of the speed."""
        # An evaluation that only a pause has made decides nothing: training goes on as it would have without.
        if state.global_step and self._judges and self.run.cfg.train.judged_by_evaluation:
            self._judge(kwargs["metrics"], state, control)
        self._mark = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pause, if that is what it was for, and leave the time it took out of the speed."""
        if self._pauses and not self.trainer.stopped_early:
            self._reach_rung(state)
        events.mark()
        self._mark = time.monotonic()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show that something moves."""
        events.mark()

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

    def _find_pause(self, total_steps: int) -> None:
        """Take what the first process has read of a pause; at the last step or beyond it there is none."""
        here = self._pause.of(total_steps) if self._pause and self.run.is_main else 0
        (step,) = self.trainer.over_processes([float(here)])
        self._pause_step = int(step) if 0 < step < total_steps else None

    def _pause_here(self, state: TrainerState) -> None:
        """Pause at a checkpoint that is at the pause's step or beyond it, without a step more.

        That is one of a run that was killed just before it could say so, or had come further when its sweep began to
        compare runs on the way.

        Raises:
            Stopped: Always.
        """
        trainer = self.trainer
        (evaluated,) = trainer.over_processes([float(self.run.is_main and self._is_evaluated(state.global_step))])
        if self.run.rows.evals and not evaluated:
            self._judges = False
            trainer._evaluate(None, None, skip_scheduler=True)
        self._reach_rung(state)
        told = trainer.callback_handler
        told.on_train_end(trainer.args, state, trainer.control)
        told.callbacks.clear()  # they know how it ended, and hear of no failure
        raise stop.Stopped(Status.paused)

    def _is_evaluated(self, step: int) -> bool:
        lines = record.read_lines(self.run.folder / record.METRICS)
        return any(line["step"] == step and any(name.startswith("eval_") for name in line) for line in lines)

    def _reach_rung(self, state: TrainerState) -> None:
        """Write down what the run has come to, as its end would, and have it stop."""
        run, mean_loss = self.run, self._mean_loss()
        if run.is_main:
            assert self._pause is not None
            lines = record.read_lines(run.folder / record.METRICS)
            metrics = record.last_values(lines) | {"loss": mean_loss}
            objective = objective_of(run.cfg, metrics)
            speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
            rung = Rung(
                pause=self._pause,
                step=state.global_step,
                metrics=metrics,
                objective=metrics[objective] if objective else None,
                tokens_per_second=round(sum(speeds) / len(speeds), 1) if speeds else None,
                peak_memory_bytes=device.peak_memory_bytes(run.cfg.hardware.device),
            )
            rung.add_to(run.folder)
        events.send("note", text=f"paused after step {state.global_step} of {state.max_steps}, as its sweep wants")
        stop.request(Status.paused)

    def _mean_loss(self) -> float:
        """Return the mean loss of all steps so far, those that no line of metrics has yet among them."""
        trainer = self.trainer
        (unlogged,) = trainer.over_processes([trainer._tr_loss.item() / self.run.world_size])
        steps = trainer.state.global_step - trainer.guard.skipped
        return (trainer._total_loss_scalar + unlogged) / max(1, steps)

    def _told_to_stop(self) -> bool:
        """Tell whether any process was: all must stop after the same step."""
        return bool(self.trainer.over_processes([float(stop.requested() is not None)])[0])
