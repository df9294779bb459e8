"""``ftrun preview``: rows as they will be trained on, on the terminal, as JSON, or as a page one can send."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.text import Text

from ftrun import launch, page, record, task
from ftrun.config import Config
from ftrun.display import console, near
from ftrun.errors import ConfigError, Problem
from ftrun.record import Status

ROWS = 3
"""Rows shown where nobody says how many."""

_HEAD, _TAIL = 1200, 200
"""Of a longer sequence, only so many pieces at its beginning and its end go to the terminal."""

_BAR = 40
"""Columns of the longest bar."""

_MARKS = {"\n": "↵\n", "\t": "⇥\t"}


@dataclass
class Preview:
    """What a worker said of the rows."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def take(self, line: str) -> None:
        """Take a line of the answer."""
        value = json.loads(line)
        if "row" in value:
            self.rows.append(value["row"])
        else:
            self.about = value


def show(overrides: Sequence[str], *, as_json: bool, html: Path | None, rows: int | None) -> int:
    """Show the rows of the run that has the same words.

    Args:
        overrides: What was typed.
        as_json: Print one object for each row, and nothing else.
        html: File to write a page to.
        rows: How many rows. Default: all as JSON, else `ROWS`.

    Returns:
        The exit code.

    Raises:
        ConfigError: The config, its rows or the file cannot be.
        RunFailed: The worker failed.
    """
    problems = [*_page_problems(html)]
    try:
        cfg = launch.check(overrides, to_run=False)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems := [*problems, *_row_problems(cfg, as_json, rows)]:
        raise ConfigError(problems)
    if as_json:
        result = task.do("preview", cfg, _print_line, rows=rows, plain=True)
        return record.EXIT_CODES[result.status]
    preview = Preview()
    typed = [word.partition("=")[2] for word in overrides if word.startswith("template=")]
    result = task.do("preview", cfg, preview.take, rows=rows or ROWS, plain=False, template=(typed or [""])[-1])
    if result.status is not Status.completed:
        return record.EXIT_CODES[result.status]
    if html:
        _write_page(html, preview, task.command("preview", overrides))
    else:
        _show(preview)
    return 0


def _print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _page_problems(html: Path | None) -> Iterator[Problem]:
    if html is None:
        return
    if html.is_dir():
        yield Problem("--html", f"{html} is a folder", f"--html {html / 'preview.html'}")
    elif not html.absolute().parent.is_dir():
        yield Problem("--html", f"there is no folder {html.parent}", "a file in a folder that is there")


def _row_problems(cfg: Config, as_json: bool, rows: int | None) -> Iterator[Problem]:
    if not cfg.stage.rows:
        message = f"stage={cfg.stage.name} reads no rows, so there are none to show"
        yield Problem("stage", message, "a stage that trains (`ftrun list stage`)")
    elif as_json and cfg.data.streaming and rows is None:
        message = "with data.streaming=true, all rows may be more than the disk holds"
        yield Problem("--json", message, "--rows N, or data.streaming=false")


def _show(preview: Preview) -> None:
    brush = Brush(coloured=bool(console.is_terminal and console.color_system and not console.no_color))
    console.print(brush.legend(), soft_wrap=True)
    for row in preview.rows:
        console.print(f"\n[bold]{escape(title(row))}[/]", soft_wrap=True)
        for name, pieces in row["parts"].items():
            if name != "text":
                console.print(f"[bold]{name}[/]", soft_wrap=True)
            console.print(brush.paint(pieces), soft_wrap=True, end="")
    console.print("\n[bold]All rows[/]")
    for label, value in facts(preview.about):
        console.print(f"{label:<12}  {escape(value)}", soft_wrap=True)
    console.print("\n[bold]Tokens of a row[/]")
    _show_bars(preview.about["lengths"])
    for text in preview.about["notes"]:
        console.print(f"[cyan]note[/]  {escape(text)}", soft_wrap=True)
    for text in preview.about["warnings"]:
        console.print(f"[yellow]warning[/]  {escape(text)}", soft_wrap=True)


class Brush:
    """Writes tokens so that one sees what is trained: in colours, or with brackets where there are none."""

    def __init__(self, *, coloured: bool) -> None:
        self._coloured = coloured

    def legend(self) -> Text:
        """Return what the ways of writing mean."""
        words = {"trained": (True, False), "masked": (False, False), "special token": (False, True)}
        if not self._coloured:
            return Text("⟦trained⟧  masked  ⟨special token⟩  ↵ line break")
        shown = [Text(word, style=self._style(*kind, number=0)) for word, kind in words.items()]
        return Text("  ").join([*shown, Text("special and trained", style=self._style(True, True, 0))])

    def paint(self, pieces: Sequence[dict[str, Any]]) -> Text:
        """Return a sequence as it is shown; the shade changes from token to token."""
        out = Text()
        inside = False
        for number, piece in enumerate(_shortened(pieces)):
            if "learned" in piece:  # is predicted here, and stands nowhere in the text
                self._add(out, f"({piece['learned']})", trained=True, special=True, number=number, inside=inside)
                inside = True
            inside = self._add(
                out, piece["text"], trained=piece["trained"], special=piece["special"], number=number, inside=inside
            )
        if inside and not self._coloured:
            out.append("⟧")
        return out if out.plain.endswith("\n") else out.append("\n")

    def _add(self, out: Text, text: str, *, trained: bool, special: bool, number: int, inside: bool) -> bool:
        """Append a token, and return whether it is trained."""
        text = visible(text)
        if self._coloured:
            out.append(text, style=self._style(trained, special, number))
            return trained
        border = "" if trained == inside else "⟦" if trained else "⟧"
        out.append(border + (f"⟨{text}⟩" if special else text))
        return trained

    @staticmethod
    def _style(trained: bool, special: bool, number: int) -> str:
        if special:
            return "bold magenta" if trained else "magenta"
        shades = ("bold green", "bold bright_green") if trained else ("bright_black", "grey62")
        return shades[number % 2]


