"""One process of a run or of a task: read run.yaml, do the stage or the task, leave a result."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from ftrun import events, record
from ftrun.config import Config
from ftrun.errors import ConfigError, FtrunError
from ftrun.record import Pause, Result, Rung, Status
from ftrun.worker import stop


def main(run_file: str, task: str | None = None, options: str = "{}") -> int:
    """Run the stage of a frozen config, or do a task with it. Every process calls this; the first writes the result.

    Args:
        run_file: The path of ``run.yaml``.
        task: The module beside this one whose function ``answer`` is called instead of the stage.
        options: The task's options, a JSON object.

    Returns:
        0 if the run ended as it should or stopped on request, 1 if it failed: what torchrun wants to know. How it
        ended is in result.json.
    """
    rank = int(os.environ.get("RANK", "0"))
    folder = Path(run_file).parent.resolve()
    stop.install()
    events.send("process", rank=rank, pid=os.getpid())
    begun = time.monotonic()
    try:
        with _Held(folder) if rank == 0 else contextlib.nullcontext() as held:
            result = _attempt(functools.partial(_work, Path(run_file), task, options, held), folder)
        result.wall_seconds = round(time.monotonic() - begun, 3)
        # Of several processes the first speaks for all, but one that failed speaks first: the others are ended for it.
        if (rank == 0 or result.status is Status.failed) and not _another_failed(folder):
            result.checkpoint = record.checkpoint_name(folder)
            result.save(folder)
    except record.Held as error:  # who started this process is gone, and somebody else has come to be at the run
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    finally:
        _leave_process_group()
    return int(result.status is Status.failed)


def _attempt(work: Callable[[], Result], folder: Path) -> Result:
    """Do the work, and say how it ended whatever happens."""
    try:
        result = work()
    except stop.Stopped as stopped:
        if stopped.status is Status.paused and (rung := _rung(folder)):
            return rung.result()
        return Result(status=stopped.status, **record.so_far(folder))
    except BaseException as error:
        traceback.print_exc()
        problems = error.problems if isinstance(error, ConfigError) else ()
        return Result(
            status=Status.failed,
            reason=_reason(error),
            problems=[dataclasses.asdict(problem) for problem in problems],
            **record.so_far(folder),
        )
    result.status = Status.completed
    return result


def _rung(folder: Path) -> Rung | None:
    """Return what the run had come to where it is to pause, if it has been there."""
    pause = Pause.load(folder)
    return Rung.all_of(folder).get(pause) if pause else None


def _is_paused(folder: Path) -> bool:
    """Tell whether a run stands where it is to pause: with what it had come to, and a checkpoint of that step or on."""
    rung, checkpoint = _rung(folder), record.latest_checkpoint(folder)
    return bool(rung and checkpoint and record.step_of(checkpoint) >= rung.step)


def _another_failed(folder: Path) -> bool:
    """Tell whether another process of the run has said that it failed; the launcher then ends this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and Result.load(folder).status is Status.failed


def _work(run_file: Path, task: str | None, options: str, held: _Held | None) -> Result:
    cfg = Config.load(run_file)
    cfg.output_dir = str(run_file.parent.resolve())  # the folder may have been moved since it was frozen
    if held and cfg.train.stall_minutes is not None:
        held.give_up_after(cfg.train.stall_minutes)
    if task is None:
        if _is_paused(cfg.folder):  # nothing to import and load for
            raise stop.Stopped(Status.paused)
        _set_up(cfg)
        return cfg.stage.run(cfg)
    with _own_output() as output:
        _set_up(cfg)
        importlib.import_module(f"ftrun.worker.{task}").answer(cfg, output, **json.loads(options))
    return Result()


@contextlib.contextmanager
def _own_output() -> Iterator[TextIO]:
    """Keep standard output for a task's answer: what else is printed, by libraries too, goes to the log."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)
        yield output


def _set_up(cfg: Config) -> None:
    events.send("phase", text="importing")
    import torch
    import transformers

    from ftrun.worker import device

    assert cfg.hardware.num_threads is not None
    torch.set_num_threads(cfg.hardware.num_threads)
    device.check(cfg.hardware)
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(cfg.seed)


class _Held:
    """Holds a run's folder: says who writes to it, keeps showing signs of life, and ends what moves no more.

    Only the first of several processes does. Where another one hangs, the first waits for it in the next exchange
    between them, and its end ends them all.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._minutes: float | None = None
        self._is_over = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> _Held:
        record.claim(self._folder, after=record.Holder.from_environment())
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over = True
        self._wake.set()
        self._thread.join()

    def give_up_after(self, minutes: float) -> None:
        """From now on, end the process if nothing moves for so long."""
        self._minutes = minutes
        self._wake.set()

    def _beat(self) -> None:
        # Counted in beats: a process that is suspended, as clusters do to make room, does not stall meanwhile.
        still, moved = 0.0, events.moved()
        while not self._is_over:
            seconds = min(record.HEARTBEAT_SECONDS, 15 * (self._minutes or 1.0))
            if self._wake.wait(seconds):
                self._wake.clear()
                continue
            with contextlib.suppress(OSError):
                os.utime(self._folder / record.RESULT)
            still, moved = (still + seconds if moved == events.moved() else 0.0), events.moved()
            if self._minutes is not None and still >= 60 * self._minutes:
                self._give_up(self._minutes)

    def _give_up(self, minutes: float) -> None:
        """Leave word of what each thread was doing, and end the process: a thread that hangs cannot be told to."""
        print(f"no progress for {minutes:g} minutes; what each thread was doing:", file=sys.stderr)  # noqa: T201
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        reason = f"no progress for {minutes:g} minutes, which is train.stall_minutes; the log says where it hung"
        record.conclude(self._folder, Status.failed, reason)
        os._exit(1)


def _reason(error: BaseException) -> str:
    text = str(error) if isinstance(error, FtrunError) else f"{type(error).__name__}: {error}"
    return text.strip()[:2000]


def _leave_process_group() -> None:
    """Close torch's process group: a worker that leaves it open may abort at exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
