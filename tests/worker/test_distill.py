"""The divergence of a student from its teacher, against numpy and TRL; and replies put into rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftrun.data.tokens import IGNORED
from ftrun.errors import ConfigError
from ftrun.worker import distill


def log_softmax(logits, temperature):
    logits = logits.double().numpy() / temperature
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_divergence_is_its_formula(beta, temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 11, generator=generator) * 2 for _ in range(2))
    ours, theirs = log_softmax(student, temperature), log_softmax(teacher, temperature)
    mixture = np.log(beta * np.exp(theirs) + (1 - beta) * np.exp(ours))
    of_teacher = (np.exp(theirs) * (theirs - (mixture if 0 < beta < 1 else ours))).sum(-1)
    of_student = (np.exp(ours) * (ours - (mixture if 0 < beta < 1 else theirs))).sum(-1)
    wanted = {0.0: of_teacher, 1.0: of_student}.get(beta, beta * of_teacher + (1 - beta) * of_student) * temperature**2
    found = distill.divergence(student, teacher, beta=beta, temperature=temperature)
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_divergence_is_that_of_trl(beta, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    student, teacher = torch.randn(2, 4, 9), torch.randn(2, 4, 9)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=1.5, reduction="sum")
    ours = distill.divergence(student.flatten(0, 1), teacher.flatten(0, 1), beta=beta, temperature=1.5)
    assert ours.sum().item() / 1.5**2 == pytest.approx(theirs.item(), rel=1e-5)


def test_tokens_that_only_one_vocabulary_has_are_left_out():
    student, teacher = torch.randn(3, 6), torch.randn(3, 6)
    longer = torch.cat([teacher, torch.randn(3, 2)], 1)
    one, other = (distill.divergence(student, each, beta=0.5, temperature=1.0) for each in (teacher, longer))
    assert torch.equal(one, other)


def test_a_reply_begins_where_the_last_labels_do():
    no = IGNORED
    assert distill.last_reply([no, no, 5, 6]) == 2
    assert distill.last_reply([no, 4, no, 5, no]) == 3
    assert distill.last_reply([no, no]) is None
    assert distill.last_reply([5, 6]) is None  # all is labelled: there is no prompt


def test_rows_of_a_batch_have_no_padding_and_no_media():
    batch = {
        "input_ids": torch.tensor([[4, 5, 0], [6, 7, 8]]),
        "labels": torch.tensor([[IGNORED, 5, IGNORED], [IGNORED, IGNORED, 8]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    assert distill.rows_of(batch)[0] == {"input_ids": [4, 5], "labels": [IGNORED, 5]}
    with pytest.raises(ConfigError):
        distill.rows_of(batch | {"pixel_values": torch.zeros(1)})
