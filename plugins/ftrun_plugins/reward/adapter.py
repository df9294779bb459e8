"""Rewards of a reward model that shares the policy's base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftrun import record
from ftrun.errors import ConfigError, Problem
from ftrun.fields import MISSING
from ftrun.model import Source
from ftrun.plugin import register
from ftrun_plugins.reward._learned import Learned

if TYPE_CHECKING:
    from torch import nn

    from ftrun.completions import Completion
    from ftrun.config import Config
    from ftrun.model import Model
    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class RewardAdapter(Learned):
    """The score of a reward model whose adapter is put beside the policy's: their common base is held once."""

    name: str = "adapter"

    path: str = MISSING
    """Folder of a run of stage=rm with an adapter, which started from the same model as this run; or the folder of
    such an adapter."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """The base must stay what the reward's adapter was trained on."""
        if not cfg.adapter.off_is_start:
            message = f"adapter={cfg.adapter.name} changes the weights that the reward's adapter was trained on"
            yield Problem("reward", message, "adapter=lora, or reward=model with the same path")

    def check_files(self, cfg: Config) -> Iterator[Problem]:
        """Yield what is wrong with its files, which must be those of an adapter."""
        problems = list(super().check_files(cfg))
        yield from problems
        if not problems and not (_folder(self.path) / _CONFIG).is_file():
            message = f"{self.path} holds no adapter, but a whole model"
            yield Problem("reward.adapter.path", message, f"reward=model reward.model.path={self.path}")

    def prepare(self, run: Run, model: nn.Module) -> None:
        """Put its adapter beside the policy's.

        Raises:
            ConfigError: It was trained on another model than the policy starts from, or does not fit.
        """
        from peft import PeftModel

        from ftrun.worker import loading, scoring
        from ftrun_plugins.reward._learned import Judge

        if wrong := list(self._other_base(run.cfg)):
            raise ConfigError(wrong)
        if not isinstance(model, PeftModel):
            message = (
                f"adapter={run.cfg.adapter.name} puts nothing beside the base, where the reward's adapter could be"
            )
            raise ConfigError([Problem("reward", message, "adapter=lora, or reward=model with the same path")])
        with self.said_of_mine():
            scorer = scoring.attach_scorer(model, _folder(self.path), run.tokenizer)
        own = loading.tokenizer_of(self.files(run.cfg))
        self._judge = Judge(scorer, own, run.tokenizer, "reward.adapter.path")

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """Ask it about prompt and reply together, with the policy's adapter out of the way."""
        return self._judge.scores(completions, self.batch_size)

    def _other_base(self, cfg: Config) -> Iterator[Problem]:
        """Yield a problem if it was trained on something else than the policy starts from."""
        base, revision = _base(Path(self.path))
        policy = cfg.model
        if base != policy.path or (policy.source is Source.hub and revision not in (None, policy.revision)):
            was = f"{base} {revision or ''}".strip() if base else "a model that it does not name"
            starts = f"{policy.path} {policy.revision or ''}".strip()
            message = f"its adapter was trained on {was}, and the policy starts from {starts}"
            yield Problem("reward.adapter.path", message, "an adapter for the policy's own base; or reward=model")


_CONFIG = "adapter_config.json"


def _folder(path: str) -> Path:
    """Return the folder of an adapter's files, which may be that of the run that left them."""
    folder = Path(path).expanduser()
    return folder / record.MODEL if record.is_run(folder) else folder


def _base(folder: Path) -> tuple[str | None, str | None]:
    """Return the model that an adapter was trained on, and its commit: by its run, or by its own settings."""
    from ftrun.config import Config

    for run in (folder, folder.parent):
        if record.is_run(run):
            start: Model = Config.load(run / record.RUN).model
            return start.path, start.revision
    settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    return settings.get("base_model_name_or_path"), settings.get("revision")
