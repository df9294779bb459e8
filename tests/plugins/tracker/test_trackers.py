"""What each tracker stored is read back and compared with metrics.jsonl; all but TensorBoard run where installed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ftrun import config, record
from ftrun.errors import ConfigError
from ftrun.plugin import Tracker
from ftrun.record import Status

RUN = ("model=tiny", "data.rows=16", "train.micro_batch_size=4", "train.log_every=1", "stage.num_samples=0")
SHORT = (*RUN, "train.max_steps=4", "train.eval_every=2")
LONG = (*RUN, "train.max_steps=150", "train.eval_every=50")

Points = dict[str, dict[int, float]]
NAMES = {"loss": "train/loss", "lr": "train/learning_rate", "eval_loss": "eval/loss"}


def logged(folder: Path) -> Points:
    """Return what metrics.jsonl says, by the names and steps that trackers store it under."""
    points: Points = {name: {} for name in NAMES.values()}
    for line in record.read_lines(folder / record.METRICS):
        for ours, theirs in NAMES.items():
            if ours in line:
                points[theirs][line["step"]] = line[ours]
    return points


def assert_stored(stored: Points, folder: Path) -> None:
    for name, points in logged(folder).items():
        assert points, name
        assert stored[name] == pytest.approx(points, rel=1e-6), name  # TensorBoard holds float32


def tensorboard(folder: Path, tmp_path: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in NAMES.values()}


def wandb(folder: Path, tmp_path: Path) -> Points:
    from wandb.proto.wandb_internal_pb2 import Record

    points: Points = {name: {} for name in NAMES.values()}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for entry in (Record.FromString(data) for data in log_records(file.read_bytes())):
            if entry.HasField("history"):
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in entry.history.item}
                for name in NAMES.values() & values.keys():
                    points[name][values["train/global_step"]] = values[name]
    return points


def swanlab(folder: Path, tmp_path: Path) -> Points:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    points: Points = {name: {} for name in NAMES.values()}
    for file in sorted(folder.glob("swanlab/run-*/*.swanlab")):
        for entry in (Record.FromString(data) for data in log_records(file.read_bytes())):
            if entry.HasField("scalar") and entry.scalar.key in points:
                points[entry.scalar.key][entry.scalar.step] = entry.scalar.value.number
    return points


def log_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format with a header of seven bytes, as both of the above write."""
    block, head = 32768, 7
    at, record_so_far = head, b""
    while at + head <= len(data):
        if block - at % block < head:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record_so_far += data[at + head : at + head + length]
        at += head + length
        if kind in (1, 4):  # whole, or the last part
            yield record_so_far
            record_so_far = b""


def mlflow(folder: Path, tmp_path: Path) -> Points:
    points: Points = {}
    with sqlite3.connect(folder / "mlflow.db") as database:
        for ours, theirs in {"loss": "loss", "learning_rate": "lr", "eval_loss": "eval_loss"}.items():
            rows = database.execute("SELECT step, value FROM metrics WHERE key = ? ORDER BY timestamp", [ours])
            points[NAMES[theirs]] = dict(rows.fetchall())
    return points


def trackio(folder: Path, tmp_path: Path) -> Points:
    points: Points = {name: {} for name in NAMES.values()}
    with sqlite3.connect(tmp_path / "trackio" / "ftrun.db") as database:
        for (text,) in database.execute("SELECT metrics FROM metrics WHERE run_name LIKE ?", [f"{folder.name}-%"]):
            values = json.loads(text)
            for name in NAMES.values() & values.keys():
                points[name][values["train/global_step"]] = values[name]
    return points


READERS: dict[str, Callable[[Path, Path], Points]] = {
    read.__name__: read for read in (tensorboard, wandb, swanlab, mlflow, trackio)
}
WORDS = {"wandb": ("tracker.wandb.mode=offline",), "swanlab": ("tracker.swanlab.mode=offline",)}


