"""The report of an audit on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftkit.audit.findings import SHOWN
from peftkit.audit.outcome import Report, SplitReport

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

COLOURS = {"error": "bold red", "stop": "red", "warning": "yellow", "note": "cyan"}
LABELS = 20
"""Labels that a table shows."""
BAR = 30
LONGEST = 1200
"""Characters of an example that are shown."""


def show(report: Report, console: Console | None = None) -> None:
    """Print all of a report, to stdout unless told otherwise; colours on a terminal only."""
    from rich.console import Console

    console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
    if report.splits:
        console.print(_figures(report.splits))
    for split in report.splits:
        _show_lengths(console, split)
    if any(split.labels for split in report.splits):
        console.print(_balance(report.splits))
    for example in report.examples:
        console.print(_text((example.where, "bold"), ("  ", ""), *_marked(example.pieces)))
    for note in report.notes:
        console.print(_text(("note ", "dim"), (note, "")))
    _show_findings(console, report)


def visible(text: str) -> str:
    """The text with control characters as escapes: a terminal would obey them."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text.replace("\n", "⏎")
    )


def _figures(splits: Sequence[SplitReport]) -> Table:
    table = _table("split", "rows", "examples", "tokens", "min", "median", "p95", "max", "cut", "dropped", "end learnt")
    for split in splits:
        lengths = [f"{split.lengths[name]:,.0f}" if split.lengths else "" for name in ("min", "p50", "p95", "max")]
        numbers = (split.rows, split.examples, split.tokens)
        rest = (split.truncated, sum(split.dropped.values()), split.with_end)
        table.add_row(split.name, *(f"{one:,}" for one in numbers), *lengths, *(f"{one:,}" for one in rest))
    return table


def _show_lengths(console: Console, split: SplitReport) -> None:
    if not split.histogram:
        return
    console.print(_text((f"\ntokens of an example, {split.name}", "bold")))
    most = max(count for _, count in split.histogram)
    for start, count in split.histogram:
        console.print(_text((f"{start:>7,} ", ""), ("█" * -(-BAR * count // most), "blue"), (f" {count:,}", "dim")))


def _balance(splits: Sequence[SplitReport]) -> Table:
    counted = [split for split in splits if split.labels]
    names = sorted(counted[0].labels, key=lambda name: -counted[0].labels[name])
    table = _table("label", *(split.name for split in counted))
    for name in names[:LABELS]:
        table.add_row(visible(name), *(_share(split, name) for split in counted))
    if len(names) > LABELS:
        table.add_row(f"and {len(names) - LABELS} more", *("" for _ in counted))
    return table


def _share(split: SplitReport, label: str) -> str:
    count = split.labels.get(label, 0)
    return f"{count:,} ({100 * count / max(1, sum(split.labels.values())):.1f} %)"


def _marked(pieces: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pieces in colour where something is learnt, with the label behind the text."""
    found, left = list[tuple[str, str]](), LONGEST
    for text, mark in pieces:
        label = "" if mark in ("", "learnt") else f" → {visible(mark)} "
        found.append((visible(text[:left]) + (label if text else f"{label}"), "green" if mark else ""))
        left = max(0, left - len(text))
    return found


def _show_findings(console: Console, report: Report) -> None:
    console.print()
    for one in report.findings:
        more = f" and {one.count - SHOWN:,} more" if one.places and one.count > SHOWN else ""
        where = f" ({', '.join(one.places[:SHOWN])}{more})" if one.places else ""
        kind = (f"{one.severity:8}", COLOURS[one.severity])
        what = f" {one.split}: {visible(one.what + where)}; {visible(one.mend)}"
        console.print(_text(kind, (f"{one.name}:", "bold"), (what, "")))
    if not report.findings:
        console.print(_text(("no findings", "green")))


def _table(first: str, *others: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _text(*parts: tuple[str, str]) -> Text:
    """Text in styles; never read as rich's markup."""
    from rich.text import Text

    return Text.assemble(*parts)
