"""Proximal policy optimization: replies are written, judged and valued, then trained on in several passes.

A step is one update on one mini batch of a rollout. What is left of a rollout is saved in each checkpoint, so a run may
stop after any step and goes on as if it had not.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, set_seed

from ftrun.completions import Completion
from ftrun.worker import generation, training, verdicts
from ftrun.worker.batches import Batch, Collate, model_inputs, num_tokens, padding_collator
from ftrun.worker.generation import Decoding, Generator
from ftrun.worker.head import labelled_positions
from ftrun.worker.losses.policy import (
    KLController,
    Moments,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_k1,
    kl_k3,
    token_rewards,
)
from ftrun.worker.reference import Live
from ftrun.worker.rewarding import Rewards
from ftrun.worker.rollout import KNOWN, Rollout, RolloutBatches, answered, minibatch, padded, seed_of
from ftrun.worker.samples import show
from ftrun.worker.sampling import Budget
from ftrun.worker.training import Run, RunTrainer, add

if TYPE_CHECKING:
    from ftrun_plugins.stage.ppo import PPO

VALUE_HEAD = "value_head.safetensors"
"""In a run's folder and in each checkpoint: the weights of the value model that train."""

VALUE_MODEL = "value_model"

_Estimates = dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
_ESTIMATES: _Estimates = {"k1": kl_k1, "k3": kl_k3}


class PolicyRun(Run):
    """A run whose batches of questions are drawn for whole rollouts."""

    @cached_property
    def epoch_batches(self) -> RolloutBatches:
        """The questions that this process draws, batch by batch."""
        stage, train = cast("PPO", self.cfg.stage), self.cfg.train
        return RolloutBatches(
            self.tokens_in_a_batch(self.rows.train),
            Budget(train.micro_batch_size * stage.minibatches, None, padded=True),
            train,
            steps=stage.steps_per_rollout,
            seed=self.cfg.seed,
            rank=self.rank,
            world_size=self.world_size,
        )


