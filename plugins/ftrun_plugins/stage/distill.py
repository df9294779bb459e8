"""Distillation of a larger model into a smaller one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun import model as models
from ftrun.anchor import Reference
from ftrun.data import Packing
from ftrun.errors import ConfigError, Problem
from ftrun.fields import ranged
from ftrun.model import Dtype, Model, Source
from ftrun.plugin import Stage, register

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.record import Result


@register
@dataclass(kw_only=True)
class Distill(Stage):
    """Learn the distribution that a teacher gives each token (https://arxiv.org/abs/2306.13649)."""

    default_data: ClassVar[str] = "demo:identity"
    rows: ClassVar[str] = "conversations"
    reads: ClassVar[tuple[str, ...]] = ("model.*", "template.*", "data.*", "train.*")
    metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "loss", "eval_token_accuracy", "eval_perplexity")
    name: str = "distill"

    teacher_path: str | None = None
    """The model to learn from, with the same tokenizer: hub id, folder, folder of an earlier run, or GGUF file.
    Default: the model as it starts, so that learning the rows changes little else."""

    teacher_revision: str | None = None
    """Its commit, tag or branch on the hub. Default: the newest; run.yaml holds the commit it was."""

    teacher_source: Source = Source.auto
    """Where its files come from. Default: found out, and written to run.yaml."""

    teacher_dtype: Dtype = Dtype.auto
    """Stored type of its weights. Default: the checkpoint's own; float32 on CPU."""

    alpha: float = ranged(0.5, gt=0, le=1)
    """Weight of the divergence from the teacher; the rest is that of the rows' own tokens, as in sft."""

    beta: float = ranged(0.0, ge=0, le=1)
    """Which divergence: 0 is KL(teacher || student), which covers all that the teacher may say; 1 is
    KL(student || teacher), which keeps to what it is likeliest to say; between them, Jensen-Shannon's."""

    temperature: float = ranged(1.0, gt=0)
    """What both models' logits are divided by: higher learns more of what the teacher finds unlikely. The divergence is
    multiplied by its square, so that the gradient stays as large."""

    on_policy: float = ranged(0.0, ge=0, le=1)
    """Share of the steps whose replies the student writes itself, in place of the rows' last ones: it learns what the
    teacher would have said where the student goes. Those steps have the divergence only."""

    max_new_tokens: int = ranged(128, ge=1)
    """Longest reply that the student writes, in tokens."""

    reply_temperature: float = ranged(1.0, gt=0)
    """How freely the student writes it."""

    @property
    def reference(self) -> Reference:
        """The teacher, as the trainer knows a model to compare with."""
        return Reference.model if self.teacher_path else Reference.auto

    def reference_model(self, cfg: Config) -> Model:
        """Return the teacher, which is loaded as the run's own model is."""
        return dataclasses.replace(
            cfg.model,
            path=self.teacher_path,
            revision=self.teacher_revision,
            source=self.teacher_source,
            dtype=self.teacher_dtype,
            size=None,
            sizes={},
        )

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield keys that nothing reads, and rows that no reply can be written to."""
        if not self.teacher_path:
            fix = "stage.teacher_path=MODEL"
            for key in ("teacher_revision", "teacher_source", "teacher_dtype"):
                if getattr(self, key) != getattr(type(self), key):
                    yield Problem(f"stage.{key}", "there is no teacher but the model itself", fix)
            if self.alpha == 1:
                yield Problem("stage.alpha", "the model is its own teacher, and would learn nothing else", fix)
        if not self.on_policy:
            for key in ("max_new_tokens", "reply_temperature"):
                if getattr(self, key) != getattr(type(self), key):
                    message = "with stage.on_policy=0 the student writes no replies"
                    yield Problem(f"stage.{key}", message, "stage.on_policy=0.5, or without it")
        elif cfg.data.packing is not Packing.none or cfg.train.padding_free:
            message = "replies are written to rows, and these share sequences"
            yield Problem("stage.on_policy", message, "data.packing=none and train.padding_free=false")

    def check_files(self, cfg: Config) -> Iterator[Problem]:
        """Yield what is wrong with the teacher, as far as this machine's disk can tell."""
        if self.teacher_path:
            yield from map(_of_teacher, models.check(self.reference_model(cfg)))

    def settle(self, cfg: Config) -> None:
        """Settle, in place, where the teacher's files are.

        Raises:
            ConfigError: They are nowhere to be found.
        """
        if self.teacher_path:
            with of_teacher():
                found = models.locate(self.reference_model(cfg))
            self.teacher_path, self.teacher_source, self.teacher_revision = found.path, found.source, found.revision

    def run(self, cfg: Config) -> Result:
        """Load, encode, train beside the teacher, and say how it went."""
        from ftrun.worker import distill, training

        model, run = training.prepare(cfg)
        return training.fit(training.build(distill.DistillTrainer, model, run))


@contextlib.contextmanager
def of_teacher() -> Iterator[None]:
    """Have problems with the keys of a model be problems with those of the teacher."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([_of_teacher(problem) for problem in error.problems]) from None


def _of_teacher(problem: Problem) -> Problem:
    key, fix = (
        text.replace("stage.reference_", "stage.teacher_").replace("model.", "stage.teacher_")
        for text in (problem.key, problem.fix)
    )
    return dataclasses.replace(problem, key=key, fix=fix)
