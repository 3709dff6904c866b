"""Columns that are not what they are taken for: swapped, shifted, or the wrong one named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peftkit.audit.findings import Finding, counted, found_in
from peftkit.audit.labels import FEW, Labels
from peftkit.audit.settings import AuditSettings
from peftkit.audit.texts import flat
from peftkit.data.rows import Rows
from peftkit.tasks.label_names import label_text

ENOUGH = 20
"""Rows from which a share says something."""
FREQUENT = 5
"""A label that a field is compared with occurs this often."""


def header_findings(split: str, rows: Rows) -> Iterator[Finding]:
    """Rows that are a header: every field is the name of its column."""
    indices = [
        index
        for index, record in enumerate(rows.records)
        if len(record) > 1 and all(value == name for name, value in record.items())
    ]
    yield from found_in("header-row", split, rows, indices, f"{counted(len(indices), 'row')}: the names of the columns")


def column_findings(labels: Labels, texts: Sequence[str], settings: AuditSettings) -> Iterator[Finding]:
    """Labels in the place of texts and the reverse, for a split with one label a row.

    Args:
        texts: the columns of texts; the first is what labels may have been swapped with.
    """
    if not labels.single:
        return
    split, rows, counts = labels.split, labels.rows, labels.counts
    many = len(rows) >= ENOUGH and len(counts) > settings.label_per_row * len(rows)
    if many and texts and _are_labels(rows, texts[0]):
        what = f"'{texts[0]}' has a few values that come again and again, and '{labels.column}' is different everywhere"
        yield from found_in("swapped-columns", split, rows, range(len(rows)), what)
    elif many:
        what = f"'{labels.column}' has {len(counts):,} different values in {len(rows):,} rows"
        yield from found_in("label-per-row", split, rows, range(len(rows)), what)
    else:
        yield from _misplaced(labels, texts)


def _are_labels(rows: Rows, column: str) -> bool:
    values = {flat(record.get(column)) for record in rows.records}
    return len(values) <= len(rows) / 5


def _misplaced(labels: Labels, texts: Sequence[str]) -> Iterator[Finding]:
    """Rows whose label is rare while another field of theirs is a frequent label."""
    counts = labels.counts
    frequent = {label for label, count in counts.items() if count >= FREQUENT}
    rare = {label for label, count in counts.items() if count <= FEW}
    swapped, shifted = list[int](), list[int]()
    for index, (label,) in enumerate(labels.texts if rare and frequent else ()):
        if label is None or label not in rare:
            continue
        fields = {name: label_text(value) for name, value in labels.rows.records[index].items()}
        holding = [name for name, text in fields.items() if name != labels.column and text in frequent]
        if holding and holding[0] in texts and len(label.split()) > 1:
            swapped.append(index)
        elif holding:
            shifted.append(index)
    split, rows, column = labels.split, labels.rows, labels.column
    yield from found_in("swapped-row", split, rows, swapped, f"{counted(len(swapped), 'row')}: a text in '{column}'")
    what = f"{counted(len(shifted), 'row')}: the label in another column than '{column}'"
    yield from found_in("shifted-row", split, rows, shifted, what)
