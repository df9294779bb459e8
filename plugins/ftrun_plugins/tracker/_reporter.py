"""How trackers are told: one that does not answer stops a run before it trains, and never one that is under way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from ftrun import events
from ftrun.errors import ConfigError, Problem
from ftrun.plugin import Tracker
from ftrun.record import Status

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ftrun.worker.training import Run

START_SECONDS = 30
"""How long a tracker may take to start. The libraries' own limits are minutes, while a whole cluster job waits."""

END_SECONDS = 60
"""How long a tracker may take to send what is left when training ends."""

T = TypeVar("T")


@contextlib.contextmanager
def starting(tracker: Tracker, fix: str) -> Iterator[None]:
    """Turn whatever the tracker's library raises inside into something that the user can mend.

    Raises:
        ConfigError: The library raised.
    """
    events.send("phase", text=f"starting {tracker.name}")
    try:
        yield
    except Exception as error:
        raise ConfigError([Problem(f"tracker.{tracker.name}", f"cannot start: {_said(error)}", fix)]) from error


def within(seconds: float, call: Callable[[], T]) -> T:
    """Call in a thread of its own and wait no longer than that; a call that hangs is left behind.

    Raises:
        TimeoutError: It took longer.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds} seconds") from None


def unique_name(run: Run) -> str:
    """Return a name that a run keeps when it is resumed, and that no other run has."""
    return f"{run.name}-{run.unique_id[:6]}"


def reporter(
    tracker: Tracker, callback: TrainerCallback, end: Callable[[Status], object] = lambda _: None
) -> TrainerCallback:
    """Pass the run's logs on to transformers' own callback, and call ``end`` once with how the run ended.

    What either raises on the way is said, once, and the training goes on: metrics.jsonl holds everything anyway.
    """
    from transformers import TrainerCallback

    from ftrun.worker import stop

    said = False

    @contextlib.contextmanager
    def lenient() -> Iterator[None]:
        nonlocal said
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            text = f"tracker={tracker.name} is not told everything: {_said(error)}"
            if not said:
                print(text, flush=True)  # noqa: T201 (log.txt)
                events.send("note", text=text)
            said = True

    class Reporter(TrainerCallback):
        def on_failure(self) -> None:
            with lenient():
                end(Status.failed)

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            with lenient():
                callback.on_train_begin(*args, **kwargs)

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            with lenient():
                callback.on_log(*args, **kwargs)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done = state.global_step >= state.max_steps
            with lenient():
                end(Status.completed if done else stop.requested() or Status.interrupted)
            with lenient():
                callback.on_train_end(args, state, control, **kwargs)

    return Reporter()


def _said(error: BaseException) -> str:
    """Return an error's message on one line, or its name if it has nothing to say."""
    return " ".join(str(error).split())[:500] or type(error).__name__
