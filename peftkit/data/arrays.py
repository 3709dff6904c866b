"""Many small records in a few arrays, which files can hold and memory can map."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
TYPES: dict[type, str] = {int: "int64", float: "float64"}
"""What becomes an element of an array; all of a column are of one type."""


@dataclass(frozen=True)
class Column:
    """One value for each record: a number, a list of numbers, or whatever else Python can read back as it wrote it."""

    values: Array
    ends: Array | None = None
    """Where the values of each record end; None: each has one."""
    is_text: bool = False
    """The values are bytes of Python literals."""

    @classmethod
    def of(cls, values: Sequence[Any]) -> Column | None:
        """None where the values would not come back as they are.

        Raises:
            OverflowError: a whole number that has no place in eight bytes.
        """
        for kind in TYPES:
            if all(type(one) is kind for one in values):
                return cls(_compact(np.array(values, dtype=TYPES[kind])))
            if all(type(one) is list and all(type(each) is kind for each in one) for one in values):
                flat = np.array([each for one in values for each in one], dtype=TYPES[kind])
                return cls(_compact(flat), _ends(values))
        texts = [repr(one) for one in values]
        try:
            if not all(_is_same(ast.literal_eval(text), one) for text, one in zip(texts, values, strict=True)):
                return None
        except (ValueError, SyntaxError):
            return None
        encoded = [text.encode() for text in texts]
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), _ends(encoded), is_text=True)

    def __len__(self) -> int:
        return len(self.values if self.ends is None else self.ends)

    def at(self, index: int) -> Any:
        """The value of one record, as it was given."""
        if self.ends is None:
            return self.values[index].item()
        part = self.values[self.ends[index - 1] if index else 0 : self.ends[index]]
        return ast.literal_eval(part.tobytes().decode()) if self.is_text else part.tolist()

    def lengths(self) -> list[int]:
        """Of lists: how many numbers each has."""
        assert self.ends is not None
        lengths: list[int] = np.diff(self.ends, prepend=0).tolist()
        return lengths


class Table(Sequence[dict[str, Any]]):
    """Records with the same keys, each made when it is asked for."""

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.columns = dict(columns)

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> Table | None:
        """None where there are no records, they differ in their keys, or would not come back as they are."""
        if not records or any(list(one) != list(records[0]) for one in records):
            return None
        columns = {}
        for name in records[0]:
            column = Column.of([one[name] for one in records])
            if column is None:
                return None
            columns[name] = column
        return cls(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(index)
        return {name: column.at(at) for name, column in self.columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the arrays into a folder; returns what `read` needs to know about them."""
        for number, column in enumerate(self.columns.values()):
            np.save(folder / f"{number}.values.npy", column.values)
            if column.ends is not None:
                np.save(folder / f"{number}.ends.npy", column.ends)
        return {name: {"lists": one.ends is not None, "text": one.is_text} for name, one in self.columns.items()}

    @classmethod
    def read(cls, folder: Path, known: Mapping[str, Any]) -> Table:
        """Map what `write` wrote into memory.

        Raises:
            OSError, ValueError: a file is not there, or is no array.
        """
        columns = {}
        for number, (name, one) in enumerate(known.items()):
            values = np.load(folder / f"{number}.values.npy", mmap_mode="r", allow_pickle=False)
            ends = np.load(folder / f"{number}.ends.npy", mmap_mode="r", allow_pickle=False) if one["lists"] else None
            columns[name] = Column(values, ends, one["text"])
        return cls(columns)


def _ends(values: Sequence[Any]) -> Array:
    return np.cumsum([len(one) for one in values], dtype=np.int64)


def _compact(values: Array) -> Array:
    """Whole numbers in four bytes each, where they fit."""
    if values.dtype.kind != "i" or not len(values):
        return values
    narrow = np.iinfo(np.int32)
    fits = values.min() >= narrow.min and values.max() <= narrow.max
    return values.astype(np.int32) if fits else values


def _is_same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other)
