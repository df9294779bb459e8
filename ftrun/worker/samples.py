"""Sample replies, at each evaluation: what a person looks at to see whether training works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ftrun import events, record
from ftrun.data.rows import BadRow, Row
from ftrun.errors import ConfigError
from ftrun.worker.encode import RowEncoder
from ftrun.worker.report import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ftrun.worker.training import Run


class Samples(TrainerCallback):
    """Replies to the same prompts at each evaluation, and writes them down."""

    def __init__(self, run: Run, prompts: list[Prompt], max_new_tokens: int) -> None:
        self.run, self.prompts, self.max_new_tokens = run, prompts, max_new_tokens
        encoder = RowEncoder(run.cfg, run.tokenizer)
        row = Row({}, "stage.sample_prompts", 1)
        try:
            self._prompt_ids = [encoder.prompt_ids(prompt.messages, row, prompt.tools) for prompt in prompts]
        except BadRow as bad:
            raise ConfigError([bad.problem]) from None

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Generate the replies on the first process."""
        if not (self.prompts and self.run.is_main):
            return
        texts = replies(
            model,
            self.run.tokenizer,
            self._prompt_ids,
            max_new_tokens=self.max_new_tokens,
            stop=self.run.cfg.template.stop,
        )
        lines = [
            {"step": state.global_step, "prompt": prompt.messages[-1]["content"], "reply": text}
            for prompt, text in zip(self.prompts, texts, strict=True)
        ]
        for line in lines:
            record.append_line(self.run.folder / record.SAMPLES, line)
        events.send("samples", step=state.global_step, samples=lines)


def replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop: list[str],
) -> list[str]:
    """Reply greedily to several conversations at once.

    The prompts, each a list of tokens, are padded on the left, so that each reply begins where its prompt ends.
    """
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    ends = [
        tokenizer.eos_token_id,
        *(tokenizer.convert_tokens_to_ids(word) for word in stop if word in tokenizer.get_vocab()),
    ]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    model.train(was_training)
    return [
        text.strip() for text in tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    ]
