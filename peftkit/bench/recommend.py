"""Which method to use for a data set and budget, in plain words, with the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peftkit.bench import numbers
from peftkit.bench.analysis import LEVEL, Analysis, Row
from peftkit.bench.numbers import Scale
from peftkit.bench.pairing import on_shared_seeds
from peftkit.bench.statistics import difference, equivalence


@dataclass(frozen=True)
class Recommendation:
    """A method, and why."""

    method: str
    text: str


def recommend(analysis: Analysis, baselines: Mapping[str, float]) -> Recommendation | None:
    """The cheapest of those that are as good as the best mean, as far as the results tell; None without any score.

    As good as the best is a method that is not separable from it and whose mean is within the margin of its mean, or
    that was tested to be no worse by the margin. Of these, the fewest trainable parameters win, then the shortest
    training.
    """
    if not analysis.scored:
        return None
    best = analysis.scored[0]
    candidates = [row for row in analysis.scored if row is best or _is_as_good(row, best, analysis)]
    chosen = min(candidates, key=_price)
    sentences = [_evidence(chosen, best, analysis), *_others(chosen, candidates), *_doubts(chosen, analysis, baselines)]
    return Recommendation(chosen.entry.method, " ".join(sentences))


def _is_as_good(row: Row, best: Row, analysis: Analysis) -> bool:
    shared = on_shared_seeds(row.entry, best.entry)
    if shared is None or row.entry.method not in analysis.pairs.names or best.entry.method not in analysis.pairs.names:
        return False
    found = equivalence(*shared, analysis.margin)
    return (_p(row, best, analysis) > LEVEL and found.gain >= -analysis.margin) or found.p_not_worse <= LEVEL


def _p(row: Row, best: Row, analysis: Analysis) -> float:
    """Not corrected: correction guards those who say that two differ, and here it would let more count as equal."""
    names = analysis.pairs.names
    return float(analysis.pairs.p_values[names.index(row.entry.method), names.index(best.entry.method)])


def _price(row: Row) -> tuple[float, float, str]:
    """Trainable parameters, then seconds; what was not measured counts as dear."""
    return (_parameters(row), _seconds(row) or float("inf"), row.entry.method)


def _evidence(chosen: Row, best: Row, analysis: Analysis) -> str:
    scale, block = Scale(analysis.block.is_share), analysis.block
    score = f"{scale.score(chosen.mean)} {block.headline}"
    if chosen.interval:
        score += f" (95 % {scale.between(chosen.interval.low, chosen.interval.high)})"
    if chosen is best:
        cheaper = any(_price(row) < _price(chosen) for row in analysis.scored)
        told = "the best mean score" if len(analysis.scored) > 1 else "the only method with a score"
        worse = "; no cheaper method was found to be as good" if cheaper else ""
        return f"{chosen.entry.method}: {told}, {score}{worse}{_next(chosen, analysis)}."
    shared = on_shared_seeds(chosen.entry, best.entry)
    assert shared is not None
    apart = difference(*shared)
    proven = equivalence(*shared, analysis.margin).p_not_worse <= LEVEL
    words = f"no worse than {best.entry.method} by {scale.margin(analysis.margin)} or more (tested)" if proven else ""
    p = _p(chosen, best, analysis)
    if p > LEVEL:
        words = f"not separable from the best mean, {best.entry.method}{'; ' + words if words else ''}"
    return (
        f"{chosen.entry.method}: {words}; {score}, {scale.change(apart.mean)} from {best.entry.method} "
        f"(95 % {scale.change_between(apart.low, apart.high)}, p {numbers.probability(p)} before correction), with "
        f"{_ratio(_parameters(chosen), _parameters(best))} of its trainable parameters"
        f"{_of_time(chosen, best)}."
    )


def _next(best: Row, analysis: Analysis) -> str:
    """How far the second is from the first; empty where the two cannot be paired."""
    second = next((row for row in analysis.scored if row is not best), None)
    names = analysis.pairs.names
    if second is None or best.entry.method not in names or second.entry.method not in names:
        return ""
    shared = on_shared_seeds(second.entry, best.entry)
    assert shared is not None
    scale, apart, p = Scale(analysis.block.is_share), difference(*shared), _p(second, best, analysis)
    return (
        f". Next is {second.entry.method}, {scale.change(apart.mean)} (95 % "
        f"{scale.change_between(apart.low, apart.high)}, p {numbers.probability(p)} before correction)"
    )


def _others(chosen: Row, candidates: list[Row]) -> list[str]:
    others = [row.entry.method for row in candidates if row is not chosen]
    if not others:
        return []
    timed = [(seconds, row) for row in candidates if (seconds := _seconds(row))]
    quickest = min(timed, key=lambda one: one[0])[1] if timed else chosen
    names = ", ".join([chosen.entry.method, *others])
    tie = f"Of {len(candidates)} that are as good ({names}) it trains fewest parameters"
    if all(_parameters(row) == _parameters(chosen) for row in candidates):
        tie = f"{names} are as good and train equally many parameters; it takes least time"
    quick = (
        "" if quickest is chosen or "least time" in tie else f"; {quickest.entry.method} trains in the shortest time"
    )
    return [f"{tie}{quick}."]


def _doubts(chosen: Row, analysis: Analysis, baselines: Mapping[str, float]) -> list[str]:
    """What keeps the recommendation from being more than it is."""
    told = []
    lower = analysis.block.lower_is_better
    for name, value in baselines.items():
        beaten = chosen.interval and (chosen.interval.high < value if lower else chosen.interval.low > value)
        if not beaten:
            told.append(f"It is not shown to beat {name}.")
    if len(chosen.entry.seeds) == 1:
        told.append("It rests on one seed.")
    tested = analysis.pairs.names
    unsure = [row.entry.method for row in analysis.scored if row.entry.method not in tested]
    if unsure and len(analysis.scored) > 1:
        told.append(f"Not compared for want of shared seeds or rows: {', '.join(unsure)}.")
    return told


def _ratio(part: float, whole: float) -> str:
    return numbers.share(part, whole) or "an unknown share"


def _of_time(chosen: Row, best: Row) -> str:
    mine, theirs = _seconds(chosen), _seconds(best)
    return f" and {100 * mine / theirs:.0f} % of its training time" if mine and theirs else ""


def _parameters(row: Row) -> float:
    return numbers.mean(run.trainable_parameters for run in row.entry.runs) or 0.0


def _seconds(row: Row) -> float | None:
    return numbers.mean(run.cost.seconds if run.cost else None for run in row.entry.runs)
