"""When a sweep gives up."""

from __future__ import annotations

from ftrun.failures import Failures
from ftrun.record import Status


def test_failures_that_differ_in_numbers_and_paths_only_are_of_one_kind():
    failures = Failures(2)
    failures.note(Status.failed, "RunFailed: the loss of step 17 is nan (rows.jsonl:12)\nand more")
    failures.note(Status.failed, "MemoryError: all of it is taken")
    assert not failures.too_many
    failures.note(Status.failed, "RunFailed: the loss of step 4 is nan (rows.jsonl:3)")
    assert failures.too_many.startswith("2 jobs failed for one reason, none completed: RunFailed: the loss of step")


def test_nothing_is_given_up_once_a_job_has_come_to_something_nor_where_no_number_is_said():
    failures = Failures(1)
    failures.note(Status.paused, "")
    failures.note(Status.failed, "x")
    assert not failures.too_many
    never = Failures(None)
    for _ in range(100):
        never.note(Status.failed, "x")
    assert not never.too_many
