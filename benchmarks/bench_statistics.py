"""Whether the statistics of `peftkit bench` do what they promise, by simulation with known truth.

    python -m benchmarks.bench_statistics [--repetitions 2000]

Right and wrong answers come from a probit model: an example is right where μ + seed + difficulty + noise > 0, all
normal, so that the true accuracy is known exactly. Difficulty is shared by the seeds of a method (correlation 0.8 of
what is behind the answers) and, to 90 %, by methods. Seeds spread by 0, 0.5, 1 and 2 points of accuracy. Told are, for
each way to make an interval, how often it holds the truth; for each paired test, how often it errs where there is no
difference, alone and over a family of 11 after Holm; how often "as good as" is said of methods that are the margin
apart; and power, predicted and found. The result goes to results/bench_statistics.json. About 3 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from peftkit.bench.families import against, holm
from peftkit.bench.power import power, smallest_detectable
from peftkit.bench.resampling import bootstrap_interval, paired_bootstrap_p, stretch, weights
from peftkit.bench.samples import Array, Samples, linearised
from peftkit.bench.statistics import above, interval, limits
from peftkit.bench.variance import Components, MeanSquares, mean_squares
from peftkit.environment import describe

RESULT = Path(__file__).parent / "results" / "bench_statistics.json"
SPREADS, SEEDS, SIZES = (0.0, 0.005, 0.01, 0.02), 5, (600, 1300)
WITHIN, ACROSS = 0.8, 0.9
"""Correlation of what is behind the answers of two seeds, and of the difficulties of two methods."""
COMPARISONS, MARGIN, DRAWS, CHUNK = 11, 0.02, 1000, 250
Ends = tuple[Array, Array]
Draw = Callable[[int], Iterator[tuple[Array, Array]]]
"""From repetitions, numerators and denominators (R, S, N) of one method after the other, all equally good."""


class World:
    """Draws answers of methods whose expected accuracy over all seeds and examples is set."""

    def __init__(self, spread: float, seeds: int, examples: int, random: np.random.Generator) -> None:
        self.spread, self.seeds, self.examples, self.random = spread, seeds, examples, random
        self.difficulty = np.sqrt(WITHIN / (1 - WITHIN))

    def shared(self, repetitions: int) -> Array:
        """(R, 1, N): the difficulty that methods have in common."""
        return self._normal(repetitions, 1, self.examples)

    def answers(self, accuracy: float, common: Array) -> Array:
        """(R, S, N) of 0 and 1 for one more method."""
        repetitions, quantile = len(common), ndtri(accuracy)
        density = np.exp(-(quantile**2) / 2) / np.sqrt(2 * np.pi)
        of_seeds = self.spread / density * np.sqrt(1 + self.difficulty**2)
        middle = quantile * np.sqrt(1 + self.difficulty**2 + of_seeds**2)
        behind = self._difficulties(common) + middle + of_seeds * self._normal(repetitions, self.seeds, 1)
        return (behind + self._normal(repetitions, self.seeds, self.examples) > 0).astype(np.float64)

    def spans(self) -> tuple[Draw, float]:
        """A drawer of micro F1, and the true score of every method.

        Poisson(0.7) spans an example, each found by the probit model, and Poisson spans beside them with a mean
        that varies between examples around 0.12.
        """
        gold, beside, quantile = 0.7, 0.12, ndtri(0.8)
        root = np.sqrt(1 + self.difficulty**2)

        def expected(seed: Array | float) -> Array:
            found = gold * ndtr(quantile + seed / root)
            return 2 * found / (found + beside + gold)

        slope = (expected(1e-4) - expected(-1e-4)) / 2e-4
        of_seeds = self.spread / slope
        nodes, shares = np.polynomial.hermite_e.hermegauss(60)
        truth = float((shares * expected(of_seeds * nodes)).sum() / shares.sum())

        def draw(repetitions: int) -> Iterator[tuple[Array, Array]]:
            common = self.shared(repetitions)
            spans = self.random.poisson(gold, (repetitions, 1, self.examples))
            more = beside * self.random.exponential(size=(repetitions, 1, self.examples))
            while True:
                behind = (
                    quantile * root + self._difficulties(common) + of_seeds * self._normal(repetitions, self.seeds, 1)
                )
                found = self.random.binomial(np.broadcast_to(spans, behind.shape), ndtr(behind))
                wrong = self.random.poisson(np.broadcast_to(more, behind.shape))
                yield 2.0 * found, (found + wrong + spans).astype(np.float64)

        return draw, truth

    def _difficulties(self, common: Array) -> Array:
        """(R, 1, N): of one method."""
        own = self._normal(*common.shape)
        return self.difficulty * (np.sqrt(ACROSS) * common + np.sqrt(1 - ACROSS) * own)

    def _normal(self, *shape: int) -> Array:
        return self.random.standard_normal(shape, dtype=np.float32)


def chunks(repetitions: int) -> Iterator[int]:
    for start in range(0, repetitions, CHUNK):
        yield min(CHUNK, repetitions - start)


def resampled(numerators: Array, denominators: Array) -> Array:
    """(R, S, N) → (B, R): means of the hierarchical bootstrap."""
    repetitions, seeds, examples = numerators.shape
    of_seeds, of_examples = (one.astype(np.float32) for one in weights(seeds, examples, DRAWS))
    above_, below = (
        (of_examples @ one.reshape(-1, examples).T.astype(np.float32)).reshape(DRAWS, repetitions, seeds)
        for one in (numerators, denominators)
    )
    return np.einsum("bs,brs->br", of_seeds, above_ / below)


def satterthwaite(squares: MeanSquares) -> Array:
    """Degrees of freedom of Hillis 2007."""
    seeds, examples = squares.shape
    below = squares.from_seeds**2 / (seeds - 1) + squares.from_examples**2 / (examples - 1)
    return np.divide(squares.variance**2, below, out=np.full_like(below, np.inf), where=below > 0)


def intervals(numerators: Array, denominators: Array) -> dict[str, Ends]:
    """Ends for every repetition, by every way."""
    squares = mean_squares(linearised(numerators, denominators))
    mean, examples = squares.grand, squares.shape[1]
    found = {"chosen": limits(squares, "logit", 0.95, examples)}
    if squares.shape[0] == 1:
        return found
    found["chosen, not on the logit scale"] = limits(squares, "identity", 0.95, examples)
    by_satterthwaite = stdtrit(satterthwaite(squares), 0.975) * np.sqrt(squares.variance)
    found["two-way, Satterthwaite"] = mean - by_satterthwaite, mean + by_satterthwaite
    drawn = np.quantile(resampled(numerators, denominators), [0.025, 0.975], axis=0)
    wider = mean + (drawn - mean) * stretch(squares.shape[0])
    found["bootstrap, percentile"], found["bootstrap, stretched"] = tuple(drawn), tuple(wider)
    over_seeds = stdtrit(squares.shape[0] - 1, 0.975) * np.sqrt(squares.from_seeds)
    found["t over seeds"] = mean - over_seeds, mean + over_seeds
    over_examples = 1.96 * np.sqrt(squares.examples / (squares.shape[0] * examples))
    found["examples alone"] = mean - over_examples, mean + over_examples
    return found


def coverage(draw: Draw, truth: float, repetitions: int) -> dict[str, dict[str, float]]:
    """Shares of intervals that hold the truth, and their mean width, in percent and points."""
    inside: dict[str, list[Array]] = {}
    for count in chunks(repetitions):
        for name, (low, high) in intervals(*next(draw(count))).items():
            held = (low <= truth + 1e-9) & (truth - 1e-9 <= high)
            inside.setdefault(name, []).append(np.stack([held, high - low]))
    return {
        name: {"coverage": _percent(found[0]), "width": _percent(found[1])}
        for name, found in ((name, np.concatenate(parts, axis=1)) for name, parts in inside.items())
    }


def tests(first: tuple[Array, Array], second: tuple[Array, Array]) -> dict[str, Array]:
    """p values (R,) of no difference, by every way; each method is its numerators and denominators."""
    squares = mean_squares(linearised(*first) - linearised(*second))
    by_satterthwaite = 2 * stdtr(satterthwaite(squares), -np.abs(squares.grand) / _error(squares.variance))
    drawn = resampled(*first) - resampled(*second)
    far = np.abs(drawn - squares.grand) * stretch(squares.shape[0]) >= np.abs(squares.grand) - 1e-9
    over_seeds = 2 * stdtr(squares.shape[0] - 1, -np.abs(squares.grand) / _error(squares.from_seeds))
    found = {
        "chosen": squares.p_value(),
        "two-way, Satterthwaite": by_satterthwaite,
        "paired bootstrap": (1 + far.sum(axis=0)) / (1 + DRAWS),
        "paired t over seeds": over_seeds,
    }
    if (first[1] == 1).all():
        found["McNemar, first seed"] = mcnemar_all(first[0][:, 0] - second[0][:, 0])
    return found


def mcnemar_all(apart: Array) -> Array:
    """Of (R, N) differences of answers; what `mcnemar` gives for each row."""
    from scipy.special import bdtr

    only = (apart > 0).sum(axis=1), (apart < 0).sum(axis=1)
    return np.minimum(2 * bdtr(np.minimum(*only), only[0] + only[1], 0.5), 1.0)


def false_positives(draw: Draw, repetitions: int) -> dict[str, dict[str, float]]:
    """11 methods against an equally good reference: errors of one test, and of any after Holm, in percent."""
    found: dict[str, list[Array]] = {}
    for count in chunks(repetitions):
        methods = draw(count)
        reference = next(methods)
        family = [tests(next(methods), reference) for _ in range(COMPARISONS)]
        for name in family[0]:
            found.setdefault(name, []).append(np.stack([one[name] for one in family]))
    result = {}
    for name, parts in found.items():
        values = np.concatenate(parts, axis=1)
        adjusted = np.stack([holm(column) for column in values.T])
        result[name] = {"one_test": _percent(values <= 0.05), "family": _percent((adjusted <= 0.05).any(axis=1))}
    return result


def equivalences(world: World, accuracy: float, repetitions: int) -> dict[str, float]:
    """How often "as good as" and "not worse" are said, in percent, at the margin and where there is no difference."""
    result = {"margin_points": 100 * MARGIN}
    for name, apart in (("at_margin", MARGIN), ("equal", 0.0)):
        equal, not_worse = [], []
        for squares in _differences(world, accuracy - apart, accuracy, repetitions):
            worse = above(squares, -MARGIN)
            equal.append(np.maximum(worse, 1 - above(squares, MARGIN)) <= 0.05)
            not_worse.append(worse <= 0.05)
        result |= {f"{name}_as_good": _percent(np.concatenate(equal))}
        result |= {f"{name}_not_worse": _percent(np.concatenate(not_worse))}
    return result


def powers(world: World, accuracy: float, repetitions: int) -> dict[str, Any]:
    """The difference that is to be found with 80 %, and how often that, half of it, and 1.5 of it are found."""
    pilots = list(_differences(world, accuracy, accuracy, repetitions))
    known = Components(*np.mean([_components(squares) for squares in pilots], axis=0))
    smallest = smallest_detectable(known, world.seeds, world.examples)
    told = [smallest_detectable(one, world.seeds, world.examples) for one in _each(pilots[0], 200)]
    rows = []
    for factor in (0.5, 1.0, 1.5):
        effect = factor * smallest
        found = [
            squares.p_value() <= 0.05
            for squares in _differences(world, accuracy + effect / 2, accuracy - effect / 2, repetitions)
        ]
        predicted = 100 * power(known, effect, world.seeds, world.examples)
        row = {"difference": round(100 * effect, 2), "predicted": round(predicted, 1)}
        rows.append(row | {"found": _percent(np.concatenate(found))})
    middle_80 = [round(100 * float(end), 2) for end in np.quantile(told, [0.1, 0.9])]
    return {
        "smallest_detectable_points": round(100 * smallest, 2),
        "as_told_by_80_percent_of_single_comparisons": middle_80,
        "differences": rows,
    }


def _differences(world: World, first: float, second: float, repetitions: int) -> Iterator[MeanSquares]:
    for count in chunks(repetitions):
        common = world.shared(count)
        yield mean_squares(world.answers(first, common) - world.answers(second, common))


def _each(squares: MeanSquares, most: int) -> Iterator[Components]:
    """The components that each repetition would report."""
    for parts in list(zip(squares.grand, squares.seeds, squares.examples, squares.rest, strict=True))[:most]:
        yield MeanSquares(*parts, squares.shape).components


def _components(squares: MeanSquares) -> list[float]:
    """Unbiased: those below 0 are kept, for a mean over many."""
    seeds, examples = squares.shape
    parts = (squares.seeds - squares.rest) / examples, (squares.examples - squares.rest) / seeds, squares.rest
    return [max(float(part.mean()), 0.0) for part in parts]


def speed(cells: int = 1000, examples: int = 1000) -> dict[str, float]:
    """Seconds of one core for `cells` cells of 5 seeds: intervals, and paired differences with Holm."""
    random = np.random.default_rng(0)
    made = [Samples(random.random((SEEDS, examples)) < 0.85, np.ones((SEEDS, examples))) for _ in range(cells)]
    result = {}
    for name, work in (
        ("intervals", lambda: [interval(one) for one in made]),
        ("differences", lambda: against(made[0], {str(at): one for at, one in enumerate(made[1:])})),
        ("bootstrap_intervals", lambda: [bootstrap_interval(one) for one in made]),
        ("paired_bootstraps", lambda: [paired_bootstrap_p(one, made[0]) for one in made[1:]]),
    ):
        start = time.process_time()
        work()
        result[name] = round(time.process_time() - start, 2)
    return result


def _error(variance: Array) -> Array:
    return np.sqrt(np.maximum(variance, 1e-18))


def _percent(values: Array) -> float:
    return round(100 * float(np.mean(values)), 2)


def simulate(repetitions: int) -> dict[str, Any]:
    """Everything; each spread and number of examples with random numbers of its own."""
    rows: dict[str, list[dict[str, Any]]] = {"accuracy": [], "micro_f1": [], "pairs": []}
    for at, (examples, spread) in enumerate((size, spread) for size in SIZES for spread in SPREADS):
        here = {"seeds": SEEDS, "examples": examples, "seed_spread_points": 100 * spread}
        world = World(spread, SEEDS, examples, np.random.default_rng([1, at]))
        for accuracy in (0.85, 0.97):
            draw = _accuracy(world, accuracy)
            rows["accuracy"].append({"accuracy": accuracy} | here | coverage(draw, accuracy, repetitions))
            show(rows["accuracy"][-1])
        if examples == SIZES[0]:
            draw, truth = world.spans()
            row = {"micro_f1": round(truth, 4)} | here | coverage(draw, truth, repetitions)
            rows["micro_f1"].append(row | {"tests": false_positives(draw, repetitions)})
            show(rows["micro_f1"][-1])
        row = {"accuracy": 0.85} | here | {"tests": false_positives(_accuracy(world, 0.85), repetitions)}
        row |= {"equivalence": equivalences(world, 0.85, repetitions), "power": powers(world, 0.85, repetitions)}
        rows["pairs"].append(row)
        show(rows["pairs"][-1])
    return rows | {"few_seeds": list(few_seeds(repetitions))}


def few_seeds(repetitions: int) -> Iterator[dict[str, Any]]:
    """Three and two seeds; and one, of which the interval speaks of new examples alone."""
    for seeds, spread in ((3, 0.0), (3, 0.02), (2, 0.0), (2, 0.02), (1, 0.0)):
        world = World(spread, seeds, SIZES[0], np.random.default_rng([2, seeds, int(1000 * spread)]))
        row = {"accuracy": 0.85, "seeds": seeds, "examples": SIZES[0], "seed_spread_points": 100 * spread}
        row |= coverage(_accuracy(world, 0.85), 0.85, repetitions)
        show(row)
        yield row


def summary(found: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Lowest and highest figure of every way over all worlds of five seeds, in percent."""
    seen: dict[str, dict[str, list[float]]] = {}
    for row in found["accuracy"] + found["micro_f1"] + found["pairs"]:
        ways = {name: value for name, value in row.items() if isinstance(value, dict) and "coverage" in value}
        for name, value in [*ways.items(), *row.get("tests", {}).items()]:
            for kind in value.keys() - {"width"}:
                seen.setdefault(kind, {}).setdefault(name, []).append(value[kind])
    return {kind: {name: [min(all_), max(all_)] for name, all_ in ways.items()} for kind, ways in sorted(seen.items())}


