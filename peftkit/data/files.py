"""One file, read into rows that know their place.

Nothing is ever read as missing: "NA", "None", "null" and "" stay text. Blank lines hold no row. Files are read line by
line, also those packed as .gz.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from peftkit.data.plain_text import read_lines, read_paragraphs
from peftkit.data.rows import Rows
from peftkit.data.structured import read_conll, read_json, read_jsonl, read_parquet
from peftkit.data.tables import HEADER, Columns, read_csv, read_orange, read_tsv
from peftkit.errors import DataError, UsageError
from peftkit.schema import did_you_mean, nearest

__all__ = ["READERS", "SUFFIXES", "Rows", "check_file", "format_of", "read_file", "text_lines"]

Reader = Callable[[str, Iterable[str]], Iterator[tuple[int, dict[str, Any]]]]
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PACKED = ".gz"
MOST_LINE = 2**28
"""Bytes of one line of a packed file, of which a few can stand for any number."""

READERS: Mapping[str, Reader] = {
    "csv": read_csv,
    "tsv": read_tsv,
    "tab": read_orange,
    "json": read_json,
    "jsonl": read_jsonl,
    "ndjson": read_jsonl,
    **dict.fromkeys(("conll", "bio", "iob", "iob2"), read_conll),
    **dict.fromkeys(("txt", "raw"), read_lines),
    "paragraphs": read_paragraphs,
}
"""From (name for messages, lines) to (place, record), by format, which is the suffix of a file without its dot."""
PARQUET = "parquet"
FORMATS = (*READERS, PARQUET)
SUFFIXES = tuple(f".{name}" for name in FORMATS)
TABLES = ("csv", "tsv")  # whose columns can be given
BY_ROW = ("json", PARQUET)  # their places are row numbers, not lines


def read_file(
    path: str | Path,
    source: str | None = None,
    format: str | None = None,
    columns: Columns = HEADER,
) -> Rows:
    """The rows of one file.

    Args:
        source: what messages call the file; default: `path`.
        format: csv, tsv, tab, json, jsonl, conll, txt, paragraphs or parquet; default: what the suffix says.
        columns: of a csv or tsv file that has no header, or rows with more fields than columns.

    Raises:
        UsageError: no such file, or a format that is not known.
        DataError: the file is not what it should be, with file and line.
    """
    place, source = Path(path), source or str(path)
    check_file(place, source, format)
    kind = format or format_of(place)
    if kind == PARQUET:
        records = read_parquet(source, place)
        return Rows(source, records, range(1, len(records) + 1), by_line=False)
    if not any(line.strip() for line in text_lines(source, place)):
        raise DataError(f"{source}:1: the file is empty; write rows into it")
    found = list(_reader(source, kind, columns)(source, text_lines(source, place)))
    if not found:
        raise DataError(f"{source}:1: the file has no rows; add some")
    return Rows(source, [record for _, record in found], [place for place, _ in found], by_line=kind not in BY_ROW)


def format_of(path: Path) -> str:
    """The format that a file's name says: its suffix, or the one before `.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == PACKED:
        suffixes.pop()
    return suffixes[-1].removeprefix(".") if suffixes else ""


def check_file(path: Path, source: str, format: str | None = None) -> None:
    """Refuse what `read_file` could not even open."""
    if path.is_dir():
        raise DataError(f"{source}: a folder, not a file; name one of the files in it")
    if not path.is_file():
        raise UsageError(f"{source}: no such file in {path.parent.absolute()}{_file_meant(path)}")
    if format is not None and format not in FORMATS:
        raise UsageError(f"{source}: no format '{format}'{did_you_mean(format, FORMATS)}")
    if format is None and format_of(path) not in FORMATS:
        raise UsageError(f"{source}: cannot read '{path.suffix}' files; readable are {', '.join(SUFFIXES)}")


def _file_meant(path: Path) -> str:
    if not path.parent.is_dir():
        return ", which is no folder; check the path"
    match = nearest(path.name, (entry.name for entry in path.parent.iterdir() if entry.is_file()))
    return f"; did you mean '{match}'?" if match else "; check the path"


def _reader(source: str, kind: str, columns: Columns) -> Reader:
    if columns == HEADER:
        return READERS[kind]
    if kind not in TABLES:
        raise UsageError(f"{source}: columns can be given for {' and '.join(TABLES)} files, not for {kind}")
    read = read_csv if kind == "csv" else read_tsv
    return lambda name, lines: read(name, lines, columns)


def text_lines(source: str, path: Path) -> Iterator[str]:
    """The lines of a text file with their ends, which are `\\n` alone: tweets contain U+0085 and U+2028.

    Raises:
        DataError: bytes that are no UTF-8, a NUL, or a line of a packed file that has no end, with file and line.
    """
    try:
        with _opened(path) as file:
            for number, raw in enumerate(_bounded(source, file) if path.suffix.lower() == PACKED else file, 1):
                yield _text(f"{source}:{number}", raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise DataError(f"{source}: not a whole gzip file ({problem}); pack it again") from problem
    except OSError as problem:
        raise DataError(f"{source}: cannot be read: {problem.strerror}; check its permissions") from problem


def _bounded(source: str, file: IO[bytes]) -> Iterator[bytes]:
    for number, raw in enumerate(iter(partial(file.readline, MOST_LINE + 1), b""), 1):
        if len(raw) > MOST_LINE:
            raise DataError(
                f"{source}:{number}: a line of more than {MOST_LINE:,} bytes; unpack it, and write a row a line"
            )
        yield raw


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == PACKED else path.open("rb")  # type: ignore[return-value]


def _text(where: str, raw: bytes) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError as problem:
        byte = raw[problem.start]
        raise DataError(f"{where}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        raise DataError(f"{where}: a NUL byte, which no text has; write the file again")
    return text
