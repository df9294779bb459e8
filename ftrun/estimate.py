"""What ``ftrun check`` says a run, or a whole sweep, will take: memory, time and disk, before anything starts.

A worker rehearses a training step without weights and counts its memory (`ftrun.worker.estimate`). The time comes from
earlier runs like it on this machine, or, roughly, from what a step computes; a probe takes two steps and measures both.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import socket
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape
from rich.table import Table

from ftrun import hardware, launch, record, task, weights
from ftrun.config import Config
from ftrun.display import console, near, size_text
from ftrun.errors import RunFailed
from ftrun.hardware import Device, Hardware
from ftrun.record import Result, Status
from ftrun.train import Scheduler


@dataclass
class Estimate:
    """What a worker found out about a run; bytes are those of one process. None stands for what is not known."""

    world_size: int = 1
    unknown: dict[str, str] = field(default_factory=dict)
    """Why ``memory``, or what depends on ``rows``, is not known."""

    rows: int = 1
    """Sequences of one forward pass."""

    length: int = 0
    """Tokens of the longest."""

    steps: int | None = None
    tokens: int | None = None
    """Of all steps and processes, padding not counted."""

    how: str = ""
    """What the number of steps comes from."""

    is_exact: bool = False
    groups: list[dict[str, Any]] = field(default_factory=list)
    """The weights that train, as `ftrun.weights` prints them."""

    parameters: int = 0
    trained: int = 0
    weights: int | None = None
    gradients: int | None = None
    state: int | None = None
    """Of the optimizer."""

    reference: int = 0
    """What a reference model takes beside the one that trains."""

    activations: int | None = None
    """What the forward pass leaves for the backward pass, at the longest rows."""

    gathered: int = 0
    """Weights of other processes' shards that are here at one time."""

    is_shared_out: bool = False
    peak: int | None = None
    """The most that is in memory at once: gradients come as activations go."""

    saved: int = 0
    """The weights that the run ends with, on disk: all of the model's, or those of its adapter."""

    is_adapter: bool = False
    checkpoint: int = 0
    """Bytes of a checkpoint: the same weights, and the optimizer's state."""

    flops: float | None = None
    """Floating-point operations of one token, forward and backward."""

    rate: float | None = None
    """Floating-point operations a second of a product of matrices on the run's device."""

    memory_total: int | None = None
    memory_free: int | None = None
    sharers: int = 1
    """Processes of the run that share this memory."""

    @property
    def known(self) -> int:
        """What is known of the memory where not all of it is: no less is needed."""
        return (self.weights or 0) + (self.gradients or 0) + (self.state or 0) + self.reference


@dataclass
class Probed:
    """What real steps took."""

    step_seconds: float
    peak: int
    """Bytes: allocated on an accelerator, or more resident than before on a CPU."""


def show(cfg: Config, *, probe: bool = False) -> None:
    """Print the weights that train, and what a run takes.

    Args:
        cfg: A config that `ftrun.launch.check` has passed; it is left as it is.
        probe: Whether to take two steps for real, and print what they took beside the estimate.

    Raises:
        ConfigError: The run would be refused.
        RunFailed: The probe failed.
    """
    cfg = copy.deepcopy(cfg)
    try:
        (found,) = _ask([cfg])
    except RunFailed as error:
        _line("memory", f"[yellow]unknown:[/] {escape(str(error).splitlines()[0])}")
        return
    if found.groups:
        console.print(weights.table(found.groups))
    _show_memory(found)
    _show_steps(found)
    time = _time(cfg, found, _earlier([Path("outputs")]))
    _line("time", time.text)
    _line("disk", _disk_text(cfg, found))
    if probe:
        _show_probe(cfg, found)


def shapes(cfgs: Iterable[Config]) -> list[tuple[Config, int]]:
    """Return one config of each kind that may take other memory, time or disk than the rest, with how many it is of."""
    found: dict[str, tuple[Config, int]] = {}
    for cfg in cfgs:
        key = repr(list(_shape(cfg)))
        first, count = found.get(key, (cfg, 0))
        found[key] = (first, count + 1)
    return list(found.values())