def _accuracy(world: World, accuracy: float) -> Draw:
    def draw(count: int) -> Iterator[tuple[Array, Array]]:
        common = world.shared(count)
        while True:
            right = world.answers(accuracy, common)
            yield right, np.ones_like(right)

    return draw


def show(row: dict[str, Any]) -> None:
    """One line of what was found."""
    print(" ".join(f"{name} {value}" for name, value in row.items() if not isinstance(value, dict)))
    for name, value in row.items():
        if isinstance(value, dict) and "coverage" in value:
            print(f"  {name:32} holds the truth in {value['coverage']:5} %, {value['width']} points wide")
    for name, value in row.get("tests", {}).items():
        print(f"  {name:32} errs in {value['one_test']} % of tests, {value['family']} % of families")
    if "power" in row:
        print(f"  as good as: {row['equivalence']}\n  power: {row['power']}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    repetitions = parser.parse_args().repetitions
    start = time.process_time()
    found = simulate(repetitions)
    result = {
        "command": " ".join(["python -m benchmarks.bench_statistics", *sys.argv[1:]]),
        "repetitions": repetitions,
        "monte_carlo_error_at_95": round(100 * float(np.sqrt(0.95 * 0.05 / repetitions)), 2),
        "bootstrap_draws": DRAWS,
        "processor_seconds": round(time.process_time() - start, 1),
        "seconds_of_1000_cells": speed(),
        "lowest_and_highest_percent": summary(found),
    }
    RESULT.write_text(json.dumps(result | found | {"environment": describe()}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
