"""What a person sees of a run while it goes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from rich.console import Console

from ftrun import display


def shown(monkeypatch, tmp_path, **terminal) -> str:
    """Return what a display of three events prints."""
    console = Console(highlight=False, record=True, file=(tmp_path / "out").open("w"), **terminal)
    monkeypatch.setattr(display, "console", console)
    with display.Display(tmp_path) as seen:
        seen.show({"kind": "start", "step": 0, "total": 10})
        seen.show({"kind": "log", "step": 5, "loss": 1.25, "tokens_per_second": 40.0})
        seen.show({"kind": "samples", "step": 5, "samples": [{"prompt": "a\nb", "reply": "\x1b]0;x\x07 [red]c\x16"}]})
    return (tmp_path / "out").read_text() + console.export_text()


def test_a_file_gets_lines(monkeypatch, tmp_path):
    assert "step 5/10  loss 1.25" in shown(monkeypatch, tmp_path)


def test_a_dumb_terminal_gets_lines(monkeypatch, tmp_path):
    monkeypatch.setenv("TERM", "dumb")
    assert "step 5/10  loss 1.25" in shown(monkeypatch, tmp_path, force_terminal=True)


def test_a_terminal_gets_a_bar(monkeypatch, tmp_path):
    monkeypatch.setenv("TERM", "xterm")
    assert "step 5/10" not in shown(monkeypatch, tmp_path, force_terminal=True)


@pytest.mark.parametrize("width", [60, 100])
def test_the_bar_shows_step_and_loss_in_any_usual_width(width, monkeypatch, tmp_path):
    monkeypatch.setenv("TERM", "xterm")
    text = shown(monkeypatch, tmp_path, force_terminal=True, width=width)
    assert "0/10" in text
    assert "loss 1.25  40 tokens/s" in text


def test_a_reply_can_do_nothing_to_the_terminal(monkeypatch, tmp_path):
    text = shown(monkeypatch, tmp_path)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "a b" in text
    assert "\N{REPLACEMENT CHARACTER}]0;x\N{REPLACEMENT CHARACTER} [red]c" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_letter_that_the_terminal_does_not_have_ends_nothing(encoding):
    code = "from ftrun import cli; cli._COMMANDS['list'] = lambda _: print('\\u2190'); cli.main(['list'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (b"?", "\u2190".encode())


def test_a_working_folder_that_is_gone_is_a_problem(tmp_path):
    gone = tmp_path / "gone"
    code = (
        f"import os, sys; os.mkdir({str(gone)!r}); os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); "
        "from ftrun import cli; sys.exit(cli.main(['list']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "the working folder: has been deleted" in done.stderr
    assert "Traceback" not in done.stderr
