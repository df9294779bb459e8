"""Replies to prompts: in batches padded on the left, the longest prompts first, shared by the processes of a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ftrun import events
from ftrun.config import Config
from ftrun.data import TrainOn
from ftrun.data.rows import Conversation, Row
from ftrun.errors import ConfigError, Problem
from ftrun.worker import noise, sharding
from ftrun.worker.batches import Batch, model_inputs, padding_collator
from ftrun.worker.encode import EncodedRow, RowEncoder
from ftrun.worker.sampling import Budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ftrun.worker.media.processor import MediaProcessor

_SMALLEST_DRAW = 2.0**-25
"""Half of the smallest step of the uniform numbers behind a draw: one that is rounded to 0 would win always."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the tokens of a reply are chosen."""

    max_new_tokens: int
    """Longest reply, its end included."""

    temperature: float = 0.0
    """What the logits are divided by before a token is drawn; 0 takes the likeliest one."""

    top_p: float = 1.0
    """Draw among the likeliest tokens that have this much probability together."""

    top_k: int = 0
    """Draw among so many of the likeliest tokens; 0 for all."""

    num_beams: int = 1
    """Replies that are followed at once, of which the likeliest is taken; for ``temperature=0`` only."""

    seed: int = 0
    """Of what is drawn. Each prompt has draws of its own, which depend on its number and on nothing beside it."""


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Writes replies to prompts."""

    decoding: Decoding
    budget: Budget
    """How many prompts a batch takes; of tokens, a prompt takes its own and ``max_new_tokens``."""

    ends: tuple[int, ...]
    """The tokens that end a reply."""

    pad_id: int
    media: MediaProcessor | None = None
    """The processor of the model, if prompts may have images, videos or sounds."""

    def replies(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Any],
        *,
        rank: int = 0,
        world_size: int = 1,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[list[int]]:
        """Return the tokens of each prompt's reply, in the order of the prompts: to its end, if it came to one.

        Every process must call it with the same prompts; each writes its share, and all return everything.

        Args:
            model: May be training, and goes on so.
            prompts: Rows with ``input_ids``; of a prompt with media, also ``media`` and ``place``.
            rank: Of this process.
            world_size: Number of processes.
            progress: Is told after each batch how many replies this process has written.
        """
        if world_size > 1 and sharding.is_cut(model):
            rank, world_size = 0, 1  # all take part in each forward pass, so all write everything
        lengths = np.array([self._length(prompt) for prompt in prompts], np.int64)
        order = np.argsort(-lengths, kind="stable")[rank::world_size]
        taken = (lengths[order] + self.decoding.max_new_tokens) * self.decoding.num_beams
        written: list[tuple[int, list[int]]] = []
        with noise.off(model), torch.no_grad():
            for start, stop in itertools.pairwise(self.budget.fill(taken).tolist()):
                numbers = order[start:stop].tolist()
                found = self._write(model, [prompts[number] for number in numbers], numbers)
                written += zip(numbers, found, strict=True)
                events.mark()
                progress(len(written))
        everything = dict(gather_object(written) if world_size > 1 else written)
        return [everything[number] for number in range(len(prompts))]

    def text(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
        """Return a reply as a person reads it: without special tokens, its end, and the space around it."""
        body = ids[:-1] if len(ids) and ids[-1] in self.ends else ids
        decoded = tokenizer.decode(list(body), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded).strip()

    def _length(self, prompt: Any) -> int:
        """Return the tokens of a prompt, as far as its media tell theirs."""
        return len(prompt["input_ids"]) + sum(medium.num_tokens - 1 for medium in prompt.get("media", ()))

    def _write(self, model: PreTrainedModel, prompts: Sequence[Any], numbers: Sequence[int]) -> list[list[int]]:
        batch = self._batch(prompts)
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        out = model.generate(
            **inputs,
            generation_config=self._config(),
            logits_processor=self._drawing(numbers, model.device),
        )
        return [self._ended(ids) for ids in out[:, batch["input_ids"].shape[1] :].tolist()]

    def _batch(self, prompts: Sequence[Any]) -> Batch:
        """Put prompts above each other, filled up on the left, so that each reply begins where its prompt ends."""
        kept = ("input_ids", "media", "place")
        rows = [
            {name: prompt[name] for name in kept if name in prompt} | {"labels": prompt["input_ids"]}
            for prompt in prompts
        ]
        batch = model_inputs(padding_collator(self.pad_id, self.media)(rows))
        missing = batch["attention_mask"].shape[1] - batch["attention_mask"].sum(1)
        columns = ("input_ids", "attention_mask", *(self.media.family.token_columns if self.media else ()))
        for name in columns:
            if name in batch:
                moved = [row.roll(int(count)) for row, count in zip(batch[name], missing, strict=True)]
                batch[name] = torch.stack(moved)
        return batch

    def _config(self) -> GenerationConfig:
        """Return what `generate` is to do, all of it, or it would take up what a model was published with.

        That may be a temperature, or a penalty on repetition. Draws are made by a processor of logits (`_Drawn`), so to
        `generate` nothing is sampled.
        """
        return GenerationConfig(
            max_new_tokens=self.decoding.max_new_tokens,
            num_beams=self.decoding.num_beams,
            eos_token_id=list(self.ends) or None,
            pad_token_id=self.pad_id,
            use_cache=True,
            do_sample=False,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            length_penalty=1.0,
            early_stopping=False,
        )

    def _drawing(self, numbers: Sequence[int], device: torch.device) -> LogitsProcessorList:
        """Return what makes the likeliest token of a batch's changed logits one that is drawn."""
        decoding = self.decoding
        steps = LogitsProcessorList()
        if not decoding.temperature:
            return steps
        steps.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_k:
            steps.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            steps.append(TopPLogitsWarper(decoding.top_p))
        steps.append(_Drawn([_generator(decoding.seed, number, device) for number in numbers]))
        return steps

    def _ended(self, ids: list[int]) -> list[int]:
        """Return a reply without the padding behind its end."""
        last = next((at for at, token in enumerate(ids) if token in self.ends), len(ids) - 1)
        return ids[: last + 1]


