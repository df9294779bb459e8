"""The optimizers that transformers knows by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ftrun.errors import ConfigError, Problem, did_you_mean
from ftrun.fields import MISSING
from ftrun.plugin import register
from ftrun_plugins.optimizer import _bitsandbytes
from ftrun_plugins.optimizer._foreign import Foreign

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.config import Config
    from ftrun.worker.training import Run

_WRONG = {
    "galore": ("drops weight decay and Adam's settings, and cannot be resumed", "optimizer=galore"),
    "apollo": ("drops weight decay, and cannot be resumed", "optimizer=apollo"),
    "lomo": ("takes its steps in a training loop of its own", "optimizer=lomo"),
    "adalomo": ("takes its steps in a training loop of its own", "optimizer=adalomo"),
    "schedule": (
        "trains other weights than those to evaluate and save, and nobody would switch",
        "optimizer=schedule_free",
    ),
}
"""What the first part of names begins with that go wrong without a word, and how; what to type instead."""


_OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
"""Settings that transformers has as arguments of their own."""


@register
@dataclass(kw_only=True)
class HF(Foreign):
    """An optimizer that transformers knows by name (its ``optim`` and ``optim_args``), over our groups of weights.

    What it makes of the decay is its own, and its usual rate may be far from AdamW's, so that ``optimizer.lr`` is worth
    typing.
    """

    name: str = "hf"

    optim: str = MISSING
    """Its name: ``ademamix``, ``rmsprop``, ``grokadamw`` and others; a wrong one is answered with all."""

    args: dict[str, Any] = field(default_factory=dict)
    """Its settings by transformers' names: ``adam_beta1``, ``adam_beta2``, ``adam_epsilon``, and what else
    ``optim_args`` says (``{beta3: 0.999, alpha: 8}``). One that changes nothing is refused."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield the names that transformers takes and gets wrong."""
        yield from super().check(cfg)
        family = self.optim.partition("_")[0]
        if family in _WRONG:
            why, instead = _WRONG[family]
            yield Problem("optimizer.optim", f"transformers' {self.optim} {why}", instead)
        yield from self._no_paging(cfg)

    def settle(self, cfg: Config) -> None:
        """Refuse paging on a device that is known only now.

        Raises:
            ConfigError: It has none.
        """
        if problems := list(self._no_paging(cfg)):
            raise ConfigError(problems)

    def _no_paging(self, cfg: Config) -> Iterator[Problem]:
        if self.optim.startswith("paged_"):
            instead = f"optimizer.optim={self.optim.removeprefix('paged_')}"
            yield from _bitsandbytes.no_paging(cfg.hardware.device, "optimizer.optim", instead)

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        """Return what transformers would use.

        Raises:
            ConfigError: It knows no such name or setting, or lacks a package.
        """
        from ftrun.worker import parameters

        cls, arguments = self._found(self.args, model)
        for name, value in self.args.items():
            without = self._found({one: other for one, other in self.args.items() if one != name}, model)
            if repr(without) == repr((cls, arguments)):
                message = f"{name}={value} changes nothing: {self.optim} does not read it, or has it so anyway"
                raise ConfigError([Problem(f"optimizer.args.{name}", message, f"leave {name} out")])
            if value is False and arguments.get(name) is True:
                message = f"transformers reads any text as true for {self.optim}, false too"
                raise ConfigError([Problem(f"optimizer.args.{name}", message, f"leave {name} out")])
        del arguments["lr"]
        # Of some it passes numbers on as the text that it has read them from.
        arguments |= {name: value for name, value in self.args.items() if arguments.get(name) == str(value)}
        if arguments.get("optim_bits") == 8:  # as transformers does it: embeddings keep 32 bits
            return self.made(
                _bitsandbytes.sparing(cls), parameters.groups(model, self, _bitsandbytes.rule_of), arguments
            )
        return self.made(cls, parameters.groups(model, self, lambda _: self.optim), arguments)

    def _found(self, args: dict[str, Any], model: nn.Module) -> tuple[Any, dict[str, Any]]:
        """Return the class and the arguments that transformers has for the name."""
        from transformers import Trainer, TrainingArguments
        from transformers.training_args import OptimizerNames

        known = [one.value for one in OptimizerNames if one.value.partition("_")[0] not in _WRONG]
        if self.optim not in known:
            message = f"transformers knows no {self.optim}{did_you_mean(self.optim, known)}"
            raise ConfigError([Problem("optimizer.optim", message, f"one of {', '.join(known)}")])
        of_adam = {name: float(value) for name, value in args.items() if name in _OF_ADAM}
        # Arguments of the true class would reset the state that the trainer's own have set up.
        defaults = {
            field.name: field.default for field in fields(TrainingArguments) if not field.name.startswith("optim")
        }
        others = ",".join(f"{name}={value}" for name, value in args.items() if name not in of_adam)
        try:
            made: Any = SimpleNamespace(
                **defaults | of_adam, optim=OptimizerNames(self.optim), optim_args=others or None
            )
            return Trainer.get_optimizer_cls_and_kwargs(made, model)
        except ImportError as error:
            raise ConfigError([Problem("optimizer.optim", str(error), "pip install what it names")]) from error
        except (TypeError, ValueError) as error:
            message = f"transformers cannot make {self.optim} of this: {error}"
            raise ConfigError([Problem("optimizer.optim", message, "other optimizer.args, or another name")]) from error
