"""What two runs of one backbone do otherwise: what they add to it, module by module, their heads and their settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.artifacts.combine import check_same_backbone
from peftkit.artifacts.combined_heads import head_difference
from peftkit.artifacts.loading import load_run
from peftkit.artifacts.low_rank import Change, inner, length
from peftkit.artifacts.updates import update_of
from peftkit.changes import differences, flat
from peftkit.config import settings_of


@dataclass(frozen=True)
class Pair:
    """The change of one parameter in both runs, or of all together."""

    name: str
    norms: tuple[float, float]
    """‖ΔW‖, Frobenius; 0 where a run leaves it alone."""
    cosine: float | None
    """Of the angle between both changes; None where one of them is 0."""


@dataclass(frozen=True)
class DiffReport:
    """Two runs side by side."""

    runs: tuple[str, str]
    whole: Pair
    parameters: tuple[Pair, ...]
    heads: str
    """In what the heads differ; empty where they are equal."""
    settings: dict[str, tuple[Any, Any]]
    """By dotted name, those that differ."""
    scores: tuple[dict[str, float], dict[str, float]]
    """What training recorded of the tuned models."""


def diff(one: Path, other: Path) -> DiffReport:
    """Compare what two runs add to their backbone.

    Raises:
        UsageError: they are of different backbones, or no finished runs.
        NotMergeable: one whose method changes no weights.
    """
    check_same_backbone([one, other])
    ours, theirs = (update_of(load_run(folder)) for folder in (one, other))
    names = dict.fromkeys([*ours.changes, *theirs.changes])
    inners = {name: _inners(ours.changes.get(name), theirs.changes.get(name)) for name in names}
    sums = (sum(column) for column in zip(*inners.values(), strict=True)) if inners else (0.0, 0.0, 0.0)
    settings = [flat(settings_of(update.origin.run)) for update in (ours, theirs)]
    scores = [update.origin.manifest.get("scores", {}).get("after", {}) for update in (ours, theirs)]
    return DiffReport(
        runs=(str(one), str(other)),
        whole=_pair("all", *sums),
        parameters=tuple(_pair(name, *found) for name, found in inners.items()),
        heads=head_difference(ours, theirs),
        settings=differences(*settings),
        scores=(scores[0], scores[1]),
    )


def _inners(one: Change | None, other: Change | None) -> tuple[float, float, float]:
    """⟨one, one⟩, ⟨other, other⟩ and ⟨one, other⟩."""
    squares = [0.0 if change is None else length(change) ** 2 for change in (one, other)]
    return squares[0], squares[1], 0.0 if one is None or other is None else inner(one, other)


def _pair(name: str, ours: float, theirs: float, both: float) -> Pair:
    norms = (ours**0.5, theirs**0.5)
    return Pair(name, norms, both / (norms[0] * norms[1]) if all(norms) else None)
