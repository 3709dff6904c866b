"""Successive halving over (method, learning rate), fitted into what is left of a budget of time.

Jamieson & Talwalkar 2016 (arXiv:1502.07943): train all arms for a few steps, keep the best third, train those three
times as long, and so on. Every rung trains anew, with a schedule of its own length, so that a score is that of a
finished training and not of one cut short. The last rung holds one arm a method, with several seeds and one length for
all, full fine-tuning's best among them: on it the statement rests. Nothing here runs or reads anything; what comes next
follows from rungs, results, prices and the seconds that are left.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from peftkit.bench.advice.prices import Prices, makespan
from peftkit.schema import Section

ETA = 3
"""One arm in so many goes on, for so many times the steps (the authors' choice for Hyperband is 3 or 4)."""
REFERENCE = "full"
"""The method whose best arm is always in the last rung, if it runs at all."""
FINALISTS = (3, 2)
"""Methods in the last rung beside the reference; the second where the first would not fit."""
SEEDS = (1, 2, 3)
"""Of the last rung; 0, which chooses, is none of them."""
MOST_SEEDS = 5
"""As many as the last rung comes to have where time is left."""
FEWEST_STEPS = 16
"""Below these nothing is worth comparing, unless the configuration itself trains for fewer."""
GOOD_STEPS = 100
"""Of the last rung, from which on more learning rates are worth more than more steps."""


class Arm(Section):
    """A method with a learning rate."""

    method: str
    learning_rate: float


class Rung(Section):
    """Arms that are trained for equally many steps."""

    steps: int
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0,)
    last: bool = False
    """Keeps answers; there may be several, of one length, with further seeds."""

    @property
    def trials(self) -> tuple[Trial, ...]:
        """One run each, in an order that leaves whole rounds of all arms where it is cut."""
        return tuple(Trial(arm, self.steps, seed, self.last) for seed in self.seeds for arm in self.arms)


class Trial(NamedTuple):
    """One run of an arm."""

    arm: Arm
    steps: int
    seed: int
    last: bool


class Outcome(NamedTuple):
    """What came of a run."""

    goodness: float | None
    """The score on dev, with the sign that makes more better; None where the run failed."""
    loss: float = 0.0
    """Of the last training steps; it decides between equal scores, such as of arms that have learnt nothing yet."""


Results = Mapping[Trial, Outcome]


@dataclass(frozen=True)
class Plan:
    """The next rung and what is to follow it."""

    rung: Rung
    sizes: tuple[int, ...]
    """Arms in each rung from the next on."""
    steps: tuple[int, ...]
    seeds: int
    """Of the last rung."""
    seconds: float
    """That all of it is expected to take."""


@dataclass(frozen=True)
class Limits:
    """What a plan has to keep to."""

    seconds: float
    """That are left."""
    workers: int
    least_steps: int
    """That every method can be trained for."""
    most_steps: int
    """The configuration's own."""

    @property
    def fewest(self) -> int:
        """Steps of the first rung."""
        return min(self.most_steps, max(FEWEST_STEPS, self.least_steps))


def next_plan(
    rates: Mapping[str, Sequence[float]], rungs: Sequence[Rung], results: Results, prices: Prices, limits: Limits
) -> Plan | None:
    """What to do next; None where all is done, or nothing that is worth doing fits into the time that is left.

    Args:
        rates: those of each method in the order of trial; how many are tried depends on the time.
        rungs: that were begun; all of their runs have results.
    """
    if not rungs:
        return _best(list(_first(rates)), prices, limits, limits.fewest)
    before = rungs[-1]
    if before.last:
        return _another_seed(rungs, results, prices, limits)
    ways = [way for count in FINALISTS if (way := _onward(before, results, count))]
    return _best(ways, prices, limits, before.steps)


def least_seconds(rates: Mapping[str, Sequence[float]], prices: Prices, limits: Limits) -> float:
    """What the smallest comparison with all seeds takes."""
    return min(_cost(way, limits.fewest, len(SEEDS), prices, limits) for way in _first(rates))


def survivors(rung: Rung, results: Results, count: int) -> list[Arm]:
    """The best arms of a rung, and the reference's best beside them."""
    ranked = _ranked(rung, results)
    kept = ranked[:count]
    reference = next((arm for arm in ranked if arm.method == REFERENCE), None)
    return kept if reference is None or reference in kept else [*kept, reference]


def finalists(rung: Rung, results: Results, count: int) -> list[Arm]:
    """The best arm of each of the best methods, and the reference's."""
    best: dict[str, Arm] = {}
    for arm in _ranked(rung, results):
        best.setdefault(arm.method, arm)
    others = [arm for arm in best.values() if arm.method != REFERENCE][:count]
    return [arm for arm in best.values() if arm in others or arm.method == REFERENCE]


def _ranked(rung: Rung, results: Results) -> list[Arm]:
    """Arms that ended well, the best first: by score on dev, then by training loss, then the smaller rate."""
    found = {arm: [results[one] for one in rung.trials if one.arm == arm and one in results] for arm in rung.arms}
    keyed = []
    for arm, outcomes in found.items():
        scores = [one.goodness for one in outcomes if one.goodness is not None]
        if scores:
            loss = sum(one.loss for one in outcomes) / len(outcomes)
            keyed.append((-sum(scores) / len(scores), loss, arm.learning_rate, arm.method, arm))
    return [one[-1] for one in sorted(keyed, key=lambda one: one[:-1])]


