"""An optimizer that updates each parameter group by a rule of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from ftrun.errors import RunFailed

State = dict[str, Any]
"""What a rule keeps of one weight: tensors and plain numbers, so that a checkpoint holds it and loads it safely."""


class Rule:
    """How weights of one kind are updated. Its settings are fixed for the run; what changes is in the states."""

    elementwise: ClassVar[bool] = False
    """Whether each element is updated by its own gradient alone, so that a shard of a weight can be updated, too."""

    def start(self, weight: Tensor) -> State:
        """Return the state of a weight before its first step."""
        raise NotImplementedError

    def update(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        *,
        lr: float,
        weight_decay: float,
    ) -> None:
        """Update weights and their states in place. The gradients may be overwritten.

        Args:
            weights: Of one parameter group, all on one device; at least one.
            grads: The gradient of each.
            states: The state of each.
            lr: The rate of this step.
            weight_decay: Decoupled: a weight shrinks by ``lr * weight_decay`` of itself, apart from its gradient.
        """
        raise NotImplementedError


class Ruled(torch.optim.Optimizer):
    """Applies a rule to each parameter group.

    Args:
        groups: Parameter groups, each with ``lr``, ``weight_decay``, and in ``rule`` the name of its rule.
        rules: The rules by name.
    """

    layerwise: Layerwise | None = None
    """What updates the weights in the backward pass, if anything does."""

    def __init__(self, groups: list[dict[str, Any]], rules: Mapping[str, Rule]) -> None:
        self.rules = rules
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if weights := [weight for weight in group["params"] if weight.grad is not None]:
                self.update(group, weights)
        return loss

    def update(self, group: dict[str, Any], weights: Sequence[Tensor]) -> None:
        """Update some weights of a group, which have gradients."""
        rule = self.rules[group["rule"]]
        settings = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        apart = [weight for weight in weights if isinstance(weight, DTensor) and not rule.elementwise]
        for weight in apart:
            self._update_whole(rule, weight, settings)
        if together := [weight for weight in weights if not isinstance(weight, DTensor) or rule.elementwise]:
            for weight in together:
                if weight not in self.state:
                    self.state[weight] = rule.start(weight)
            grads: list[Any] = [weight.grad for weight in together]
            rule.update(together, grads, [self.state[weight] for weight in together], **settings)

    def _update_whole(self, rule: Rule, weight: DTensor, settings: dict[str, float]) -> None:
        """Update a weight of which each process holds a shard (FSDP2) by a rule that needs it whole.

        Every process gathers it and computes the same, and keeps of it what belongs to its own shard.
        """
        assert isinstance(weight.grad, DTensor)
        whole, grad = weight.full_tensor().clone(), weight.grad.full_tensor().clone()
        if weight not in self.state:
            self.state[weight] = rule.start(whole)
        rule.update([whole], [grad], [self.state[weight]], **settings)
        mesh: Any = weight.device_mesh
        everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        weight.to_local().copy_(everywhere.redistribute(mesh, weight.placements).to_local())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state, every tensor in the type that it was saved in: torch would cast it to its weight's."""
        super().load_state_dict(state_dict)
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        weights = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, weight in zip(ids, weights, strict=True):
            if number in state_dict["state"]:
                self.state[weight] = _restored(state_dict["state"][number], self.state[weight])


def _restored(saved: State, placed: State) -> State:
    """Return a copy of what was saved, each tensor on the device where torch has placed it."""
    return {
        name: value.to(device=placed[name].device, copy=True) if isinstance(value, Tensor) else placed[name]
        for name, value in saved.items()
    }


class Layerwise:
    """Updates each weight within the backward pass, as soon as its gradient is whole, and frees the gradient.

    So the gradients of the whole model are never in memory at once. Their common norm is not known when the first of
    them is used; each is clipped by its own.

    Args:
        optimizer: Whose weights to update. Its ``step`` then finds no gradients left.
        max_norm: Norm to which each gradient is clipped; 0 does not clip.
    """

    def __init__(self, optimizer: Ruled, max_norm: float) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm
        self._norms: dict[Tensor, Tensor] = {}
        numbered = enumerate(optimizer.param_groups)
        self._groups = {weight: number for number, group in numbered for weight in group["params"]}
        for weight in self._groups:
            weight.register_post_accumulate_grad_hook(self._use)
        optimizer.register_step_post_hook(lambda *_: self._norms.clear())

    @property
    def norm(self) -> Tensor:
        """The norm of the whole gradient of the step so far, before clipping."""
        norms = list(self._norms.values())
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    @torch.no_grad()
    def _use(self, weight: Tensor) -> None:
        if weight in self._norms:
            raise RunFailed(
                "a step has gone backward twice, and weights that are updated on the way have used up their gradients"
            )
        assert weight.grad is not None
        norm = torch.linalg.vector_norm(weight.grad, dtype=torch.float32)
        if self.max_norm:
            weight.grad.mul_((self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        self._norms[weight] = norm
        self.optimizer.update(self.optimizer.param_groups[self._groups[weight]], [weight])
        weight.grad = None