def _shortened(pieces: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    if len(pieces) <= _HEAD + _TAIL:
        yield from pieces
        return
    yield from pieces[:_HEAD]
    left_out = sum(len(piece["ids"]) for piece in pieces[_HEAD:-_TAIL])
    yield {"text": f"\n[{left_out:,} tokens are not shown]\n", "ids": [], "trained": False, "special": False}
    yield from pieces[-_TAIL:]


def visible(text: str) -> str:
    """Return a text with its line breaks marked, and without characters that would move a terminal's cursor."""
    return "".join(_MARKS.get(letter) or _printable(letter) for letter in text)


def _printable(letter: str) -> str:
    code = ord(letter)
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's pictures of control characters
    return f"\\x{code:02x}" if unicodedata.category(letter) == "Cc" else letter


def title(row: dict[str, Any]) -> str:
    """Return a row's place, its lengths, and what else a stage reads of it."""
    lengths = [
        f"{'' if name == 'text' else f'{name} '}{count:,} tokens, {trained:,} trained"
        for name, (count, trained) in row["tokens"].items()
    ]
    other = [
        f"{name} {json.dumps(row[name], ensure_ascii=False)}" for name in ("label", "margin", "answer") if name in row
    ]
    return " · ".join([near(Path(row["source"])), *lengths, *other])


def facts(about: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what became of the rows: a word, and the figures."""
    report = about["report"]
    train = report["train"]
    yield "read", _rows(train["rows_read"])
    for reason, count in sorted(train["skipped"].items(), key=lambda item: -item[1]):
        yield "skipped", f"{count:,}: {reason}"
    if dropped := train.get("too_long"):
        yield "left out", f"{dropped:,} longer than data.max_length={about['max_length']}"
    if sequences := train.get("sequences"):
        yield "split", f"into {sequences:,} sequences, one for each reply whose history the template rewrites"
    yield "trained on", _rows(train["rows"])
    learned = train["tokens_learned"]
    yield "tokens", f"{train['tokens']:,}, of which {learned:,} ({_share(learned, train['tokens'])}) are trained"
    yield "truncated", f"{_rows(train['truncated'])} ({about['truncated_share']:.1%})"
    if special := train.get("special_as_text"):
        yield "plain text", f"special tokens in the own text of {_rows(special)}"
    yield "length", _lengths(about["lengths"])
    if packed := train.get("packed_into"):
        yield "packed", f"into {packed:,} sequences, {train['packing_efficiency']:.1%} full"
    for name, source in report.get("sources", {}).items():
        yield "source", f"{name}: {_counts(source)}"
    for name, counts in report.items():
        if name.startswith("eval"):
            yield "evaluation", f"{name}: {_rows(counts['rows'])}, {counts['tokens']:,} tokens"


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _counts(source: dict[str, Any]) -> str:
    skipped = sum(source["skipped"].values())
    kept = f"{source['rows']:,} of {_rows(source['rows_read'])}" + (f", {skipped:,} skipped" if skipped else "")
    trained = _share(source["tokens_learned"], source["tokens"])
    return f"{kept}, {source['tokens']:,} tokens ({trained} trained), {source['truncated']:,} truncated"


def _lengths(lengths: dict[str, Any]) -> str:
    names = ("shortest", "median", "mean", "p95", "longest")
    return ", ".join(f"{name} {lengths[name]:,}" for name in names)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0%"


def bars(lengths: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the bars of the length histogram: from where to where, and how many rows."""
    width = lengths["width"]
    for number, count in enumerate(lengths["counts"]):
        first = lengths["start"] + number * width
        yield (f"{first}" if width == 1 else f"{first}-{first + width - 1}"), count


def _show_bars(lengths: dict[str, Any]) -> None:
    found = list(bars(lengths))
    most, wide = max(count for _, count in found), max(len(label) for label, _ in found)
    for label, count in found:
        bar = "█" * round(_BAR * count / most) or ("▏" if count else "")
        console.print(f"{label:>{wide}}  [green]{bar}[/] {count:,}", soft_wrap=True)


def _write_page(file: Path, preview: Preview, command: str) -> None:
    about = preview.about
    header = {"command": command, "model": about["model"], "stage": about["stage"], "template": about["template"]}
    text = page.render(
        header,
        [(title(row), row["parts"]) for row in preview.rows],
        list(facts(about)),
        list(bars(about["lengths"])),
        about["warnings"],
        about["notes"],
    )
    try:
        record.write_whole(file, text)
    except OSError as error:
        message = f"{file} cannot be written: {error.strerror}"
        raise ConfigError([Problem("--html", message, "a file in a folder of yours")]) from None
    console.print(f"written to {escape(str(file))}", soft_wrap=True)
    for warning in about["warnings"]:
        console.print(f"[yellow]warning[/]  {escape(warning)}", soft_wrap=True)
