"""BAdam: the blocks of a model take turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ftrun.errors import ConfigError, Problem
from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.optimizer._blocks import InTurns, told

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.config import Config
    from ftrun.worker.optim.blocks import Turns
    from ftrun.worker.training import Run


class Unit(StrEnum):
    """What a block is."""

    layer = "layer"
    """A transformer layer."""

    module = "module"
    """A part of one: its attention, its MLP."""


class Order(StrEnum):
    """Which block follows."""

    random = "random"
    """Each once in a round, in an order that is drawn anew for every round."""

    ascending = "ascending"
    """The next one, from the embeddings to the head."""

    descending = "descending"
    """The one before."""

    fixed = "fixed"
    """The same one."""


@register
@dataclass(kw_only=True)
class BAdam(InTurns):
    """AdamW on one block of the model at a time (https://arxiv.org/abs/2404.02827).

    Blocks are the embeddings, each layer, and the head; a norm before the head goes with the last layer. Only the block
    whose turn it is has gradients and moments, so their memory is that of the largest block, and backward passes end at
    it. Each turn starts without moments. ``train.max_grad_norm`` clips the gradient of that block. Weights that are
    stored in bfloat16 have a float32 copy while it is their turn, and so 12 bytes besides their own and the gradient's.
    """

    name: str = "badam"

    blocks: Unit = Unit.layer
    """What a block is: ``layer``, or ``module``, the parts of a layer that have matrices (``self_attn``, ``mlp``),
    which takes less memory; a layer's norms go with the part before them."""

    order: Order = Order.random
    """Which block follows: ``random`` (each once in a round), ``ascending`` (from the embeddings to the head),
    ``descending``, or ``fixed`` (always ``start_block``)."""

    start_block: int | None = ranged(None, ge=0)
    """Number of the block that begins, from 0. Default: the first if ascending, the last if descending."""

    update_interval: int | None = ranged(None, ge=1)
    """Steps of a turn. Default: an epoch's steps divided by the number of blocks, but 50 to 100, as the paper advises;
    fewer in a run that would end before every block had one. The run says how many."""

    embeddings: bool = True
    """Whether the embeddings, with a head that shares their weights, are a block. They may be the largest."""

    head: bool = True
    """Whether the output head is a block."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield a beginning that the order has no use for, or lacks, and a new head that would stay as it is."""
        yield from super().check(cfg)
        if self.order is Order.random and self.start_block is not None:
            message = "a random order begins where it is drawn to begin"
            yield Problem("optimizer.start_block", message, "optimizer.order=ascending, or leave it out")
        if self.order is Order.fixed and self.start_block is None:
            message = "it trains one block only, and no key says which"
            yield Problem("optimizer.order", message, "optimizer.start_block=N, or optimizer.order=random")
        if not self.embeddings and self.embedding_lr is not None:
            message = "with optimizer.embeddings=false they stay as they are"
            yield Problem("optimizer.embedding_lr", message, "optimizer.embeddings=true, or leave it out")
        if not self.head and cfg.stage.head.modules:
            message = f"stage={cfg.stage.name} brings a new head, which would never be trained"
            yield Problem("optimizer.head", message, "optimizer.head=true")

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        """Return the optimizer that the blocks take turns in.

        Raises:
            ConfigError: There is no block of the number to begin with, or nothing to leave out.
        """
        from ftrun.worker.media import encoders
        from ftrun.worker.optim.blocks import of_everything

        self._leave_out(model)
        # A batch without media gives what encodes them no gradient, so it has no turn of its own: it trains always.
        of_media = {id(weight) for weight in encoders.parameters(model).values()}
        everything = of_everything(model, split=self.blocks is Unit.module)
        blocks = {name: [one for one in block if id(one) not in of_media] for name, block in everything.items()}
        blocks = {name: block for name, block in blocks.items() if block}
        num_parts = 1 if self.order is Order.fixed else len(blocks)
        steps = told(self.update_interval, run, num_parts, "blocks")
        return self.in_turns(model, run, [*blocks.values()], self._turns([*blocks], run.cfg.seed), steps)

    def _leave_out(self, model: nn.Module) -> None:
        """Freeze what is to be no block."""
        from ftrun.worker.parameters import Role, weights

        found = weights(model)
        for key, wanted, role in (("embeddings", self.embeddings, Role.embedding), ("head", self.head, Role.head)):
            left_out = [weight.parameter for weight in found if weight.role is role]
            if not wanted and not left_out:
                message = f"no {role} of its own trains, so there is nothing to leave out"
                raise ConfigError([Problem(f"optimizer.{key}", message, f"optimizer.{key}=true")])
            for parameter in left_out:
                parameter.requires_grad_(wanted)

    def _turns(self, names: list[str], seed: int) -> Turns:
        from ftrun.worker.optim import blocks

        count = len(names)
        if self.start_block is not None and self.start_block >= count:
            listed = ", ".join(f"{number} {name}" for number, name in enumerate(names))
            message = f"there are {count} blocks: {listed}"
            raise ConfigError([Problem("optimizer.start_block", message, f"a number below {count}")])
        match self.order:
            case Order.random:
                return blocks.shuffled(count, seed=seed)
            case Order.ascending:
                return blocks.one_after_another(count, start=self.start_block or 0, stride=1)
            case Order.descending:
                start = count - 1 if self.start_block is None else self.start_block
                return blocks.one_after_another(count, start=start, stride=-1)
            case Order.fixed:
                return blocks.one_after_another(count, start=self.start_block or 0, stride=0)
