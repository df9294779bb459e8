"""Training on the model's own replies, as rewards judge them: TRL's trainers, inside the run's own loop and records.

TRL writes the replies, makes advantages of the rewards, and computes the losses. What is not taken from it:

- Prompts are the run's own tokens, and replies end where the run's template ends them.
- The reference is the one that every stage has (`ftrun.worker.reference`). TRL would load one from disk by the model's
  name, or copy the adapter, which starts PiSSA's a second time: training need not have begun at either.
- Replies that are still to be trained on are saved in a checkpoint, with the state of the random generators.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional
from transformers import Trainer

from ftrun.completions import Completion
from ftrun.config import Config
from ftrun.errors import ConfigError, Problem
from ftrun.worker import generation, noise, parameters, sampling, training, verdicts
from ftrun.worker.arguments import arguments
from ftrun.worker.batches import Batch
from ftrun.worker.generation import Decoding, Generator
from ftrun.worker.reference import Live
from ftrun.worker.rewarding import Rewards
from ftrun.worker.samples import show
from ftrun.worker.training import Run, RunTrainer, add
from ftrun.worker.verdicts import completion

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

if TYPE_CHECKING:
    from ftrun_plugins.stage._online import Online

_REPLIES = "ftrun_replies.pt"
"""In each checkpoint, of each process: the replies that are still to be trained on."""

_METRICS = {
    "reward": "rewards_mean",
    "reward_std": "rewards_std",
    "frac_reward_zero_std": "rewards_tied",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "completions_truncated",
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio/region_mean": "clip_fraction",
    "cispo_clip_ratio": "clip_fraction",
    "vespo/phi_seq_mean": "vespo_weight",
}
"""What TRL's metrics are called in metrics.jsonl; each reward's is ``rewards_NAME``, and others are left out."""


class GroupBatches(sampling.EpochBatches):
    """The questions of each micro batch of one process, each as often as it gets replies.

    Replies are written for several micro batches at a time, and trained on one or more times: the same questions are
    drawn for each of those micro batches, since the trainer asks for questions with each. Where the rows of an epoch
    make no whole number of such batches, the last one is filled up with the epoch's first rows.

    Args:
        lengths: Tokens of each question.
        cfg: The run's config.
        rank: Of this process.
        world_size: Number of processes.
    """

    def __init__(self, lengths: sampling.Array, cfg: Config, *, rank: int, world_size: int) -> None:
        budget = sampling.Budget(cfg.train.micro_batch_size, None, padded=True)
        super().__init__(lengths, budget, cfg.train, seed=cfg.seed, rank=rank, world_size=world_size)
        stage = cast("Online", cfg.stage)
        self.group_size = stage.group_size
        self.replies = cfg.train.micro_batch_size * stage.micro_batches(cfg)
        self.questions = self.replies * world_size // self.group_size
        self.repeats = stage.micro_batches(cfg) * stage.num_iterations

    @cached_property
    def num_batches(self) -> int:
        """Micro batches of an epoch on each process."""
        return math.ceil(len(self.lengths) / self.questions) * self.repeats

    def plan(self, epoch: int) -> tuple[sampling.Array, sampling.Array]:
        """Return the rows of an epoch in their order, and where in it each batch of all processes begins."""
        count = math.ceil(len(self.lengths) / self.questions)
        questions = np.resize(self._order(epoch), (count, self.questions))
        replies = np.repeat(questions, self.group_size, axis=1)
        rows = np.repeat(replies.reshape(count, 1, -1), self.repeats, axis=1).ravel()
        return rows, np.arange(0, len(rows) + 1, self.replies)


class OnlineRun(Run):
    """A run that draws questions in groups."""

    @cached_property
    def epoch_batches(self) -> sampling.EpochBatches:
        """The questions that this process draws, micro batch by micro batch."""
        lengths = self.tokens_in_a_batch(self.rows.train)
        return GroupBatches(lengths, self.cfg, rank=self.rank, world_size=self.world_size)


class OnlineTrainer(RunTrainer):
    """What the run's trainer and one of TRL's need of each other; a class derives from this and then from TRL's.

    Args:
        run: The run, whose stage says what TRL's trainer is given.
        model: The policy.
        kwargs: What every trainer is given besides, which TRL's trainer takes from the run.
    """

    arguments_class: ClassVar[Any]
    """Of what TRL's trainer is given."""

    eos_token_ids: list[int]
    generation_config: Any
    _other: nn.Module | None = None
    """Another model than the policy that is the reference, once it is ready."""

    def __init__(self, *, run: Run, model: nn.Module, **kwargs: Any) -> None:
        stage = cast("Online", run.cfg.stage)
        _refuse_adapted_head(model)
        names = list(run.cfg.reward)
        given = arguments(run, model) | stage.trl_arguments()
        weights = {weight: weight.data for _, weight in parameters.trained(model)}
        super().__init__(
            model=model,
            args=self.arguments_class(
                **(_no_checkpointing(self.arguments_class) | given),
                steps_per_generation=stage.micro_batches(run.cfg),
                reward_weights=[run.cfg.reward[name].weight for name in names],
                beta=0.0,  # or TRL would make a reference
                router_aux_loss_coef=0.0,
            ),
            reward_funcs=[_judged_by_the_run] * len(names),
            train_dataset=Dataset.from_dict({"prompt": [""]}),
            processing_class=run.tokenizer,
        )
        for weight, before in weights.items():
            if weight.dtype is not before.dtype:  # TRL turns those of quantized models into bfloat16
                weight.data = before.to(weight.device)
        self.run, self.stage = run, stage
        self.train_dataset, self.reward_func_names = run.rows.train, names
        self.eos_token_ids = [*generation.end_ids(run.cfg, run.tokenizer, self.model)]
        self.generation_config.eos_token_id = self.eos_token_ids
        self.beta = stage.beta
        self.rewards = Rewards(run.cfg.reward, run, self.model)
        _count_positions(self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Make the reference of what training starts from, where there is one, then train."""
        if self.beta:
            self.ref_model = Live(self)
        return super().train(*args, **kwargs)

    # Rows and replies

    @property
    def collate(self) -> Any:
        """What makes of rows what TRL's trainer is given."""
        return _questions

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Return a step's batches; their tokens are counted when replies are there."""
        return Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Return prompts as they are, which are tokens already."""
        return prompts, None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with noise.off(self.model):
            return super()._generate_single_turn(*args, **kwargs)

    def _completions(self, rows: Sequence[Mapping[str, Any]], replies: Sequence[list[int]]) -> list[Completion]:
        return [completion(self.run, row, ids, self.eos_token_ids) for row, ids in zip(rows, replies, strict=True)]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        """Return what each reward says of each reply of all processes, of shape (N, rewards)."""
        _, each = self.rewards(self._completions(inputs, completion_ids_list))
        table = torch.stack([each[name] for name in self.reward_func_names], dim=1)
        return self.accelerator.gather(table.to(self.args.device))

    # Log-probabilities and the loss

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, Live):
            with model.model() as reference:
                self._prepare_other(reference)
                return super()._get_per_token_logps_and_entropies(reference, *args, **kwargs)
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        with noise.off(self.model):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _prepare_other(self, reference: nn.Module) -> None:
        """Have a reference that is another model compute as the policy does, the first time that it is asked."""
        if reference is not self.model and reference is not self._other:
            add_fused_lm_head(reference, temperature=self.stage.temperature)
            _count_positions(reference)
            self._other = reference

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return TRL's loss of a micro batch, and take its metrics into the run's."""
        loss = super().compute_loss(model, inputs)
        self.tokens += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        for name, values in self._metrics["train"].items():
            if ours := self._our_name(name):
                add(self._sums, {ours: torch.tensor([value for value in values if not math.isnan(value)])})
        self._metrics["train"].clear()
        return loss

    def _our_name(self, name: str) -> str | None:
        if name.startswith("rewards/") and name.endswith("/mean"):
            return f"rewards_{name.removeprefix('rewards/').removesuffix('/mean')}"
        return _METRICS.get(name)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write one line of metrics, to which TRL adds none of its own, such as the time of a step."""
        for metrics in self._metrics.values():
            metrics.clear()
        super().log(logs, start_time)

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return what rewards say of the replies to the evaluation questions."""
        sums: dict[str, list[float]] = {}
        written: list[dict[str, Any]] = []
        with noise.off(self.model):
            for name, rows in self.run.rows.evals.items():
                written += self._evaluate_set(f"eval_{name}_" if name else "eval_", rows, sums)
        found = self.evaluated(self.means(sums))
        show(self.run, self.state.global_step, written[: self.stage.num_samples])
        return found

    def _evaluate_set(self, prefix: str, rows: Any, sums: dict[str, list[float]]) -> list[dict[str, Any]]:
        """Add what rewards say of this process's share of a set's replies, and return these as samples."""
        run = self.run
        everything, mine = [rows[position] for position in range(len(rows))], slice(run.rank, None, run.world_size)
        with self.accelerator.autocast():
            written = self._evaluator().replies(self.model, everything, rank=run.rank, world_size=run.world_size)
        replies = self._completions(_questions(everything[mine]), written[mine])
        totals, each = self.rewards(replies)
        add(sums, {prefix + name: values for name, values in verdicts.metrics(replies, totals, each).items()})
        return verdicts.samples(replies, totals)

    def _evaluator(self) -> Generator:
        """Return what writes the replies of an evaluation."""
        stage, run = self.stage, self.run
        drawn: dict[str, Any] = {"top_p": stage.top_p, "top_k": stage.top_k} if stage.eval_temperature else {}
        decoding = Decoding(
            max_new_tokens=stage.max_new_tokens, temperature=stage.eval_temperature, seed=run.cfg.seed, **drawn
        )
        ends = tuple(self.eos_token_ids)
        return Generator(decoding=decoding, budget=run.budget(padded=True), ends=ends, pad_id=run.pad_id)

    # Checkpoints

    def _save_rng_state(self, output_dir: str) -> None:
        """Save, beside the random generators' states, the replies that are still to be trained on."""
        super()._save_rng_state(output_dir)
        needed = self._step % (self.args.steps_per_generation * self.stage.num_iterations)
        state = {"step": self._step, "batches": self._buffered_inputs if needed else None}
        torch.save(state, Path(output_dir) / f"{_REPLIES}.{self.args.process_index}")

    def restore(self, checkpoint: Path) -> None:
        """Take up the replies that were still to be trained on."""
        super().restore(checkpoint)
        file = checkpoint / f"{_REPLIES}.{self.args.process_index}"
        state = torch.load(file, map_location="cpu", weights_only=True)
        self._step, batches = state["step"], state["batches"]
        self._buffered_inputs = batches and [self.on_device(batch) for batch in batches]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the run writes its own."""

    def _send_telemetry(self) -> None:
        """Tell nobody: TRL would report to its makers what is trained on what."""


class GroupTrainer(OnlineTrainer, GRPOTrainer):
    """Compares each reply with the others to the same question, as GRPO and its relatives do."""

    arguments_class = GRPOConfig


class LeaveOneOutTrainer(OnlineTrainer, RLOOTrainer):
    """Compares each reply with the mean of the others to the same question."""

    arguments_class = RLOOConfig


class PairTrainer(GroupTrainer):
    """Trains on pairs of replies to one question, of which rewards prefer one.

    The replies and what rewards say of them are those of the other trainers. TRL's own trainer for this would tokenise
    the prompts anew, train where rewards see no difference, and step as many times too far as batches are accumulated.
    """

    def _generate_and_score_completions(self, inputs: Any) -> Batch:
        """Return pairs of replies, the better one first: what TRL returns of replies, each of shape (pairs, 2, ...)."""
        found = super()._generate_and_score_completions(inputs)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "ref_per_token_logps")
        worth = found["advantages"].view(-1, 2)
        order = worth.argsort(dim=1, descending=True, stable=True)
        at = torch.arange(len(order), device=order.device)[:, None]
        pairs = {name: found[name].view(len(order), 2, -1)[at, order] for name in names}
        return pairs | {"decided": (worth[:, 0] != worth[:, 1]).float()}

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> torch.Tensor:
        """Return the mean loss of the pairs of a micro batch, where a pair without a better reply has none."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=2).flatten(0, 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=2).flatten(0, 1)
        completion_mask = inputs["completion_mask"].flatten(0, 1)
        length = completion_mask.shape[1]
        logps, entropies, _ = self._get_per_token_logps_and_entropies(model, ids, mask, length, compute_entropy=True)
        reference = inputs["ref_per_token_logps"].flatten(0, 1)
        gained = ((logps - reference) * completion_mask).sum(1).view(-1, 2)
        losses = self.loss_of_pairs(gained[:, 0], gained[:, 1]) * inputs["decided"]
        margins = self.beta * (gained[:, 0] - gained[:, 1]).detach()[inputs["decided"] > 0]
        add(
            self._sums,
            {
                "rewards_margins": margins,
                "rewards_accuracies": (margins > 0).float(),
                "kl": ((logps - reference)[completion_mask > 0]).detach(),
                "entropy": entropies[completion_mask > 0].detach(),
            },
        )
        return losses.mean() / self.current_gradient_accumulation_steps

    def loss_of_pairs(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """Return the loss of each pair.

        Args:
            chosen: How much more likely the policy makes the better reply than the reference does, in nats, (B,).
            rejected: The same for the worse reply.
        """
        if self.stage.loss.value == "ipo":  # type: ignore[attr-defined]
            return (chosen - rejected - 1 / (2 * self.beta)) ** 2
        return -functional.logsigmoid(self.beta * (chosen - rejected))


def _questions(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Return rows as TRL's trainer and the rewards read them.

    Raises:
        ConfigError: One has media, which the model would not be shown.
    """
    if any("media" in row for row in rows):
        message = "a question has images, videos or sounds, which this stage does not show the model"
        raise ConfigError([Problem("stage", message, "stage=ppo, or questions of text")])
    return [verdicts.asked(row) for row in rows]


def _no_checkpointing(arguments_class: Any) -> dict[str, bool]:
    """Return the arguments that keep activations, which TRL does not do by itself."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    return {name: False for name in names if name in arguments_class.__dataclass_fields__}


def _judged_by_the_run(**_: Any) -> list[float | None]:
    """Stand for a reward where TRL counts them."""
    raise AssertionError("rewards are asked by the run")


def _count_positions(model: nn.Module) -> None:
    """Have a model count positions from each prompt's first token, if it takes positions."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    if "position_ids" in inspect.signature(plain.forward).parameters:
        model.register_forward_pre_hook(_with_positions, with_kwargs=True)


def _with_positions(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Count positions from each prompt's first token, where TRL counts from the padding before it."""
    if kwargs.get("fused_lm_head"):
        positions = kwargs["attention_mask"].cumsum(dim=1) - 1
        kwargs = kwargs | {"position_ids": positions.clamp(min=0)}
    return args, kwargs


def _refuse_adapted_head(model: nn.Module) -> None:
    """Refuse an adapter on the output head, whose weights TRL reads past it.

    Raises:
        ConfigError: There is one.
    """
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):  # type: ignore[operator]
        message = "the output head is among them, and the log-probabilities of replies are computed past its adapter"
        raise ConfigError(
            [Problem("adapter.targets", message, "adapter.targets without it, or adapter.exclude=[lm_head]")]
        )


OnlineTrainer_ = TypeVar("OnlineTrainer_", bound=OnlineTrainer)


def build(cls: type[OnlineTrainer_], cfg: Config) -> OnlineTrainer_:
    """Load what a run starts with, and make a trainer of the class that a stage names."""
    model, run = training.prepare(cfg, OnlineRun)
    generation.refuse_too_long(model, run.rows.longest, cast("Online", cfg.stage).max_new_tokens)
    return training.build(cast("type[OnlineTrainer_]", partial(cls, run=run)), model, run)
