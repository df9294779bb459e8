"""What the optimizers of bitsandbytes share: eight bits of state a value, in blocks of 256 with a scale each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.errors import ConfigError, Problem
from ftrun.fields import ranged
from ftrun.hardware import Device
from ftrun.plugin import Optimizer

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.config import Config
    from ftrun.worker.parameters import Weight

_PAGING = ("auto", "cuda")
"""Devices, as torch calls them, that have memory which the driver moves between them and the machine."""


@dataclass(kw_only=True)
class EightBit(Optimizer):
    """An optimizer of bitsandbytes whose state is quantized (https://arxiv.org/abs/2110.02861).

    Embeddings keep 32 bits, as the paper finds they must: in a row, the gradients of rare tokens are far apart.
    """

    requires: ClassVar[tuple[str, ...]] = ("bitsandbytes",)

    min_8bit_size: int = ranged(4096, ge=1)
    """Number of elements below which a weight keeps 32 bits of state: norms gain no memory, and lose precision."""

    paged: bool = False
    """Let the GPU's driver move states to the machine's memory where the GPU's is full, and back for each step. After a
    resumption bitsandbytes keeps them in the GPU's."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield paging on a device that is known to have none."""
        yield from super().check(cfg)
        if self.paged:
            yield from no_paging(cfg.hardware.device, "optimizer.paged", "optimizer.paged=false")

    def settle(self, cfg: Config) -> None:
        """Refuse paging on a device that is known only now.

        Raises:
            ConfigError: It has none.
        """
        if self.paged and (
            problems := list(no_paging(cfg.hardware.device, "optimizer.paged", "optimizer.paged=false"))
        ):
            raise ConfigError(problems)

    def made(self, name: str, model: nn.Module, settings: Mapping[str, Any]) -> TorchOptimizer:
        """Return the optimizer of bitsandbytes that has a name, over the weights that train."""
        from bitsandbytes import optim

        from ftrun.worker import parameters

        assert self.lr is not None
        groups = parameters.groups(model, self, rule_of)
        common: dict[str, Any] = {"lr": self.lr, "min_8bit_size": self.min_8bit_size, "is_paged": self.paged}
        return sparing(getattr(optim, name))(groups, **common, **settings)


def no_paging(device: Device, key: str, instead: str) -> Iterator[Problem]:
    """Yield a problem if a device has no paged memory, in which bitsandbytes would quietly use the usual one."""
    if device.torch_name not in _PAGING:
        message = f"hardware.device={device} has no paged memory, so it would change nothing"
        yield Problem(key, message, f"{instead}, or hardware.device=cuda")


def rule_of(weight: Weight) -> str:
    """Return the name of the group of a weight's kind: by it, `sparing` knows the embeddings."""
    from ftrun.worker.parameters import Role

    return "32bit" if weight.role is Role.embedding else "8bit"


def sparing(cls: Any) -> type[TorchOptimizer]:
    """Return an optimizer of bitsandbytes that keeps 32 bits of state in groups whose rule is ``32bit``.

    Its own way of saying so, ``GlobalOptimManager``, knows weights by their ``id``, in one list for the whole process.
    """

    def get_config(self: Any, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = cls.get_config(self, gindex, pindex, group)
        return found | {"optim_bits": 32} if group["rule"] == "32bit" else found

    return type(cls.__name__, (cls,), {"get_config": get_config})
