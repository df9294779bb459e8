"""What replies are worth: the rewards of a run, asked one after another, and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ftrun.completions import Completion
from ftrun.errors import RunFailed
from ftrun.plugin import Reward
from ftrun.worker.training import Run


class Rewards:
    """The chosen rewards by name, ready to judge."""

    def __init__(self, rewards: Mapping[str, Reward], run: Run, model: nn.Module) -> None:
        self.rewards = dict(rewards)
        for reward in self.rewards.values():
            reward.prepare(run, model)

    def __call__(self, completions: Sequence[Completion]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Judge replies, one or many.

        Returns:
            The sum of each reply's rewards times their weights, where one that says nothing counts 0; and what each
            reward said before its weight, NaN for nothing. All float32, on the CPU, of as many values as replies.

        Raises:
            RunFailed: A reward fails, leaves a reply out, or says what is no number.
        """
        raw = {name: _values(name, reward, completions) for name, reward in self.rewards.items()}
        total = torch.zeros(len(completions))
        for name, values in raw.items():
            total += self.rewards[name].weight * values.nan_to_num(nan=0.0)
        return total, raw


def _values(name: str, reward: Reward, completions: Sequence[Completion]) -> torch.Tensor:
    found = list(reward.score(completions))
    if len(found) != len(completions):
        raise RunFailed(f"reward={name} gives {len(found)} values for {len(completions)} replies")
    for value in found:
        if value is not None and not math.isfinite(value):
            raise RunFailed(f"reward={name} gives {value} for a reply: a number is wanted, or None for no opinion")
    return torch.tensor([math.nan if value is None else float(value) for value in found], dtype=torch.float32)
