"""Which runs of a cell come next: trials over learning rates, one more beyond an edge, then a run for each seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from peftkit.bench.cells import Cell, Planned
from peftkit.bench.rates import best_rate
from peftkit.bench.store import Record

DIGITS = 6
"""Of a learning rate beyond the given ones."""


@dataclass(frozen=True)
class Progress:
    """How far a cell is."""

    state: Literal["tuning", "final", "done", "stuck"]
    """`stuck`: every trial failed, so there is no learning rate for the final runs."""
    runs: tuple[Planned, ...]
    """What can be run now, in order."""
    learning_rate: float | None = None
    """That was chosen on dev."""
    rates: tuple[float, ...] = ()
    """That were tried, or are to be."""
    at_edge: bool = False
    """The chosen one is the smallest or the greatest that was tried."""


def progress(cell: Cell, records: Mapping[str, Record]) -> Progress:
    """What is left to do in a cell, given what is there; the same for the same records, whatever their order in time.

    The learning rate with the best score on dev wins, and the smaller one of two that are equally good. A run that
    failed counts as worse than any.
    """
    if not cell.rates:
        return _final(cell, records, None, ())
    rates = list(cell.rates)
    for extensions_left in range(cell.grid.tuning.extensions, -1, -1):
        trials = {rate: cell.trial(rate) for rate in rates}
        pending = tuple(one for one in trials.values() if one.id not in records)
        if pending:
            return Progress("tuning", pending, rates=tuple(rates))
        best = best_rate([records[one.id] for one in trials.values()])
        if best is None:
            return Progress("stuck", (), rates=tuple(rates))
        beyond = _beyond(rates, best) if extensions_left else None
        if beyond is None:
            break
        rates = sorted([*rates, beyond])
    return _final(cell, records, best, tuple(rates))


def _final(cell: Cell, records: Mapping[str, Record], rate: float | None, rates: tuple[float, ...]) -> Progress:
    runs = (cell.final(seed, rate) for seed in cell.grid.seeds)
    pending = tuple(one for one in runs if one.id not in records)
    at_edge = len(rates) > 1 and rate in (rates[0], rates[-1])
    return Progress("final" if pending else "done", pending, rate, rates, at_edge)


def _beyond(rates: list[float], best: float) -> float | None:
    """The rate beyond an edge, as far as the two at that edge are apart; None where the best lies inside."""
    if len(rates) == 1 or best not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / neighbour:.{DIGITS}g}")
