"""Sample replies, at each evaluation: what a person looks at to see whether training works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ftrun import events, record
from ftrun.data.rows import BadRow, Row
from ftrun.errors import ConfigError
from ftrun.worker import generation
from ftrun.worker.encode import RowEncoder
from ftrun.worker.generation import Decoding, Generator
from ftrun.worker.report import Prompt
from ftrun.worker.sampling import Budget

if TYPE_CHECKING:
    from ftrun.worker.training import Run


class Samples(TrainerCallback):
    """Replies to the same prompts at each evaluation, and writes them down."""

    def __init__(self, run: Run, model: Any, prompts: list[Prompt], max_new_tokens: int) -> None:
        self.run, self.prompts = run, prompts
        self._generator = Generator(
            decoding=Decoding(max_new_tokens=max_new_tokens),
            budget=Budget(max(1, len(prompts)), None, padded=True),
            ends=generation.end_ids(run.cfg, run.tokenizer, model),
            pad_id=run.pad_id,
        )
        encoder = RowEncoder(run.cfg, run.tokenizer)
        row = Row({}, "stage.sample_prompts", 1)
        try:
            self._prompt_ids = [encoder.prompt_ids(prompt.messages, row, prompt.tools) for prompt in prompts]
        except BadRow as bad:
            raise ConfigError([bad.problem]) from None

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Generate the replies on the first process, or on all where none holds the whole model."""
        if not self.prompts or not (self.run.is_main or self.run.cfg.hardware.sharding.cuts_weights):
            return
        written = self._generator.replies(model, [{"input_ids": ids} for ids in self._prompt_ids])
        texts = [self._generator.text(self.run.tokenizer, ids) for ids in written]
        lines = [
            {"prompt": prompt.messages[-1]["content"], "reply": text}
            for prompt, text in zip(self.prompts, texts, strict=True)
        ]
        show(self.run, state.global_step, lines)


def show(run: Run, step: int, samples: Sequence[dict[str, Any]]) -> None:
    """Write replies, of the first process, to the run's folder and to the screen."""
    if not (samples and run.is_main):
        return
    lines = [{"step": step} | sample for sample in samples]
    for line in lines:
        record.append_line(run.folder / record.SAMPLES, line)
    events.send("samples", step=step, samples=lines)
