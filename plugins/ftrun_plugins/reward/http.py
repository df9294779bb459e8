"""Rewards of a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ftrun.errors import Problem
from ftrun.fields import MISSING, ranged
from ftrun.plugin import Reward, register
from ftrun.secrets import check_name

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ftrun.completions import Completion
    from ftrun.config import Config
    from ftrun.worker.training import Run


class Send(StrEnum):
    """What the server is sent of each reply."""

    texts = "texts"
    conversations = "conversations"


@register
@dataclass(kw_only=True)
class HTTP(Reward):
    """The score that a server gives: ``POST {"model": ..., "messages": [...]}``, answered ``{"scores": [...]}``."""

    name: str = "http"

    url: str = MISSING
    """Where to post to, the path included."""

    model: str = "model"
    """What the request says as ``model``."""

    send: Send = Send.texts
    """What ``messages`` holds of each reply. texts: one text, prompt and reply as the policy's template writes them,
    which a LLaMA-Factory server wants. conversations: its messages, with ``role`` and ``content``, the reply last."""

    key_env: str | None = None
    """Name of the environment variable that holds the server's key, sent as a bearer token. Default: no key."""

    batch_size: int = ranged(32, ge=1)
    """How many replies a request holds."""

    timeout: float = ranged(60.0, gt=0)
    """Seconds to wait for an answer."""

    retries: int = ranged(3, ge=0)
    """How often a request is sent again that met no server, a busy one (429) or one in trouble (500 and above); after
    one second, then two, four and so on."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """An address, and no secret in it."""
        try:
            parts = urlsplit(self.url)
        except ValueError as error:
            yield Problem("reward.http.url", f"is no address: {error}", "reward.http.url=http://HOST:PORT/PATH")
            return
        if parts.username or parts.password:
            message = "holds a name or a password, which would end up in run.yaml"
            yield Problem("reward.http.url", message, "the address without it, and reward.http.key_env=MY_KEY")
        elif parts.scheme not in ("http", "https") or not parts.hostname:
            message = f"{self.url} is no address of the web"
            yield Problem("reward.http.url", message, "reward.http.url=http://HOST:PORT/PATH")
        if self.key_env is not None:
            yield from check_name("reward.http.key_env", self.key_env)

    def prepare(self, run: Run, model: nn.Module) -> None:
        """Keep the tokenizer, with which prompt and reply become the text that is sent."""
        self._tokenizer: PreTrainedTokenizerBase = run.tokenizer

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """Ask the server, a batch after another."""
        from ftrun_plugins.reward import _post as post

        found: list[float | None] = []
        for start in range(0, len(completions), self.batch_size):
            batch = completions[start : start + self.batch_size]
            body = {"model": self.model, "messages": [self._sent(reply) for reply in batch]}
            found += post.scores(self, body, len(batch))
        return found

    def _sent(self, reply: Completion) -> Any:
        if self.send is Send.conversations:
            return [*reply.prompt, {"role": "assistant", "content": reply.text}]
        return self._tokenizer.decode([*reply.prompt_ids, *reply.ids])
