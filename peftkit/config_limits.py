"""How much of a configuration is read: a small file can name a huge one, and aliases of aliases grow without end."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftkit.errors import UsageError
from peftkit.schema import nearest

MOST_BYTES = 2**20
"""Bytes of a file, and characters of its values once every alias is written out."""
MOST_VALUES = 20_000
"""Keys, values and list items once every alias is written out; the largest models have a thousand modules to name."""
MOST_DEPTH = 50
MOST_KEY = 200
"""Characters of a key."""
HALF = re.compile("[\ud800-\udfff]")


class TooMuch(Exception):
    """More than is read of a configuration, and the line where that shows."""

    def __init__(self, line: int, message: str) -> None:
        self.line = line
        super().__init__(message)


class Budget:
    """What may still be read of one document."""

    def __init__(self) -> None:
        self._values = self._characters = self._depth = 0

    def spend(self, text: str, line: int) -> None:
        """Count one value.

        Raises:
            TooMuch: it is one too many, or the values are too long together.
        """
        self._values += 1
        self._characters += len(text)
        for found, most, what in (
            (self._values, MOST_VALUES, "keys and values"),
            (self._characters, MOST_BYTES, "characters of values"),
        ):
            if found > most:
                raise TooMuch(
                    line,
                    f"more than {most:,} {what}, those that aliases repeat included, are not read; "
                    "keep settings in it, and data in files of their own",
                )

    @contextmanager
    def inside(self, line: int) -> Iterator[None]:
        """Count one level of nesting while it is read.

        Raises:
            TooMuch: it is one too deep.
        """
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise TooMuch(line, f"nested more than {MOST_DEPTH} deep, which is not read; no setting lies that deep")
        yield
        self._depth -= 1


def read_text(path: Path) -> str:
    """A configuration file, of which no more than the limit is ever in memory.

    Raises:
        UsageError: it is missing, no plain file, too large, or not UTF-8.
    """
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise UsageError(f"{path} is a folder; name a configuration file in it")
        if not stat.S_ISREG(kind):
            raise UsageError(f"{path} is no plain file; write what it gives into a file, and name that")
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else None
        hint = f"; did you mean '{path.parent / near}'?" if near else "; `peftkit ls` lists what is shipped"
        raise UsageError(f"no configuration file {path}{hint}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
    if len(content) > MOST_BYTES:
        raise UsageError(
            f"{path} has more than {MOST_BYTES:,} bytes, the most that is read of a configuration; "
            "keep settings in it, and data in files of their own"
        )
    return _decoded(content, path)


def character_problem(text: str) -> str | None:
    """Why a text cannot be a setting: only an escape can bring these into one."""
    if "\0" in text:
        return "a NUL character, which no setting has; leave it out"
    if not text.isascii() and HALF.search(text):
        return "half a character (\\ud800 to \\udfff alone); write both halves, or neither"
    return None


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise UsageError(
            f"cannot read {path}: line {line} has byte 0x{byte:02x}, which is not UTF-8; save it as UTF-8"
        ) from None
