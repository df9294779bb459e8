"""The page that ``ftrun preview --html`` writes: one file, which reads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import ftrun

Pieces = Sequence[Mapping[str, Any]]

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1d2127; --quiet: #5d6672; --line: #e3e5e8;
  --trained: #cdeed6; --trained-2: #b5e4c2; --trained-ink: #0c3f1e; --masked: #6a7380;
  --special: #7a3fb0; --special-back: #f0e6fa; --bar: #4aa36a; --warn: #9a5b00; --warn-back: #fff4dd;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1c2026; --ink: #e6e9ed; --quiet: #9aa4b1; --line: #2e343c;
    --trained: #1d4a2d; --trained-2: #265c39; --trained-ink: #d5f5de; --masked: #98a2af;
    --special: #cfa6f5; --special-back: #392650; --bar: #57b97b; --warn: #f2c46d; --warn-back: #3a2d12;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.35rem; margin: 0 0 .75rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
h3 { font-size: .8rem; margin: 1rem 0 .3rem; color: var(--quiet); letter-spacing: .04em; text-transform: uppercase; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; font-size: .92rem; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1rem; margin: 0 0 1rem;
}
.place { font-size: .85rem; color: var(--quiet); margin: 0 0 .5rem; overflow-wrap: anywhere; }
.text {
  margin: 0; font-size: .86rem; line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  color: var(--masked);
}
.text span { border-radius: 3px; padding: .1em 0; }
.text span:hover, .text span:focus { outline: 2px solid var(--bar); }
.t { background: var(--trained); color: var(--trained-ink); }
.t:nth-child(even) { background: var(--trained-2); }
.m:nth-child(even) { background: color-mix(in srgb, var(--masked) 9%, transparent); }
.s { color: var(--special); font-weight: 600; background: var(--special-back); }
.s.t, .s.t:nth-child(even) { background: var(--trained); }
.s.t { box-shadow: inset 0 -3px 0 var(--bar); }
.nl { opacity: .55; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem .6rem; margin: 1rem 0; font-size: .85rem; line-height: 1.6; }
.legend span { border-radius: 3px; padding: 0 .4em; }
.legend .m { color: var(--masked); border: 1px solid var(--line); }
.warning {
  background: var(--warn-back); color: var(--warn); border-radius: 8px; padding: .6rem .8rem; margin: 0 0 .6rem;
}
.note { color: var(--quiet); border-left: 3px solid var(--line); padding: .1rem .8rem; margin: 0 0 .6rem; }
.bars {
  display: grid; grid-template-columns: max-content 1fr max-content; gap: .25rem .6rem; align-items: center;
  font-size: .85rem;
}
.bars span { font-variant-numeric: tabular-nums; color: var(--quiet); text-align: right; }
.bars i { display: block; height: .9rem; min-width: 1px; border-radius: 2px; background: var(--bar); }
footer { margin-top: 2rem; font-size: .8rem; color: var(--quiet); }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .45rem; } }
"""


def render(
    header: Mapping[str, Any],
    rows: Sequence[tuple[str, Mapping[str, Pieces]]],
    facts: Sequence[tuple[str, str]],
    bars: Sequence[tuple[str, int]],
    warnings: Sequence[str],
    notes: Sequence[str],
) -> str:
    """Return the page.

    Args:
        header: What was previewed, each with its name.
        rows: The title of each row, and its parts by name.
        facts: What became of all rows.
        bars: How many rows there are of which lengths.
        warnings: What is likely to spoil the training.
        notes: What is worth knowing besides.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(f"Preview: {header['command']}")}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>Rows as they will be trained on</h1>
<dl class="card">{"".join(_fact(name, value, code=name == "command") for name, value in header.items())}</dl>
{"".join(f'<p class="warning">{escape(text)}</p>' for text in warnings)}
{"".join(f'<p class="note">{escape(text)}</p>' for text in notes)}
<div class="legend" aria-label="Legend"><span class="t">trained</span><span class="m">masked</span>
<span class="s">special token</span><span class="s t">special and trained</span><span>↵ line break</span></div>
{"".join(_row(title, parts) for title, parts in rows)}
<h2>All rows</h2>
<dl class="card">{"".join(_fact(name, value) for name, value in facts)}</dl>
<h2>Tokens of a row</h2>
<div class="card bars">{_bars(bars)}</div>
<footer>Written by ftrun {escape(ftrun.__version__)}. Point at a token to see its id.</footer>
</main>
</body>
</html>
"""


def _fact(name: str, value: Any, *, code: bool = False) -> str:
    text = escape(str(value))
    return f"<dt>{escape(name)}</dt><dd>{f'<code>{text}</code>' if code else text}</dd>"


def _row(title: str, parts: Mapping[str, Pieces]) -> str:
    shown = (
        f"{f'<h3>{escape(name)}</h3>' if name != 'text' else ''}"
        f'<pre class="text">{"".join(_token(piece) for piece in pieces)}</pre>'
        for name, pieces in parts.items()
    )
    return f'<section class="card"><p class="place">{escape(title)}</p>{"".join(shown)}</section>\n'


def _token(piece: Mapping[str, Any]) -> str:
    classes = " ".join(["s"] * piece["special"] + ["t" if piece["trained"] else "m"])
    about = f"{_ids(piece['ids'])}, {'trained' if piece['trained'] else 'masked'}"
    span = f'<span class="{classes}" title="{about}">{_visible(piece["text"])}</span>'
    if "learned" not in piece:
        return span
    hint = f"{_ids(piece['learned_ids'])}, trained here though it stands nowhere in the text"
    return f'<span class="s t" title="{hint}">({escape(piece["learned"])})</span>{span}'


def _ids(ids: Sequence[int]) -> str:
    return f"{'id' if len(ids) == 1 else 'ids'} {' '.join(map(str, ids))}"


def _visible(text: str) -> str:
    """Return text with its line breaks marked, and a mark for what a browser would not show."""
    shown = "".join(
        chr(0x2400 + ord(letter)) if ord(letter) < 0x20 and letter not in "\n\t" else letter for letter in text
    )
    return escape(shown).replace("\n", '<b class="nl">↵</b>\n')


def _bars(bars: Sequence[tuple[str, int]]) -> str:
    most = max(count for _, count in bars)
    return "".join(
        f'<span>{escape(label)}</span><i style="width:{100 * count / most:.1f}%"></i><span>{count:,}</span>'
        for label, count in bars
    )
