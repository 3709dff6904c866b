"""Columns by the names that a task knows them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from peftkit.data.rows import Rows
from peftkit.errors import DataError


def renamed_tables(tables: Sequence[Rows | None], names: Mapping[str, str]) -> list[Rows | None]:
    """The same of several splits; a column that only some of them have is renamed in those."""
    known = {name for rows in tables if rows for name in rows.column_names}
    return [
        rows and renamed(rows, {old: new for old, new in names.items() if old in rows.column_names or old not in known})
        for rows in tables
    ]


def renamed(rows: Rows, names: Mapping[str, str]) -> Rows:
    """The rows with columns renamed, `{name in the data: name in the run}`; two names can be exchanged.

    Raises:
        DataError: no such column, or two columns of one name.
    """
    if not names:
        return rows
    rows.require(*names)
    after = [names.get(name, name) for name in rows.column_names]
    twice = next((name for name in after if after.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{rows.source}: rename gives two columns the name '{twice}'; rename the other one too")
    records = [{names.get(name, name): value for name, value in record.items()} for record in rows.records]
    features = {names.get(name, name): value for name, value in rows.features.items()}
    return replace(rows, records=records, features=features)
