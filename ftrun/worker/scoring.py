"""Reward models: trained on pairs of a better and a worse reply, and asked what a reply is worth."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from ftrun import record
from ftrun.errors import ConfigError, Problem
from ftrun.model import Model, locate
from ftrun.worker import loading, score_head
from ftrun.worker.batches import Batch, Collate, model_inputs, pad
from ftrun.worker.losses.ranking import bradley_terry, centering
from ftrun.worker.score_head import ScoreHead
from ftrun.worker.training import Run, RunTrainer, add

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from ftrun.worker.dataset import Selected

_BATCH = 16
"""Replies that a reward model reads at once."""


class RewardTrainer(RunTrainer):
    """Trains a score head, and the layers below it, to give the better reply of a pair the higher score.

    The loss of a step is the weighted mean over its pairs, of all of its batches and processes.
    """

    with_margin = True
    """Whether the scores shall differ by the row's margin, where it has one."""

    per_prompt = True
    """Whether the pairs that come from one row count as much together as the only pair of another."""

    centering_weight = 0.0
    """How much the squared sum of both scores counts."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # have the loss normalised over the pairs of the whole step

    @cached_property
    def score_head(self) -> ScoreHead:
        """The head that the model has on top."""
        return ScoreHead(self.model)

    @property
    def collate(self) -> Collate:
        """What makes a batch of pairs, with ``margin``, of shape (B,)."""
        return partial(_with_margins, collate=super().collate, with_margin=self.with_margin)

    @cached_property
    def _shares(self) -> dict[str | None, torch.Tensor]:
        """How much each pair counts, by evaluation set, and of the rows that are trained on."""
        every = [(None, self.run.rows.train), *self.run.rows.evals.items()]
        return {name: self._shares_of(rows).to(self.args.device) for name, rows in every}

    def _shares_of(self, rows: Selected) -> torch.Tensor:
        return pair_shares(rows) if self.per_prompt else torch.ones(len(rows))

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """Return how much the pairs of a step count together, over all processes."""
        shares = self._shares[None]
        here = sum((shares[batch["index"]].sum() for batch in batch_samples), torch.zeros((), device=device))
        return self.accelerator.reduce(here)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and undo what transformers has made of the model's padding token when it began."""
        found = super().train(*args, **kwargs)
        score_head.name_padding(self.accelerator.unwrap_model(self.model), self.run.tokenizer)
        return found

    def _scores(self, model: nn.Module, inputs: Batch) -> torch.Tensor:
        """Return the scores of both sides, of shape (2, B)."""
        count = len(inputs["index"])
        batch = {name: value for name, value in inputs.items() if name != "margin"}
        return self.score_head.scores(model, batch)[: 2 * count].view(2, count)

    def _loss(self, model: nn.Module, inputs: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of each pair, and the metrics of each."""
        chosen, rejected = self._scores(model, inputs)
        losses = bradley_terry(chosen, rejected, inputs["margin"])
        if self.centering_weight:
            losses = losses + self.centering_weight * centering(chosen, rejected)
        metrics = {
            "accuracy": (chosen > rejected).float(),
            "rewards_chosen": chosen.detach(),
            "rewards_rejected": rejected.detach(),
            "rewards_margins": (chosen - rejected).detach(),
        }
        return losses, metrics

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the weighted sum of a batch's losses over the weights of the whole step."""
        losses, metrics = self._loss(model, inputs)
        self.count(metrics)
        shares = self._shares[None][inputs["index"]]
        return (losses * shares).sum() / num_items_in_batch * self.accelerator.num_processes

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the mean loss and metrics over the evaluation pairs."""
        sums: dict[str, list[float]] = {}
        for name, rows in self.run.rows.evals.items():
            prefix = f"eval_{name}_" if name else "eval_"
            for batch in self._batches_of(rows):
                losses, metrics = self._loss(self.model, batch)
                shares = self._shares[name][batch["index"]]
                total = sums.setdefault(f"{prefix}loss", [0.0, 0.0])
                total[0] += float((losses * shares).sum())
                total[1] += float(shares.sum())
                add(sums, {prefix + metric: values for metric, values in metrics.items()})
        return self.evaluated(self.means(sums))

    def predict_scores(self) -> None:
        """Write the scores of all evaluation pairs to ``predictions.jsonl``. Every process must call it."""
        lines = []
        for name, rows in self.run.rows.evals.items():
            scores = torch.zeros(2, len(rows), device=self.args.device)
            for batch in self._batches_of(rows):
                scores[:, batch["index"]] = self._scores(self.model, batch)
            chosen, rejected = self.accelerator.reduce(scores).tolist()
            of_set = {"set": name} if name else {}
            lines += [
                of_set | {"index": at, "source": rows.place_of(at), "chosen": better, "rejected": worse}
                for at, (better, worse) in enumerate(zip(chosen, rejected, strict=True))
            ]
        if self.run.is_main:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            record.write_whole(self.run.folder / record.PREDICTIONS, text)

    def _batches_of(self, rows: Any) -> Iterator[Batch]:
        """Yield this process's share of a data set, to be computed without gradients and dropout."""
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            yield from self.batches_in_file_order(rows)


def needs_evals(run: Run) -> None:
    """Refuse a run that is to predict and has no rows to do that for.

    Raises:
        ConfigError: It has none.
    """
    if not run.rows.evals:
        message = "there are no evaluation rows to score"
        raise ConfigError([Problem("stage.predict", message, "data.eval_path=FILE, or data.eval_size=100")])


def _with_margins(rows: Sequence[Any], collate: Collate, with_margin: bool) -> Batch:
    """Put the margins of pairs, 0 where a row has none, beside the batch that they make."""
    margins = [float(row["extra"] or 0.0) if with_margin else 0.0 for row in rows]
    return collate(rows) | {"margin": torch.tensor(margins, dtype=torch.float32)}


def pair_shares(rows: Selected) -> torch.Tensor:
    """Return one over the number of pairs that come from the same row of a file, for each pair of a data set.

    K ranked replies to a prompt make up to K(K - 1)/2 pairs, which are no more independent than the replies; so they
    share the weight of one (https://arxiv.org/abs/2203.02155, section 3.5).
    """
    found = np.zeros(len(rows), np.float32)
    for number, stored in enumerate(rows.stores):
        origins = stored.origins
        mine = rows.which == number
        found[mine] = 1 / np.bincount(origins)[origins[rows.index[mine]]] if len(origins) else 0.0
    return torch.from_numpy(found)


class Scorer:
    """A reward model, ready to be asked."""

    def __init__(
        self,
        hidden: Callable[[Batch], torch.Tensor],
        head: Callable[[torch.Tensor], torch.Tensor],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> None:
        """Put together a reward model.

        Args:
            hidden: From ``input_ids`` and ``attention_mask`` of shape (B, T), the last hidden states, (B, T, H).
            head: From hidden states in float32, of shape (B, H), scores of shape (B,).
            tokenizer: The one that the model was trained with, and whose token ids it reads.
            device: Where the model is.
        """
        self._hidden, self._head = hidden, head
        self.tokenizer, self.device = tokenizer, device

    def scores(self, sequences: Sequence[Sequence[int]], batch_size: int = _BATCH) -> list[float]:
        """Return what each of some sequences of token ids is worth, in their order.

        Args:
            sequences: Whole conversations, as the chat template writes them, of one token at least each.
            batch_size: How many are read at once; those of like lengths are read together.
        """
        order = sorted(range(len(sequences)), key=lambda at: len(sequences[at]), reverse=True)
        found = [0.0] * len(sequences)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            for at, score in zip(places, self._of_batch([sequences[at] for at in places]), strict=True):
                found[at] = score
        return found

    @torch.no_grad()
    def _of_batch(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        ids = [np.asarray(sequence, np.int64) for sequence in sequences]
        batch = model_inputs(pad([{"input_ids": each, "labels": each} for each in ids], pad_id=0))
        batch = {name: value.to(self.device) for name, value in batch.items()}
        hidden = self._hidden(batch)[score_head.last_tokens(batch)]
        with torch.autocast(self.device.type, enabled=False):
            return self._head(hidden.float()).tolist()


def load_scorer(
    path: str | Path | Model, device: torch.device | str = "cpu", dtype: torch.dtype | str = torch.float32
) -> Scorer:
    """Load a reward model: what a run of stage=rm ended with, whatever its adapter, or one in transformers' format.

    Args:
        path: A run's folder, a model's or an adapter's folder, or a hub id; or where that was found to be.
        device: Where it shall be.
        dtype: Of its layers; the head is float32. ``"auto"`` for the files' own.

    Raises:
        ConfigError: It is nowhere, or is no reward model.
    """
    found = path if isinstance(path, Model) else locate(Model(path=str(path)))
    model = loading.as_saved(found, {"dtype": dtype})
    if not score_head.is_on(model):
        beside = loading.beside(found, score_head.VALUE_HEADS)
        if beside is None:
            message = f"{found.path} is a {type(model).__name__}, which has no score head: it is no reward model"
            raise ConfigError([Problem("model.path", message, "the folder of a run of stage=rm")])
        model = score_head.put_on(model, score_head.value_head(beside))
    model = score_head.with_score(model, None, seed=0)
    model.requires_grad_(False).eval().to(device)
    head = cast(nn.Linear, getattr(model, score_head.NAME))

    def hidden(batch: Batch) -> torch.Tensor:
        return model.base_model(**batch, use_cache=False).last_hidden_state

    return Scorer(
        hidden, lambda states: head(states).squeeze(-1), loading.tokenizer_of(found), next(model.parameters()).device
    )


def attach_scorer(policy: PeftModel, folder: Path, tokenizer: PreTrainedTokenizerBase, name: str = "reward") -> Scorer:
    """Put a reward model's adapter beside that of a policy, so that the layers which both start from are held once.

    The policy trains and is saved as if it were not there.

    Args:
        policy: With an adapter that leaves the base weights as they were (`Adapter.off_is_start`).
        folder: Of the reward model's adapter, which was trained on the same weights and saved with its score head.
        tokenizer: The policy's, which the reward model was trained with too.
        name: What the adapter is called, other than the policy's own.

    Raises:
        ConfigError: The folder holds no adapter with a score head, or one that does not fit.
    """
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    weight = score_head.of_adapter(folder)
    config: Any = PeftConfig.from_pretrained(str(folder))
    config.task_type, config.modules_to_save, config.inference_mode = None, None, True
    weights = load_peft_weights(str(folder), device="cpu")
    layers = {key: tensor for key, tensor in weights.items() if not key.endswith(f".{score_head.NAME}.weight")}
    try:
        policy.add_adapter(name, config)
        left_over = set_peft_model_state_dict(policy, layers, adapter_name=name).unexpected_keys
        why = f"it has no {left_over[0]}" if left_over else ""
    except (ValueError, RuntimeError) as error:  # no layer of that name, or one of another shape
        why = str(error).strip().splitlines()[0]
    if why:
        message = f"the adapter in {folder} is for other layers than the policy's: {why}"
        raise ConfigError([Problem("reward", message, "a reward model trained on the same base as the policy")])
    del policy.peft_config[name]  # or a checkpoint would hold it, and transformers would not find the policy's own
    for key, parameter in policy.named_parameters():
        if f".{name}." in key:
            parameter.requires_grad_(False)
    weight = weight.to(policy.device)

    def hidden(batch: Batch) -> torch.Tensor:
        with _only(policy, name):
            return policy.get_base_model().base_model(**batch, use_cache=False).last_hidden_state

    return Scorer(hidden, lambda states: linear(states, weight).squeeze(-1), tokenizer, policy.device)


@contextlib.contextmanager
def _only(policy: PeftModel, name: str) -> Iterator[None]:
    """While inside, have one adapter compute in place of the policy's, and nothing drop out; what trains stays so."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    trains = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    was_training = policy.training
    layers = [(layer, layer.active_adapters) for layer in policy.modules() if isinstance(layer, BaseTunerLayer)]
    whole = [module for module in policy.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    policy.eval()
    for layer, _ in layers:
        layer.set_adapter(name)
    for module in whole:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for layer, before in layers:
            layer.set_adapter(before)
        for module in whole:
            module.enable_adapters(True)
        for parameter, trained in trains:
            parameter.requires_grad_(trained)
        policy.train(was_training)
