"""Texts with two marked entities: markers put in, checked, and kept when a text is cut to its length in tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peftkit.data.files import Rows
from peftkit.tasks.base import refuse_rows

Markers = tuple[str, str, str, str]
"""Before and after the first entity, before and after the second."""
Span = tuple[int, int]


def marked(text: str, spans: Sequence[Span], markers: Markers) -> str:
    """`text` with the markers around characters [start, end) of each span; one span may lie in the other."""
    pieces: list[tuple[int, int, int, str]] = []
    for number, (start, end) in enumerate(spans):
        # where they meet, what ends comes before what begins, and the longer span is outside
        pieces += [(start, 1, -end, markers[2 * number]), (end, 0, -start, markers[2 * number + 1])]
    for position, _, _, marker in sorted(pieces, reverse=True):
        text = text[:position] + marker + text[position:]
    return text


def as_words(text: str, markers: Markers) -> str:
    """The same text with the space before an entity moved inside its marker: the words of byte-level tokenizers
    begin with their space."""
    return re.sub(f"(\\s+)({re.escape(markers[0])}|{re.escape(markers[2])})", r"\2\1", text)


def spans_in(rows: Rows, columns: Sequence[str]) -> list[list[Span]]:
    """The spans that the columns name: `e1` with [start, end], or `e1_start` and `e1_end`."""
    found = [[_span(record, column) for column in columns] for record in rows.records]
    wrong = [i for i, spans in enumerate(found) if None in spans]
    names = " and ".join(f"'{column}'" for column in columns)
    mend = f"write [start, end) in characters as e.g. '{columns[0]}': [4, 9], or as {columns[0]}_start and _end"
    refuse_rows(rows, wrong, f"{names} hold no spans", mend)
    return [[span for span in spans if span is not None] for spans in found]


def refuse_outside(rows: Rows, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> None:
    """Refuse spans that are empty or reach beyond their text."""
    wrong = [
        index
        for index, (text, both) in enumerate(zip(texts, spans, strict=True))
        if any(not 0 <= start < end <= len(text) or not text[start:end].strip() for start, end in both)
    ]
    refuse_rows(rows, wrong, "an entity's span is empty or reaches beyond the text", "count characters from 0")


def refuse_unmarked(rows: Rows, texts: Sequence[str], markers: Markers) -> None:
    """Refuse texts in which not each marker stands exactly once, each entity's in order."""
    wrong = [index for index, text in enumerate(texts) if not _is_marked(text, markers)]
    first, second = f"{markers[0]}…{markers[1]}", f"{markers[2]}…{markers[3]}"
    refuse_rows(
        rows, wrong, f"the text does not have one entity {first} and one entity {second}", "mark both, and only once"
    )


def kept_tokens(count: int, room: int, entities: Sequence[Span]) -> list[int] | None:
    """Which of `count` tokens stay when there is room for fewer: both entities, markers included, and what is nearest
    to them; None where not even these fit.

    Text before the first and after the second goes first, and then the middle of what is between them.
    """
    if count <= room:
        return list(range(count))
    (low, first_end), (second, high) = _outline(entities)
    spare = room - (high - low)
    if spare >= 0:
        before = min(low, max(spare // 2, spare - (count - high)))
        return list(range(low - before, high + min(count - high, spare - before)))
    spare = room - (first_end - low) - (high - second)
    if second < first_end or spare < 0:
        return None
    return [*range(low, first_end + (spare + 1) // 2), *range(second - spare // 2, high)]


def _outline(entities: Sequence[Span]) -> tuple[Span, Span]:
    """The entity that begins first, and the other one; twice what they span where one reaches into the other."""
    one, other = sorted(entities)
    if other[0] < one[1]:
        whole = (one[0], max(one[1], other[1]))
        return whole, whole
    return one, other


def _is_marked(text: str, markers: Markers) -> bool:
    if any(text.count(marker) != 1 for marker in markers):
        return False
    places = [text.index(marker) for marker in markers]
    inside = [text[places[i] + len(markers[i]) : places[i + 1]] for i in (0, 2)]
    return places[0] < places[1] and places[2] < places[3] and all(one.strip() for one in inside)


def _span(record: dict[str, Any], column: str) -> Span | None:
    value = record.get(column, [record.get(f"{column}_start"), record.get(f"{column}_end")])
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        return None
    return value[0], value[1]
