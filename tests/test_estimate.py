"""``ftrun check`` says what a run takes: what is read, added up and printed, and an answer from end to end."""

from __future__ import annotations

import json
import re
import socket

import pytest

from ftrun import config, estimate, forkserver, launch, record
from ftrun.errors import ConfigError
from ftrun.estimate import Estimate
from ftrun.record import Result

CPU = ["model=tiny", "hardware=cpu"]


def shown(capsys, call, *args, **kwargs) -> str:
    capsys.readouterr()
    call(*args, **kwargs)
    return capsys.readouterr().out


@pytest.fixture
def here(server, monkeypatch, tmp_path):
    """The working folder of a driver whose workers are forked."""
    monkeypatch.setenv(forkserver.VARIABLE, server)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_points_that_differ_in_what_costs_nothing_are_one_shape():
    same = [["seed=1"], ["seed=2", "optimizer.lr=1e-3"], ["train.scheduler=constant"], ["adapter.alpha=8"]]
    other = [["adapter.rank=4"], ["adapter.dropout=0.1"], ["data.max_length=64"], ["train.epochs=1"]]
    found = estimate.shapes(config.compose([*CPU, *words]) for words in [*same, *other])
    assert [count for _, count in found] == [4, 1, 1, 1, 1]
    assert found[1][0].adapter.rank == 4


def test_a_run_is_said_to_take_what_it_takes(here, capsys):
    cfg = launch.check([*CPU, "adapter=full", "train.max_steps=12", "train.save_every=5"])
    before = cfg.to_yaml()
    out = shown(capsys, estimate.show, cfg)
    assert cfg.to_yaml() == before
    assert 4 * 205_120 / 2**10 == 801.25
    assert re.search(r"weights +801 KiB +205,120 parameters, 205,120 of them train", out)
    assert re.search(r"gradients +801 KiB", out)
    assert re.search(r"optimizer's state +1.6 MiB", out)
    assert re.search(r"at once, at most; fits into \d", out)
    assert re.search(r"steps  12 of [\d,]+ tokens in all \(the rows are tokenised\)", out)
    assert re.search(r"time   [\d.]+ \w+ or more, roughly: [\d.]+ GFLOP at the [\d.]+ [GT]FLOP/s", out)
    assert "disk   5.5 MiB: 2 checkpoints of 2.3 MiB and the model, 801 KiB" in out
    assert "in all" in out  # the table of what trains


def test_the_speed_of_an_earlier_run_like_it_is_gone_by(here, capsys):
    cfg = launch.check([*CPU, "train.max_steps=10"])
    folder = launch.freeze(launch.check([*CPU, "train.max_steps=3", "output_dir=outputs/before"]), [])
    Result(status=record.Status.completed, tokens_per_second=50.0).save(folder)
    other = launch.freeze(launch.check([*CPU, "data.max_length=64", "output_dir=outputs/other"]), [])
    Result(status=record.Status.completed, tokens_per_second=1.0).save(other)
    out = shown(capsys, estimate.show, cfg)
    tokens = int(re.search(r"steps  10 of ([\d,]+) tokens", out)[1].replace(",", ""))
    said = re.search(r"time   about ([\d.]+) (s|min), at 50 tokens/s: the speed of outputs/before", out)
    assert float(said[1]) * {"s": 1, "min": 60}[said[2]] == pytest.approx(tokens / 50, rel=0.05)


def test_runs_of_another_machine_or_damaged_ones_say_nothing(here):
    folder = launch.freeze(launch.check([*CPU, "output_dir=outputs/before"]), [])
    Result(status=record.Status.completed, tokens_per_second=50.0).save(folder)
    assert [run.tokens_per_second for run in estimate._earlier([here / "outputs"])] == [50.0]
    manifest = json.loads((folder / record.MANIFEST).read_text())
    assert manifest["machine"]["host"] == socket.gethostname()
    manifest["machine"]["host"] = "elsewhere"
    (folder / record.MANIFEST).write_text(json.dumps(manifest))
    assert estimate._earlier([here / "outputs"]) == []
    (folder / record.MANIFEST).write_text("{")
    assert estimate._earlier([here / "outputs"]) == []


