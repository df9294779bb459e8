"""What the documentation says is tried: its commands, its examples, its links, and the reference that is generated."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ftrun import config, forkserver, options, reference
from ftrun.data import info
from ftrun.data.formats import COLUMNS, KINDS, LAYOUTS, understand
from ftrun.data.messages import ROLES
from ftrun.data.read import read
from ftrun.data.rows import Row
from ftrun.sweep import run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page that are in a language."""
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def examples(page: Path) -> dict[str, str]:
    """Return the Python files of a page, by the name in their first line."""
    named = {re.match(r"# (\w+\.py)\n", block): block for block in blocks(page, "python")}
    return {match[1]: block for match, block in named.items() if match}


def commands() -> Iterator[object]:
    """Yield every ``ftrun`` command of every page that is not marked as one that cannot be run."""
    for page in PAGES:
        for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
            if re.match(r"ftrun\b", line) and not re.search(r"# not run\b", line):
                words = shlex.split(line, comments=True)[1:]
                yield pytest.param(page, words, id=f"{name_of(page)}: {line.split('  ')[0]}")


@pytest.mark.parametrize(("page", "words"), list(commands()))
def test_commands_can_be_typed(page, words, driver, request, tmp_path):
    for name, text in examples(page).items():
        (tmp_path / name).write_text(text)
    command = words[0] if words and words[0] in options.COMMANDS else None
    if command in ("list", "runs", "cache", "env", "completion") or "--help" in words:
        assert driver(*words).code == 0
        return
    if command in ("preview", "prepare") or (command == "check" and "-m" not in words):
        request.getfixturevalue("ftrun")(*words).sees(0)
        return
    assert command in (None, "show", "check"), "mark it as not run"
    overrides = words[1:] if command else words
    if "-m" in overrides:
        assert run.check([word for word in overrides if not word.startswith("-")])
    elif command is None and any(word.startswith("plugins=") for word in words):
        request.getfixturevalue("ftrun")(*words).sees(0)
    else:
        config.compose(overrides)


