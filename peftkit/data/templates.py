"""Texts made from the columns of a row: `Review: {text}\\nSentiment:`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator

from peftkit.data.files import Rows
from peftkit.errors import DataError
from peftkit.schema import did_you_mean

PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def pieces(template: str) -> Iterator[tuple[str, str | None]]:
    """(literal text, column that follows it) from left to right; None for the column after the last text.

    `{{` and `}}` stand for braces. A column's name is everything between its braces.

    Raises:
        ValueError: a brace without its other half, or one that names no column.
    """
    literal, end = "", 0
    for part in PART.finditer(template):
        literal, end = literal + template[end : part.start()], part.end()
        if part[0] in ("{{", "}}"):
            literal += part[0][0]
        elif not (part[1] or "").strip():
            what = "names no column" if part[1] is not None else "has no other half"
            raise ValueError(f"'{part[0]}' at character {part.start() + 1} {what}; write '{{{{' and '}}}}' for braces")
        else:
            yield literal, part[1]
            literal = ""
    yield literal + template[end:], None


def check(template: str) -> str:
    """`template` itself, or a ValueError that says where it is wrong."""
    for _ in pieces(template):
        pass
    return template


Template = Annotated[str, AfterValidator(check)]
"""A text with `{column}` in it, checked when the configuration is read."""


def columns(template: str) -> tuple[str, ...]:
    """The columns that a template takes, each once, in order of appearance."""
    return tuple(dict.fromkeys(column for _, column in pieces(template) if column is not None))


def render(template: str, record: Mapping[str, Any]) -> str:
    """`template` with the record's values in place of its columns; braces in values stay as they are.

    Raises:
        DataError: a column that the record lacks, or whose value is null or neither text nor a number.
    """
    return "".join(
        literal + ("" if column is None else value_as_text(record, column)) for literal, column in pieces(template)
    )


def render_rows(template: str, rows: Rows) -> list[str]:
    """The text of each row; errors name the row."""
    rows.require(*columns(template))
    texts = []
    for index, record in enumerate(rows.records):
        try:
            texts.append(render(template, record))
        except DataError as error:
            raise DataError(f"{rows.where(index)}: {error}") from None
    return texts


def value_as_text(record: Mapping[str, Any], column: str) -> str:
    """One value as a template writes it."""
    if column not in record:
        raise DataError(f"no column '{column}' for the template{did_you_mean(column, record)}")
    value = record[column]
    if value is None:
        raise DataError(f"'{column}' is null, which a template cannot write; fill it in or remove the row")
    if not isinstance(value, str | int | float):
        raise DataError(f"'{column}' holds a {type(value).__name__}; a template takes text and numbers")
    return str(value)
