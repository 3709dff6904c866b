"""Tables line by line: comma separated, tab separated, and Orange's tab separated with three header lines.

A reader takes the name for messages, the lines with their ends, and what the file has for columns. It yields (line
number, record), so that a file is never in memory twice.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from peftkit.errors import DataError

Line = tuple[int, list[str]]  # line number, fields
Records = Iterator[tuple[int, dict[str, Any]]]

ORANGE_FLAGS = frozenset({"class", "c", "meta", "m", "ignore", "i", "weight", "w"})
TAB_MEND = "a field cannot hold a tab"


@dataclass(frozen=True)
class Columns:
    """The columns of a table."""

    names: tuple[str, ...] | None = None
    """None: the first line holds them."""
    ignore_extra: bool = False
    """Rows may have more fields than there are columns; those are left out."""


HEADER = Columns()


def read_csv(source: str, lines: Iterable[str], columns: Columns = HEADER) -> Records:
    """Comma separated, quoted as in RFC 4180."""
    limit = csv.field_size_limit(2**31 - 1)  # csv's own 131,072 characters are too few for documents
    try:
        yield from _table(source, _csv_lines(source, lines), "put quotes around a field that holds a comma", columns)
    finally:
        csv.field_size_limit(limit)


def read_tsv(source: str, lines: Iterable[str], columns: Columns = HEADER) -> Records:
    """Tab separated; a quote is a character like any other."""
    return _table(source, _tab_lines(enumerate(lines, 1)), TAB_MEND, columns)


def read_orange(source: str, lines: Iterable[str], columns: Columns = HEADER) -> Records:
    """Orange's .tab: names, types and flags, then tab separated rows."""
    numbered = enumerate(lines, 1)
    head = [stripped(line) for _, line in islice(numbered, 3)]
    _check_orange_flags(f"{source}:3", head[2] if len(head) > 2 else "(nothing)")
    header = (1, head[0].split("\t"))
    return _table(source, chain([header], _tab_lines(numbered)), TAB_MEND, columns)


def stripped(line: str) -> str:
    """A line without its end."""
    return line.removesuffix("\n").removesuffix("\r")


def check_header(where: str, names: Sequence[str]) -> None:
    """Refuse columns without a name, and names that two columns share."""
    for index, name in enumerate(names):
        if not name.strip():
            raise DataError(f"{where}: column {index + 1} of the header has no name; name it or leave it out")
        if name in names[:index]:
            raise DataError(f"{where}: two columns are called '{name}'; rename one")


def _csv_lines(source: str, lines: Iterable[str]) -> Iterator[Line]:
    reader = csv.reader(_split_at_returns(lines), strict=True)
    start = 1
    try:
        for fields in reader:
            if fields:
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as problem:
        raise DataError(f"{source}:{start}: {_quoting_fault(str(problem), reader.line_num)}") from None


def _split_at_returns(lines: Iterable[str]) -> Iterator[str]:
    """A lone carriage return ends a line too, as on old Macs."""
    for line in lines:
        if "\r" in line and line.index("\r") < len(line) - 2:
            yield from io.StringIO(line, newline="")
        else:
            yield line


def _quoting_fault(problem: str, line: int) -> str:
    fault = f"a quote in this row ends within a field (line {line}: {problem})"
    if problem == "unexpected end of data":
        fault = "a quote opened in this row is never closed"
    return f"{fault}; close it, or write a quote inside quotes twice"


def _check_orange_flags(where: str, line: str) -> None:
    # a plain table under this name would lose its first two rows
    for flag in re.split(r"(?<!\\)\s+", line.strip()):
        if flag and flag not in ORANGE_FLAGS and "=" not in flag:
            mend = "a .tab file starts with names, types and flags; with one header line call it .tsv"
            raise DataError(f"{where}: '{flag}' is no flag; {mend}")


def _tab_lines(lines: Iterable[tuple[int, str]]) -> Iterator[Line]:
    for number, line in lines:
        bare = stripped(line)
        if bare:
            yield number, bare.split("\t")


def _table(source: str, lines: Iterator[Line], mend: str, columns: Columns) -> Records:
    first = next(lines, (1, []))
    if columns.names is not None:
        lines = _without_header(f"{source}:{first[0]}", first, lines, columns.names)
    names = list(columns.names or first[1])
    check_header(f"{source}:{first[0]}", names)
    empty = True
    for number, fields in lines:
        if len(fields) != len(names):
            _check_width(f"{source}:{number}", len(fields), columns, len(names), mend)
            del fields[len(names) :]
        yield number, dict(zip(names, fields, strict=True))
        empty = False
    if empty and names:
        raise DataError(f"{source}:{first[0]}: only a header, no rows; add some")


def _without_header(where: str, first: Line, rest: Iterator[Line], names: Sequence[str]) -> Iterator[Line]:
    """All lines, because the first one holds no names."""
    if first[1] == list(names):
        raise DataError(f"{where}: this line holds the names of the columns; leave columns out")
    return chain([first] if first[1] else [], rest)


def _check_width(where: str, fields: int, columns: Columns, wanted: int, mend: str) -> None:
    if fields > wanted and columns.ignore_extra:
        return
    what = "the header has" if columns.names is None else "columns names"
    raise DataError(f"{where}: {fields} fields, {what} {wanted}; {mend}")
