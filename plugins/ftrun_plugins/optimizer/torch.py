"""Any optimizer class that can be imported."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftrun.errors import ConfigError, Problem, did_you_mean
from ftrun.fields import MISSING
from ftrun.plugin import register
from ftrun_plugins.optimizer._foreign import Foreign

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.config import Config
    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class Torch(Foreign):
    """Any class that is an optimizer of torch, of torch itself or an installed package.

    Weights, rates and decays are given to it as to every optimizer. What it makes of them is its own: many classes of
    torch add the decay to the gradient (L2) where others shrink the weight, and its usual rate may be far from AdamW's,
    so that ``optimizer.lr`` is worth typing.
    """

    name: str = "torch"

    cls: str = MISSING
    """Where it is imported from: ``torch.optim.RAdam``."""

    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class, by name: ``{betas: [0.9, 0.99]}``; the class's defaults for the others."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield a class that is named without its module."""
        yield from super().check(cfg)
        if "." not in self.cls.strip("."):
            message = f"{self.cls!r} does not say which module it is in"
            yield Problem("optimizer.cls", message, "optimizer.cls=torch.optim.RAdam, for example")

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        """Return an optimizer of the class.

        Raises:
            ConfigError: It cannot be imported, is none, or takes other arguments.
        """
        from ftrun.worker import parameters

        # As lists they would not be what most classes say that they take.
        arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in self.args.items()}
        cls = _imported(self.cls)
        return self.made(cls, parameters.groups(model, self, lambda _: cls.__name__), arguments)


def _imported(path: str) -> type[TorchOptimizer]:
    """Return the class at a dotted path.

    Raises:
        ConfigError: There is none.
    """
    import torch

    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything
        message = f"{module_name} cannot be imported: {error}"
        raise ConfigError([Problem("optimizer.cls", message, "a module that is installed here")]) from error
    base = torch.optim.Optimizer
    known = [
        one
        for one, found in vars(module).items()
        if isinstance(found, type) and issubclass(found, base) and found is not base
    ]
    if name not in known:
        message = f"{module_name} has no optimizer {name}{did_you_mean(name, known)}"
        raise ConfigError(
            [Problem("optimizer.cls", message, f"one of {', '.join(known)}" if known else "another module")]
        )
    return getattr(module, name)
