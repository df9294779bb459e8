"""A server that has imported the heavy packages once, and forks a worker from itself in milliseconds.

A fresh worker spends seconds importing torch, transformers and peft. A sweep, and this project's own tests, start one
server and fork every worker from it; the code that a worker runs is the same. The server has touched no accelerator and
started no thread, so its children may.

    python -m ftrun.forkserver SOCKET

A driver uses the server whose socket ``$FTRUN_FORK_SERVER`` names. The server ends when the process that started it
does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ftrun.errors import ConfigError, Problem
from ftrun.record import Holder

VARIABLE = "FTRUN_FORK_SERVER"
"""Environment variable by which a driver finds the server."""

PRELOADED = (
    "torch", "torch.distributed", "torch.utils.data", "transformers", "transformers.trainer", "transformers.generation",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2", "peft", "accelerate", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer",
    "ftrun.worker.main", "ftrun.worker.training", "ftrun.worker.preference", "ftrun.worker.samples",
)  # fmt: skip
"""What a worker is likely to import."""


class Forked:
    """A worker that a server forked, seen from the driver."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("r")
        if not (line := self._stream.readline()):
            raise ConnectionError("it ended")
        self.pid = int(json.loads(line)["pid"])
        self._process = Holder.of(self.pid)
        self._code: int | None = None
        self._is_alone = False

    def poll(self) -> int | None:
        """Return how the worker ended, if it has."""
        if self._is_alone and not self._process.is_alive(0.0):
            self._code = -signal.SIGKILL
        if self._code is None and not self._is_alone:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if selector.select(timeout=0):
                    if line := self._stream.readline():
                        self._code = json.loads(line)["code"]
                    else:  # the server is gone, and nobody will say how this child of it ends
                        self._is_alone = True
        return self._code


class ServerGone(ConfigError):
    """No server answers where one was said to be."""


def fork(
    address: str, words: Sequence[str], env: dict[str, str], out: int, log: int, held: Sequence[int] = ()
) -> Forked:
    """Have the server at ``address`` fork a worker.

    Args:
        address: The server's socket.
        words: What follows ``python -m ftrun.worker``.
        env: Environment variables besides the driver's own.
        out: File descriptor of the worker's standard output.
        log: File descriptor of its standard error.
        held: Open files that it keeps open as long as it lives.

    Raises:
        ServerGone: No server answers there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(address)
        request = {"words": list(words), "env": dict(os.environ) | env, "cwd": str(Path.cwd())}
        socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [out, log, *held])
        return Forked(connection)
    except OSError as error:
        connection.close()
        fix = f"start one (`python -m ftrun.forkserver {address} &`), or unset {VARIABLE}"
        why = f"no server answers at {address}: {error.strerror or error}"
        raise ServerGone([Problem(f"${VARIABLE}", why, fix)]) from None


def start(address: str) -> subprocess.Popen[bytes]:
    """Start a server and wait until it can fork.

    Raises:
        RuntimeError: It died on the way.
    """
    # OpenMP reads its policy when it is loaded, so the server has it for its children.
    policy = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": policy, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "ftrun.forkserver", address, str(os.getpid())]
    # A session of its own: what Ctrl-C means is for the driver to say.
    server = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    while not Path(address).exists():
        if server.poll() is not None:
            raise RuntimeError(f"the fork server ended with exit code {server.returncode}")
        time.sleep(0.02)
    return server


def serve(address: str, parent: int | None = None) -> None:
    """Import everything, then fork a worker for each request until the process that wanted that ends."""
    parent = parent or os.getppid()
    with _silence():
        for module in PRELOADED:
            importlib.import_module(module)
    gc.freeze()  # or each worker's collector would look through all of that, and copy its pages
    server = _Server(address)
    while os.getppid() == parent:
        server.turn()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep off the terminal what libraries say when they are imported: it is no run's."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


_MOST_HELD = 64
"""Open files that one worker can be given."""


class _Server:
    def __init__(self, address: str) -> None:
        self._children: dict[int, socket.socket] = {}
        self._settings = _import_settings(dict(os.environ))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        temporary = f"{address}.{os.getpid()}"
        self._listener.bind(temporary)
        os.chmod(temporary, 0o600)
        self._listener.listen(128)
        os.rename(temporary, address)  # there from now on: it can take requests
        self._wake, self._wakes = socket.socketpair()  # both kept: a closed one's number would be given to another
        self._wakes.setblocking(False)
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)

    def turn(self) -> None:
        """Take what requests there are, and say how ended children ended."""
        for key, _ in self._selector.select(timeout=1.0):
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._wake.recv(4096)
        self._reap()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        try:
            line, (out, log, *held), _, _ = socket.recv_fds(connection, 1 << 20, 2 + _MOST_HELD)
            while not line.endswith(b"\n"):
                if not (more := connection.recv(1 << 20)):
                    raise ConnectionError("it has hung up")
                line += more
            request = json.loads(line)
        except (OSError, ValueError):  # a driver that died while it asked: the others go on
            connection.close()
            return
        pid = os.fork()
        if pid == 0:
            for inherited in (self._listener, self._wake, self._wakes, connection, *self._children.values()):
                inherited.close()
            _child(request, out, log, fresh=_import_settings(request["env"]) != self._settings)
        for received in (out, log, *held):
            os.close(received)
        self._children[pid] = connection
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                connection = self._children.pop(pid)
                with contextlib.suppress(OSError):  # a driver that is gone does not want to know
                    connection.sendall(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
                connection.close()


def _import_settings(env: dict[str, str]) -> dict[str, str]:
    """Return the variables that are read once: by the Hugging Face libraries, and by Python for its search path."""
    read_once = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "PYTHONPATH")
    return {name: value for name, value in env.items() if name.startswith(read_once)}


def _child(request: dict[str, Any], out: int, log: int, *, fresh: bool) -> None:
    """Become a worker; a fresh interpreter if the imported libraries have other settings. Never returns."""
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (out, 1), (log, 2)):
            os.dup2(source, target)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        if fresh:
            os.execv(sys.executable, [sys.executable, "-m", "ftrun.worker", *request["words"]])  # noqa: S606
        from ftrun.worker.main import main

        code = main(*request["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
