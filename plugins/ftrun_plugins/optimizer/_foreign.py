"""What optimizers share whose class is somebody else's: it is looked at before it is used, and after its first step."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftrun.errors import ConfigError, Problem, RunFailed, did_you_mean
from ftrun.plugin import Optimizer

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer
    from transformers import TrainerCallback

    from ftrun.config import Config
    from ftrun.worker.training import Run

_KEYS = {"params": "adapter=...", "lr": "optimizer.lr=...", "weight_decay": "optimizer.weight_decay=..."}
"""Arguments that are not to be given, and what says them here."""


@dataclass(kw_only=True)
class Foreign(Optimizer):
    """An optimizer whose class is somebody else's."""

    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class, by name."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield the arguments that keys of ours say."""
        yield from super().check(cfg)
        for name in sorted(self.args.keys() & _KEYS.keys()):
            message = "is said by a key of every optimizer, which the schedule and the groups of weights go by"
            yield Problem(f"optimizer.args.{name}", message, _KEYS[name])

    def callbacks(self, model: nn.Module, run: Run) -> Sequence[TrainerCallback]:
        """Look at the state after the first step."""
        from transformers import TrainerCallback

        seen: set[bool] = set()

        class Watch(TrainerCallback):
            def on_step_end(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
                if not seen and optimizer.state:
                    refuse_state(optimizer)
                    seen.add(True)

        return [Watch()]

    def made(
        self, cls: type[TorchOptimizer], groups: list[dict[str, Any]], arguments: Mapping[str, Any]
    ) -> TorchOptimizer:
        """Return an optimizer of a class, over groups that hold the rate and the decay.

        Raises:
            ConfigError: It takes other arguments, or does not work in a training loop.
        """
        from ftrun.worker.optim.ruled import keep_types

        if problems := list(_unfit(cls, groups, arguments)):
            raise ConfigError(problems)
        try:
            optimizer = cls(groups, lr=self.lr, **arguments)  # type: ignore[call-arg]
        except Exception as error:  # a class may raise anything
            fix = "other values, or another optimizer"
            raise ConfigError([Problem("optimizer.args", f"{cls.__name__} refuses: {error}", fix)]) from error
        keep_types(optimizer)
        return optimizer


def _unfit(cls: Any, groups: Collection[dict[str, Any]], arguments: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what a class does not take or cannot do, by its signature."""
    takes, name = _after_the_first(cls), cls.__name__
    others = [one for one in takes if one not in _KEYS]
    anything = any(one.kind is one.VAR_KEYWORD for one in inspect.signature(cls).parameters.values())
    for one in () if anything else sorted(arguments.keys() - takes.keys()):
        message = f"{name} has no such argument{did_you_mean(one, others)}"
        yield Problem(f"optimizer.args.{one}", message, f"one of {', '.join(others)}")
    for one in others:
        if takes[one].default is inspect.Parameter.empty and one not in arguments:
            yield Problem(f"optimizer.args.{one}", f"{name} must be given it", f"optimizer.args.{one}=...")
    if "lr" not in takes and not anything:
        message = f"{name} takes no rate, and it is by the rate that a schedule works"
        yield Problem("optimizer", message, "a class with an argument lr")
    if "weight_decay" not in takes and not anything and any(group["weight_decay"] for group in groups):
        yield Problem("optimizer.weight_decay", f"{name} has none", "optimizer.weight_decay=0")
    if any(one.default is inspect.Parameter.empty for one in _after_the_first(cls.step).values()):
        yield Problem("optimizer", f"{name} wants to compute a step's loss itself, several times", "another class")
    if hasattr(cls, "eval"):
        message = f"{name} trains other weights than those that are to be evaluated and saved, and nobody would switch"
        yield Problem("optimizer", message, "optimizer=schedule_free")


def _after_the_first(function: Any) -> dict[str, inspect.Parameter]:
    """Return the named arguments of a function but for the first: weights of a class, and self of a method."""
    parameters = list(inspect.signature(function).parameters.items())[1:]
    return {name: one for name, one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}


def refuse_state(optimizer: TorchOptimizer) -> None:
    """Refuse to go on if a checkpoint of an optimizer could not be resumed from.

    Raises:
        RunFailed: Its state holds what only an unsafe unpickling could read.
    """
    if kind := next(_objects(optimizer.state_dict()), None):
        name = type(getattr(optimizer, "optimizer", optimizer)).__name__
        raise RunFailed(f"{name} keeps a {kind} in its state, and a checkpoint holds tensors and plain values only")


def _objects(value: Any) -> Iterator[str]:
    """Yield the types of what is in a state and torch would not load safely."""
    import torch

    plain = (torch.Tensor, torch.nn.Parameter, int, float, bool, str, type(None))
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _objects(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _objects(inner)
    elif type(value) not in (*plain, *torch.serialization.get_safe_globals()):
        yield f"{type(value).__module__}.{type(value).__qualname__}"
