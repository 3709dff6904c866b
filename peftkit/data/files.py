"""One file, read into rows that know their place.

Nothing is ever read as missing: "NA", "None", "null" and "" stay text. Blank lines hold no row.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peftkit.errors import DataError, UsageError
from peftkit.schema import did_you_mean, nearest

Line = tuple[int, list[str]]  # line number, fields

ORANGE_FLAGS = frozenset({"class", "c", "meta", "m", "ignore", "i", "weight", "w"})


@dataclass(frozen=True)
class Rows:
    """Records of one split, each with its place of origin."""

    source: str
    records: list[dict[str, Any]]
    places: Sequence[int]
    features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_line: bool = True  # places are lines of a file; False: row numbers, from 1

    def __len__(self) -> int:
        return len(self.records)

    def where(self, index: int) -> str:
        """`train.tsv:17`, or `glue/sst2[train] row 17`."""
        return f"{self.source}{':' if self.by_line else ' row '}{self.places[index]}"

    @property
    def column_names(self) -> tuple[str, ...]:
        """Every column that some record has, in order of appearance."""
        return tuple(dict.fromkeys(name for record in self.records for name in record))

    def require(self, *columns: str) -> None:
        """Refuse rows without these columns."""
        for column in columns:
            lacking = next((i for i, record in enumerate(self.records) if column not in record), None)
            if lacking is None:
                continue
            if any(column in record for record in self.records):
                raise DataError(f"{self.where(lacking)}: no '{column}' in this row, though other rows have it")
            raise DataError(f"{self.source}: no column '{column}'{did_you_mean(column, self.column_names)}")

    def take(self, indices: Iterable[int]) -> Rows:
        """These rows, in this order."""
        chosen = list(indices)
        records = [self.records[index] for index in chosen]
        return replace(self, records=records, places=[self.places[index] for index in chosen])

    def head(self, count: int) -> Rows:
        """The first `count` rows."""
        return replace(self, records=self.records[:count], places=self.places[:count])


def read_file(path: str | Path, source: str | None = None) -> Rows:
    """The rows of one file, by its suffix; messages call the file `source`, or what `path` says."""
    place, source = Path(path), source or str(path)
    check_file(place, source)
    if place.suffix.lower() == ".parquet":
        return _read_parquet(source, place)
    rows = TEXT_READERS[place.suffix.lower()](source, _read_text(source, place))
    if not rows.records:
        raise DataError(f"{source}:1: the file has no rows; add some")
    return rows


def check_file(path: Path, source: str) -> None:
    """Refuse what `read_file` could not even open."""
    if path.is_dir():
        raise DataError(f"{source}: a folder, not a file; name one of the files in it")
    if not path.is_file():
        raise UsageError(f"{source}: no such file in {path.parent.absolute()}{_file_meant(path)}")
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{source}: cannot read '{path.suffix}' files; readable are {', '.join(SUFFIXES)}")


def _file_meant(path: Path) -> str:
    if not path.parent.is_dir():
        return ", which is no folder; check the path"
    match = nearest(path.name, (entry.name for entry in path.parent.iterdir() if entry.is_file()))
    return f"; did you mean '{match}'?" if match else "; check the path"


def _read_text(source: str, path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = problem.object.count(b"\n", 0, problem.start) + 1
        byte = problem.object[problem.start]
        raise DataError(f"{source}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
    except OSError as problem:
        raise DataError(f"{source}: cannot be read: {problem.strerror}; check its permissions") from problem
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{source}:{line}: a NUL byte, which no text has; write the file again")
    if not text.strip():
        raise DataError(f"{source}:1: the file is empty; write rows into it")
    return text


def _lines(text: str) -> list[str]:
    # not splitlines(): it also breaks at U+0085 or U+2028, which tweets contain
    return text.replace("\r\n", "\n").split("\n")


def _read_csv(source: str, text: str) -> Rows:
    limit = csv.field_size_limit(2**31 - 1)  # csv's own 131,072 characters are too few for documents
    try:
        return _table(source, _csv_lines(source, text), "put quotes around a field that holds a comma")
    finally:
        csv.field_size_limit(limit)


def _csv_lines(source: str, text: str) -> Iterator[Line]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    try:
        for fields in reader:
            if fields:
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as problem:
        raise DataError(f"{source}:{start}: {_quoting_fault(str(problem), reader.line_num)}") from None


def _quoting_fault(problem: str, line: int) -> str:
    fault = f"a quote in this row ends within a field (line {line}: {problem})"
    if problem == "unexpected end of data":
        fault = "a quote opened in this row is never closed"
    return f"{fault}; close it, or write a quote inside quotes twice"


def _read_tsv(source: str, text: str) -> Rows:
    return _table(source, _tab_lines(enumerate(_lines(text), 1)), "a field cannot hold a tab")


def _read_orange(source: str, text: str) -> Rows:
    lines = list(enumerate(_lines(text), 1))
    _check_orange_flags(f"{source}:3", lines[2][1] if len(lines) > 2 else "(nothing)")
    header = (1, lines[0][1].split("\t"))
    return _table(source, iter([header, *_tab_lines(lines[3:])]), "a field cannot hold a tab")


def _check_orange_flags(where: str, line: str) -> None:
    # a plain table under this name would lose its first two rows
    for flag in re.split(r"(?<!\\)\s+", line.strip()):
        if flag and flag not in ORANGE_FLAGS and "=" not in flag:
            mend = "a .tab file starts with names, types and flags; with one header line call it .tsv"
            raise DataError(f"{where}: '{flag}' is no flag; {mend}")


def _tab_lines(lines: Iterable[tuple[int, str]]) -> Iterator[Line]:
    return ((number, line.split("\t")) for number, line in lines if line)


def _table(source: str, lines: Iterator[Line], mend: str) -> Rows:
    start, names = next(lines)
    _check_header(f"{source}:{start}", names)
    records, places, width = [], [], len(names)
    for number, fields in lines:
        if len(fields) != width:
            raise DataError(f"{source}:{number}: {len(fields)} fields, the header has {width}; {mend}")
        records.append(dict(zip(names, fields, strict=True)))
        places.append(number)
    if not records:
        raise DataError(f"{source}:{start}: only a header, no rows; add some")
    return Rows(source, records, places)


def _check_header(where: str, names: list[str]) -> None:
    for index, name in enumerate(names):
        if not name.strip():
            raise DataError(f"{where}: column {index + 1} of the header has no name; name it or leave it out")
        if name in names[:index]:
            raise DataError(f"{where}: two columns are called '{name}'; rename one")


def _read_json(source: str, text: str) -> Rows:
    document = _decode(source, 1, text)
    values = document if isinstance(document, list) else _only_list(source, document)
    records = [_object(f"{source} row {row}", value) for row, value in enumerate(values, 1)]
    return Rows(source, records, range(1, len(records) + 1), by_line=False)


def _only_list(source: str, document: Any) -> list[Any]:
    values = document.values() if isinstance(document, dict) else ()
    lists = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) != 1:
        raise DataError(f"{source}:1: {len(lists)} lists of objects; write one array of objects, or one under a key")
    return lists[0]


def _read_jsonl(source: str, text: str) -> Rows:
    lines = [(number, line) for number, line in enumerate(_lines(text), 1) if line.strip()]
    records = [_object(f"{source}:{number}", _decode(source, number, line)) for number, line in lines]
    return Rows(source, records, [number for number, _ in lines])


def _decode(source: str, first_line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        line = first_line + problem.lineno - 1
        raise DataError(
            f"{source}:{line}: column {problem.colno}: {problem.msg}; the file is cut or is not JSON"
        ) from None
    except RecursionError:
        raise DataError(f"{source}:{first_line}: nested too deeply to read; write flat objects") from None


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: {json.dumps(value)[:40]} is not an object; write a row as {{...}}")
    return value


def _read_parquet(source: str, path: Path) -> Rows:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
    except (ArrowException, OSError) as problem:
        cause = str(problem).splitlines()[0]
        raise DataError(f"{source}: not a readable parquet file ({cause}); write it again") from problem
    _check_header(source, table.column_names)
    if not table.num_rows:
        raise DataError(f"{source}: only column names, no rows; add some")
    return Rows(source, table.to_pylist(), range(1, table.num_rows + 1), by_line=False)


def _read_conll(source: str, text: str) -> Rows:
    records, places = [], []
    sentence: list[list[str]] = []
    for number, columns in _conll_lines(source, text):
        if columns and not sentence:
            places.append(number)
        if columns:
            sentence.append(columns)
        elif sentence:
            records.append(_sentence(sentence))
            sentence = []
    return Rows(source, records, places)


def _sentence(lines: list[list[str]]) -> dict[str, Any]:
    tokens, *middle, tags = map(list, zip(*lines, strict=True))
    return {"tokens": tokens, "tags": tags} | {f"column_{i}": column for i, column in enumerate(middle, 2)}


def _conll_lines(source: str, text: str) -> Iterator[Line]:
    """The columns of each line; none where a sentence ends, as it does after the last line."""
    width = 0
    for number, line in enumerate([*_lines(text), ""], 1):
        columns = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or columns[0] == "-DOCSTART-":
            yield number, []
            continue
        width = width or len(columns)
        _check_conll_columns(f"{source}:{number}", columns, width)
        yield number, columns


def _check_conll_columns(where: str, columns: list[str], width: int) -> None:
    if len(columns) != width:
        raise DataError(f"{where}: {len(columns)} columns, the lines before have {width}; write the same in all")
    if width < 2:
        raise DataError(f"{where}: no tag; write a token and its tag on each line, with a tab between")
    if "" in columns:
        raise DataError(f"{where}: column {columns.index('') + 1} is empty; write a token and its tag")


TEXT_READERS: Mapping[str, Callable[[str, str], Rows]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".tab": _read_orange,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    **dict.fromkeys((".conll", ".bio", ".iob", ".iob2"), _read_conll),
}
SUFFIXES = (*TEXT_READERS, ".parquet")
