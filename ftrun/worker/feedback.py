"""Training on single replies that were found good or bad, compared with a reference and replies to other prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ftrun import events
from ftrun.data.tokens import IGNORED
from ftrun.worker import logprobs, noise, reference, training
from ftrun.worker.batches import Batch, Collate, sequence_collator
from ftrun.worker.dataset import Selected
from ftrun.worker.stored import StoredRows
from ftrun.worker.training import RunTrainer, add

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.record import Result

Numbers = np.ndarray[Any, Any]

_MISMATCHED = "mismatched"
"""Under which name a row has its prompt with the reply to another one; in a batch, before the names of its columns."""

_REFERENCE = "reference"
"""Under which name a batch has what the reference says of it, of shape (1 or 2, B)."""

_SALT = 0x4B544F
"""So that what is drawn here has nothing to do with what else the seed draws."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What is made small: the mean over a step's replies of their losses, plus a likelihood of the good ones."""

    loss: Callable[..., torch.Tensor]
    """One of `ftrun.worker.losses.feedback`: of log-ratios, verdicts and, if the next field says so, a divergence."""

    compares_with_mismatched: bool
    """Whether the loss looks at how far the policy is from the reference on replies to other prompts."""

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    nll_weight: float = 0.0
    """Weight of the mean negative log-likelihood of a token of the good replies."""

    def of(self, replies: Replies, kl: float) -> torch.Tensor:
        """Return the loss of each reply, of shape (B,), without the likelihood."""
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        measured = (replies.logratio.new_tensor(kl),) if self.compares_with_mismatched else ()
        return self.loss(replies.logratio, replies.good, *measured, beta=self.beta, **weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replies:
    """What policy and reference say of B replies: summed log-probabilities in nats, of shape (B,)."""

    policy: torch.Tensor
    reference: torch.Tensor
    length: torch.Tensor
    """Learned tokens of each."""

    good: torch.Tensor
    """Whether each was found good."""

    @property
    def logratio(self) -> torch.Tensor:
        """How much likelier the policy makes each reply than the reference does."""
        return self.policy - self.reference

    @property
    def nll_of_good(self) -> torch.Tensor:
        """The mean negative log-likelihood of a token of each good reply, of shape (good replies,)."""
        return -(self.policy / self.length.clamp(min=1))[self.good]

    def metrics(self, beta: float) -> dict[str, torch.Tensor]:
        """Return what is logged of the good replies and of the bad ones."""
        rewards, logps = beta * self.logratio.detach(), self.policy.detach()
        return {
            "rewards_chosen": rewards[self.good],
            "rewards_rejected": rewards[~self.good],
            "logps_chosen": logps[self.good],
            "logps_rejected": logps[~self.good],
        }


class FeedbackTrainer(RunTrainer):
    """Trains on replies and verdicts; the loss is the mean over the replies of a whole step.

    The divergence that replies are compared with is measured before the first batch of a step, over all batches and
    processes, so that it is the same for each of them, however the step is divided.
    """

    objective: Objective

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # have the loss normalised over the replies of the whole step
        self._said: reference.Said | None = None
        self._kl, self._num_good = 0.0, 1.0

    @property
    def collate(self) -> Collate:
        """What makes a batch of rows."""
        collate = sequence_collator(self.run.cfg, self.run.pad_id, self.run.media)
        return partial(batch_of, collate=collate, mismatched=self.objective.compares_with_mismatched)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Note what the reference thinks of every reply, or have it at hand, then train."""
        count = 2 if self.objective.compares_with_mismatched else 1
        self._said = reference.said(self, self._log_probabilities, count=count)
        return super().train(*args, **kwargs)

    def _log_probabilities(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the log-probability of each reply, and of each mismatched one if they count, of shape (1 or 2, B)."""
        count, parts = len(batch["index"]), [own(batch)]
        parts += [mismatched(batch)] if self.objective.compares_with_mismatched else []
        return torch.stack([logprobs.of_sequences(self, model, part, count) for part in parts])

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], Any]:
        """Measure, on all batches of a step, what each of their losses is compared with."""
        found, num_items = super().get_batch_samples(*args, **kwargs)
        good = sum(float(batch["good"].sum()) for batch in found)
        found = [self._compared(self.on_device(batch)) for batch in found]
        with noise.off(self.model), torch.no_grad(), self.accelerator.autocast():
            ratios = [self._mismatched_ratios(batch) for batch in found]
        (self._num_good,) = self.over_processes([good])
        self._kl = self._divergence(ratios)
        return found, num_items

    def _compared(self, batch: Batch, of: str | None = None) -> Batch:
        """Return a batch with what the reference says of it, as ``reference``."""
        assert self._said is not None
        return batch | {_REFERENCE: self._said(batch, of)}

    def _mismatched_ratios(self, batch: Batch) -> torch.Tensor:
        """Return how much likelier the policy makes each mismatched reply, of shape (B,); nothing if none counts."""
        if not self.objective.compares_with_mismatched:
            return torch.zeros(0)
        policy = logprobs.of_sequences(self, self.model, mismatched(batch), len(batch["index"]))
        return policy - batch[_REFERENCE][1]

    def _divergence(self, ratios: Sequence[torch.Tensor]) -> float:
        """Return the mean of log-ratios over all processes, in nats, and 0 if it is below."""
        sums = [sum(float(each.double().sum()) for each in ratios), float(sum(len(each) for each in ratios))]
        total, count = self.over_processes(sums)
        return max(0.0, total / count) if count else 0.0

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        replies = torch.tensor(float(sum(len(batch["index"]) for batch in batch_samples)), device=device)
        return self.accelerator.reduce(replies)

    def _replies(self, model: nn.Module, batch: Batch) -> Replies:
        """Return what policy and reference say of a batch."""
        count, sequences = len(batch["index"]), own(batch)
        return Replies(
            policy=logprobs.of_sequences(self, model, sequences, count),
            reference=batch[_REFERENCE][0],
            length=logprobs.lengths(sequences, count),
            good=batch["good"],
        )

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return a batch's share of the loss of the whole step."""
        replies = self._replies(model, inputs)
        loss = self.objective.of(replies, self._kl).sum() / num_items_in_batch
        if self.objective.nll_weight:
            loss = loss + self.objective.nll_weight * replies.nll_of_good.sum() / max(self._num_good, 1.0)
        self.count(self._metrics(replies, self._kl))
        # Processes average their gradients, so each one's share is scaled up by their number.
        return loss * self.accelerator.num_processes

    def _metrics(self, replies: Replies, kl: float) -> dict[str, torch.Tensor]:
        found = replies.metrics(self.objective.beta)
        if self.objective.compares_with_mismatched:
            found["kl"] = torch.full((len(replies.good),), kl)
        if self.objective.nll_weight:
            found["nll_chosen"] = replies.nll_of_good.detach()
        return found

    def means(self, sums: dict[str, list[float]]) -> dict[str, float]:
        """Return the mean of each metric that has occurred, and how far the rewards of both kinds are apart."""
        found = super().means(sums)
        for name in [name for name in found if name.endswith("rewards_chosen")]:
            if (rejected := found.get(name.replace("chosen", "rejected"))) is not None:
                found[name.replace("chosen", "margins")] = found[name] - rejected
        return found

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the loss and metrics over the evaluation replies, all of which count as one batch."""
        self.model.eval()
        means: dict[str, float] = {}
        for name, rows in self.run.rows.evals.items():
            means |= self._evaluate_set(name, rows)
        return self.evaluated(means)

    def _evaluate_set(self, name: str, rows: Any) -> dict[str, float]:
        with torch.no_grad(), self.accelerator.autocast():
            parts, ratios = [], []
            for batch in self.batches_in_file_order(rows):
                compared = self._compared(batch, name)
                parts.append(self._replies(self.model, compared))
                ratios.append(self._mismatched_ratios(compared))
        kl, sums = self._divergence(ratios), dict[str, list[float]]()
        for part in parts:
            add(sums, self._metrics(part, kl) | {"loss": self.objective.of(part, kl)})
        found = self.means(sums)
        if self.objective.nll_weight:
            found["loss"] += self.objective.nll_weight * found.get("nll_chosen", 0.0)
        prefix = f"eval_{name}_" if name else "eval_"
        return {prefix + metric: value for metric, value in found.items()}


def batch_of(rows: Sequence[Any], collate: Collate, *, mismatched: bool) -> Batch:
    """Make a batch of replies.

    Returns:
        What ``collate`` makes of them; the same of their mismatched replies, if they count, under names that begin with
        ``mismatched_``; ``index`` (where each row is in its data set) and ``good``, of shape (rows,).
    """
    batch = dict(collate(rows))
    if mismatched:
        others = collate([row[_MISMATCHED] for row in rows])
        batch |= {f"{_MISMATCHED}_{name}": value for name, value in others.items()}
    batch["index"] = torch.tensor([int(row["index"]) for row in rows], dtype=torch.int64)
    batch["good"] = torch.tensor([bool(row["extra"]) for row in rows], dtype=torch.bool)
    return batch


def own(batch: Batch) -> Batch:
    """Return the replies of a batch."""
    left_out = ("index", "good", _REFERENCE)
    return {name: value for name, value in batch.items() if name not in left_out and not name.startswith(_MISMATCHED)}


def mismatched(batch: Batch) -> Batch:
    """Return the mismatched replies of a batch."""
    prefix = f"{_MISMATCHED}_"
    return {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}


class Mismatches:
    """Which row's reply each row of a data set lends: one to another prompt, drawn once for all.

    All rows stand in a circle in an order that the seed draws, and each takes the reply of the next one whose prompt is
    another. So neither the order of training nor the size of a batch changes who that is. Without a seed, where rows
    are not shuffled either, the next one is the one before it in the file.
    """

    def __init__(self, rows: Selected, seed: int | None, max_length: int) -> None:
        self.stores, self._max_length = rows.stores, max_length
        self._lengths = [stored.lengths for stored in rows.stores]
        self._starts = np.cumsum([0, *(len(stored) for stored in rows.stores)])
        taken = np.unique(self._starts[rows.which] + rows.index)
        self._circle = taken[::-1] if seed is None else np.random.default_rng([_SALT, seed]).permutation(taken)
        # Rows that the data set leaves out have a place too: what is noted of the reference goes by whole sources.
        self._places = np.arange(self._starts[-1]) % max(1, len(taken))
        self._places[self._circle] = np.arange(len(taken))
        self._known: dict[int, int] = {}
        self._one_prompt = False
        sources = " ".join(str(stored.place.name) for stored in rows.stores)
        self.key = hashlib.sha256(f"{sources} {seed} ".encode() + taken.tobytes()).hexdigest()[:16]

    def partner(self, source: int, index: int) -> tuple[int, int]:
        """Return the source and the index in it of the row whose reply a row takes: its own if there is no other."""
        row = int(self._starts[source]) + index
        if row not in self._known and not self._one_prompt:
            self._look_for(row)
        found = self._known[row] if row in self._known else self._next(row, 1)
        at = int(np.searchsorted(self._starts, found, side="right")) - 1
        return at, found - int(self._starts[at])

    def _look_for(self, row: int) -> None:
        """Go round until a prompt is another one; all who were passed come to the same."""
        prompt, passed = self._prompt(row), [row]
        for step in range(1, len(self._circle) + 1):
            other = self._next(row, step)
            if not np.array_equal(self._prompt(other), prompt):
                self._known |= dict.fromkeys(passed, other)
                return
            passed.append(other)
        self._one_prompt = True

    def _next(self, row: int, step: int) -> int:
        return int(self._circle[(self._places[row] + step) % len(self._circle)])

    def _prompt(self, row: int) -> Numbers:
        at = int(np.searchsorted(self._starts, row, side="right")) - 1
        found = self.stores[at][row - int(self._starts[at])]
        return found["input_ids"][: _reply_begins(found)]

    def of(self, source: int, index: int, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row's prompt with the reply that it takes, cut to the longest that a row may be."""
        at, other_index = self.partner(source, index)
        other = self.stores[at][other_index]
        first, begin = _reply_begins(row), _reply_begins(other)
        media = int(self._lengths[source][index]) - len(row["input_ids"])  # tokens that are only there in a batch
        end = begin + max(1, self._max_length - first - media)
        joined = {name: np.concatenate([row[name][:first], other[name][begin:end]]) for name in ("input_ids", "labels")}
        return {name: row[name] for name in ("media", "place") if name in row} | joined


