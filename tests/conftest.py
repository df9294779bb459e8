"""What the tests share: the command as a user types it, its workers forked from one server that imported torch once."""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ftrun import forkserver, model, record
from ftrun.record import Result
from tests import typed

SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}

os.environ.update(SETTINGS)
os.environ.pop("FTRUN_FORK_SERVER", None)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or every process that is started compiles all of ftrun again
PYTHONPATH = os.environ.get("PYTHONPATH")


def _own_cache() -> str:
    """Return a cache folder that starts without anything tokenised, and has what was downloaded before."""
    kept, fresh = model.cache_folder(), Path(tempfile.mkdtemp(prefix="ftrun-tests-"))
    atexit.register(shutil.rmtree, fresh, ignore_errors=True)
    for name in ("models", "wheels"):
        (kept / name).mkdir(parents=True, exist_ok=True)
        (fresh / name).symlink_to(kept / name)
    return str(fresh)


os.environ["FTRUN_CACHE"] = _own_cache()
os.environ["FTRUN_SLOTS"] = str(Path(os.environ["FTRUN_CACHE"]) / "slots")


@dataclasses.dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def result(self) -> Result:
        return Result.load(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return record.read_lines(self.folder / record.METRICS)

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics if "loss" in line]

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / record.MANIFEST).read_text())

    def sees(self, code: int = 0) -> Done:
        """Fail with all that was printed unless the exit code is the wanted one."""
        log = self.folder / record.LOG
        assert self.code == code, f"{self.out}\n{self.err}\n{log.read_text()[-4000:] if log.exists() else ''}"
        return self


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A fork server: every worker of the session is forked from it."""
    address = str(tmp_path_factory.mktemp("server") / "socket")
    process = forkserver.start(address)
    yield address
    process.terminate()
    process.wait()


Start = Callable[..., "subprocess.Popen[str]"]


def _started(folder: Path, words: Sequence[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ftrun", *words],
        cwd=folder,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal: a suite that runs in the background hands down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start ``ftrun WORDS`` with a worker of its own, and do not wait."""
    return lambda *words, **env: _started(tmp_path, words, env)


@pytest.fixture
def forked(tmp_path: Path, server: str) -> Start:
    """Start ``ftrun WORDS`` with a forked worker, and do not wait."""
    return lambda *words, **env: _started(tmp_path, words, {forkserver.VARIABLE: server} | env)


Ftrun = Callable[..., Done]


@pytest.fixture(scope="session")
def ftrun_in(server: str) -> Callable[[Path], Ftrun]:
    """Return what runs ``ftrun WORDS`` in a folder to its end: for runs that several tests look at."""

    def in_folder(cwd: Path) -> Ftrun:
        count = itertools.count(1)

        def run(*words: str, **env: str) -> Done:
            folder = cwd / f"run{next(count)}"
            given = [word for word in words if word.startswith("output_dir=")]
            if given:
                folder = cwd / given[0].partition("=")[2]
            elif words[:1] == ("resume",):
                folder = cwd / words[1]
            elif not words or "=" in words[0]:
                words = (*words, f"output_dir={folder}")
            mine = {forkserver.VARIABLE: server} | env
            if env or os.environ.get("PYTHONPATH") != PYTHONPATH:  # a process of its own: imports may go by them
                process = _started(cwd, words, mine)
                out, err = process.communicate(timeout=600)
                return Done(process.returncode, out, err, folder)
            return Done(*typed.run(words, cwd, os.environ | mine, timeout=600), folder)

        return run

    return in_folder


@pytest.fixture
def ftrun(ftrun_in: Callable[[Path], Ftrun], tmp_path: Path) -> Ftrun:
    """Run ``ftrun WORDS`` to its end, in a run folder that is known."""
    return ftrun_in(tmp_path)


@pytest.fixture
def driver(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ftrun:
    """Do ``ftrun WORDS`` in this process, for commands that start no worker; `check` leaves out what would need one."""
    from ftrun import cli

    monkeypatch.chdir(tmp_path)

    def do(*words: str) -> Done:
        capsys.readouterr()
        quick = ["--quick"] if words[:1] == ("check",) and "--help" not in words else []
        code = cli.main([*words, *quick])
        out, err = capsys.readouterr()
        return Done(code, out, err, tmp_path)

    return do


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Write a file: text, bytes, or rows as JSON lines."""

    def write_it(name: str, content: str | bytes | Sequence[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        return path

    return write_it
