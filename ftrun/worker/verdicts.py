"""Replies to questions as rewards judge them, and what is reported of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ftrun.completions import Completion

if TYPE_CHECKING:
    from ftrun.worker.training import Run


def asked(row: Any) -> dict[str, Any]:
    """Return of a question's row what rewards read: ``prompt`` (tokens), ``messages`` and ``answer``."""
    extra = row["extra"]
    return {"prompt": row["input_ids"].tolist(), "messages": extra["prompt"], "answer": extra["answer"]}


def completion(run: Run, row: Mapping[str, Any], ids: list[int], end_ids: Sequence[int]) -> Completion:
    """Return a reply as rewards see it.

    Args:
        run: Whose tokenizer it was written with.
        row: What `asked` returns of its question.
        ids: The reply's tokens.
        end_ids: The tokens that end a reply.
    """
    finished = ids[-1] in end_ids
    text = run.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True).strip()
    return Completion(
        prompt=row["messages"], answer=row["answer"], text=text, prompt_ids=row["prompt"], ids=ids, finished=finished
    )


def metrics(
    judged: Sequence[Completion], totals: torch.Tensor, each: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return what is to be averaged over replies; those that no reward judges have no part in the rewards' means.

    Args:
        judged: N replies.
        totals: What all rewards together say of them, of shape (N,).
        each: What each says, of shape (N,): NaN where it says nothing.
    """
    return {
        "rewards_mean": totals[~torch.stack([*each.values()]).isnan().all(0)],
        **{f"rewards_{name}": values[~values.isnan()] for name, values in each.items()},
        "completion_length": torch.tensor([float(len(one.ids)) for one in judged]),
        "completions_truncated": torch.tensor([float(not one.finished) for one in judged]),
    }


def samples(judged: Sequence[Completion], totals: torch.Tensor) -> list[dict[str, Any]]:
    """Return replies and what they are worth as `ftrun.worker.samples.show` takes them."""
    return [
        {"prompt": one.prompt[-1]["content"], "reply": one.text, "reward": round(worth, 6)}
        for one, worth in zip(judged, totals.tolist(), strict=True)
    ]
