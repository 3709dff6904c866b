"""What an audit returns: figures of each split, findings, and a few decoded examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.audit.findings import Finding
from peftkit.audit.tokens import Tokens
from peftkit.data.rows import Rows
from peftkit.errors import DataError

GRAVE = ("error", "stop")


@dataclass(frozen=True)
class SplitReport:
    """The figures of one split."""

    name: str
    source: str
    rows: int
    examples: int
    tokens: int
    lengths: dict[str, float]
    """Tokens of an example: min, p5, p25, p50, p75, p95, p99, max, mean."""
    histogram: list[tuple[int, int]]
    """(shortest length of a bar, examples)."""
    truncated: int
    dropped: dict[str, int]
    """Rows left out, by reason."""
    labels: dict[str, int]
    """How often each label is supervised."""
    supervised: int
    """Supervised tokens, where labels stand at tokens."""
    masked: int
    """Examples without anything supervised."""
    with_end: int
    """Examples whose end token is supervised."""

    @classmethod
    def of(cls, name: str, rows: Rows, tokens: Tokens, labels: Sequence[str]) -> SplitReport:
        """The report of what was counted."""
        counts = {label: tokens.labels[index] for index, label in enumerate(labels)} if tokens.labels else {}
        return cls(
            name,
            rows.source,
            len(rows),
            len(tokens.lengths),
            sum(tokens.lengths),
            tokens.quantiles(),
            tokens.histogram(),
            tokens.truncated,
            dict(tokens.dropped),
            counts,
            tokens.supervised,
            tokens.masked_count,
            tokens.with_end,
        )


@dataclass(frozen=True)
class Shown:
    """An example as the model sees it: pieces of text, each with what is learnt there; empty where nothing is."""

    where: str
    pieces: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Report:
    """All that an audit found."""

    splits: tuple[SplitReport, ...]
    findings: tuple[Finding, ...]
    """Grave ones first."""
    examples: tuple[Shown, ...]
    notes: tuple[str, ...]

    @property
    def grave(self) -> list[Finding]:
        """What stops training."""
        return [one for one in self.findings if one.severity in GRAVE]

    def lines(self) -> Iterator[str]:
        """One line a finding, as training says them; notes are told with the data."""
        told = [one for one in self.findings if one.severity == "warning"]
        for one in told:
            yield f"audit     {one.line()}"
        if not told and not self.grave:
            yield "audit     no findings"

    def refuse(self) -> None:
        """Stop where something is grave.

        Raises:
            DataError: all of it, each with its first places and its mend.
        """
        if len(self.grave) == 1:
            raise DataError(f"audit: {self.grave[0].line()}{self._way_out()}")
        if self.grave:
            raise DataError("\n  ".join([self.verdict(), *(one.line() for one in self.grave)]))

    def verdict(self) -> str:
        """Why training stops, and how it would not."""
        many = "1 finding stops" if len(self.grave) == 1 else f"{len(self.grave)} findings stop"
        return f"audit: {many} training{self._way_out()}"

    def _way_out(self) -> str:
        names = dict.fromkeys(one.name for one in self.grave if one.severity == "stop")
        return f"; to let it through: {' '.join(f'--allow {name}' for name in names)}" if names else ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "splits": [dataclasses.asdict(one) for one in self.splits],
            "findings": [one.as_dict() for one in self.findings],
            "examples": [dataclasses.asdict(one) for one in self.examples],
            "notes": list(self.notes),
            "stops": bool(self.grave),
        }
