"""How a configuration names a file: as text, or as a section where the file is odd."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator

from peftkit.data.files import FORMATS
from peftkit.schema import Section, did_you_mean

Text = Annotated[str, Field(min_length=1)]


class FileSettings(Section):
    """A file whose suffix does not say its format, or that has no header."""

    file: Text
    format: str | None = None
    """csv, tsv, tab, json, jsonl, conll, txt, paragraphs or parquet; default: what the suffix says."""
    columns: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """The names of the columns of a csv or tsv file without a header."""
    ignore_extra: bool = False
    """Rows of a csv or tsv file may have more fields than there are columns; those are left out."""

    @field_validator("format")
    @classmethod
    def _known(cls, format: str | None) -> str | None:
        if format is not None and format not in FORMATS:
            raise ValueError(f"no format '{format}'{did_you_mean(format, FORMATS)}")
        return format

    @field_validator("columns")
    @classmethod
    def _distinct(cls, columns: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if columns is not None and len(set(columns)) != len(columns):
            raise ValueError("two columns have one name; rename one")
        return columns

    def __str__(self) -> str:
        return self.file


def _is_section(value: Any) -> str:
    return "(section)" if isinstance(value, dict | FileSettings) else "(text)"


Named = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[FileSettings, Tag("(section)")], Discriminator(_is_section)
]
"""So that a wrong section is told as a section, and never as something that should be text."""