class ValueModel(nn.Module):
    """What the rewards of a reply's rest come to, from each of its tokens on: a linear head on hidden states.

    It starts at 0 everywhere.

    Args:
        hidden_size: Of the hidden states.
        trunk: What computes them; without one they are the policy's.
    """

    def __init__(self, hidden_size: int, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))
        self._names = {name for name, weight in self.named_parameters() if weight.requires_grad}

    def forward(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the value at each position whose next token is labelled, in float32, of shape (N,).

        Args:
            hidden: The policy's last hidden states, of shape (B, T, H).
            batch: What they are of.
        """
        if self.trunk is not None:
            hidden = self.trunk(**model_inputs(batch), use_cache=False)[0]
        chosen = hidden[labelled_positions(batch["labels"])]
        return (chosen.float() * self.weight).sum(-1) + self.bias  # no matrix product, which autocast would round

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that train, at any time, by name."""
        return {name: weight.data for name, weight in self.named_parameters() if name in self._names}

    def save(self, file: Path) -> None:
        """Write the weights that train."""
        save_file({name: weight.contiguous() for name, weight in self.trained.items()}, file)

    def load(self, file: Path) -> None:
        """Take up weights that were saved, in place."""
        saved = load_file(file)
        for name, weight in self.trained.items():
            weight.copy_(saved[name])


def value_model(policy: PreTrainedModel, *, separate: bool, gradient_checkpointing: bool) -> ValueModel:
    """Return a value model for a policy that has not been trained yet.

    Args:
        policy: The model, with its adapter if it has one.
        separate: Whether it has a trunk of its own, which is the policy's as it is now. The weights that do not train
            are one and the same for both; those that do are copied.
        gradient_checkpointing: Whether the trunk recomputes activations in the backward pass.
    """
    plain = cast(PreTrainedModel, getattr(policy, "get_base_model", lambda: policy)())
    size = int(plain.config.get_text_config().hidden_size)
    if not separate:
        return ValueModel(size).to(policy.device)
    shared = [*(weight for weight in plain.parameters() if not weight.requires_grad), *plain.buffers()]
    trunk = copy.deepcopy(plain.base_model, {id(tensor): tensor for tensor in shared})
    if gradient_checkpointing:
        trunk.gradient_checkpointing_enable({"use_reentrant": False})
    return ValueModel(size, trunk).to(policy.device)


class PPOTrainer(RunTrainer):
    """Writes replies, has them judged, and trains the policy and its value model on them."""

    rollout: Rollout | None = None
    """The replies that are trained on at present."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # have the loss normalised over the tokens of the whole step
        self.scores_seen = Moments()

    @property
    def stage(self) -> PPO:
        """The stage's keys."""
        return cast("PPO", self.run.cfg.stage)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Note what training starts from, make the value model, and train."""
        stage, cfg = self.stage, self.run.cfg
        policy = self.model.to(self.args.device)
        generation.refuse_too_long(policy, self.run.rows.longest, stage.max_new_tokens)
        self.controller = KLController(stage.kl_coef, stage.kl_target, stage.kl_horizon)
        self.reference = Live(self) if stage.kl_coef else None
        self.rewards = Rewards(cfg.reward, self.run, policy)
        self.ends = generation.end_ids(cfg, self.run.tokenizer, policy)
        separate, checkpointing = stage.value_model == "separate", cfg.train.gradient_checkpointing
        self.value_model = value_model(policy, separate=separate, gradient_checkpointing=checkpointing)
        # Part of the model while it trains: the optimizer, the clipping of gradients and the processes see one model.
        policy.add_module(VALUE_MODEL, self.value_model)
        try:
            return super().train(*args, **kwargs)
        finally:
            del policy.value_model

    @contextlib.contextmanager
    def policy_alone(self) -> Iterator[None]:
        """While inside, the model is the policy and nothing else."""
        attached = self.model._modules.pop(VALUE_MODEL, None)
        try:
            yield
        finally:
            if attached is not None:
                self.model.add_module(VALUE_MODEL, attached)

    # Rollouts

    @property
    def collate(self) -> Collate:
        """What makes of rows the places where they are."""
        return _places

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """Return a step's batches, of a rollout that may have to be made first."""
        drawn = [int(place) for _ in range(num_batches) for place in next(epoch_iterator)["places"]]
        number, step = divmod(self.state.global_step, self.stage.steps_per_rollout)
        if step == 0:
            self.rollout = self._roll_out(drawn, number)
        assert self.rollout is not None
        seeds = (self.run.cfg.seed, number, self.run.rank)
        parts = minibatch(len(self.rollout.rows), step, self.stage.minibatches, num_batches, seeds)
        found = [self._batch(self.rollout, which) for which in parts]
        self.tokens += sum(num_tokens(batch) for batch in found)
        self.count({name: torch.tensor([value], dtype=torch.float64) for name, value in self.rollout.metrics.items()})
        return found, self._get_num_items_in_batch(found, device)

    def _batch(self, rollout: Rollout, which: Sequence[int]) -> Batch:
        return rollout.batch(self.run.rows.train.__getitem__, self._padded, which)

    @property
    def _padded(self) -> Collate:
        return padding_collator(self.run.pad_id, self.run.media)

    def _roll_out(self, places: Sequence[int], number: int) -> Rollout:
        """Write replies to questions, and work out what is learned from each of their tokens.

        Args:
            places: Where the questions are in the training rows.
            number: Of the rollout, counted from 0.
        """
        stage = self.stage
        seed = seed_of(self.run.cfg.seed, number, self.run.rank)
        decoding = Decoding(
            max_new_tokens=stage.max_new_tokens,
            temperature=stage.temperature,
            top_p=stage.top_p,
            top_k=stage.top_k,
            seed=seed,
        )
        questions = [self.run.rows.train[place] for place in places]
        # Draws of its own: the training loop's go on as if there had been none, and here they do not depend on those.
        with training.own_randomness(self.args.device):
            set_seed(seed)
            replies = self._generator(decoding, len(questions)).replies(self.model, questions) if questions else []
            logps, entropies, values, kl = self._said_of(questions, replies)
            judged = self._completions(questions, replies)
            scores, each = self.rewards(judged)
        metrics = self._judged(judged, scores, each) | self._means({"entropy": entropies})
        lengths = [len(ids) for ids in replies]
        advantages, returns = self._advantages(self._normalised(scores, judged), values, kl, lengths)
        metrics |= self._explained(values, returns) | self._penalised(_sums(kl, replies))
        known = dict(zip(KNOWN, (logps, values, advantages, returns), strict=True))
        return Rollout([*places], replies, known, metrics)

    def _generator(self, decoding: Decoding, count: int) -> Generator:
        at_once = self.stage.generation_batch_size or max(count, 1)
        return Generator(
            decoding=decoding,
            budget=Budget(at_once, None, padded=True),
            ends=self.ends,
            pad_id=self.run.pad_id,
            media=self.run.media,
        )

    def _completions(self, questions: Sequence[Any], replies: Sequence[list[int]]) -> list[Completion]:
        pairs = zip(questions, replies, strict=True)
        return [verdicts.completion(self.run, verdicts.asked(question), ids, self.ends) for question, ids in pairs]

    def _said_of(self, questions: Sequence[Any], replies: Sequence[list[int]]) -> list[torch.Tensor]:
        """Return the log-probability, entropy, value and KL of each token of replies, each of shape (N,), on the CPU.

        Without a reference there is no KL, and it is 0.
        """
        rows = [answered(question, ids) for question, ids in zip(questions, replies, strict=True)]
        size = self.run.cfg.train.micro_batch_size
        self.model.eval()  # each step of training switches it back
        found: list[tuple[torch.Tensor, ...]] = []
        for start in range(0, len(rows), size):
            batch = self.on_device(self._padded(rows[start : start + size]))
            with torch.no_grad(), self.accelerator.autocast():
                logps, entropies, values = self._scores(self.model, batch)
            kl = torch.zeros_like(logps)
            if self.reference:
                with self.policy_alone(), self.reference.model() as model:
                    (of_reference,) = self.reference.head.scores(model, batch, self._logprobs)
                kl = _ESTIMATES[self.stage.kl_estimator](logps, of_reference)
            found.append((logps, entropies, values, kl))
        empty = (torch.zeros(0),) * 4
        return [torch.cat([values.cpu() for values in column]) for column in zip(*(found or [empty]), strict=True)]

    def _scores(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the log-probability, entropy and value of each labelled token, of shape (N,), from one forward pass.

        No gradient goes through the entropy.
        """
        with _hidden_states(self.model.get_output_embeddings(), batch["input_ids"].shape) as seen:
            logps, entropies = self.head.scores(model, batch, self._logprobs_and_entropies)
        return logps, entropies, self.value_model(seen[-1], batch)

    def _logprobs(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor]:
        every = torch.log_softmax(logits / self.stage.temperature, dim=-1)
        return (every.gather(-1, targets[:, None]).squeeze(-1),)

    def _logprobs_and_entropies(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        every = torch.log_softmax(logits / self.stage.temperature, dim=-1)
        with torch.no_grad():
            entropies = -(every.exp() * every).sum(-1)
        return every.gather(-1, targets[:, None]).squeeze(-1), entropies

    # What replies are worth

    def _normalised(self, scores: torch.Tensor, judged: Sequence[Completion]) -> torch.Tensor:
        """Return scores as they are trained on: penalised, normalised, clipped."""
        stage = self.stage
        unfinished = torch.tensor([not one.finished for one in judged], dtype=torch.bool)
        scores = scores - stage.missing_end_penalty * unfinished
        if stage.score_norm:
            self.scores_seen = self.scores_seen.with_more(Moments.of(scores, self.over_processes))
            scores = self.scores_seen.whitened(scores)
        return scores if stage.score_clip is None else scores.clamp(-stage.score_clip, stage.score_clip)

    def _advantages(
        self, scores: torch.Tensor, values: torch.Tensor, kl: torch.Tensor, lengths: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return advantages and returns of each token, of shape (N,).

        Args:
            scores: Of each reply, of shape (B,).
            values: Of each token, of shape (N,).
            kl: Of each token, of shape (N,).
            lengths: Tokens of each reply.
        """
        stage = self.stage
        if not lengths:  # this process has no question, but takes part in what all compute
            rewards = mask = torch.zeros(0, 0)
        else:
            mask = padded(torch.ones(len(values), dtype=torch.bool), lengths)
            rewards = token_rewards(scores, padded(kl, lengths), torch.tensor(lengths), self.controller.coef)
        if stage.whiten_rewards:
            moments = Moments.of(rewards[mask.bool()], self.over_processes)
            rewards = moments.whitened(rewards, shift_mean=False)
        if not lengths:
            advantages = returns = torch.zeros(0)
        else:
            both = gae(rewards, padded(values, lengths), mask, gamma=stage.gamma, lam=stage.lam)
            advantages, returns = (matrix[mask] for matrix in both)
        if stage.whiten_advantages:
            advantages = Moments.of(advantages, self.over_processes).whitened(advantages)
        return advantages, returns

    # What lines of metrics say of a rollout, the same on every process

    def _judged(
        self, judged: Sequence[Completion], scores: torch.Tensor, each: dict[str, torch.Tensor]
    ) -> dict[str, float]:
        std = Moments.of(scores, self.over_processes).std
        return self._means(verdicts.metrics(judged, scores, each)) | {"rewards_std": std}

    def _explained(self, values: torch.Tensor, returns: torch.Tensor) -> dict[str, float]:
        """Return how much of the variance of the returns the values foretold: 1 is all, below 0 is worse than none."""
        total = Moments.of(returns, self.over_processes).variance
        left = Moments.of(returns - values, self.over_processes).variance
        return {"value_explained_variance": 1.0 - left / total if total else 0.0}

    def _penalised(self, kl: torch.Tensor) -> dict[str, float]:
        """Return the mean KL of a reply, of those of this process (B,), and its weight, which is then moved."""
        if not self.reference:
            return {}
        moments = Moments.of(kl, self.over_processes)
        metrics = {"kl": moments.mean, "kl_coef": self.controller.coef}
        self.controller.update(moments.mean, moments.count)
        return metrics

    def _means(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return the mean of each over all processes; of nothing there is none."""
        sums: dict[str, list[float]] = {}
        add(sums, values)
        return self.means(sums)

    # Updates

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """Return the tokens of replies in a step, over all processes."""
        here = torch.tensor(float(sum(len(batch["advantages"]) for batch in batch_samples)), device=device)
        return self.accelerator.reduce(here)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the summed loss of a batch over the tokens of the whole step."""
        stage = self.stage
        batch = {name: value for name, value in inputs.items() if name not in KNOWN}
        logps, _, values = self._scores(model, batch)
        of_policy, clipped = clipped_policy_loss(logps, inputs["old_logps"], inputs["advantages"], stage.clip_range)
        of_value, _ = clipped_value_loss(values, inputs["old_values"], inputs["returns"], stage.value_clip_range)
        metrics = {
            "policy_loss": of_policy,
            "value_loss": of_value,
            "clip_fraction": clipped.float(),
            "approx_kl": kl_k3(inputs["old_logps"], logps),
        }
        self.count({name: each.detach() for name, each in metrics.items()})
        losses = of_policy + stage.value_coef * of_value
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return what rewards say of the replies to the evaluation questions, and their KL from the reference."""
        metrics: dict[str, float] = {}
        samples: list[dict[str, Any]] = []
        for number, (name, rows) in enumerate(self.run.rows.evals.items()):
            set_seed(seed_of(self.run.cfg.seed, self.run.rank))
            prefix = f"eval_{name}_" if name else "eval_"
            metrics |= {prefix + key: mean for key, mean in self._evaluated(rows, number, samples).items()}
        found = self.evaluated(metrics)
        show(self.run, self.state.global_step, samples[: self.stage.num_samples])
        return found

    def _evaluated(self, rows: Any, number: int, samples: list[dict[str, Any]]) -> dict[str, float]:
        """Return the metrics of one evaluation set; each process judges its share of the replies."""
        run, stage = self.run, self.stage
        decoding = Decoding(
            max_new_tokens=stage.max_new_tokens,
            temperature=stage.eval_temperature,
            top_p=stage.top_p if stage.eval_temperature else 1.0,
            top_k=stage.top_k if stage.eval_temperature else 0,
            seed=seed_of(run.cfg.seed, number),
        )
        everything, mine = [rows[place] for place in range(len(rows))], slice(run.rank, None, run.world_size)
        generator = self._generator(decoding, run.cfg.train.micro_batch_size)
        written = generator.replies(self.model, everything, rank=run.rank, world_size=run.world_size)
        questions, replies = everything[mine], written[mine]
        judged = self._completions(questions, replies)
        scores, each = self.rewards(judged)
        *_, kl = self._said_of(questions, replies)
        values = verdicts.metrics(judged, scores, each)
        if self.reference:
            values["kl"] = _sums(kl, replies)
        samples += verdicts.samples(judged, scores)
        return self._means(values)

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the policy, and the value model beside it."""
        with self.policy_alone():
            super()._save(output_dir, state_dict)
        self.value_model.save(Path(output_dir or self.args.output_dir) / VALUE_HEAD)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Take up the weights of both."""
        with self.policy_alone():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.value_model.load(Path(resume_from_checkpoint) / VALUE_HEAD)

    def own_state(self) -> dict[str, Any]:
        """Return what rollouts depend on, and the one that is not yet done with."""
        done = self.state.global_step % self.stage.steps_per_rollout == 0
        return {
            "kl_coef": self.controller.coef,
            "scores_seen": vars(self.scores_seen),
            "rollout": None if done or not self.rollout else self.rollout.state(),
        }

    def take_own_state(self, state: dict[str, Any]) -> None:
        """Take up what `own_state` has returned."""
        self.controller.coef = state["kl_coef"]
        self.scores_seen = Moments(**state["scores_seen"])
        self.rollout = Rollout.of(state["rollout"]) if state["rollout"] else None


def _places(rows: Sequence[Any]) -> Batch:
    """Return where rows are in their data set."""
    return {"places": torch.tensor([int(row["index"]) for row in rows], dtype=torch.int64)}


def _sums(values: torch.Tensor, replies: Sequence[list[int]]) -> torch.Tensor:
    """Return the sum over each reply of the values (N,) of its tokens, of shape (B,)."""
    return padded(values, [len(ids) for ids in replies]).sum(1) if replies else torch.zeros(0)


@contextlib.contextmanager
def _hidden_states(head: nn.Module, shape: torch.Size) -> Iterator[list[torch.Tensor]]:
    """While inside, keep what a model gives its output head: hidden states of shape (B, T, H)."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments[0].shape[:-1] == shape:  # and not a part of it, for which the head is called by itself
            seen.append(arguments[0])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
