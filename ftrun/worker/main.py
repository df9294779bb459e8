"""One process of a run or of a task: read run.yaml, do the stage or the task, leave a result."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from ftrun import events, record
from ftrun.config import Config
from ftrun.errors import ConfigError, FtrunError
from ftrun.record import Result, Status
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
        with _held(folder) if rank == 0 else contextlib.nullcontext():
            result = _attempt(functools.partial(_work, Path(run_file), task, options), folder)
        result.wall_seconds = round(time.monotonic() - begun, 3)
        # Of several processes the first speaks for all, but one that failed speaks first: the others are ended for it.
        if (rank == 0 or result.status is Status.failed) and not _another_failed(folder):
            last = record.latest_checkpoint(folder)
            result.checkpoint = str(last.relative_to(folder)) if last else None
            result.save(folder)
    finally:
        _leave_process_group()
    return int(result.status is Status.failed)


def _attempt(work: Callable[[], Result], folder: Path) -> Result:
    """Do the work, and say how it ended whatever happens."""
    try:
        result = work()
    except stop.Stopped as stopped:
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


def _another_failed(folder: Path) -> bool:
    """Tell whether another process of the run has said that it failed; the launcher then ends this one."""
    return Result.load(folder).status is Status.failed


def _work(run_file: Path, task: str | None, options: str) -> Result:
    cfg = Config.load(run_file)
    cfg.output_dir = str(run_file.parent.resolve())  # the folder may have been moved since it was frozen
    if task is None:
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


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the folder: say who writes to it, and keep showing signs of life."""
    Result(holder=record.Holder.me()).save(folder)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(record.HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(folder / record.RESULT)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _reason(error: BaseException) -> str:
    text = str(error) if isinstance(error, FtrunError) else f"{type(error).__name__}: {error}"
    return text.strip()[:2000]


def _leave_process_group() -> None:
    """Close torch's process group: a worker that leaves it open may abort at exit."""
    import sys

    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
