"""Steps that must not be taken: their loss or gradient is not finite, or leaps far above those before."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from ftrun import events
from ftrun.errors import RunFailed
from ftrun.train import BadLoss
from ftrun.worker import pack

if TYPE_CHECKING:
    from ftrun.worker.training import Run, RunTrainer

_WINDOW = 100
"""Steps whose losses and norms a step is compared with."""

_FEWEST = 10
"""Steps before which nothing counts as a leap: the median of fewer says little."""

_MOST_IN_A_ROW = 10
"""Steps that may be skipped one after the other; more, and it is not the rows that are at fault."""

_MOST_NAMED = 16
"""Rows that a message names."""


@dataclass
class _Seen:
    """What a step came to, on its way from the device."""

    step: int
    values: torch.Tensor
    """The loss over all processes, the gradient's norm, and the loss of each batch of this process."""

    arrived: torch.cuda.Event | None = None

    def set_off(self) -> None:
        """Have the values copied to the CPU when the GPU gets to it."""
        self.values = torch.empty(self.values.shape, pin_memory=True).copy_(self.values, non_blocking=True)
        self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.arrived.record()

    def read(self) -> list[float]:
        """Return the values, once they are there."""
        if self.arrived:
            self.arrived.synchronize()
        return self.values.tolist()


class Guard:
    """Looks at every step before its update, and has it skipped or ends the run.

    Where a run is only to be stopped, a GPU is not waited for: the numbers of a step are looked at in the next one, and
    in any case before something is logged, evaluated or saved. What the update did by then is lost with the run.
    """

    def __init__(self, trainer: RunTrainer) -> None:
        train = trainer.run.cfg.train
        self.trainer, self.spike = trainer, train.max_loss_spike
        self.skips = train.on_bad_loss is BadLoss.skip
        self.waits = not self.skips and not self.spike and trainer.args.device.type == "cuda"
        self.skipped = 0
        """Steps of the run so far that were skipped."""

        self.since_log = 0
        """Those since the last line of metrics."""

        self.in_a_row = 0
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._norms: deque[float] = deque(maxlen=_WINDOW)
        self._batches: list[torch.Tensor] = []
        self._norm: torch.Tensor | float = 0.0
        self._pending: _Seen | None = None

    def begin(self) -> None:
        """Forget the batches of the step before."""
        self._batches.clear()

    def see(self, loss: torch.Tensor) -> None:
        """Take in the loss of a batch, on its device."""
        self._batches.append(loss.detach().float().reshape(()))

    def see_norm(self, norm: torch.Tensor | float) -> None:
        """Take in the norm of the step's gradient, before it is clipped."""
        self._norm = norm

    def refuses(self) -> bool:
        """Tell whether the step that is about to be taken must be skipped.

        Raises:
            RunFailed: It is bad, or the one before it was, and the run is to stop.
        """
        before, seen = self._pending, self._gathered()
        if self.waits:
            self._pending = seen
            return bool(before and self._is_bad(before))
        return self._is_bad(seen)

    def settle(self) -> None:
        """Look at what has not been looked at.

        Raises:
            RunFailed: It is bad.
        """
        if seen := self._pending:
            self._pending = None
            self._is_bad(seen)

    def _gathered(self) -> _Seen:
        trainer = self.trainer
        each = torch.stack(self._batches) if self._batches else torch.zeros(1, device=trainer.args.device)
        mean = trainer.accelerator.reduce(each.sum(), reduction="mean") if trainer.run.world_size > 1 else each.sum()
        norm = torch.as_tensor(self._norm, device=each.device).detach().float().reshape(())
        seen = _Seen(trainer.state.global_step + 1, torch.cat([torch.stack([mean, norm]), each]))
        if self.waits:
            seen.set_off()
        return seen

    def _is_bad(self, seen: _Seen) -> bool:
        """Tell whether a step is bad; every process comes to the same answer."""
        loss, norm, *batches = seen.read()
        if not (why := self._why(loss, norm)):
            self.in_a_row = 0
            if math.isfinite(norm):
                self._losses.append(loss)
                self._norms.append(norm)
            return False
        self.in_a_row += 1
        text = f"at step {seen.step} {why}{self._rows(seen.step, batches)}"
        if not self.skips:
            advice = (
                "; a lower optimizer.lr or other rows may help, or train.on_bad_loss=skip to go on without such steps"
            )
            raise RunFailed(text + advice)
        if self.in_a_row > _MOST_IN_A_ROW:
            raise RunFailed(
                f"{text}; {_MOST_IN_A_ROW} steps before it were skipped already, and a lower optimizer.lr may help"
            )
        self.skipped, self.since_log = self.skipped + 1, self.since_log + 1
        if self.trainer.run.is_main:
            print(json.dumps({"note": f"skipped: {text}"}), flush=True)  # noqa: T201 (log.txt)
            events.send("note", text=f"skipped: {text}")
        return True

    def _why(self, loss: float, norm: float) -> str:
        """Say what is wrong with a step, if anything is."""
        # With loss scaling, a gradient that overflows is skipped by the scaler, which then scales less.
        scaled = self.trainer.accelerator.scaler is not None
        if not math.isfinite(loss) or not (scaled or math.isfinite(norm)):
            return f"the loss is {loss:g} and its gradient's norm {norm:g}"
        if self.spike and len(self._norms) >= _FEWEST:
            for name, value, usual in (("loss", loss, self._losses), ("gradient's norm", norm, self._norms)):
                if (median := statistics.median(usual)) > 0 and value > self.spike * median:
                    return f"the {name} is {value:.4g}, more than {self.spike:g} times its usual {median:.4g}"
        return ""

    def _rows(self, step: int, losses: Sequence[float]) -> str:
        """Name the rows of a step on all processes; of batches that are not finite, those alone."""
        guilty = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        found = [*places(self.trainer.run, step - 1, guilty)]
        if not any(gather_object([len(found)])):
            found = [*places(self.trainer.run, step - 1, range(len(losses)))]
        found = gather_object(found)
        if not found:
            return ""
        more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        return f", on the rows {', '.join(found[:_MOST_NAMED])}{more}"

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {
            "skipped": self.skipped,
            "since_log": self.since_log,
            "in_a_row": self.in_a_row,
            "losses": [*self._losses],
            "norms": [*self._norms],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        self.skipped, self.since_log, self.in_a_row = state["skipped"], state["since_log"], state["in_a_row"]
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])


def places(run: Run, step: int, batches: Sequence[int]) -> Iterator[str]:
    """Yield the file and line of each row in some of this process's batches of a step; of a stream, nothing.

    Args:
        run: The run.
        step: The step, counted from 0.
        batches: Numbers of the batches within the step.
    """
    if run.cfg.data.streaming or not batches:
        return
    planned, rows = run.epoch_batches, run.rows.train
    epoch, in_epoch = divmod(step, planned.steps_per_epoch)
    order, begins = planned.plan(epoch)
    for batch in batches:
        number = (in_epoch * run.cfg.train.grad_accumulation + batch) * run.world_size + run.rank
        for position in order[begins[number] : begins[number + 1]].tolist():
            if isinstance(rows, pack.PackedRows):
                bins = rows.bins
                members = bins.members[int(bins.offsets[position]) : int(bins.offsets[position + 1])]
                yield from (rows.rows.place_of(int(member)) for member in members)  # type: ignore[attr-defined]
            else:
                yield rows.place_of(position)