class _Drawn(LogitsProcessor):
    """Adds Gumbel noise to the logits: the largest sum is then a draw from the softmax.

    Each row has a random generator of its own, so that its draws do not depend on which rows it shares a batch with.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits with noise, of shape (B, V)."""
        waits = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(waits, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - waits.clamp_min(_SMALLEST_DRAW).log()


def _generator(seed: int, number: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed * 1_000_003 + number)


def refuse_too_long(model: PreTrainedModel, longest: int, reply: int) -> None:
    """Stop where the longest question and a reply have more tokens than a model has positions.

    Raises:
        ConfigError: They have: some models would fail at a reply of that length, others write nonsense.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and longest + reply > positions:
        message = f"a question of {longest} tokens and a reply of {reply} do not fit into the model's {positions}"
        fix = f"stage.max_new_tokens={positions - longest}" if longest < positions else "a smaller data.max_length"
        raise ConfigError([Problem("stage.max_new_tokens", message, fix)])


def end_ids(cfg: Config, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> tuple[int, ...]:
    """Return the tokens that end a reply.

    They are the tokenizer's end-of-sequence token, the model's, the strings in ``template.stop``, and the special token
    that the template ends a reply with: a base model's tokenizer often has a chat template that does not end with its
    end-of-sequence token.
    """
    known = tokenizer.get_vocab()
    of_model = getattr(model.generation_config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])]
    found += [known[word] for word in cfg.template.stop if word in known]
    found.append(_last_of_a_reply(cfg, tokenizer))
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def _last_of_a_reply(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the template ends a short reply with, if it does."""
    data = replace(cfg.data, train_on=TrainOn.completions, train_roles=[])
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (encoded,) = RowEncoder(replace(cfg, data=data), tokenizer).encode([Conversation(messages, Row({}, "template", 1))])
    if not isinstance(encoded, EncodedRow) or not encoded.sequences[0].replies:
        return None  # a template that refuses such a conversation
    sequence = encoded.sequences[0]
    token = sequence.ids[sequence.replies[-1][1] - 1]
    added = tokenizer.added_tokens_decoder.get(token)
    return token if token in tokenizer.all_special_ids or (added and added.special) else None