def test_what_a_command_is_shown_to_print_is_what_it_prints(driver):
    shown = [(page, block) for page in PAGES for block in blocks(page, "") if block.startswith("$ ftrun ")]
    assert shown
    for page, block in shown:
        line, _, expected = block.partition("\n")
        done = driver(*shlex.split(line)[2:])
        assert (done.out + done.err).split() == expected.split(), name_of(page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_that_is_no_file_runs(page, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = examples(page).values()
    for block in (block for block in blocks(page, "python") if block not in named):
        monkeypatch.setenv(forkserver.VARIABLE, request.getfixturevalue("server"))
        exec(compile(block, name_of(page), "exec"), {})


def test_presets_are_found_where_they_are_said_to_be(driver, tmp_path):
    written = []
    for block in blocks(ROOT / "docs" / "configuration.md", "yaml"):
        path = re.search(r"This is (conf/(\w+)/(\w+)\.yaml)", block)
        assert path, block
        (tmp_path / path[1]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path[1]).write_text(block)
        package = re.match(r"# @package (\S+)", block)
        written.append((path[2], path[3], package[1] if package else path[2], OmegaConf.create(block)))
    assert {group for group, *_ in written} == {"data", "optimizer", "tracker", "experiment"}
    for group, option, package, content in written:
        shown = OmegaConf.create(driver("show", f"{group}={option}").out)
        node = shown if package == "_global_" else OmegaConf.select(shown, package)
        expected = {key: value for key, value in content.items() if key != "defaults"}
        assert OmegaConf.merge(node, expected) == node
        assert option in driver("list", group).out


FORMATS = ROOT / "docs" / "formats.md"


def rows_of_formats() -> Iterator[object]:
    """Yield every row that is shown under the name of a format."""
    for form, section in re.findall(r"^## `(\w+)`$(.*?)(?=^## |\Z)", FORMATS.read_text(), re.DOTALL | re.MULTILINE):
        lines = "".join(text for name, text in FENCE.findall(section) if name == "json").splitlines()
        for number, line in enumerate(lines, 1):
            yield pytest.param(form, line, id=f"{form} {number}")


@pytest.mark.parametrize(("form", "line"), list(rows_of_formats()))
def test_rows_are_understood(form, line, tmp_path):
    """A row is of the format that it stands under, whether that is named or found, for each kind it may be."""
    (tmp_path / "rows.jsonl").write_text(line)
    (row,) = read(tmp_path / "rows.jsonl")
    for kind in (kind for kind, forms in KINDS.items() if form in forms):
        assert LAYOUTS[form].fits(row.value)
        assert understand(row, kind, form) == understand(row, kind)


def test_rows_with_media_have_the_media_that_they_name(tmp_path):
    for block in blocks(ROOT / "docs" / "multimodal.md", "json"):
        (tmp_path / "rows.jsonl").write_text(block)
        for row in read(tmp_path / "rows.jsonl"):
            (item,) = understand(row, "conversations")
            assert item.media


def test_every_format_has_rows_and_every_column_and_role_its_word():
    assert {case.values[0] for case in rows_of_formats()} == set(LAYOUTS)
    words = set(re.findall(r"`(\w+)`", prose(FORMATS)))
    assert words >= COLUMNS
    assert words >= ROLES.keys()


def test_entries_of_data_sets_are_read(tmp_path):
    (block,) = blocks(ROOT / "docs" / "data.md", "json")
    (tmp_path / info.FILE).write_text(block)
    found = info.load(str(tmp_path))
    read = {name: info.entry(str(tmp_path), name, entry, None) for name, entry in found.items()}
    assert {name: entry.format for name, entry in read.items()} == {
        "tickets": "alpaca",
        "chats": "sharegpt",
        "judged": "preference",
    }
    row = Row({"question": "Q", "reply": "R", "input": "more"}, "tickets.json", 1)
    (item,) = understand(row, "conversations", read["tickets"].format, read["tickets"].columns, read["tickets"].tags)
    assert [message["content"] for message in item.messages] == ["Q\nmore", "R"]


def test_rows_are_cut_as_the_table_says():
    from ftrun.worker.sequence import Encoded
    from ftrun.worker.truncation import cut

    text = (ROOT / "docs" / "data.md").read_text()
    room = int(re.search(r"With a room of (\d+):", text)[1])
    cases = [[int(cell) for cell in line] for line in re.findall(r"^\|" + r" (\d+) \|" * 5 + "$", text, re.MULTILINE)]
    assert len(cases) == 4
    for prompt, reply, beginning, end, kept in cases:
        whole = Encoded([*range(prompt + reply)], [prompt, prompt + reply], [1.0], [(prompt, prompt + reply)])
        (found,) = cut([whole], room)
        assert found.ids == [*range(beginning), *range(prompt - end, prompt + kept)]
        assert found.spans == [beginning + end, room]


def test_project_files_are_toml():
    found = [tomllib.loads(block) for block in blocks(ROOT / "docs" / "plugins.md", "toml")]
    assert found[0]["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["src/ftrun_plugins"]
    assert set(found[1]["project"]["entry-points"]["ftrun.plugins"]) == {"optimizer.signum", "my_package"}


@pytest.mark.slow
def test_the_example_of_a_plugin_passes_its_suite(tmp_path):
    files = examples(ROOT / "docs" / "plugins.md")
    folder = tmp_path / "site" / "ftrun_plugins" / "optimizer"
    folder.mkdir(parents=True)
    (folder / "signum.py").write_text(files["signum.py"])
    (tmp_path / "test_signum.py").write_text(files["test_signum.py"])
    env = os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}:{ROOT / 'plugins'}"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_signum.py"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout)
    assert "1 skipped" in done.stdout  # it has no key `layerwise`


def anchors(page: Path) -> set[str]:
    """Return what the headings of a page can be linked to as."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs" / "reference").glob("*.md"))], ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index():
    listed = re.findall(r"\]\((\S+)\)", (ROOT / "docs" / "README.md").read_text())
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(listed)


def test_the_reference_is_up_to_date_and_takes_no_torch(tmp_path):
    """Neither the options of the working folder nor other people's plugins are in it."""
    for name in ("conf/data/mine.yaml", "site/ftrun_plugins/optimizer/theirs.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("# Not ftrun's.\n")
    code = (
        "import sys; from ftrun import reference; stale = reference.main(['--check'])\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else stale)"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}:{ROOT / 'plugins'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n`python -m ftrun.reference` writes it again"


def test_a_stale_page_is_named_and_written_again(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "reference"
    shutil.copytree(reference.FOLDER, folder)
    monkeypatch.setattr(reference, "FOLDER", folder)
    (folder / "train.md").write_text("old")
    (folder / "stage.md").unlink()
    (folder / "gone.md").write_text("no group is called that")
    assert reference.main(["--check"]) == 1
    named = capsys.readouterr().out.splitlines()
    assert sorted(named) == [f"docs/reference/{name}.md is stale" for name in ("gone", "stage", "train")]
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0
    assert not (folder / "gone.md").exists()


def test_the_reference_says_everything_of_an_option():
    pages = reference.pages()
    assert "| `adapter.rank` | whole number >= 1 | `16` | Rank of the update" in pages["adapter.md"]
    assert "times 10" in pages["adapter.md"]
    assert "Needs `pip install wandb`" in pages["tracker.md"]
    assert "| `seed` | whole number >= 0" in pages["README.md"]
    presets = {path.parent.name: path.stem for path in options.CONF.glob("*/*.yaml")}
    plugins = {path.parent.name: path.stem for path in (ROOT / "plugins" / "ftrun_plugins").glob("*/[!_]*.py")}
    for group, option in [*presets.items(), *plugins.items()]:
        assert f"`{group}={option}`" in pages[f"{group}.md"]
