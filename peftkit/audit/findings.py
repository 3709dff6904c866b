"""One finding: what is wrong, how often, and where first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from peftkit.audit.catalogue import CHECKS, Severity
from peftkit.audit.settings import AuditSettings
from peftkit.data.rows import Rows

KEPT = 50
"""Places that a finding keeps."""
SHOWN = 3
"""Places that a line shows."""


@dataclass(frozen=True)
class Finding:
    """What a check found in one split."""

    name: str
    split: str
    count: int
    what: str
    places: tuple[str, ...] = ()
    """The first of them: `train.tsv:17`, in order."""
    share: float = 0.0
    """Of the rows of the split."""
    severity: Severity = "warning"
    mend: str = ""
    indices: Sequence[int] = field(default=(), repr=False, compare=False)
    """All of the rows, where the finding is of rows."""

    def line(self) -> str:
        """All of it in one line, for people."""
        shown = ", ".join(self.places[:SHOWN])
        more = f" and {self.count - SHOWN:,} more" if self.places and self.count > SHOWN else ""
        where = f" ({shown}{more})" if shown else ""
        return f"{self.name}: {self.split}: {self.what}{where}; {self.mend}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "indices"}
        return values | {"places": list(self.places)}


def found_in(name: str, split: str, rows: Rows, indices: Sequence[int], what: str) -> list[Finding]:
    """The finding for the rows at `indices`; none where there are none."""
    if not len(indices):
        return []
    one = finding(name, split, len(indices), what, map(rows.where, indices[:KEPT]), len(indices) / len(rows))
    return [dataclasses.replace(one, indices=indices)]


def finding(
    name: str, split: str, count: int, what: str, places: Iterable[str] = (), share: float = 0.0, mend: str = ""
) -> Finding:
    """A finding with the severity and the mend of the catalogue."""
    check = CHECKS[name]
    kept = tuple(islice(places, KEPT))
    return Finding(name, split, count, what, kept, share, check.severity, mend or check.mend)


def counted(count: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def graded(findings: Iterable[Finding], settings: AuditSettings) -> list[Finding]:
    """Findings above their threshold stop; what is allowed warns. Grave ones come first."""
    order = ("error", "stop", "warning", "note")
    return sorted((_graded(one, settings) for one in findings), key=lambda one: order.index(one.severity))


def _graded(one: Finding, settings: AuditSettings) -> Finding:
    threshold = CHECKS[one.name].threshold
    severity = one.severity
    if threshold and one.share > getattr(settings, threshold):
        severity = "stop"
    if severity == "stop" and one.name in settings.allow:
        return dataclasses.replace(one, severity="warning", what=f"{one.what}, which is allowed")
    return dataclasses.replace(one, severity=severity)
