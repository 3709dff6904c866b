"""Texts to predict, as a person gives them: on the command line, in a file, or through stdin."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit.data.files import read_file
from peftkit.data.rows import Rows
from peftkit.errors import UsageError
from peftkit.processes import require_one_process


def typed_rows(task: Any, texts: Sequence[str], pairs: Sequence[str] | None, file: Path | None) -> Rows:
    """Rows for a task: of a table with its columns, or of texts, one a line.

    Raises:
        UsageError: no text, no such file, or text that is not UTF-8.
    """
    if file and file.suffix not in ("", ".txt"):
        return read_file(file)
    if texts:
        return _rows(task, texts, pairs)
    lines = _lines(_read(file) if file else _read_stdin())
    if task_pairs := getattr(task, "text_pair", None):
        halves = [line.split("\t") for line in lines]
        if any(len(half) != 2 for half in halves):
            raise UsageError(f"each line must be the text, a tab, and the second text ('{task_pairs}')")
        return _rows(task, [one for one, _ in halves], [two for _, two in halves])
    return _rows(task, lines, None)


def lines_of(file: Path) -> list[str]:
    """One text a line of a file. Raises as `typed_rows` does."""
    return _lines(_read(file))


def _rows(task: Any, texts: Sequence[str], pairs: Sequence[str] | None) -> Rows:
    rows: Rows = task.rows_from_text(texts, pairs)
    return rows


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"no file {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {error}") from error


def _read_stdin() -> str:
    require_one_process("reading stdin")
    try:
        text = sys.stdin.read()
        text.encode()  # some locales let foreign bytes through as surrogates, which no text has
    except UnicodeError as error:
        raise UsageError(f"the input is not UTF-8: {error}") from error
    return text


def _lines(text: str) -> list[str]:
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    if not lines:
        raise UsageError("no text: the input is empty")
    return lines
