r"""Results of calculations as people and models write them: found in a text, read as exact numbers, compared.

A result that is a number is a fraction (`fractions.Fraction`), so that 0.1 + 0.2 is 0.3 and 1/3 is no decimal; any
other result is a text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:e[+-]?\d{{1,3}}(?![\w.]))?"
_UNSIGNED = re.compile(_DECIMAL, re.IGNORECASE)
_RATIO = re.compile(rf"({_DECIMAL})\s*/\s*({_DECIMAL})", re.IGNORECASE)
_FRACTION = re.compile(r"(\d*)\s*\\frac\{\s*([^{}]+?)\s*\}\{\s*([^{}]+?)\s*\}")
_MIXED = re.compile(r"(\d+)\s+(\d+)/(\d+)")
_POWER = re.compile(rf"(?:({_DECIMAL})\s*(?:\\times|\\cdot|\u00d7|\*)\s*)?10\s*\^\s*\{{?\s*([+-]?\d{{1,3}})\s*\}}?")
_WHOLE = r"(?!\d|[^\W\d_](?![^\W\d_])|\s?[\\^*/+=]|\()"
"""After a number: no further digit, no variable that it would be a factor of, no operation on it."""

_IN_TEXT = re.compile(
    rf"(?<![\w.,])(?:(?<![\w)])-\s?)?[$€£]?(?:{_MIXED.pattern}|{_RATIO.pattern}|{_DECIMAL}){_WHOLE}(?:\s?%)?",
    re.IGNORECASE,
)
_UNIT = re.compile(r"(?:°|\^\\?circ\b|[^\W\d_]{2,}|\s[mgshlLNJWVAKCF])(?:[\s/.]|[^\W\d_]|\^\{?-?\d\}?|[²³°])*")
_NO_UNITS = re.compile(r"\b(?:pi|sqrt|log|ln|sin|cos|tan|exp|and|or|to|than|minus|plus|times)\b")
_NAME = re.compile(r"^\s*\\?[^\W\d_]\w*\s*=\s*(?=\S)")

_LONGEST = 200
"""Characters of a result that is looked into; a longer one is compared as a whole."""


@dataclass(frozen=True, slots=True)
class Result:
    """A result: its value if it is a number, and its text."""

    text: str
    value: Fraction | None = None
    percent: bool = False


def of_answer(answer: Any) -> Result:
    """Read a row's answer: a bare result, or a worked solution with its result marked."""
    text = str(answer).strip()
    return read(next(iter(_marked(text)), text))


def of_reply(text: str, wanted: Result) -> list[Result]:
    """Return what the result of a reply may be: one, or none if no number is in it and one is wanted."""
    if wanted.value is None:
        return [read(next(iter(_marked(text)), text))]
    for marked in _marked(text):
        found, is_prose = read(marked), bool(re.search(r"\S\s+\S|=", marked))
        return [_number_in(marked, last=False) or found if found.value is None and is_prose else found]
    number = _number_in(text, last=True)
    return [number] if number else []


def _marked(text: str) -> list[str]:
    """Return what a text itself says is its result, in a list of one; or none."""
    if "####" in text:
        return [text.rpartition("####")[2].strip().partition("\n")[0]]
    if (content := _boxed(text)) is not None:
        return [content]
    said = re.findall(r"\banswer(?:\s+is|\s*:)\s*:?\s*(.+)", text, re.IGNORECASE)
    return [re.split(r"[.!?](?:\s|$)", said[-1].strip("*_ "))[0].strip("*_ ")] if said else []