class _Way(NamedTuple):
    """Arms, and how they are halved."""

    arms: tuple[Arm, ...]
    sizes: tuple[int, ...]
    """Arms of the rungs before the last; empty where these are the finalists."""
    finalists: int
    """Methods of the last rung, the reference among them."""


def _first(rates: Mapping[str, Sequence[float]]) -> Iterator[_Way]:
    """Ways to begin, the richest first: as many rates of each method as there are, or fewer."""
    for count in range(max(map(len, rates.values()), default=0), 0, -1):
        arms = tuple(Arm(method=name, learning_rate=one) for name, known in rates.items() for one in known[:count])
        for kept in FINALISTS:
            yield _way(arms, kept)


def _way(arms: tuple[Arm, ...], kept: int) -> _Way:
    methods = {arm.method for arm in arms}
    count = min(len(methods), kept + (REFERENCE in methods))
    if len(arms) <= count:
        return _Way(arms, (), count)
    sizes = [len(arms)]
    while -(-sizes[-1] // ETA) > count:
        sizes.append(-(-sizes[-1] // ETA))
    return _Way(arms, tuple(sizes), count)


def _onward(before: Rung, results: Results, kept: int) -> _Way | None:
    """From a finished rung that was not the last; None where all of it failed."""
    size = -(-len(before.arms) // ETA)
    last = finalists(before, results, kept)
    if last and size > len(last):
        return _way(tuple(survivors(before, results, size)), kept)
    return _Way(tuple(last), (), len(last)) if last else None


def _best(ways: Sequence[_Way], prices: Prices, limits: Limits, least: int) -> Plan | None:
    """The richest way with a good length of the last rung, or else that with the longest; fewer seeds as a last resort.

    Args:
        least: steps of the last rung.
    """
    good = min(limits.most_steps, max(GOOD_STEPS, least))
    for seeds in range(len(SEEDS), 0, -1):
        found = [(way, _longest(way, seeds, prices, limits, least)) for way in ways]
        fitting = [(way, steps) for way, steps in found if steps]
        if fitting:
            chosen = next((one for one in fitting if one[1] >= good), None) or max(fitting, key=lambda one: one[1])
            return _plan(*chosen, seeds, prices, limits)
    return None


def _longest(way: _Way, seeds: int, prices: Prices, limits: Limits, least: int) -> int:
    """Steps of the last rung with which the whole just fits; 0 where none do."""
    lengths = range(least, max(least, limits.most_steps) + 1)
    fitting = bisect_right(lengths, limits.seconds, key=lambda steps: _cost(way, steps, seeds, prices, limits))
    return lengths[fitting - 1] if fitting else 0


def _lengths(way: _Way, last: int, fewest: int) -> tuple[int, ...]:
    """Steps of each rung, the last included: each a third of the next, and never below the fewest."""
    levels = len(way.sizes)
    return tuple(min(last, max(fewest, round(last / ETA ** (levels - level)))) for level in range(levels + 1))


def _cost(way: _Way, last: int, seeds: int, prices: Prices, limits: Limits) -> float:
    """Seconds of a way, as if the dearest arms always survived."""
    *steps, end = _lengths(way, last, limits.fewest)
    total = 0.0
    for size, length in zip(way.sizes, steps, strict=True):
        each = sorted((prices.seconds(arm.method, length, False) for arm in way.arms), reverse=True)
        total += makespan(each[: size + 1], limits.workers)
    methods = {arm.method for arm in way.arms}
    each = sorted((prices.seconds(method, end, True) for method in methods), reverse=True)
    return total + makespan(each[: way.finalists] * seeds, limits.workers)


def _plan(way: _Way, last: int, seeds: int, prices: Prices, limits: Limits) -> Plan:
    steps = _lengths(way, last, limits.fewest)
    chosen = SEEDS[:seeds] if not way.sizes else (0,)
    rung = Rung(steps=steps[0], arms=way.arms, seeds=chosen, last=not way.sizes)
    seconds = _cost(way, last, seeds, prices, limits)
    return Plan(rung, (*way.sizes, way.finalists), steps, seeds, seconds)


def _another_seed(rungs: Sequence[Rung], results: Results, prices: Prices, limits: Limits) -> Plan | None:
    """The last rung once more, where there is time for it."""
    last = [rung for rung in rungs if rung.last]
    seeds = [seed for rung in last for seed in rung.seeds]
    done = [
        arm
        for arm in last[0].arms
        if any(results[one].goodness is not None for one in last[0].trials if one.arm == arm)
    ]
    if len(seeds) >= MOST_SEEDS or len(done) < 2:
        return None
    steps = last[0].steps
    seconds = makespan((prices.seconds(arm.method, steps, True) for arm in done), limits.workers)
    if seconds > limits.seconds:
        return None
    rung = Rung(steps=steps, arms=tuple(done), seeds=(max(seeds) + 1,), last=True)
    return Plan(rung, (len(done),), (steps,), 1, seconds)
