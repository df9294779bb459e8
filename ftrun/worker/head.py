"""The output head, computed only where there is a label, and for a part of these positions at a time.

The logits of a batch are by far its largest matrix: tokens times vocabulary. Prompts and padding need none, and of the
rest only so many rows at once as `CHUNK` says are ever in memory, for the forward and the backward pass alike.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ftrun.data.tokens import IGNORED
from ftrun.worker.batches import Batch, model_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Score = Callable[..., tuple[torch.Tensor, ...]]
"""What is wanted of logits: from logits (n, V) in float32, targets (n,) and further rows (n, ...), values (n,) each, of
which the first is differentiable."""

CHUNK = 2**24
"""Logits that are in memory at once: 64 MiB in float32."""

_FEWEST = 128
"""Positions below which a part is not made smaller: the product with the head would no longer fill a processor."""


class Head:
    """The output head of a model, and what its logits are put through before they are logits."""

    def __init__(self, plain: PreTrainedModel, module: nn.Module | None = None) -> None:
        """Be the head of a model.

        Args:
            plain: The model itself, not wrapped for several processes.
            module: What computes the logits, if not the model's head as it is at any time.
        """
        self.plain, self._module = plain, module
        self._known = True
        self._tried = False

    def scores(
        self,
        model: nn.Module,
        batch: Batch,
        score: Score,
        *,
        further: Sequence[torch.Tensor] = (),
        summed: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Run the model, and return what ``score`` says of each position whose next token is labelled.

        Args:
            model: What is called; may be wrapped, for several processes.
            batch: ``input_ids``, ``labels`` and a mask or positions, of shape (B, T).
            score: Says what is wanted of the logits.
            further: More rows for ``score``, one for each labelled position.
            summed: Whether only the sum of the first value is wanted: then the gradient is found in the forward pass,
                and no logits are computed twice.

        Returns:
            The first value, of shape (N,), or its sum, and the others, of shape (N,).
        """
        labels = batch["labels"]
        where = labelled_positions(labels)
        targets = labels[:, 1:][where[:, :-1]]
        if not self._known:
            return self._by_the_model(model, batch, where, (score, targets, *further), summed)
        found: list[tuple[torch.Tensor, ...]] = []
        expected: list[torch.Tensor] = []

        def compute(hidden: torch.Tensor) -> torch.Tensor:
            first = hidden[:1, :1].detach()
            if not self._tried:
                with torch.no_grad():
                    expected.append(self.of_hidden(first))
            found.append(self._in_parts(hidden[where], score, (targets, *further), summed))
            return first  # what the model itself makes logits of: next to nothing

        with intercepted(self._head, compute):
            output = model(**model_inputs(batch), use_cache=False)
        if not self._tried and bool(output.logits.isfinite().all()):  # else nothing can be told from it
            self._tried = True
            self._known = _alike(output.logits, expected[0])
            if not self._known:
                return self.scores(model, batch, score, further=further, summed=summed)
        return found[0]

    def hidden(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return what the head is given at the labelled positions, of shape (N, H), without a gradient."""
        where, found = labelled_positions(batch["labels"]), []

        def keep(hidden: torch.Tensor) -> torch.Tensor:
            found.append(hidden[where])
            return hidden[:1, :1]

        with torch.no_grad(), intercepted(self._head, keep):
            model(**model_inputs(batch), use_cache=False)
        return found[0]

    def _in_parts(
        self, hidden: torch.Tensor, score: Score, rows: Sequence[torch.Tensor], summed: bool
    ) -> tuple[torch.Tensor, ...]:
        """Return the score of all positions, computed a part of them at a time.

        Args:
            hidden: What the head takes, of shape (N, H).
            score: What is wanted of the logits.
            rows: Targets and what else ``score`` takes, of shape (N, ...).
            summed: Whether the first value is summed.
        """
        weights = [weight for weight in self._head.parameters() if weight.requires_grad]
        count = len(hidden)
        size = _positions_at_once(count, self._vocabulary)
        parts = [slice(start, start + size) for start in range(0, max(count, 1), size)]
        of_part = functools.partial(self._score_of, score)
        if not torch.is_grad_enabled():
            return _joined([of_part(hidden[part], *(row[part] for row in rows)) for part in parts], summed)
        if summed or not weights:
            return _known_gradient(of_part, hidden, rows, parts, weights, summed)
        # The gradient of the head's own weights depends on what becomes of each value, which is not known yet.
        scored = [
            checkpoint(of_part, hidden[part], *(row[part] for row in rows), use_reentrant=False) for part in parts
        ]
        return _joined(scored, summed)

    def _score_of(self, score: Score, hidden: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return score(self.of_hidden(hidden), *rows)

    def of_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits in float32 of what the head is given, of shape (..., H): all of `hidden`, or a part."""
        logits = (self._module or self._head)(hidden).float()
        config = self.plain.config.get_text_config()
        for name, change in _AFTER_THE_HEAD.items():
            if value := getattr(config, name, None):
                logits = change(logits, value)
        return logits

    @property
    def _head(self) -> nn.Module:
        return self.plain.get_output_embeddings()

    @property
    def _vocabulary(self) -> int:
        return int(self.plain.config.get_text_config().vocab_size)

    def _by_the_model(
        self, model: nn.Module, batch: Batch, where: torch.Tensor, scored: tuple[Any, ...], summed: bool
    ) -> tuple[torch.Tensor, ...]:
        """Return the score of logits that the model makes itself, all at once: what it does to them is not known."""
        score, *rows = scored
        return _joined([score(self._selected(model, batch, where), *rows)], summed)

    def _selected(self, model: nn.Module, batch: Batch, where: torch.Tensor) -> torch.Tensor:
        with intercepted(self._head, lambda hidden: hidden[where].unsqueeze(0)):
            return model(**model_inputs(batch), use_cache=False).logits[0].float()


@contextlib.contextmanager
def intercepted(head: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While inside, have what a model gives its head be changed first; ``change`` may call the head itself."""
    inside = False

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal inside
        if inside:
            return None
        inside = True
        try:
            return (change(arguments[0]), *arguments[1:])
        finally:
            inside = False

    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


_AFTER_THE_HEAD: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
    "lm_head_multiplier": lambda logits, scale: logits * scale,  # Falcon-H1
}
"""What models do to the head's output, by the key of their config that says how much."""


def labelled_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return where the next token is labelled, of shape (B, T)."""
    where = torch.zeros_like(labels, dtype=torch.bool)
    where[:, :-1] = labels[:, 1:] != IGNORED
    return where


def _positions_at_once(count: int, vocabulary: int) -> int:
    """Return of how many of ``count`` positions the logits are computed at once: never of all, if they are many."""
    return max(_FEWEST, min(CHUNK // vocabulary, -(-count // 4)))


def _known_gradient(
    score: Callable[..., tuple[torch.Tensor, ...]],
    hidden: torch.Tensor,
    rows: Sequence[torch.Tensor],
    parts: Sequence[slice],
    weights: Sequence[nn.Parameter],
    summed: bool,
) -> tuple[torch.Tensor, ...]:
    """Return the score of all positions, and find its gradient on the way, so that nothing is computed twice."""
    of_hidden = torch.empty_like(hidden)
    of_weights = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    found = []
    for part in parts:
        leaf = hidden[part].detach().requires_grad_()
        values = score(leaf, *(row[part] for row in rows))
        grad, *others = torch.autograd.grad(values[0].sum(), [leaf, *weights])
        of_hidden[part] = grad
        for total, new in zip(of_weights, others, strict=True):
            total += new
        found.append(tuple(value.detach() for value in values))
    first, *others = _joined(found, summed)
    known = (of_hidden, *of_weights)
    return _WithGradient.apply(first, known, hidden, *weights), *others  # type: ignore[no-untyped-call]


class _WithGradient(torch.autograd.Function):
    """Values whose gradient is known: a sum's, or that of values each of which depends on its own row only."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, gradients: tuple[torch.Tensor, ...], *inputs: Any) -> torch.Tensor:
        ctx.gradients, ctx.types = gradients, [each.dtype for each in inputs]
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (above,) = upstream
        scale = above if above.ndim == 0 else above[:, None]
        each = zip(ctx.gradients, ctx.types, strict=True)
        return None, None, *((gradient * scale).to(kind) for gradient, kind in each)


def _joined(found: Sequence[tuple[torch.Tensor, ...]], summed: bool) -> tuple[torch.Tensor, ...]:
    first, *others = (torch.cat(values) for values in zip(*found, strict=True))
    return first.sum() if summed else first, *others


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether the logits of one position are the same, as far as their type can tell."""
    exact = one.dtype is torch.float32
    one, other = one.float().flatten(), other.float().flatten()
    tolerance = (1e-4 if exact else 5e-2) * float(other.abs().max())
    return bool((one - other).abs().max() <= tolerance)
