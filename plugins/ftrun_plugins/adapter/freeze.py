"""Part of the model trains, the rest is frozen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ftrun.errors import ConfigError, Problem, did_you_mean
from ftrun.plugin import Adapter, register

if TYPE_CHECKING:
    from torch import nn

    from ftrun.config import Config
    from ftrun.worker.training import Run

_LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.(.+)")


@register
@dataclass(kw_only=True)
class Freeze(Adapter):
    """Train some transformer layers, and the head that a stage brings; freeze the rest of the model."""

    trains_base_weights: ClassVar[bool] = True
    name: str = "freeze"

    layers: int = 2
    """How many of the last transformer layers train; a negative number counts from the first."""

    modules: list[str] = field(default_factory=list)
    """Train only these parts of a layer (``[self_attn]``, ``[mlp.down_proj]``). Default: all of it."""

    extra: list[str] = field(default_factory=list)
    """Also train these modules outside the layers (``[lm_head]``, ``[embed_tokens]``, ``[model.norm]``)."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Something has to train."""
        if self.layers == 0 and not self.extra and not cfg.stage.head.modules:
            yield Problem("adapter.layers", "0 layers and no adapter.extra leave nothing to train", "adapter.layers=2")

    def apply(self, model: nn.Module, run: Run) -> nn.Module:
        """Set ``requires_grad`` by the parameters' names.

        Raises:
            ConfigError: ``modules`` or ``extra`` names nothing in this model, or it has fewer layers.
        """
        from ftrun.worker.media import encoders

        of_media = encoders.parameters(model)
        located = {
            name: None if name in of_media else _LAYER.search(f".{name}")
            for name, _ in model.named_parameters(remove_duplicate=False)
        }
        count = 1 + max(int(match[1]) for match in located.values() if match)
        self._check_names(
            {match[2] for match in located.values() if match}, {n for n, m in located.items() if not m}, count
        )
        head = run.cfg.stage.head.modules
        chosen = range(count)[-self.layers :] if self.layers > 0 else range(-self.layers)
        model.requires_grad_(False)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if match := located[name]:
                trains = int(match[1]) in chosen and (
                    not self.modules or any(part in match[2] for part in self.modules)
                )
            else:
                trains = name.partition(".")[0] in head or any(part in name for part in self.extra)
            if trains:  # only ever switched on: a tied weight goes by two names
                parameter.requires_grad_(True)
        return model

    def _check_names(self, inside: set[str], outside: set[str], count: int) -> None:
        problems = []
        if abs(self.layers) > count:
            problems.append(
                Problem("adapter.layers", f"the model has {count} layers", f"adapter.layers={count} or fewer")
            )
        for key, wanted, there in (("modules", self.modules, inside), ("extra", self.extra, outside)):
            parts = sorted({name.removesuffix(".weight").removesuffix(".bias") for name in there})
            for part in wanted:
                if not any(part in name for name in there):
                    where = "a layer of this model" if key == "modules" else "this model, outside its layers,"
                    message = f"{where} has no {part}{did_you_mean(part, parts)}"
                    problems.append(Problem(f"adapter.{key}", message, f"names among {', '.join(parts)}"))
        if problems:
            raise ConfigError(problems)
