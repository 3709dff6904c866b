"""JSON, JSON lines, CoNLL columns and parquet. The readers yield (place, record), like those of tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from peftkit.data.squad import flattened
from peftkit.data.tables import Line, check_header, stripped
from peftkit.errors import DataError, first_line

HALF = re.compile("[\ud800-\udfff]")


def read_json(source: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """One array of objects, one under a key, or SQuAD's nested form; places are row numbers."""
    document = flattened(source, _decode(source, 1, "".join(lines)))
    values = document if isinstance(document, list) else _only_list(source, document)
    for row, value in enumerate(values, 1):
        _check_characters(f"{source} row {row}", value)
        yield row, _object(f"{source} row {row}", value)


def _only_list(source: str, document: Any) -> list[Any]:
    values = document.values() if isinstance(document, dict) else ()
    lists = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) != 1:
        raise DataError(f"{source}:1: {len(lists)} lists of objects; write one array of objects, or one under a key")
    return lists[0]


def read_jsonl(source: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """One object a line."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            value = _decode(source, number, stripped(line))
            if "\\u" in line:
                _check_characters(f"{source}:{number}", value)
            yield number, _object(f"{source}:{number}", value)


def _check_characters(where: str, value: Any) -> None:
    """Refuse what only an escape can bring into a text: \\u0000, and half of a surrogate pair."""
    for text in _strings(value):
        if "\0" in text:
            raise DataError(f"{where}: a NUL character (\\u0000), which no text has; write the file again")
        if not text.isascii() and HALF.search(text):
            raise DataError(f"{where}: half a character (\\ud800 to \\udfff alone); write both halves, or neither")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def _decode(source: str, first: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        line = first + problem.lineno - 1
        raise DataError(
            f"{source}:{line}: column {problem.colno}: {problem.msg}; the file is cut or is not JSON"
        ) from None
    except RecursionError:
        raise DataError(f"{source}:{first}: nested too deeply to read; write flat objects") from None


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: {json.dumps(value)[:40]} is not an object; write a row as {{...}}")
    return value


def read_parquet(source: str, path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
    except (ArrowException, OSError) as problem:
        raise DataError(f"{source}: not a readable parquet file ({first_line(problem)}); write it again") from problem
    check_header(source, table.column_names)
    if not table.num_rows:
        raise DataError(f"{source}: only column names, no rows; add some")
    records: list[dict[str, Any]] = table.to_pylist()
    return records


def read_conll(source: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Sentences of a token and its tag a line; a blank line, or one of white space, ends a sentence."""
    place, sentence = 0, list[list[str]]()
    for number, columns in _conll_lines(source, lines):
        if columns:
            place = place if sentence else number
            sentence.append(columns)
        elif sentence:
            yield place, _sentence(sentence)
            sentence = []
    if sentence:
        yield place, _sentence(sentence)


def _sentence(lines: list[list[str]]) -> dict[str, Any]:
    tokens, *middle, tags = map(list, zip(*lines, strict=True))
    return {"tokens": tokens, "tags": tags} | {f"column_{i}": column for i, column in enumerate(middle, 2)}


def _conll_lines(source: str, lines: Iterable[str]) -> Iterator[Line]:
    """The columns of each line; none where a sentence ends."""
    width = 0
    for number, line in enumerate(map(stripped, lines), 1):
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
