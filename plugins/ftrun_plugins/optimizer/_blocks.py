"""What optimizers share that update a part of the weights at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.errors import Problem
from ftrun_plugins.optimizer._ruled import AdamLike

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer
    from transformers import TrainerCallback

    from ftrun.config import Config
    from ftrun.worker.optim.adamw import AdamW
    from ftrun.worker.optim.blocks import Turns
    from ftrun.worker.optim.ruled import Rule
    from ftrun.worker.training import Run


@dataclass(kw_only=True)
class InParts(AdamLike):
    """One that updates a part of the weights at a time, by Adam."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield an adapter: there is nothing to save on its weights."""
        yield from super().check(cfg)
        if not cfg.adapter.trains_base_weights:
            message = f"adapter={cfg.adapter.name} trains few weights beside the model's, which would get fewer updates"
            yield Problem("optimizer", f"{message} and save next to no memory", "adapter=full, or optimizer=adamw")

    def adamw(self) -> AdamW:
        """Return Adam's rule, with a float32 copy of weights that are stored in fewer bits."""
        from ftrun.worker.optim.blocks import Mastered

        return Mastered(beta1=self.beta1, beta2=self.beta2, eps=self.eps)

    def rule(self, run: Run) -> Rule:
        """Return the one rule."""
        return self.adamw()


@dataclass(kw_only=True)
class InTurns(InParts):
    """One whose blocks of weights take turns, with gradients of a block in its turn only."""

    skips_weights: ClassVar[bool] = True
    takes_shards: ClassVar[bool] = False  # blocks are of the model's own weights, and FSDP puts others in their place

    def callbacks(self, model: nn.Module, run: Run) -> Sequence[TrainerCallback]:
        """Return what begins the first turn, once every process has wrapped the model."""
        from ftrun.worker.optim.blocks import Begin

        return [Begin()]

    def in_turns(
        self, model: nn.Module, run: Run, blocks: Sequence[list[nn.Parameter]], turns: Turns, steps: Callable[[], int]
    ) -> TorchOptimizer:
        """Return the optimizer whose blocks take turns.

        Args:
            model: The model.
            run: The run.
            blocks: Weights of each block. A weight in none trains always.
            turns: Says whose turn it is.
            steps: Gives those of a turn.
        """
        from ftrun.worker import parameters
        from ftrun.worker.optim.blocks import InTurns, show

        made = InTurns(parameters.groups(model, self, self.rule_of), self.rules(run), blocks, turns, steps)
        if run.world_size > 1:
            show(model, made)
        return self.finished(made, run)


def interval(chosen: int | None, run: Run, num_parts: int) -> int:
    """Return the steps that each of some parts has in its turn.

    The paper's advice is an epoch's steps divided among the parts, but 50 to 100. In a run that is too short for that,
    there are so many that every part has one turn.
    """
    if chosen is not None:
        return chosen
    steps = run.total_steps if run.cfg.data.streaming else run.epoch_batches.steps_per_epoch
    advised = min(max(steps // num_parts, 50), 100)
    return max(1, min(advised, run.total_steps // num_parts))


def told(chosen: int | None, run: Run, num_parts: int, parts: str) -> Callable[[], int]:
    """Return what gives the steps of a turn, and says how the turns go when it is first asked: the rows are read then.

    Args:
        chosen: The steps, if they are chosen.
        run: The run.
        num_parts: How many parts take turns.
        parts: What they are.
    """

    @functools.cache
    def steps() -> int:
        from ftrun import events

        found = interval(chosen, run, num_parts)
        text = f"{num_parts} {parts} take turns of {found} steps each"
        num_turns = -(-run.total_steps // found)
        if num_parts > 1:
            events.send("note", text=text if num_turns >= num_parts else f"{text}, and the run ends after {num_turns}")
        return found

    return steps