def test_a_model_that_is_nowhere_to_be_found_is_refused(here):
    cfg = config.compose(["model=qwen2", "hardware=cpu"])
    with pytest.raises(ConfigError, match="is not on this machine, and HF_HUB_OFFLINE is set"):
        estimate.show(cfg)


def test_a_probe_is_printed_beside_the_estimate(here, capsys):
    cfg = launch.check([*CPU, "data.max_length=64", "train.micro_batch_size=2"])
    out = shown(capsys, estimate.show, cfg, probe=True)
    probed = re.search(r"probe  ([\d.]+) MiB of memory, which the estimate is ([+-]\d+)% off", out)
    assert float(probed[1]) > 1
    assert int(probed[2]) > -100
    assert re.search(r"[\d.e-]+ s for a step of 128 tokens in each process", out)
    assert list(here.glob("outputs/*")) == []


def test_a_sweep_is_added_up(here, capsys):
    words = [[*CPU, f"adapter.rank={rank}", f"seed={seed}", "train.max_steps=4"] for rank in (4, 8) for seed in (1, 2)]
    kinds = estimate.shapes(map(launch.check, words))
    out = shown(capsys, estimate.show_sweep, 4, kinds, slots=2, keep="adapters")
    assert "points 4 runs, 2 of them of different shapes; 2 at a time" in out
    rank_4 = 4 * 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert rank_4 == 32 * 2**10
    assert "disk   192 KiB with keep=adapters, and up to 128 KiB more while runs go" in out
    assert re.search(r"time   at least, roughly, [\d.]+ s of runs, [\d.]+ s by the clock", out)
    assert "(the largest run)" in out


def test_time_by_the_clock_is_shared_by_slots_but_no_less_than_the_longest_run():
    def of(*each, slots):
        return estimate._sweep_time([(count, estimate.Time(seconds, "?")) for count, seconds in each], slots)

    assert of((4, 3600.0), slots=2) == "about 4.0 h of runs, 2.0 h by the clock"
    assert of((1, 7200.0), (2, 60.0), slots=8) == "about 2.0 h of runs, 2.0 h by the clock"
    assert of((1, 7200.0), (3, None), slots=1).endswith("; not counted: 3 runs whose time is ?")


@pytest.mark.parametrize(
    ("peak", "total", "free", "said"),
    [
        (2**30, 2**31, 2**31, "fits into 2.0 GiB"),
        (2**32, 2**31, 2**31, "does not fit into 2.0 GiB"),
        (2**30, 2**31, 2**29, "does not fit into what is free of 2.0 GiB, of which 512 MiB are free"),
        (2**30, None, None, "unknown here"),
        (None, 2**31, 2**31, "0 B or more; may fit"),
    ],
)
def test_whether_it_fits(peak, total, free, said):
    found = Estimate(peak=peak, memory_total=total, memory_free=free)
    assert said in re.sub(r"\[/?\w*\]", "", estimate._most(found))


def test_what_is_kept_on_disk_goes_by_the_policy():
    cfg = config.compose([*CPU, "train.save_every=10", "train.keep_checkpoints=2"])
    found = Estimate(steps=100, saved=2**20, checkpoint=3 * 2**20, is_adapter=True)
    each = [(cfg, 5, found)]
    assert estimate._sweep_disk(each, 2, "all") == "35.0 MiB with keep=all"
    assert estimate._sweep_disk(each, 2, "best").startswith("7.0 MiB for each seed of the best with keep=best, and up")
    assert estimate._sweep_disk(each, 2, "adapters").startswith("5.0 MiB with keep=adapters")
    assert estimate._sweep_disk(each, 2, "none").startswith("0 B with keep=none, and up to 14.0 MiB more while runs go")
    found.steps = 10  # the checkpoint of the last step is the model
    assert estimate._disk(cfg, found) == 2**20
