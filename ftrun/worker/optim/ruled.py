"""An optimizer that updates each parameter group by a rule of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from ftrun.errors import RunFailed

State = dict[str, Any]
"""What a rule keeps of one weight: tensors and plain numbers, so that a checkpoint holds it and loads it safely."""

States = Sequence[State]
Tensors = Sequence[Tensor]


class Rule:
    """How weights of one kind are updated. Its settings are fixed for the run; what changes is in the states."""

    elementwise: ClassVar[bool] = False
    """Whether each element is updated by its own gradient alone, so that a shard of a weight can be updated, too."""

    def start(self, weight: Tensor, number: int = 0) -> State:
        """Return the state of a weight before its first step.

        Args:
            weight: The weight.
            number: Its place among all that the optimizer updates, the same whenever a run with them is started.
        """
        raise NotImplementedError

    def update(self, weights: Tensors, grads: Tensors, states: States, *, lr: float, weight_decay: float) -> None:
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

    averages: ClassVar[bool] = False
    """Whether the weights that a run ends with are others than those that it trains at."""

    def __init__(self, groups: list[dict[str, Any]], rules: Mapping[str, Rule]) -> None:
        self.rules = rules
        super().__init__(groups, {})
        keep_types(self, on_weights=True)

    def start(self, group: dict[str, Any], weight: Tensor, like: Tensor | None = None) -> State:
        """Return what the rule of a group keeps of a weight before its first step.

        Args:
            group: The weight's.
            weight: The weight.
            like: A tensor of its whole shape, if ``weight`` is a shard.
        """
        number = next(number for number, other in enumerate(self._weights()) if other is weight)
        return self.rules[group["rule"]].start(weight if like is None else like, number)

    def _weights(self) -> Iterator[Tensor]:
        return (weight for group in self.param_groups for weight in group["params"])

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """While inside, have the weights that a run would end with now."""
        return contextlib.nullcontext()

    def with_state(self) -> list[Tensor]:
        """Return the weights that have a state at one time: those of which there are most bytes, if others follow."""
        return list(self._weights())

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
        for shard in [weight for weight in weights if isinstance(weight, DTensor) and not rule.elementwise]:
            self._update_whole(group, shard, settings)
        if together := [weight for weight in weights if not isinstance(weight, DTensor) or rule.elementwise]:
            for weight in together:
                if weight not in self.state:
                    self.state[weight] = self.start(group, weight)
            grads: list[Any] = [weight.grad for weight in together]
            rule.update(together, grads, [self.state[weight] for weight in together], **settings)

    def _update_whole(self, group: dict[str, Any], weight: DTensor, settings: dict[str, float]) -> None:
        """Update a weight of which each process holds a shard (FSDP2) by a rule that needs it whole.

        Every process gathers it and computes the same, and keeps of it what belongs to its own shard.
        """
        assert isinstance(weight.grad, DTensor)
        whole, grad = weight.full_tensor().clone(), weight.grad.full_tensor().clone()
        if weight not in self.state:
            self.state[weight] = self.start(group, weight, whole)
        self.rules[group["rule"]].update([whole], [grad], [self.state[weight]], **settings)
        mesh: Any = weight.device_mesh
        everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        weight.to_local().copy_(everywhere.redistribute(mesh, weight.placements).to_local())


def keep_types(optimizer: torch.optim.Optimizer, *, on_weights: bool = False) -> None:
    """Have a state loaded in the types that it was saved in: torch casts tensors to the type of their weight.

    Args:
        optimizer: What loads it.
        on_weights: Whether all of it belongs on the weight's device. Otherwise that is left to torch, which leaves
            the count of steps where the file was read to.
    """
    saved: list[dict[str, Any]] = []

    def restore(_: torch.optim.Optimizer) -> None:
        found = saved.pop()
        numbers = chain.from_iterable(group["params"] for group in found["param_groups"])
        weights = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        for number, weight in zip(numbers, weights, strict=True):
            for name, value in found["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    state = optimizer.state[weight]
                    place = weight.device if on_weights else state[name].device
                    state[name] = value.to(device=place, copy=True)

    optimizer.register_load_state_dict_pre_hook(lambda _, state: saved.append(state))
    optimizer.register_load_state_dict_post_hook(restore)


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
        if not norms:
            return torch.zeros(())
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
