"""How good predictions are: figures of a whole split, and what each row adds to them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "pseudo_perplexity", "ter", "mse", "mae"})
"""Figures of which less is better; of all others more is."""


@dataclass(frozen=True)
class Scores:
    """How good a set of predictions is."""

    headline: str
    """The name in `values` that early stopping watches."""
    values: dict[str, float]
    per_class: list[dict[str, Any]] = field(default_factory=list)
    """One row a class or entity type: name, precision, recall, f1, support."""
    examples: int = 0
    lower_is_better: bool = False
    """Of the headline: true of losses, errors and perplexity."""

    @property
    def value(self) -> float:
        """The headline figure."""
        return self.values[self.headline]

    @property
    def goodness(self) -> float:
        """The headline figure with the sign that makes more better."""
        return -self.value if self.lower_is_better else self.value

    def by(self, figure: str) -> Scores:
        """The same scores under another of their figures."""
        return replace(self, headline=figure, lower_is_better=figure in LOWER_IS_BETTER)


@dataclass(frozen=True)
class Counts:
    """A figure as transform(Σ numerators / Σ denominators), with one of each for a row that takes part in it."""

    numerators: list[float]
    denominators: list[float]
    transform: Literal["identity", "exp"] = "identity"
