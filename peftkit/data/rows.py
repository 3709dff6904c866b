"""Rows that know the place they come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peftkit.errors import DataError
from peftkit.schema import did_you_mean


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
        return self.part(0, count)

    def part(self, start: int, stop: int) -> Rows:
        """The rows from `start` up to `stop`."""
        return replace(self, records=self.records[start:stop], places=self.places[start:stop])
