"""What a policy is held close to: the reference model, and where it comes from."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ftrun import model
from ftrun.errors import ConfigError, Problem
from ftrun.model import Dtype, Model, Source

if TYPE_CHECKING:
    from ftrun.config import Config


class Reference(StrEnum):
    """Which model the policy is compared with, and how that is at hand."""

    auto = "auto"
    precomputed = "precomputed"
    adapter_off = "adapter_off"
    copy = "copy"
    model = "model"


@dataclass(kw_only=True)
class Anchored:
    """The keys of a stage that compares its policy with a reference model."""

    reference: Reference = Reference.auto
    """The model that the policy is compared with. auto: the policy as it was before the first step, in the cheapest of
    the exact ways. precomputed: the same, its log-probabilities computed once, before the first step, and kept.
    adapter_off: the policy with its adapter switched off. copy: a frozen copy of the weights that train, as they were.
    model: another model, ``reference_path``."""

    reference_path: str | None = None
    """Another model to compare with: hub id, folder, folder of an earlier run (its base and adapter), or GGUF file."""

    reference_revision: str | None = None
    """Its commit, tag or branch on the hub. Default: the newest; run.yaml holds the commit it was."""

    reference_source: Source = Source.auto
    """Where its files come from. Default: found out, and written to run.yaml."""

    reference_dtype: Dtype = Dtype.auto
    """Stored type of its weights. Default: the checkpoint's own; float32 on CPU."""

    def reference_model(self, cfg: Config) -> Model:
        """Return the other model, which is loaded as the run's own is."""
        return dataclasses.replace(
            cfg.model,
            path=self.reference_path,
            revision=self.reference_revision,
            source=self.reference_source,
            dtype=self.reference_dtype,
            size=None,
            sizes={},
        )

    def check_reference(self, cfg: Config, *, can_precompute: bool) -> Iterator[Problem]:
        """Yield what is wrong with the choice of a reference.

        Args:
            cfg: The whole config.
            can_precompute: Whether the stage knows before training which tokens the reference is asked about.
        """
        named = {
            name: value
            for name in ("path", "revision", "source", "dtype")
            if (value := getattr(self, f"reference_{name}")) not in (None, Source.auto, Dtype.auto)
        }
        if self.reference is Reference.model and not self.reference_path:
            yield Problem("stage.reference", "there is no other model", "stage.reference_path=FOLDER_OR_ID")
        if self.reference is not Reference.model and named:
            key = f"stage.reference_{next(iter(named))}"
            yield Problem(key, f"stage.reference={self.reference} does not read it", "stage.reference=model")
        if self.reference is Reference.adapter_off and not cfg.adapter.off_is_start:
            message = f"without its adapter={cfg.adapter.name} the model is not what the run starts from"
            yield Problem("stage.reference", message, "stage.reference=copy, or auto")
        if self.reference is Reference.precomputed and not can_precompute:
            message = "the replies that it is asked about are only written while training"
            yield Problem("stage.reference", message, "stage.reference=copy, or auto")

    def check_files(self, cfg: Config) -> Iterator[Problem]:
        """Yield what is wrong with the other model as far as this machine's disk can tell."""
        if self.reference_path is not None:
            yield from map(_of_reference, model.check(self.reference_model(cfg)))

    def settle(self, cfg: Config) -> None:
        """Settle, in place, where the other model's files are.

        Raises:
            ConfigError: They are nowhere to be found.
        """
        if self.reference_path is not None:
            with of_reference():
                found = model.locate(self.reference_model(cfg))
            self.reference_path, self.reference_source = found.path, found.source
            self.reference_revision = found.revision


@contextlib.contextmanager
def of_reference() -> Iterator[None]:
    """Have problems with the keys of ``model`` be problems with those of the reference."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([_of_reference(problem) for problem in error.problems]) from None


def _of_reference(problem: Problem) -> Problem:
    key, fix = (text.replace("model.", "stage.reference_") for text in (problem.key, problem.fix))
    return dataclasses.replace(problem, key=key, fix=fix)