def _boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}``, whose braces may be nested, or None."""
    *_, last = [None, *re.finditer(r"\\f?box(?:ed)?\s*(?=\S)", text)]
    if last is None:
        return None
    depth, rest = 0, text[last.end() :]
    for place, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[1:place] if place else char
    return None


def _number_in(text: str, *, last: bool) -> Result | None:
    """Return the first or the last number of a text."""
    found = [match[0] for match in _IN_TEXT.finditer(_plain(text))]
    return read(found[-1 if last else 0]) if found else None


def read(text: str) -> Result:
    """Read a result: a number with or without a unit, or anything else."""
    plain = _NAME.sub("", _plain(text)).strip()
    number = plain.strip("$€£ ")
    sign = -1 if number[:1] == "-" else 1
    number = number.lstrip("+-").strip("$€£ ")
    value, rest = _leading(number)
    percent = rest.lstrip()[:1] == "%" or rest.strip().lower() in ("percent", "per cent")
    rest = rest.lstrip().removeprefix("%") if percent else rest
    if value is None or not (percent or _is_unit(rest)):
        return Result(_folded(plain))
    return Result(_folded(plain), sign * value, percent)


def _leading(text: str) -> tuple[Fraction | None, str]:
    """Return the number that a text begins with, without its sign, and what follows it."""
    try:
        if match := _MIXED.match(text):
            whole, above, below = map(int, match.groups())
            return whole + Fraction(above, below), text[match.end() :]
        if match := _FRACTION.match(text):
            return int(match[1] or 0) + _exact(match[2]) / _exact(match[3]), text[match.end() :]
        if match := _POWER.match(text):
            return _exact(match[1] or "1") * Fraction(10) ** int(match[2]), text[match.end() :]
        if match := _RATIO.match(text):
            return _exact(match[1]) / _exact(match[2]), text[match.end() :]
        if match := _UNSIGNED.match(text):
            return _exact(match[0]), text[match.end() :]
    except (ValueError, ZeroDivisionError):  # no number, one of thousands of digits, or one divided by nothing
        pass
    return None, text


def _exact(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", ""))


def _is_unit(text: str) -> bool:
    """Tell whether what follows a number may be its unit: words, but no further part of an expression."""
    rest = text.rstrip(". ")
    return not rest or bool(_UNIT.fullmatch(rest) and not _NO_UNITS.search(rest))


_DRESS = (
    (re.compile("[\u2212\u2012\u2013]"), "-"),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\{,\}|(?<=\d),\\?!(?=\d)"), ","),
    (re.compile(r"(?<=\d)(?:\\[,;:! ]|[\u2009\u202f\u00a0])(?=\d{3})"), ""),
    (re.compile(r"\\[,;:! ]|~|[\u2009\u202f\u00a0]"), " "),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[()\[\]]|\$\$|\*\*"), ""),
    (re.compile(r"\\([%$#&])"), r"\1"),
)
"""How LaTeX and Markdown dress what is meant, and what that is."""


def _plain(text: str) -> str:
    for pattern, meant in _DRESS:
        text = pattern.sub(meant, text)
    return text.strip()


def _folded(text: str) -> str:
    """Return a text for comparison with another: no spaces, no capitals, no brackets or stops around it."""
    text = re.sub(r"\s+", "", text).casefold().strip("$").rstrip(".!;,").strip("\"'`")
    return text[1:-1] if re.fullmatch(r"\([^\W\d_]\)", text) else text


def same(one: Result, other: Result, tolerance: float = 0.0) -> bool:
    """Tell whether two results are the same: as numbers, as texts, or element by element."""
    if one.value is not None and other.value is not None:
        readings = [(one.value, other.value)]
        if one.percent != other.percent:  # 50% is also written as 0.5, and asked for as 50
            readings.append((one.value / (100 if one.percent else 1), other.value / (100 if other.percent else 1)))
        return any(abs(mine - yours) <= Fraction(str(tolerance)) for mine, yours in readings)
    if one.text == other.text:
        return bool(one.text)
    if max(len(one.text), len(other.text)) > _LONGEST:
        return False
    mine, yours = _elements(one.text), _elements(other.text)
    if len(mine) < 2 or len(mine) != len(yours) or one.text[0] != other.text[0]:
        return False
    return all(same(read(a), read(b), tolerance) for a, b in zip(mine, yours, strict=True))


def _elements(text: str) -> list[str]:
    r"""Return the elements of a tuple, interval or set that stands in brackets; or none."""
    if not re.fullmatch(r"[(\[].*[)\]]|\\?\{.*\\?\}", text):
        return []
    inner, depth, found = text.lstrip("\\")[1:-1].rstrip("\\"), 0, [""]
    for char in inner:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            found.append("")
        else:
            found[-1] += char
    return found