def show_sweep(
    points: int, cfgs: Iterable[tuple[Config, int]], *, slots: int, keep: str, folder: Path | None = None
) -> None:
    """Print what a sweep takes.

    Args:
        points: How many runs it has.
        cfgs: Configs of distinct `shapes`, each with how many runs have it.
        slots: How many runs go at a time.
        keep: What each run leaves on disk: all, best, adapters or none.
        folder: The sweep's own, whose finished runs tell how fast others are.

    Raises:
        ConfigError: A run would be refused.
    """
    kinds = [(copy.deepcopy(cfg), count) for cfg, count in cfgs]
    _line("points", f"{points:,} runs, {len(kinds):,} of them of different shapes; {slots:,} at a time")
    try:
        estimates = _ask([cfg for cfg, _ in kinds])
    except RunFailed as error:
        _line("memory", f"[yellow]unknown:[/] {escape(str(error).splitlines()[0])}")
        return
    earlier = _earlier([Path("outputs"), *([folder] if folder else [])])
    each = [
        (cfg, count, found, _time(cfg, found, earlier)) for (cfg, count), found in zip(kinds, estimates, strict=True)
    ]
    _line("time", _sweep_time([(count, time) for _, count, _, time in each], slots))
    _line("memory", _sweep_memory([(cfg, found) for cfg, _, found, _ in each]))
    _line("disk", _sweep_disk([(cfg, count, found) for cfg, count, found, _ in each], slots, keep))


def _line(name: str, text: str) -> None:
    console.print(f"[bold]{name:<6}[/] {text}", soft_wrap=True)


# -------------------------------------------------------------------------------------------------------------- asking


def _ask(cfgs: Sequence[Config]) -> list[Estimate]:
    """Have one worker estimate several runs, on their own kind of device where this machine has one.

    Raises:
        ConfigError: A run would be refused.
        RunFailed: The worker failed.
    """
    folder = Path(tempfile.mkdtemp(prefix="ftrun-"))
    try:
        folders = []
        for number, cfg in enumerate(cfgs):
            _settle(cfg)
            folders.append(folder / str(number))
            launch.write(cfg, folders[-1])
        asked = copy.deepcopy(cfgs[0])
        device = cfgs[0].hardware.device
        here = device if hardware.find(device).names else Device.cpu
        asked.hardware = Hardware(device=here, num_processes=1, num_threads=hardware.default_threads(1))
        asked.plugins = [str(folders[0] / file) for file in asked.plugins]
        launch.write(asked, folder)
        lines = _answer(folder, {"folders": [str(one) for one in folders]})
        return [Estimate(**line) for line in lines]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settle(cfg: Config) -> None:
    """Settle a config in place, as freezing it does.

    Raises:
        ConfigError: Its model is nowhere to be found.
    """
    hardware.settle(cfg.hardware, cfg.train, cfg.model.dtype)
    launch.settle(cfg)


