"""What is wrong with labels: missing, misspelt, of two types, unknown, too rare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftkit.audit.findings import Finding, counted, finding, found_in
from peftkit.audit.settings import AuditSettings
from peftkit.audit.texts import READ_AS_MISSING
from peftkit.data.rows import Rows
from peftkit.schema import nearest, slips
from peftkit.tasks.label_names import by_position, label_text

TOLD = 10
"""Unknown labels that are told one by one."""
MANY = 1000
"""Labels that a rare one is compared with at most."""
FEW, OFTEN = 3, 10
"""A label that occurs at most FEW times is a typo of one like it that occurs OFTEN times as often."""
SHORT, LONG = 4, 8
"""Letters from which one slip, and two, can be a typo: 'no' is no slip of 'on'."""


@dataclass(frozen=True)
class Labels:
    """The labels of one split: one a row, or one a word."""

    split: str
    rows: Rows
    column: str
    values: Sequence[tuple[Any, ...]]
    """Of each row, as the data has them."""
    texts: Sequence[tuple[str | None, ...]]
    """Of each row, as peftkit reads them; None where there is none."""
    single: bool
    """One a row."""
    counts: Mapping[str, int]
    """How often each label occurs."""
    where: Mapping[str, list[int]]
    """The rows with each label."""


def read_labels(split: str, rows: Rows, column: str, names: Sequence[str] | None) -> Labels:
    """The labels of a split; `names` are the configuration's, where data may hold positions."""
    raw = [record.get(column) for record in rows.records]
    single = not any(isinstance(value, list | tuple) for value in raw)
    known: dict[Any, tuple[str | None, ...]] = {}
    values = [_as_tuple(value, single) for value in raw]
    texts = [known.get(_key(row)) or known.setdefault(_key(row), _texts(row, names)) for row in values]
    counts, where = Counter[str](), dict[str, list[int]]()
    for index, row in enumerate(texts):
        for text in dict.fromkeys(row):
            if text is not None:
                counts[text] += row.count(text)
                where.setdefault(text, []).append(index)
    return Labels(split, rows, column, values, texts, single, counts, where)


def _as_tuple(value: Any, single: bool) -> tuple[Any, ...]:
    if single:
        return (value,)
    return tuple(value) if isinstance(value, list | tuple) else ()


