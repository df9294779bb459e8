"""Slots: whose they are on the whole machine, and for how long."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ftrun.hardware import Device
from ftrun.slots import Slot, Slots


@pytest.fixture(autouse=True)
def own_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("FTRUN_SLOTS", str(tmp_path / "slots"))


def taken(slots: Slots, count: int = 1) -> Slot:
    slot = slots.take(count)
    assert slot is not None
    return slot


def test_two_drivers_do_not_take_the_same_share_of_the_cpus():
    one, other = Slots(Device.cpu, 2), Slots(Device.cpu, 2)
    first, second = taken(one), taken(other)
    assert one.take(1) is None
    assert other.take(1) is None
    first.release()
    taken(other).release()
    second.release()


def test_the_processes_of_one_job_share_a_share_of_the_cpus():
    slots = Slots(Device.cpu, 1)
    assert slots.most == float("inf")
    taken(slots, 4).release()


def test_a_job_is_shown_its_own_accelerators_only(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,GPU-5a")
    slots = Slots(Device.cuda, 1)
    assert slots.most == 3
    pair = taken(slots, 2)
    assert pair.env == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert slots.take(2) is None  # and the one that is left has not been kept
    last = taken(slots, 1)
    assert last.env == {"CUDA_VISIBLE_DEVICES": "GPU-5a"}
    pair.release()
    last.release()


def test_two_jobs_can_share_each_accelerator_and_one_job_has_each_once(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    slots = Slots(Device.cuda, 2)
    assert slots.most == 2
    held = [taken(slots, 2), taken(slots, 2)]
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in held] == ["0,1", "0,1"]
    assert slots.take(1) is None
    for slot in held:
        slot.release()


def test_a_slot_stays_taken_while_the_jobs_own_process_lives():
    slots = Slots(Device.cpu, 1)
    slot = taken(slots)
    job = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True, pass_fds=slot.held)
    slot.release()  # as when the driver dies
    assert slots.take(1) is None
    job.communicate("\n")
    taken(slots).release()
