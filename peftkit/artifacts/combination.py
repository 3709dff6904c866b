"""The ways to combine what several runs add to one backbone, by their papers' definitions on ΔW, in float64."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftkit.artifacts.low_rank import Change, added, dense, times
from peftkit.artifacts.updates import Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor

How = Literal["linear", "ties", "dare", "magnitude"]
HOWS: tuple[How, ...] = ("linear", "ties", "dare", "magnitude")


@dataclass(frozen=True)
class Recipe:
    """How changes are combined."""

    weights: tuple[float, ...]
    """One a run; negative ones take away (task arithmetic, Ilharco et al. 2023)."""
    how: How = "linear"
    density: float = 1.0
    """Of all that is not linear: the share of numbers that is kept of each run."""
    seed: int = 0
    """Of `dare`."""


def combined(updates: Sequence[Update], names: Sequence[str], recipe: Recipe) -> dict[str, Change]:
    """The combined change of every parameter that a run changes.

    Args:
        names: one a run, which decide what `dare` draws for it; their order does not matter.
    """
    changes = [update.changes for update in updates]
    if recipe.how == "ties":
        return dict(_ties([_largest(one, recipe.density) for one in changes], recipe.weights))
    if recipe.how == "magnitude":
        changes = [dict(_largest(one, recipe.density)) for one in changes]
    if recipe.how == "dare":
        changes = [dict(_dropped(one, name, recipe)) for one, name in zip(changes, names, strict=True)]
    return linear(changes, recipe.weights)


def linear(changes: Sequence[dict[str, Change]], weights: Sequence[float]) -> dict[str, Change]:
    """Σ weight · ΔW, as products of factors where all are such."""
    parts: dict[str, list[Change]] = {}
    for one, weight in zip(changes, weights, strict=True):
        for name, change in one.items():
            parts.setdefault(name, [])
            if weight:
                parts[name].append(times(change, weight))
    return {name: added(found) for name, found in parts.items() if found}


def _largest(changes: dict[str, Change], density: float) -> dict[str, Tensor]:
    """The largest numbers of a whole change by magnitude, over all its parameters together; zeros for the others."""
    import torch

    whole = {name: dense(change) for name, change in changes.items()}
    sizes = torch.cat([one.abs().flatten() for one in whole.values()])
    kept = max(1, round(density * len(sizes)))
    least = sizes.kthvalue(len(sizes) - kept + 1).values
    return {name: one * (one.abs() >= least) for name, one in whole.items()}


def _ties(trimmed: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Elect the sign of every number by the sum over runs, and take the mean of those that have it (Yadav et al. 2023).

    Trimmed changes are multiplied by their weights first: one weight λ for all is the paper's λ τ.
    """
    import torch

    found = {}
    for name in dict.fromkeys(name for one in trimmed for name in one):
        parts = [one[name] * weight for one, weight in zip(trimmed, weights, strict=True) if name in one]
        stacked = torch.stack(parts)
        agreeing = stacked * stacked.sum(0).sign() > 0
        found[name] = (stacked * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
    return found


def _dropped(changes: dict[str, Change], run: str, recipe: Recipe) -> dict[str, Tensor]:
    """Every number kept with probability `density`, and then divided by it (DARE, Yu et al. 2024)."""
    import torch

    found = {}
    for name, change in changes.items():
        whole = dense(change)
        drawn = torch.rand(whole.shape, generator=_generator(recipe.seed, run, name), dtype=torch.float64)
        found[name] = whole * (drawn < recipe.density) / recipe.density
    return found


def _generator(seed: int, run: str, name: str) -> torch.Generator:
    """The same for a parameter of a run, whichever runs it is combined with and in which order."""
    import torch

    digest = hashlib.sha256(f"{seed}\0{run}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
