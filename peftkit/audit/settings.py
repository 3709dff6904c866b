"""The audit's settings: what is allowed, and from where on a finding is grave."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from peftkit.audit.catalogue import CHECKS
from peftkit.schema import Section, did_you_mean

Share = Annotated[float, Field(ge=0, le=1)]


class AuditSettings(Section):
    """What the audit of the data lets through. Shares are of the rows of a split."""

    allow: tuple[str, ...] = ()
    """Findings by name that do not stop training."""
    overlap: Share = 0.05
    """Most rows of dev or test whose text is in train."""
    duplicates: Share = 0.5
    """Most rows that repeat an earlier one."""
    conflicts: Share = 0.05
    """Most rows whose text has another label elsewhere in the split."""
    dropped: Share = 0.5
    """Most rows of train that are left out."""
    masked: Share = 0.5
    """Most examples without anything supervised."""
    label_per_row: Share = 0.8
    """Most different labels, as a share of the rows."""
    one_sided: Share = 0.95
    """The largest share of one label in train that is not told."""
    rare_label: Annotated[int, Field(ge=0)] = 3
    """Labels with fewer rows in train are told."""
    unknown_tokens: Share = 0.2
    """The largest share of unknown tokens that is not told."""
    long_text: Annotated[int, Field(gt=0)] = 100_000
    """Characters from which a text is told."""

    @field_validator("allow")
    @classmethod
    def _known(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        for name in allow:
            check_name(name)
        return allow


def check_name(name: str) -> None:
    """Refuse the name of a finding that there is not, or that cannot be allowed.

    Raises:
        ValueError: with the name that was meant.
    """
    if name not in CHECKS:
        raise ValueError(f"no finding '{name}'{did_you_mean(name, CHECKS)}")
    if CHECKS[name].severity == "error":
        raise ValueError(f"'{name}' cannot be allowed: there is nothing to train on; {CHECKS[name].mend}")
