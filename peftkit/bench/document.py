"""What a report consists of, before it becomes a page or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "good", "bad", "same", "quiet", "chosen"]


@dataclass(frozen=True)
class Cell:
    """A figure or word in a table; the tone says how to read it."""

    text: str
    tone: Tone = ""
    below: str = ""
    """Smaller, in a line of its own."""


@dataclass(frozen=True)
class Heading:
    """Level 1 is the page's own."""

    text: str
    level: int = 2
    anchor: str = ""


@dataclass(frozen=True)
class Paragraph:
    """Plain text; in a box where it is a note, a warning or a recommendation."""

    text: str
    box: Literal["", "note", "warning", "advice"] = ""
    title: str = ""


@dataclass(frozen=True)
class Items:
    """A list."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Links:
    """Ways to headings: (text, anchor)."""

    targets: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """The first column names, the others are figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""
    words: Sequence[int] = ()
    """Columns that hold text beside the first, from 0."""


@dataclass(frozen=True)
class Charts:
    """SVG with what stands above it; a page alone shows them."""

    drawn: Sequence[tuple[str, str]]
    """(caption, SVG)."""


@dataclass(frozen=True)
class Fold:
    """Parts that a page shows when they are asked for."""

    title: str
    parts: Sequence[Part]
    open: bool = False


Part = Heading | Paragraph | Items | Links | Table | Charts | Fold


def cell(value: Cell | str) -> Cell:
    """A cell of plain text, or what is one already."""
    return value if isinstance(value, Cell) else Cell(value)
