"""What tasks read from a column of the rows."""

from __future__ import annotations

from peftkit.data.files import Rows
from peftkit.tasks.base import refuse_rows


def texts_in(rows: Rows, column: str) -> list[str]:
    """The text of each row.

    Raises:
        DataError: no such column, or rows in which it holds no text, or a blank one.
    """
    rows.require(column)
    values = [record[column] for record in rows.records]
    empty = [index for index, value in enumerate(values) if not isinstance(value, str) or not value.strip()]
    refuse_rows(rows, empty, f"no text in '{column}'", "remove the row or fill it in")
    return values