class MismatchedRows(StoredRows):
    """The rows of a source, each with its mismatched reply."""

    def __init__(self, mismatches: Mismatches, source: int) -> None:
        stored = mismatches.stores[source]
        super().__init__(stored.place)
        self._mismatches, self._source = mismatches, source
        # Where what the reference says of the rows is kept: of others than these, it says something else.
        self.place = stored.place / f"{_MISMATCHED}-{mismatches.key}"
        with contextlib.suppress(OSError):
            self.place.mkdir(exist_ok=True)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        return row | {_MISMATCHED: self._mismatches.of(self._source, index, row)}


def with_mismatched(rows: Selected, seed: int | None, max_length: int) -> Selected:
    """Return rows that have, as ``mismatched``, their prompt with another row's reply."""
    mismatches = Mismatches(rows, seed, max_length)
    stores = [MismatchedRows(mismatches, source) for source in range(len(rows.stores))]
    return Selected(stores, rows.which, rows.index)


def train(cfg: Config, objective: Objective) -> Result:
    """Load, encode, train on replies and verdicts, and say how it went."""
    model, run = training.prepare(cfg)
    _say_if_all_alike(run.rows.train)
    if objective.compares_with_mismatched:
        seed, longest = cfg.seed if cfg.train.shuffle else None, cfg.data.max_length
        run.rows.train = with_mismatched(run.rows.train, seed, longest)
        run.rows.evals = {name: with_mismatched(rows, seed, longest) for name, rows in run.rows.evals.items()}
    trainer = training.build(FeedbackTrainer, model, run)
    trainer.objective = objective
    return training.fit(trainer)


def _say_if_all_alike(rows: Selected) -> None:
    """Warn where there is nothing to tell apart."""
    first = bool(rows[0]["extra"])
    if all(bool(rows[position]["extra"]) is first for position in range(1, len(rows))):
        kind, effect = ("good", "down") if first else ("bad", "up")
        events.send("note", text=f"all {len(rows)} replies are {kind}: nothing pushes any of them {effect}")


def _reply_begins(row: dict[str, Any]) -> int:
    """Return where in a row the first learned token is."""
    return int(np.argmax(row["labels"] != IGNORED))