@pytest.fixture(params=READERS)
def tracker(request: pytest.FixtureRequest) -> str:
    """Each tracker whose package is installed."""
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's own tracking takes part, and Trackio's store is a folder of the test."""
    for name in os.environ:
        if name.startswith(("WANDB_", "SWANLAB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def test_what_a_tracker_stores_is_what_the_run_logged(ftrun, tracker, tmp_path):
    done = ftrun(*SHORT, f"tracker={tracker}", *WORDS.get(tracker, ())).sees(0)
    assert_stored(READERS[tracker](done.folder, tmp_path), done.folder)
    assert {path.name for path in tmp_path.iterdir()} <= {"run1", "trackio"}
    assert "is not told everything" not in done.out


def test_a_resumed_run_goes_on_where_it_was(forked, ftrun, tracker, tmp_path):
    words = (*LONG, f"tracker={tracker}", *WORDS.get(tracker, ()), "output_dir=stopped")
    process = forked(*words)
    folder = tmp_path / "stopped"
    deadline = time.monotonic() + 120
    while not any(line["step"] >= 5 for line in record.read_lines(folder / record.METRICS)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)  # which no tracker's library may take for itself
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    done = ftrun("resume", "stopped").sees(0)
    assert record.Result.load(folder).status is Status.completed
    assert_stored(READERS[tracker](folder, tmp_path), folder)
    assert len(tracked_runs(tracker, folder, tmp_path)) == 1
    assert "is not told everything" not in out + done.out


def tracked_runs(tracker: str, folder: Path, tmp_path: Path) -> set[str]:
    """Return the runs that a tracker takes what it stored for."""
    if tracker == "tensorboard":
        return {str(path.parent) for path in folder.rglob("events.out.tfevents.*")}
    if tracker in ("wandb", "swanlab"):
        return {path.name.rpartition("-")[2] for path in (folder / tracker).glob("*run-*") if not path.is_symlink()}
    database = folder / "mlflow.db" if tracker == "mlflow" else tmp_path / "trackio" / "ftrun.db"
    table, key = ("runs", "run_uuid") if tracker == "mlflow" else ("metrics", "run_id")
    with sqlite3.connect(database) as connection:
        return {row[0] for row in connection.execute(f"SELECT DISTINCT {key} FROM {table}")}


def test_tensorboard_forgets_what_is_done_again(ftrun, tmp_path):
    """A killed run logged steps after its checkpoint; resumed, it logs them again."""
    done = ftrun(*SHORT, "tracker=tensorboard", "train.save_every=2").sees(0)
    (done.folder / "result.json").write_text(json.dumps({"status": "interrupted"}))
    events_before = sorted((done.folder / "tensorboard").iterdir())
    os.rename(done.folder / "model", tmp_path / "model")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ftrun("resume", done.folder.name).sees(0)
    assert len(sorted((done.folder / "tensorboard").iterdir())) == len(events_before) + 1
    events = EventAccumulator(str(done.folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert_stored(tensorboard(done.folder, tmp_path), done.folder)


def test_an_absolute_folder_keeps_runs_apart(ftrun, tmp_path):
    words = (*RUN, "train.max_steps=1", "tracker=tensorboard", f"tracker.tensorboard.folder={tmp_path / 'events'}")
    ftrun(*words, "output_dir=a/run").sees(0)
    ftrun(*words, "output_dir=b/run").sees(0)
    folders = list((tmp_path / "events").iterdir())
    assert [folder.name[:4] for folder in folders] == ["run-", "run-"]
    assert not (tmp_path / "a" / "run" / "tensorboard").exists()


def test_two_trackers_at_once(ftrun, tmp_path):
    pytest.importorskip("mlflow")
    words = ("tracker=[tensorboard,mlflow]", f"tracker.mlflow.uri=sqlite:///{tmp_path}/mine.db")
    done = ftrun(*SHORT, *words, "tracker.mlflow.experiment=mine").sees(0)
    assert_stored(tensorboard(done.folder, tmp_path), done.folder)
    assert not (done.folder / "mlflow.db").exists()
    with sqlite3.connect(tmp_path / "mine.db") as database:
        runs = "SELECT r.name, r.status, e.name FROM runs r JOIN experiments e USING (experiment_id)"
        assert database.execute(runs).fetchall() == [("run1", "FINISHED", "mine")]


def test_a_failed_run_is_not_called_finished(start, tmp_path):
    pytest.importorskip("mlflow")
    words = (*LONG, "tracker=mlflow", "optimizer.lr=1e30", "adapter=full", "output_dir=bad", "train.max_grad_norm=0")
    process = start(*words)  # a worker of its own, which ends as processes do
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    with sqlite3.connect(tmp_path / "bad" / "mlflow.db") as database:
        assert database.execute("SELECT status FROM runs").fetchall() == [("FAILED",)]


KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_the_key_stays_out_of_the_run(ftrun, name):
    pytest.importorskip(name)
    words = (
        *RUN,
        "train.max_steps=1",
        f"tracker={name}",
        f"tracker.{name}.key_env=MY_KEY",
        f"tracker.{name}.mode=offline",
    )
    done = ftrun(*words, MY_KEY=KEY).sees(0)
    holding = [path for path in done.folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert not holding
    assert KEY not in done.out + done.err


@pytest.mark.parametrize(
    ("name", "words", "env"),
    [
        ("wandb", (), {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"}),
        ("wandb", (), {"HOME": "/nonexistent"}),
        ("swanlab", (), {"SWANLAB_API_KEY": KEY, "SWANLAB_API_HOST": "http://127.0.0.1:9"}),
        ("swanlab", (), {"HOME": "/nonexistent"}),
        ("mlflow", ("tracker.mlflow.uri=http://127.0.0.1:9",), {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}),
        ("trackio", ("tracker.trackio.space=me/mine",), {}),
    ],
)
def test_a_tracker_that_cannot_start_stops_the_run_before_it_trains(ftrun, name, words, env):
    pytest.importorskip(name)
    begun = time.monotonic()
    done = ftrun(*RUN, f"tracker={name}", *words, **env).sees(2)
    assert time.monotonic() - begun < 60
    assert f"tracker.{name}: cannot start:" in done.err
    assert "Traceback" not in done.err
    assert not done.metrics
    assert KEY not in done.err + (done.folder / record.LOG).read_text()


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
@pytest.mark.parametrize("secret", [KEY, "Wv9Kq2bZ7s", "local-" + KEY])
def test_a_key_that_is_typed_is_refused_and_not_repeated(driver, monkeypatch, name, secret):
    pretend_installed(monkeypatch)
    done = driver(*RUN, f"tracker={name}", f"tracker.{name}.key_env={secret}").sees(2)
    assert f"tracker.{name}.key_env: takes the name of an environment variable" in done.err
    assert secret not in done.out + done.err


def test_a_password_in_an_address_is_refused_and_not_repeated(driver, monkeypatch):
    pretend_installed(monkeypatch)
    done = driver(*RUN, "tracker=mlflow", "tracker.mlflow.uri=http://me:hunter2@host:5000").sees(2)
    assert "tracker.mlflow.uri" in done.err
    assert "hunter2" not in done.out + done.err


@pytest.mark.parametrize("name", READERS)
def test_a_missing_package_is_named_with_the_command_that_installs_it(driver, monkeypatch, name):
    version = importlib.metadata.version

    def missing(distribution: str) -> str:
        if distribution == name:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return version(distribution)

    monkeypatch.setattr("ftrun.plugin.version", missing)
    done = driver(*RUN, f"tracker={name}").sees(2)
    assert f"tracker={name} needs the package {name}, which is not installed" in done.err
    assert f"pip install {name}" in done.err


def test_no_tracker_goes_alone(driver):
    done = driver(*RUN, "tracker=[none,tensorboard]").sees(2)
    assert "none and tensorboard contradict each other" in done.err
    assert "tracker=[tensorboard]" in done.err


def test_every_tracker_that_is_chosen_has_its_keys(monkeypatch):
    pretend_installed(monkeypatch)
    cfg = config.compose(["tracker=[wandb,mlflow]", "tracker.wandb.project=p", "tracker.mlflow.experiment=e"])
    assert list(cfg.tracker) == ["wandb", "mlflow"]
    assert all(isinstance(option, Tracker) for option in cfg.tracker.values())
    with pytest.raises(ConfigError, match=r"tracker\.wandb\.projct"):
        config.compose(["tracker=wandb", "tracker.wandb.projct=p"])


def pretend_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftrun.plugin.version", lambda _: "1")