def _key(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """What tells 1 from 1.0 and from True, and takes what is in no label of ours as its text."""
    return tuple((type(value), value if isinstance(value, str | int | float | None) else str(value)) for value in row)


def _texts(row: tuple[Any, ...], names: Sequence[str] | None) -> tuple[str | None, ...]:
    texts = [label_text(value) for value in row]
    return tuple(text if text is None else by_position([text], names)[0] for text in texts)


def label_findings(labels: Labels) -> Iterator[Finding]:
    """Faults of the labels of any split by themselves."""
    split, rows, column = labels.split, labels.rows, labels.column
    missing = [index for index, row in enumerate(labels.texts) if None in row or not row]
    yield from found_in("missing-label", split, rows, missing, f"{counted(len(missing), 'row')} without '{column}'")
    yield from _mixed_types(labels)
    for label in sorted(READ_AS_MISSING & labels.counts.keys()):
        what = f"label '{label}' of {counted(len(labels.where[label]), 'row')}"
        yield from found_in("label-reads-as-missing", split, rows, labels.where[label], what)


def train_findings(
    labels: Labels, names: Sequence[str], explained: set[int], settings: AuditSettings
) -> Iterator[Finding]:
    """Faults of train's labels, which are what is learnt.

    Args:
        names: the labels that the configuration or the data set names.
        explained: rows whose label is no label, as another finding tells.
    """
    split, rows, counts = labels.split, labels.rows, labels.counts
    meant = typos(counts)
    for label, other in meant.items():
        what = f"label '{label}' occurs {counted(counts[label], 'time')}, '{other}' {counts[other]:,} times"
        yield from found_in("label-typo", split, rows, labels.where[label], what)
    few = [label for label, count in counts.items() if count < settings.rare_label and label not in meant]
    rare = [label for label in few if not explained.issuperset(labels.where[label])]
    if rare and len(counts) <= len(rows) / 2:
        shown = ", ".join(f"'{label}' ({counts[label]})" for label in sorted(rare)[:5])
        places = [rows.where(index) for label in sorted(rare) for index in labels.where[label]]
        what = f"fewer than {settings.rare_label} rows have each of {counted(len(rare), 'label')}: {shown}"
        yield finding("rare-label", split, len(rare), what, places)
    absent = [name for name in names if name not in counts]
    if absent:
        shown = ", ".join(f"'{name}'" for name in absent[:5])
        yield finding("absent-label", split, len(absent), f"{counted(len(absent), 'label')} without a row: {shown}")
    if labels.single and counts:
        yield from _one_sided(labels, settings)


def _one_sided(labels: Labels, settings: AuditSettings) -> Iterator[Finding]:
    label = max(labels.counts, key=lambda one: labels.counts[one])
    share = labels.counts[label] / len(labels.rows)
    if share > settings.one_sided:
        what = f"{100 * share:.1f} % of the rows have label '{label}'"
        yield finding("one-sided-labels", labels.split, labels.counts[label], what, share=share)


def unknown_findings(labels: Labels, known: Sequence[str]) -> Iterator[Finding]:
    """Labels of dev or test that train does not have."""
    unknown = [label for label in labels.where if label not in set(known)]
    for label in unknown[:TOLD]:
        near = nearest(label, known)
        mend = f"did you mean '{near}'?" if near else f"training has: {', '.join(list(known)[:12])}"
        indices = labels.where[label]
        what = f"label '{label}' never occurs in training"
        share = len(indices) / len(labels.rows)
        one = finding("unknown-label", labels.split, len(indices), what, map(labels.rows.where, indices), share, mend)
        yield replace(one, indices=indices)
    if rest := [index for label in unknown[TOLD:] for index in labels.where[label]]:
        what = f"{counted(len(unknown) - TOLD, 'label')} more never occur in training"
        yield from found_in("unknown-label", labels.split, labels.rows, rest, what)


def typos(counts: Mapping[str, int]) -> dict[str, str]:
    """From each label that looks like a slip of the finger to the frequent one that was meant."""
    by_fold: dict[str, list[str]] = {}
    for label in counts:
        by_fold.setdefault(_folded(label), []).append(label)
    frequent = [label for label, count in counts.items() if count >= OFTEN]
    found = {}
    for label, count in counts.items():
        twins = [other for other in by_fold[_folded(label)] if counts[other] > count]
        slipped = frequent if count <= FEW and len(frequent) <= MANY else ()
        near = (other for other in slipped if counts[other] >= OFTEN * count and _is_slip(label, other))
        meant = max(twins, key=lambda one: counts[one]) if twins else next(near, None)
        if meant is not None:
            found[label] = meant
    return found


def _is_slip(label: str, other: str) -> bool:
    one, two = _type_of(label), _type_of(other)
    if one == two or _letters(one) == _letters(two):  # B-PER and I-PER, or grade_1 and grade_2
        return False
    shorter = min(len(one), len(two))
    swapped = shorter == SHORT - 1 and sorted(one) == sorted(two)  # PRE and PER
    allowed = int(swapped) if shorter < SHORT else 1 if shorter < LONG else 2
    return abs(len(one) - len(two)) <= allowed and slips(one, two) <= allowed


def _folded(label: str) -> str:
    return "".join(letter for letter in label.casefold() if letter.isalnum()) or label


def _letters(label: str) -> str:
    return "".join(letter for letter in label if not letter.isdigit())


def _type_of(tag: str) -> str:
    """What follows B-, I-, E- or S-."""
    return tag[2:] if tag[1:2] == "-" and tag[:1] in "BIESLU" else tag


def _mixed_types(labels: Labels) -> Iterator[Finding]:
    kinds: dict[str, list[int]] = {}
    for index, row in enumerate(labels.values):
        for value in row:
            if value is not None:
                kinds.setdefault("text" if isinstance(value, str) else "numbers", []).append(index)
    if len(kinds) > 1:
        fewer = min(kinds, key=lambda kind: len(kinds[kind]))
        indices = list(dict.fromkeys(kinds[fewer]))
        what = f"'{labels.column}' is {fewer} in {len(indices):,} of {len(labels.rows):,} rows"
        yield from found_in("mixed-label-types", labels.split, labels.rows, indices, what)
