"""What the keys of the ``data`` group contradict each other in, or want of the rest of the config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ftrun.data import Cut, Data, Mix, MixUntil, OnBadRow, Packing, Source, TooLong, TrainOn
from ftrun.errors import Problem, did_you_mean

if TYPE_CHECKING:
    from ftrun.config import Config


def check(cfg: Config) -> Iterator[Problem]:
    """Yield what cannot be meant."""
    data = cfg.data
    if cfg.stage.rows:
        yield from _places(data)
        yield from _formats(cfg)
    yield from _mixing(data)
    yield from _learned(data, cfg.stage.rows)
    yield from _lengths(cfg)
    yield from _evaluation(data)
    yield from _streaming(cfg)
    if data.max_bad_share != Data.max_bad_share and data.on_bad_row is OnBadRow.error:
        yield _unread("data.max_bad_share", "data.on_bad_row=error", "data.on_bad_row=skip")


def _unread(key: str, by: str, fix: str) -> Problem:
    return Problem(key, f"{by} does not read it", fix)


def _places(data: Data) -> Iterator[Problem]:
    if data.path is None and not data.sources:
        yield Problem("data.path", "has no value", "data.path=FILE")
    if data.path is not None and data.sources:
        yield Problem("data.sources", "data.path says already where rows come from", "one of them")
    for name in ("rows", "subset", "split"):
        if data.sources and getattr(data, name) is not None:
            message = f"is for data.path; of several sources, each has its own {name}"
            yield Problem(f"data.{name}", message, f"data.sources=[{{path: ..., {name}: ...}}]")


def _formats(cfg: Config) -> Iterator[Problem]:
    sources: list[tuple[str, Data | Source]] = [("data", cfg.data)]
    sources += [(f"data.sources.{number}", source) for number, source in enumerate(cfg.data.sources)]
    named = [(key, source) for key, source in sources if source.format not in (None, "auto") or source.columns]
    if not named:
        return
    from ftrun.data import formats  # of a run that names none, the columns are looked at where its rows are

    for key, source in named:
        form = source.format or "auto"
        for problem in formats.check(form, cfg.stage.rows, f"{key}.format"):
            yield replace(problem, message=f"with stage={cfg.stage.name}, {problem.message}")
        ours = form == "auto" or form in formats.LAYOUTS
        for column in source.columns if ours else ():  # a plugin may have columns of its own
            if column not in formats.COLUMNS:
                near = did_you_mean(column, sorted(formats.COLUMNS))
                known = ", ".join(sorted(formats.COLUMNS))
                yield Problem(f"{key}.columns.{column}", f"no format has a column {column}{near}", f"one of {known}")


def _mixing(data: Data) -> Iterator[Problem]:
    if data.mix is not Mix.concatenate and len(data.sources) < 2:
        yield Problem("data.mix", "there are not several sources to mix", "data.sources=[{path: A}, {path: B}]")
    if data.mix is Mix.concatenate and data.mix_until is not MixUntil.first:
        yield _unread("data.mix_until", "data.mix=concatenate", "data.mix=interleave, or weighted")
    for number, source in enumerate(data.sources):
        if source.weight != 1 and data.mix is Mix.interleave:
            yield _unread(f"data.sources.{number}.weight", "data.mix=interleave", "data.mix=weighted")


def _learned(data: Data, kind: str) -> Iterator[Problem]:
    if data.train_on is TrainOn.roles and not data.train_roles:
        yield Problem("data.train_roles", "data.train_on=roles needs it", "data.train_roles=[assistant]")
    for role in data.train_roles:
        from ftrun.data.messages import ROLES

        if role not in (known := sorted(set(ROLES.values()))):
            message = f"there is no role {role}{did_you_mean(role, known)}"
            yield Problem("data.train_roles", message, f"some of {', '.join(known)}")
    if data.train_roles and data.train_on is not TrainOn.roles:
        yield _unread("data.train_roles", f"data.train_on={data.train_on}", "data.train_on=roles")
    if data.history_reasoning and kind == "conversations" and data.train_on is not TrainOn.last:
        by = f"data.train_on={data.train_on}, which learns earlier replies with their thinking,"
        yield _unread("data.history_reasoning", by, "data.train_on=last")


def _lengths(cfg: Config) -> Iterator[Problem]:
    data = cfg.data
    if data.packing is Packing.concatenate and cfg.stage.rows != "texts":
        message = f"{cfg.stage.rows} would be cut where a sequence is full, and see one another"
        yield Problem("data.packing", message, "data.packing=best_fit")
    if data.packing is Packing.concatenate and data.too_long is not TooLong.cut:
        yield _unread("data.too_long", "data.packing=concatenate, which goes on in the next sequence,", "leave it out")
    if data.cut is not Cut.middle and data.too_long is not TooLong.cut:
        yield _unread("data.cut", f"data.too_long={data.too_long}", "data.too_long=cut")
    if data.packing is not Packing.none and cfg.train.padding_free:
        yield Problem("train.padding_free", "packed sequences have no padding", "one of it and data.packing")


def _evaluation(data: Data) -> Iterator[Problem]:
    if data.eval_path and data.eval_size:
        yield Problem("data.eval_size", "data.eval_path says already what to evaluate on", "one of them")
    if data.eval_size > 1 and data.eval_size != int(data.eval_size):
        message = f"{data.eval_size} is neither a share nor a count"
        yield Problem("data.eval_size", message, "a share below 1, or whole rows")


def _streaming(cfg: Config) -> Iterator[Problem]:
    data = cfg.data
    if not data.streaming:
        if data.shuffle_buffer != Data.shuffle_buffer:
            yield _unread("data.shuffle_buffer", "data.streaming=false", "data.streaming=true")
        return
    if cfg.train.max_steps is None:
        message = "data.streaming does not know how many rows there are"
        yield Problem("train.max_steps", message, "train.max_steps=1000, or how many steps you want")
    if data.eval_size:
        message = "data.streaming does not know how many rows there are to hold some out of"
        yield Problem("data.eval_size", message, "data.eval_path=FILE")
    if data.processes is not None:
        yield _unread("data.processes", "data.streaming", "hardware.data_workers=4")
