"""Text files: a row for each line, or for each paragraph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from peftkit.data.tables import stripped

Placed = tuple[int, dict[str, Any]]


def read_lines(source: str, lines: Iterable[str]) -> Iterator[Placed]:
    """Each line that is not blank, as it stands, under `text`; places are lines."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, {"text": stripped(line)}


def read_paragraphs(source: str, lines: Iterable[str]) -> Iterator[Placed]:
    """Lines that no blank line parts make one text; places are their first lines."""
    first, paragraph = 0, list[str]()
    for number, line in enumerate(lines, 1):
        if line.strip():
            first = first or number
            paragraph.append(stripped(line))
        elif paragraph:
            yield first, {"text": "\n".join(paragraph)}
            first, paragraph = 0, []
    if paragraph:
        yield first, {"text": "\n".join(paragraph)}
