"""Programs that pass their tests, and those that try to get round them or take too much."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ftrun import config
from ftrun.completions import Completion
from ftrun.errors import ConfigError, RunFailed
from ftrun_plugins.reward import _sandbox
from ftrun_plugins.reward.code import Code, program_of

ADD = "def add(a, b):\n    return a + b"
DOUBLE = "print(int(input()) * 2)"


def reply(program: str, answer: object) -> Completion:
    text = f"Here it is:\n```python\n{program}\n```\nDone."
    return Completion(prompt=[], answer=answer, text=text, prompt_ids=[], ids=[], finished=True)


def worth(program: str, answer: object, **keys: object) -> float | None:
    limits = {"timeout": 5.0, "cpu_seconds": 1, "memory_mb": 256} | keys
    (value,) = Code(allow_execution=True, **limits).score([reply(program, answer)])  # type: ignore[arg-type]
    return value


@pytest.mark.parametrize(
    ("program", "answer", "wanted"),
    [
        (ADD, "assert add(1, 2) == 3", 1.0),
        (ADD, "assert add(1, 2) == 4", 0.0),
        (ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4"], 0.0),
        (ADD, None, None),
        (DOUBLE, [{"input": "4\n", "output": "8\n"}, {"input": 5, "output": 10}], 1.0),
        (DOUBLE, '[{"input": "4", "output": "9"}]', 0.0),
        ("print('a  \\nb')", [{"input": "", "output": "a\nb"}], 1.0),
        ("def (", "assert True", 0.0),
        ("raise SystemExit(0)", "assert False", 0.0),
        ("import os; os._exit(0)", "assert False", 0.0),
    ],
)
def test_tests_are_passed_or_not(program, answer, wanted):
    assert worth(program, answer) == wanted


def test_a_part_of_the_tests():
    tests = ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert add(0, 0) == 0", "assert add(1, 1) == 3"]
    assert worth(ADD, tests, partial=True) == 0.5


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "x = bytearray(1 << 30)",
        "open('x', 'wb').write(bytes(3 << 20))",
        "print('x' * (3 << 20))",
    ],
    ids=["time", "memory", "file", "output"],
)
def test_what_takes_too_much_fails(program):
    began = time.monotonic()
    assert worth(program, "assert True") == 0.0
    assert time.monotonic() - began < 4


def test_what_waits_too_long_is_killed_with_all_it_started(tmp_path):
    mark = tmp_path / "alive"
    write = f"time.sleep(1.5); open({str(mark)!r}, 'w'); os._exit(0)"
    child = f"import os, time\nif not os.fork():\n    {write}\ntime.sleep(60)"
    began = time.monotonic()
    assert worth(child, "assert True", timeout=0.5) == 0.0
    assert time.monotonic() - began < 1.4
    time.sleep(1.5)
    assert not mark.exists()


def test_the_program_sees_an_empty_folder_and_no_environment(monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hunter2")
    look = "import os, sys\nfolder, known = os.listdir('.'), set(os.environ) - {'LC_CTYPE'}"
    assert worth(look, "assert not folder and not known, (folder, known)\nassert sys.flags.isolated") == 1.0


def test_nothing_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(_sandbox.tempfile, "tempdir", str(tmp_path))
    assert worth("open('made', 'w').write('x')", "assert True") == 1.0
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```py\na\n```\nbetter:\n```python3\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("```bash\na\n```", None),
        ("a", None),
        ("```python\na", None),
    ],
)
def test_the_last_block_of_python_is_the_program(text, program):
    assert program_of(text) == program


def test_a_reply_without_a_program_is_worth_nothing():
    replies = [Completion(prompt=[], answer="assert True", text="No.", prompt_ids=[], ids=[], finished=True)]
    assert Code(allow_execution=True).score(replies) == [0.0]


@pytest.mark.parametrize("answer", [{"tests": 1}, [1], []])
def test_what_is_no_test_ends_the_run(answer):
    with pytest.raises(RunFailed, match="reward=code: a row's answer"):
        worth(ADD, answer)


def test_it_runs_nothing_unless_that_is_allowed():
    words = ["stage=grpo", "model=tiny", "reward=code"]
    with pytest.raises(ConfigError, match=r"reward\.code\.allow_execution: runs programs .* no security boundary"):
        config.compose(words)
    assert config.compose([*words, "reward.code.allow_execution=true"]).reward["code"].timeout == 10.0
