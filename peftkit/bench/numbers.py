"""Figures as they are shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

MINUS = "−"
NOTHING = "–"


@dataclass(frozen=True)
class Scale:
    """How the scores of a block are written: shares as points of a hundred, others as they are."""

    is_share: bool

    def score(self, value: float | None) -> str:
        """`91.23`."""
        if value is None:
            return NOTHING
        return true_minus(f"{100 * value:.2f}" if self.is_share else f"{value:.4g}")

    def change(self, value: float | None) -> str:
        """`+0.31`."""
        if value is None:
            return NOTHING
        return true_minus(f"{100 * value:+.2f}" if self.is_share else f"{value:+.3g}")

    def between(self, low: float, high: float) -> str:
        """`90.11 to 92.35`."""
        return f"{self.score(low)} to {self.score(high)}"

    def change_between(self, low: float, high: float) -> str:
        """`−0.20 to +0.82`."""
        return f"{self.change(low)} to {self.change(high)}"

    def margin(self, value: float) -> str:
        """`1 point`."""
        if not self.is_share:
            return f"{value:.3g}"
        points = 100 * value
        return f"{points:g} point{'' if points == 1 else 's'}"


def true_minus(text: str) -> str:
    """With a minus sign in place of the hyphen, and none before a zero."""
    if text.startswith("-") and not text.strip("-0."):
        text = text[1:]
    return text.replace("-", MINUS)


def probability(value: float) -> str:
    """`0.043`, `< 0.001`."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def count(value: float | None) -> str:
    """`1,234,567`."""
    return NOTHING if value is None else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes as `12.3 MiB`."""
    if value is None:
        return NOTHING
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= unit:
            return (
                true_minus(f"{value / unit:.3g} {name}") if abs(value) < 1000 * unit else f"{value / unit:,.0f} {name}"
            )
    return true_minus(f"{value:.0f} B")


def seconds(value: float | None) -> str:
    """`12.3 s`, `3 h 20 min`."""
    if value is None:
        return NOTHING
    if value < 600:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"


def share(part: float, whole: float) -> str:
    """`2.2 %`."""
    return f"{100 * part / whole:.2g} %" if whole and part < whole else f"{100 * part / whole:.0f} %" if whole else ""


def rate(value: float | None) -> str:
    """A learning rate: `2e-4` for 0.0002."""
    if value is None:
        return NOTHING
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def half_width(values: Iterable[float], confidence: float = 0.95) -> float | None:
    """How far Student's t interval of the mean goes to either side; None for fewer than two values."""
    from scipy.special import stdtrit

    known = list(values)
    if len(known) < 2:
        return None
    return float(stdtrit(len(known) - 1, (1 + confidence) / 2)) * stdev(known) / sqrt(len(known))