def _answer(folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a worker says that is given a frozen folder and options.

    Raises:
        ConfigError: It found something the user can mend.
        RunFailed: It failed.
    """
    lines: list[dict[str, Any]] = []
    answer = launch.Answer(lambda line: lines.append(json.loads(line)))
    try:
        result = launch.watch(folder, task.Waiting(), ["estimate", json.dumps(options)], answer)
    finally:
        answer.close()
    if result.status is not Status.completed:
        log = (folder / record.LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise RunFailed("\n    ".join([f"the estimate {result.status}: {result.reason}", *log]))
    return lines


# -------------------------------------------------------------------------------------------------------------- memory


def _show_memory(found: Estimate) -> None:
    what = f"of each of {found.world_size} processes" if found.world_size > 1 else "of the process"
    about = ", by formula where they share" if found.is_shared_out else ""
    _line("memory", f"{what}, at {_count(found.rows, 'sequence')} of {found.length:,} tokens{about}")
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column()
    shown = f"{found.parameters:,} parameters, {found.trained:,} of them train" if found.parameters else ""
    table.add_row("       weights", _size(found.weights), shown)
    table.add_row("       gradients", _size(found.gradients), "")
    table.add_row("       optimizer's state", _size(found.state), "")
    if found.reference:
        table.add_row("       reference", _size(found.reference), "")
    if found.gathered:
        table.add_row("       gathered", _size(found.gathered), "weights of other processes' shards")
    table.add_row("       activations", _size(found.activations), "what is kept for the backward pass")
    console.print(table)
    console.print(f"       {_most(found)}", soft_wrap=True)
    if why := found.unknown.get("memory"):
        console.print(f"       [yellow]unknown:[/] {escape(why)}; --probe takes two steps and measures", soft_wrap=True)


def _most(found: Estimate) -> str:
    """Say what is needed at most, and whether the device has it."""
    needed = found.known if found.peak is None else found.peak
    text = f"[bold]{size_text(needed)}[/] {'or more' if found.peak is None else 'at once, at most'}"
    if found.memory_total is None or found.memory_free is None:
        return f"{text}; how much memory the device has is unknown here"
    has = f"{size_text(found.memory_total)}, of which {size_text(found.memory_free)} are free"
    if found.sharers > 1:
        has += f", for {found.sharers} processes"
    if needed * found.sharers > found.memory_total:
        return f"{text}: [red]does not fit[/] into {has}"
    if needed * found.sharers > found.memory_free:
        return f"{text}: [yellow]does not fit[/] into what is free of {has}"
    return f"{text}; {'may fit' if found.peak is None else '[green]fits[/]'} into {has}"


def _size(size: int | None) -> str:
    return "unknown" if size is None else size_text(size)


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# ---------------------------------------------------------------------------------------------------------------- time


@dataclass
class Time:
    """How long a run takes, and how that is known."""

    seconds: float | None
    text: str
    is_rough: bool = False


def _show_steps(found: Estimate) -> None:
    if found.steps is None:
        _line("steps", f"unknown: {escape(found.unknown.get('rows') or found.how)}")
        return
    about = "" if found.is_exact or found.tokens is None else "about "
    tokens = "" if found.tokens is None else f" of {about}{found.tokens:,} tokens in all"
    why = found.unknown.get("rows") or found.how
    _line("steps", f"{about if found.tokens is not None else ''}{found.steps:,}{tokens} ({escape(why)})")


def _tokens(cfg: Config, found: Estimate) -> int | None:
    """Return the tokens of a run; without rows, as many as fit."""
    if found.tokens is not None or found.steps is None:
        return found.tokens
    return found.steps * cfg.train.grad_accumulation * found.world_size * found.rows * found.length


def _time(cfg: Config, found: Estimate, earlier: Sequence[_Run]) -> Time:
    tokens = _tokens(cfg, found)
    if tokens is None:
        return Time(None, "unknown, as the steps are")
    alike = [run for run in earlier if run.kind == _kind(dataclasses.asdict(cfg))]
    if alike:
        rate = statistics.median(run.tokens_per_second for run in alike)
        name = escape(near(alike[0].folder))
        of = f"the speed of {name}" if len(alike) == 1 else f"the median of {len(alike)} earlier runs like it ({name})"
        return Time(tokens / rate, f"about {_duration(tokens / rate)}, at {rate:,.0f} tokens/s: {of}")
    if found.flops is None:
        return Time(None, "unknown; --probe measures, and so does an earlier run like it below outputs/")
    work = tokens * found.flops
    if found.rate is None:
        return Time(None, f"unknown: {_work(work)}, and no {cfg.hardware.device} here to see how long that takes")
    seconds = work / found.rate / found.world_size
    product = f"{_work(found.rate)}/s that a product of matrices reaches here"
    text = f"{_duration(seconds)} or more, roughly: {_work(work)} at the {product}"
    return Time(seconds, text, is_rough=True)


def _work(operations: float) -> str:
    """Return a number of floating-point operations as a person reads it."""
    for unit in ("GFLOP", "TFLOP", "PFLOP"):
        if operations < 1e12:
            return f"{operations / 1e9:,.3g} {unit}"
        operations /= 1e3
    return f"{operations / 1e9:,.3g} EFLOP"


def _duration(seconds: float) -> str:
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"


_MOST_EARLIER = 200
"""Of the runs below a folder, only so many of the newest are looked at."""

_ALIKE = (
    "stage.name", "model.path", "model.dtype", "model.attention", "adapter.name", "quant.name", "optimizer.name",
    "data.max_length", "data.packing", "train.micro_batch_size", "train.micro_batch_tokens", "train.padding_free",
    "train.precision", "train.gradient_checkpointing", "hardware.device", "hardware.num_nodes",
    "hardware.num_processes", "hardware.num_threads", "hardware.sharding",
)  # fmt: skip
"""Runs that agree in these keys are taken to be equally fast."""


@dataclass
class _Run:
    """An earlier run."""

    folder: Path
    kind: str
    tokens_per_second: float


def _kind(tree: dict[str, Any]) -> str:
    """Return what says how fast a run is, from its whole config."""
    return json.dumps([str((tree.get(group) or {}).get(key)) for group, key in (one.split(".") for one in _ALIKE)])


def _earlier(roots: Sequence[Path]) -> list[_Run]:
    """Return the finished runs of this machine that know how fast they were, the newest first."""
    files = {path / record.RESULT for root in roots for path in record.runs(root) if (path / record.RESULT).exists()}
    newest = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)[:_MOST_EARLIER]
    return [run for file in newest if (run := _read(file.parent)) is not None]


def _read(folder: Path) -> _Run | None:
    try:
        result = Result.load(folder)
        machine = json.loads((folder / record.MANIFEST).read_text())["machine"]
        if not result.tokens_per_second or machine["host"] != socket.gethostname():
            return None
        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        tree = yaml.load((folder / record.RUN).read_text(), loader)  # noqa: S506 (a safe one)
        return _Run(folder, _kind(tree), result.tokens_per_second)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None  # damaged, or just being written: it says nothing


def _sweep_time(each: Sequence[tuple[int, Time]], slots: int) -> str:
    known = [(count, time.seconds) for count, time in each if time.seconds is not None]
    unknown = sum(count for count, time in each if time.seconds is None)
    reason = next((time.text for _, time in each if time.seconds is None), "")
    if not known:
        return reason
    whole = sum(count * seconds for count, seconds in known)
    wall = max(whole / slots, max(seconds for _, seconds in known))
    rough = any(time.is_rough for _, time in each)
    text = f"{'at least, roughly,' if rough else 'about'} {_duration(whole)} of runs, {_duration(wall)} by the clock"
    return text + (f"; not counted: {unknown:,} runs whose time is {reason}" if unknown else "")


def _sweep_memory(each: Sequence[tuple[Config, Estimate]]) -> str:
    known = [found for _, found in each if found.peak is not None]
    largest = max(known or [found for _, found in each], key=lambda found: found.peak or found.known)
    text = f"{_most(largest)} (the largest run)"
    reasons = {found.unknown["memory"] for _, found in each if "memory" in found.unknown}
    return text + "".join(f"; of some unknown: {escape(why)}" for why in sorted(reasons))


# ---------------------------------------------------------------------------------------------------------------- disk


def _checkpoints(cfg: Config, found: Estimate) -> int:
    """Return how many checkpoints a run has when it ends."""
    train = cfg.train
    if not train.save_every:
        return int(train.keep_best)
    made = train.keep_checkpoints if found.steps is None else max(0, found.steps - 1) // train.save_every
    return min(train.keep_checkpoints, made) + int(train.keep_best)


def _disk(cfg: Config, found: Estimate) -> int:
    return _checkpoints(cfg, found) * found.checkpoint + found.saved


def _disk_text(cfg: Config, found: Estimate) -> str:
    if not found.saved:
        return f"unknown: {escape(found.unknown.get('memory', ''))}"
    count = _checkpoints(cfg, found)
    checkpoints = f"{_count(count, 'checkpoint')} of {size_text(found.checkpoint)} and " if count else ""
    model = "adapter" if found.is_adapter else "model"
    one = "" if not count else f"; {size_text(found.checkpoint)} more while one is written"
    return f"{size_text(_disk(cfg, found))}: {checkpoints}the {model}, {size_text(found.saved)}{one}"


def _sweep_disk(each: Sequence[tuple[Config, int, Estimate]], slots: int, keep: str) -> str:
    known = [(count, _disk(cfg, found), found) for cfg, count, found in each if found.saved]
    largest = max((size for _, size, _ in known), default=0)
    kept = {
        "all": sum(count * size for count, size, _ in known),
        "best": largest,
        "adapters": sum(count * found.saved for count, _, found in known if found.is_adapter),
        "none": 0,
    }[keep]
    meanwhile = "" if keep == "all" else f", and up to {size_text(slots * largest)} more while runs go"
    each_seed = " for each seed of the best" if keep == "best" else ""
    lost = sum(count for _, count, found in each if not found.saved)
    return f"{size_text(kept)}{each_seed} with keep={keep}{meanwhile}" + (f"; unknown of {lost:,} runs" if lost else "")


# --------------------------------------------------------------------------------------------------------------- probe


def _show_probe(cfg: Config, found: Estimate) -> None:
    """Take two steps for real, and print what they took."""
    probed = _probe(cfg)
    off = "" if found.peak is None else f", which the estimate is {_off(found.peak, probed.peak)}"
    _line("probe", f"{size_text(probed.peak)} of memory{off}")
    tokens = cfg.train.grad_accumulation * found.rows * found.length
    text = f"{probed.step_seconds:.3g} s for a step of {_count(tokens, 'token')} in each process"
    if found.flops is not None and found.rate is not None:
        rough = tokens * found.flops / found.rate
        text += f"; roughly estimated: {rough:.3g} s, {_off(rough, probed.step_seconds)}"
    _line("", text)
    if (whole := _tokens(cfg, found)) is not None:
        seconds = whole / found.world_size / tokens * probed.step_seconds
        _line("", f"about {_duration(seconds)} for all steps, if every token takes as long")


def _off(estimated: float, measured: float) -> str:
    """Return how far an estimate is from what was measured."""
    return f"{estimated / measured - 1:+.0%} off"


def _probe(cfg: Config) -> Probed:
    """Have two steps of a run taken on its longest rows, in a folder that is gone afterwards.

    Raises:
        ConfigError: The run cannot start.
        RunFailed: It failed.
    """
    folder = Path(tempfile.mkdtemp(prefix="ftrun-"))
    cfg = copy.deepcopy(cfg)
    # What would come between the steps or after them, and the order in which rows are drawn.
    train = cfg.train
    train.max_steps, train.shuffle, train.group_by_length, train.profile_steps = 2, False, False, 0
    train.eval_every, train.save_every, train.keep_best, train.early_stopping_patience = 0, 0, False, None
    train.scheduler, train.warmup, cfg.tracker, cfg.objective = Scheduler.constant, 0.0, {}, None
    cfg.output_dir = str(folder / "run")
    try:
        (line,) = _answer(launch.freeze(cfg, ["--probe"]), {"probe": True})
        return Probed(**line)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -------------------------------------------------------------------------------------------------------------- shapes

_NOTHING_TO_DO_WITH_IT = {
    "": ("seed", "objective", "objective_mode", "output_dir", "tracker", "plugins"),
    "train": (
        "scheduler", "warmup", "min_lr_ratio", "num_cycles", "power", "decay", "decay_shape", "plateau_patience",
        "plateau_factor", "max_grad_norm", "neftune", "log_every",
    ),
    "optimizer": ("groups",),
}  # fmt: skip
"""Keys that change neither memory nor time nor disk."""

_HOW_STRONGLY = ("stage", "adapter", "optimizer", "reward")
"""Groups in which a number that is not whole says how strongly something acts: only whether it does makes a shape."""

_HOW_MUCH = ("ratio",)
"""But for these keys, which say how much there is of it."""


def _shape(cfg: Config) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a config that its memory, time or disk depend on, with their values."""
    for group, value in dataclasses.asdict(cfg).items():
        if group in _NOTHING_TO_DO_WITH_IT[""]:
            continue
        if not isinstance(value, dict):
            yield group, value
            continue
        for key, inner in value.items():
            if key not in _NOTHING_TO_DO_WITH_IT.get(group, ()):
                weak = isinstance(inner, float) and group in _HOW_STRONGLY and key not in _HOW_MUCH
                yield f"{group}.{key}", bool(inner) if weak else inner
