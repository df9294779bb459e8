"""What rewards share that were trained themselves: where their files are, and which tokens they are asked about."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftrun import model, record
from ftrun.errors import ConfigError, Problem
from ftrun.fields import MISSING, ranged
from ftrun.model import Model, Source
from ftrun.plugin import ModelHead, Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ftrun.completions import Completion
    from ftrun.config import Config
    from ftrun.worker.scoring import Scorer


@dataclass(kw_only=True)
class Learned(Reward):
    """The keys that say where a reward's weights are, and how many replies it reads at once."""

    path: str = MISSING
    """What was trained to score replies."""

    source: Source = Source.auto
    """Where its files come from. Default: found out, and written to run.yaml."""

    batch_size: int = ranged(16, ge=1)
    """How many replies are read at once: more is faster, and takes more memory."""

    def files(self, cfg: Config) -> Model:
        """Return its weights as a model of their own."""
        return Model(path=self.path, source=self.source, trust_remote_code=cfg.model.trust_remote_code)

    def check_files(self, cfg: Config) -> Iterator[Problem]:
        """Yield what is wrong with its files as far as this machine's disk can tell."""
        problems = [self._mine(problem) for problem in model.check(self.files(cfg))]
        yield from problems
        if not problems and (stage := _stage_of(self.path)):
            message = f"{self.path} is a run of stage={stage}, which trains no score head"
            yield Problem(f"reward.{self.name}.path", message, "the folder of a run of stage=rm")

    def settle(self, cfg: Config) -> None:
        """Settle, in place, where its files are.

        Raises:
            ConfigError: They are nowhere to be found.
        """
        with self.said_of_mine():
            self._settled(model.locate(self.files(cfg)))

    def _settled(self, found: Model) -> None:
        assert found.path
        self.path, self.source = found.path, found.source

    @contextlib.contextmanager
    def said_of_mine(self) -> Iterator[None]:
        """Have problems with the keys of ``model`` be problems with those of this reward."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError([self._mine(problem) for problem in error.problems]) from None

    def _mine(self, problem: Problem) -> Problem:
        """Return a problem with a key of ``model`` as one with the same key of this reward."""
        key, fix = (text.replace("model.", f"reward.{self.name}.") for text in (problem.key, problem.fix))
        return dataclasses.replace(problem, key=key, fix=fix)


def _stage_of(path: str) -> str:
    """Return the stage of the run in a folder, if that is one which left no reward model."""
    from ftrun.config import Config

    folder = Path(path).expanduser()
    if not record.is_run(folder):
        return ""
    try:
        stage = Config.load(folder / record.RUN).stage
    except ConfigError:
        return ""  # of which nothing can be told; loading it may
    return "" if stage.head is ModelHead.score else stage.name


class Judge:
    """A reward model that reads replies as it was trained to: through its own template, if that is not the policy's."""

    def __init__(self, scorer: Scorer, own: PreTrainedTokenizerBase, policy: PreTrainedTokenizerBase, key: str) -> None:
        """Be told of both tokenizers.

        Raises:
            ConfigError: The reward model reads other tokens than the policy writes, and has no template to make them.
        """
        self._scorer, self._own = scorer, own
        same_tokens = own.get_vocab() == policy.get_vocab()
        self._reads_replies = same_tokens and own.chat_template in (None, policy.chat_template)
        if not self._reads_replies and own.chat_template is None:
            message = "its tokenizer is not the policy's, and has no chat template to write conversations with"
            raise ConfigError([Problem(key, message, "a reward model whose tokenizer has one")])

    def scores(self, completions: Sequence[Completion], batch_size: int) -> list[float]:
        """Return the score of each reply to its prompt."""
        return self._scorer.scores([self._tokens(reply) for reply in completions], batch_size)

    def _tokens(self, reply: Completion) -> list[int]:
        if self._reads_replies:
            return [*reply.prompt_ids, *reply.ids]
        messages = [*reply.prompt, {"role": "assistant", "content": reply.text}]
        ids: list[int] = self._own.apply_chat_template(messages, tokenize=True, return_dict=False)
        return ids
