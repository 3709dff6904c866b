"""What runs take, told from those that are there."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

SLACK = 1.1
"""Runs may take so much longer than those before them before a plan fails."""


@dataclass(frozen=True)
class Timed:
    """What a run took, in seconds."""

    method: str
    steps: int
    seconds: float
    """Of its process, from start to end."""
    training: float
    """Of its steps alone."""
    answering: float = 0.0
    """Of the second look at dev, which keeps the answers."""


@dataclass(frozen=True)
class Price:
    """Of one method."""

    start: float
    """Seconds of everything but steps: imports, data, weights, scoring dev once."""
    step: float


@dataclass(frozen=True)
class Prices:
    """Of all methods; what was never seen counts as the dearest that was, whichever part of it."""

    known: dict[str, Price]
    unknown: Price
    answering: float

    @classmethod
    def of(cls, runs: Iterable[Timed]) -> Prices | None:
        """None without any run to go by."""
        by_method: dict[str, list[Timed]] = {}
        for run in runs:
            if run.steps:
                by_method.setdefault(run.method, []).append(run)
        if not by_method:
            return None
        known = {name: _price(found) for name, found in by_method.items()}
        dearest = Price(max(one.start for one in known.values()), max(one.step for one in known.values()))
        answering = [run.answering for found in by_method.values() for run in found if run.answering]
        return cls(known, dearest, fmean(answering) if answering else 0.0)

    def seconds(self, method: str, steps: int, answers: bool) -> float:
        """That a run is expected to take, with some slack."""
        price = self.known.get(method, self.unknown)
        return SLACK * (price.start + steps * price.step + (self.answering if answers else 0.0))


def _price(runs: Sequence[Timed]) -> Price:
    start = fmean(max(0.0, run.seconds - run.training - run.answering) for run in runs)
    return Price(start, sum(run.training for run in runs) / sum(run.steps for run in runs))


def makespan(seconds: Iterable[float], workers: int) -> float:
    """How long runs take on several workers, each of which takes the longest that is left when it is free."""
    busy = [0.0] * workers
    for one in sorted(seconds, reverse=True):
        heapq.heapreplace(busy, busy[0] + one)
    return max(busy)
