"""A user's own layout of rows is one file, found like any plugin, and its failures are those of the row."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftrun import options, plugin
from ftrun.conformance import FormatSuite
from ftrun.data import formats
from ftrun.data.rows import BadRow, Row
from ftrun.errors import ConfigError
from ftrun.plugin import PluginError

QUIZ = re.search(
    r"^```python\n(# quiz\.py\n.*?)^```$",
    (Path(__file__).resolve().parents[2] / "docs" / "plugins.md").read_text(),
    re.DOTALL | re.MULTILINE,
)[1]  # type: ignore[index]
"""The example of the documentation."""

FORMAT = '''
"""Rows of somebody's own."""

from dataclasses import dataclass

from ftrun.plugin import Format, register


@register
@dataclass(kw_only=True)
class Own(Format):
    """Somebody's rows."""

    name: str = "own"
    FIELD

    def convert(self, row):
        return CONVERTED
'''.lstrip()


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    plugin.forget_files()


def own(folder: Path, converted: str, field: str = "", name: str = "own") -> Path:
    """Write a plugin file."""
    text = FORMAT.replace("CONVERTED", converted).replace("FIELD", field).replace('"own"', f'"{name}"')
    file = folder / "mine.py"
    file.write_text(text)
    return file


def read(value: dict[str, Any], form: str = "own", **more: Any) -> list[Any]:
    return formats.understand(Row(value, "rows.jsonl", 3), "conversations", form, **more)


def texts(items: list[Any]) -> list[tuple[str, str]]:
    return [(item.messages[0]["content"], item.messages[1]["content"]) for item in items]


def test_the_example_of_the_documentation(tmp_path):
    (tmp_path / "quiz.py").write_text(QUIZ)
    plugin.load_file(tmp_path / "quiz.py")
    row = {"question": "Which is a fruit?", "choices": ["A stone", "An apple"], "right": 1}
    assert texts(read(row, "quiz")) == [("Which is a fruit?\nA. A stone\nB. An apple", "B. An apple")]
    assert read(row, "quiz")[0].row.place == "rows.jsonl:3"
    with pytest.raises(BadRow, match=r"data\.format=quiz cannot convert it: KeyError: 'right'"):
        read({"question": "?", "choices": []}, "quiz")


def test_several_rows_of_any_layout(tmp_path):
    plugin.load_file(own(tmp_path, '[{"prompt": row["q"], "completion": reply} for reply in row["replies"]]'))
    assert texts(read({"q": "Hi", "replies": ["a", "b"]})) == [("Hi", "a"), ("Hi", "b")]


def test_columns_are_renamed_first_and_tags_name_what_it_returns(tmp_path):
    plugin.load_file(own(tmp_path, '{"conversations": row["turns"]}'))
    value = {"talk": [{"who": "me", "value": "Hi"}, {"who": "gpt", "value": "Hello."}]}
    items = read(value, columns={"turns": "talk"}, tags={"role_tag": "who", "user_tag": "me"})
    assert texts(items) == [("Hi", "Hello.")]


@pytest.mark.parametrize(
    ("converted", "why", "reason"),
    [
        ('row["nothing"]', "KeyError: 'nothing'", "data.format=own cannot convert it: KeyError"),
        (
            "int(row['q'])",
            "invalid literal for int() with base 10: 'Hi'",
            "data.format=own cannot convert it: ValueError",
        ),
        ("[]", "data.format=own makes no row of it", "data.format=own makes no row of it"),
        ("None", "makes null, not a row, of it", "data.format=own makes null, not a row, of it"),
        ("[row, 3]", "makes a number, not a row, of it", "data.format=own makes a number, not a row, of it"),
        ('{"prompt": row["q"], "completion": ""}', "has no reply", "has no reply of the assistant to learn"),
        ("row", "has the columns q", "has other columns than conversations are read from"),
    ],
)
def test_its_failures_are_those_of_the_row(tmp_path, converted, why, reason):
    plugin.load_file(own(tmp_path, converted))
    with pytest.raises(BadRow) as caught:
        read({"q": "Hi"})
    assert caught.value.problem.key == "rows.jsonl:3"
    assert why in caught.value.problem.message
    assert caught.value.reason == reason


def test_one_object_reads_all_rows_and_a_newer_file_is_read_anew(tmp_path):
    counted = '{"prompt": "x", "completion": str(self.seen.append(1) or len(self.seen))}'
    plugin.load_file(own(tmp_path, counted, "seen = []"))
    assert texts(read({}) + read({})) == [("x", "1"), ("x", "2")]
    plugin.load_file(own(tmp_path, '{"prompt": "x", "completion": "new"}'))
    assert texts(read({})) == [("x", "new")]


def test_it_is_no_group_that_is_typed():
    assert plugin.Format.group not in plugin.GROUPS
    assert plugin.Format.group not in options.GROUPS


def test_it_has_no_keys(tmp_path):
    with pytest.raises(PluginError, match=r"Own has the field language: data\.format= chooses it by its name"):
        plugin.load_file(own(tmp_path, "row", 'language: str = "en"'))


def test_it_is_listed_and_checked(tmp_path):
    assert list(formats.check("own", "conversations"))
    plugin.load_file(own(tmp_path, "row"))
    assert list(formats.check("own", "conversations")) == []
    assert formats.names()[-1] == "own"
    plugin.load_file(own(tmp_path, "row", name="alpaca"))
    (problem,) = formats.check("alpaca", "conversations")
    assert "a plugin has its name" in problem.message


def test_an_unknown_one_is_an_error_of_the_key():
    with pytest.raises(ConfigError, match=r"data\.format: there is no format own"):
        read({})


def test_an_installed_package_may_have_one(tmp_path, monkeypatch):
    folder = tmp_path / "ftrun_plugins" / "format"
    folder.mkdir(parents=True)
    text = own(tmp_path, '{"prompt": row["q"], "completion": "installed"}', name="shipped").read_text()
    (folder / "shipped.py").write_text(text)
    (folder / "fails.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert {"shipped", "fails"} <= set(formats.names())
    assert texts(read({"q": "Hi"}, "shipped")) == [("Hi", "installed")]
    with pytest.raises(PluginError, match=r"data\.format=fails .*No module named 'no_such_package'"):
        read({}, "fails")
    with pytest.raises(PluginError, match=r"data\.format=shipped is defined twice"):
        plugin.load_file(own(tmp_path, "row", name="shipped"))
    monkeypatch.undo()
    del plugin._registered["format", "shipped"]


class TestQuiz(FormatSuite):
    """The example of the documentation, as an installed package has it."""

    option = "quiz"
    rows = (
        {"question": "Which is a fruit?", "choices": ["A stone", "An apple"], "right": 1},
        {"question": "1+1?", "choices": ["2", "3"], "right": 0},
    )

    @pytest.fixture(autouse=True)
    def _installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        site = tmp_path / "site"
        (site / "ftrun_plugins" / "format").mkdir(parents=True)
        (site / "ftrun_plugins" / "format" / "quiz.py").write_text(QUIZ)
        monkeypatch.syspath_prepend(site)
        monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        yield
        plugin._registered.pop(("format", "quiz"), None)
        for module in ("ftrun_plugins.format.quiz", "ftrun_plugins.format"):  # which remembers the folders it is in
            sys.modules.pop(module, None)


SPOILT = {
    "changes its row": (
        "test_the_row_itself_is_left_as_it_was",
        'row.pop("q") and {"prompt": "a", "completion": "b"}',
        AssertionError,
    ),
    "reads any row": (
        "test_a_row_of_other_columns_is_a_bad_one",
        '{"prompt": "a", "completion": "b"}',
        pytest.fail.Exception,
    ),
    "makes rows that are not read": ("test_what_it_makes_of_a_row_is_read", '{"q": row["q"]}', BadRow),
    "has no rows": ("test_what_it_makes_of_a_row_is_read", "row", pytest.skip.Exception),
}


@pytest.mark.parametrize(("test", "converted", "error"), SPOILT.values(), ids=SPOILT)
def test_the_suite_sees_what_a_format_does_wrong(tmp_path, test, converted, error):
    plugin.load_file(own(tmp_path, converted))

    class Suite(FormatSuite):
        option = "own"
        rows = () if error is pytest.skip.Exception else ({"q": "Hi"},)

    with pytest.raises(error):
        getattr(Suite(), test)()


def test_a_run_on_such_rows(ftrun, tmp_path):
    (tmp_path / "quiz.py").write_text(QUIZ)
    rows = [{"question": f"{n}?", "choices": ["no", "yes"], "right": 1} for n in range(8)]
    bad = {"question": "?", "choices": ["no"], "right": 1}
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, bad]))
    words = (f"plugins=[{tmp_path / 'quiz.py'}]", "data.format=quiz", f"data.path={path}", "model=tiny", "debug=smoke")
    assert f"{path}:9: data.format=quiz cannot convert it: IndexError" in ftrun(*words).sees(2).err
    done = ftrun(*words, "data.on_bad_row=skip", "data.max_bad_share=0.5").sees(0)
    assert done.manifest["data"]["train"]["rows"] == 8
