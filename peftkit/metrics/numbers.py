"""The number that an answer ends with, whatever it is dressed in: $1,000.00, -3, 1/2."""

from __future__ import annotations

import re
from fractions import Fraction

MARK = "####"
NUMBER = re.compile(
    r"""
    (?P<minus>(?<![\w.)])[-−])?                       # a sign, not the minus of 16-3 or 16 - 3
    (?:[$€£¥]\s?(?P<late>[-−])?)?                     # -$5 and $-5 alike
    (?:(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<decimals>\.\d+)?|(?P<bare>\.\d+))
    (?:/(?P<below>\d+))?
    """,
    re.VERBOSE,
)


def final_number(text: str) -> Fraction | None:
    """The number after the first `####`, on that line; without the mark the last number of the text; else None."""
    before, mark, after = text.partition(MARK)
    if not mark:
        found = numbers(before)
        return found[-1] if found else None
    line, *_ = after.strip().split("\n")
    found = numbers(line)
    return found[0] if found else None


def numbers(text: str) -> list[Fraction]:
    """Every number of a text, exactly: thousands may be set apart by commas, and a fraction is one number."""
    return [_value(match) for match in NUMBER.finditer(text)]


def _value(match: re.Match[str]) -> Fraction:
    whole = (match["whole"] or "0").replace(",", "")
    value = Fraction(whole + (match["decimals"] or match["bare"] or ""))
    if match["below"] and int(match["below"]):
        value /= int(match["below"])
    return -value if match["minus"] or match["late"] else value
