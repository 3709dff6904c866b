"""The charts of one block: scores with intervals, Pareto fronts, learning curves, forgetting against learning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from peftkit.bench import numbers
from peftkit.bench.analysis import Analysis, Row
from peftkit.bench.block_tables import forgetting
from peftkit.bench.charts import Line, Point, intervals, legend, lines, scatter
from peftkit.bench.document import Charts, Items, Part
from peftkit.bench.numbers import Scale
from peftkit.bench.store import Record

Styles = Mapping[str, int]
"""Method → its place among all, which decides how it is drawn."""
MOST_CURVES = 30
WIDE = 8
"""From how many times the smallest value on an axis is logarithmic."""
Price = Callable[[Record], float | None]
PRICES: tuple[tuple[str, str, float, Price], ...] = (
    ("trainable parameters", "trainable parameters", 1.0, lambda run: run.trainable_parameters),
    ("memory growth", "memory growth, MiB", 2.0**-20, lambda run: run.cost.memory_growth_bytes if run.cost else None),
    ("training time", "training time, s", 1.0, lambda run: run.cost.seconds if run.cost else None),
    ("file size", "artifact, MiB", 2.0**-20, lambda run: run.artifact_bytes or None),
)
"""Caption, axis, factor, and where the figure comes from."""


def scores(analysis: Analysis, styles: Styles, baselines: Mapping[str, float]) -> Charts:
    """Means with their intervals, the best on top."""
    scale = Scale(analysis.block.is_share)
    points = [
        Point(
            row.entry.method,
            row.mean or 0.0,
            0.0,
            styles[row.entry.method],
            row.interval.low if row.interval else None,
            row.interval.high if row.interval else None,
            f"{row.entry.method}: {scale.score(row.mean)}"
            + (f", 95 % {scale.between(row.interval.low, row.interval.high)}" if row.interval else ""),
            tuple(map(float, row.entry.samples.values)) if row.entry.samples else (),
        )
        for row in analysis.scored
    ]
    drawn = intervals(
        points, f"{analysis.block.headline}: mean, 95 % interval, and each seed", [*baselines.items()], _factor(scale)
    )
    return Charts([("", drawn)])


def pareto(analysis: Analysis, styles: Styles) -> list[Part]:
    """Score against what it costs, for each cost that was recorded, and who is on each front."""
    block, drawn, told = analysis.block, [], []
    scale = Scale(block.is_share)
    for caption, label, factor, price in PRICES:
        priced = [(row, numbers.mean(price(run) for run in row.entry.runs)) for row in analysis.scored]
        points = [_point(row, factor * value, styles, scale, label) for row, value in priced if value]
        if len(points) < 2:
            continue
        best, values = front(points, block.lower_is_better), [point.x for point in points]
        logarithmic = 0 < WIDE * min(values) < max(values)
        drawn.append(
            (f"Score and {caption}", scatter(points, label, block.headline, best, _factor(scale), logarithmic))
        )
        told.append(f"On the Pareto front of score and {caption}, the cheapest first: {', '.join(best)}.")
        if free := [row.entry.method for row, value in priced if value == 0]:
            told.append(f"Not drawn, for its {caption} is none: {', '.join(free)}.")
    return [Charts(drawn), Items(told)] if drawn else []


def front(points: Sequence[Point], lower_is_better: bool = False) -> list[str]:
    """Names of those that no other beats in one of x (less is better) and y without being worse in the other; by x."""
    sign = 1 if lower_is_better else -1
    kept: list[str] = []
    least = float("inf")
    for point in sorted(points, key=lambda one: (one.x, sign * one.y, one.name)):
        if sign * point.y < least:
            kept.append(point.name)
            least = sign * point.y
    return kept


def curves(analysis: Analysis, styles: Styles) -> list[Part]:
    """Dev scores and training losses over steps, means over seeds."""
    scale = Scale(analysis.block.is_share)
    drawn = []
    for caption, label, factor, of in (
        ("Learning curves on dev", f"dev {analysis.block.headline}", _factor(scale), lambda run: run.curve),
        ("Training loss", "mean loss", 1.0, lambda run: run.losses),
    ):
        series = [
            Line(row.entry.method, mean_curve([of(run) for run in row.entry.runs]), styles[row.entry.method])
            for row in analysis.scored[:MOST_CURVES]
        ]
        series = [one for one in series if len(one.points) > 1]
        if series:
            drawn.append((caption, lines(series, "step", label, factor)))
    return [Charts(drawn)] if drawn else []


def mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[tuple[float, float], ...]:
    """The mean at each step that all seeds reached."""
    known = [dict(curve) for curve in curves if curve]
    shared = set.intersection(*map(set, known)) if known else set()
    return tuple((float(step), fmean(one[step] for one in known)) for step in sorted(shared))


def forgetting_against_learning(analysis: Analysis, styles: Styles) -> list[Part]:
    """How much each method forgot over how well it does; for each probe."""
    scale, drawn = Scale(analysis.block.is_share), []
    runs = analysis.block.runs
    for probe in sorted({run.forgetting.probe for run in runs if run.forgetting}):
        found = [run.forgetting for run in runs if run.forgetting and run.forgetting.probe == probe]
        shares = Scale(all(0 <= one.before <= 1 and 0 <= one.after <= 1 and not one.lower_is_better for one in found))
        points = []
        for row in analysis.scored:
            if lost := forgetting(row.entry.runs, probe):
                note = f"{row.entry.method}: {scale.score(row.mean)}, forgot {shares.score(fmean(lost))}"
                points.append(
                    Point(row.entry.method, row.mean or 0.0, fmean(lost), styles[row.entry.method], note=note)
                )
        if len(points) > 1:
            label = f"forgotten: {probe}"
            chart = scatter(points, analysis.block.headline, label, (), _factor(shares), x_percent=_factor(scale))
            drawn.append((f"Forgetting against learning ({probe}); lower is less forgotten", chart))
    return [Charts(drawn)] if drawn else []


def key(analysis: Analysis, styles: Styles) -> Charts:
    """Which mark is which method."""
    return Charts([("", legend([(row.entry.method, styles[row.entry.method]) for row in analysis.scored]))])


def _point(row: Row, x: float, styles: Styles, scale: Scale, label: str) -> Point:
    note = f"{row.entry.method}: {scale.score(row.mean)}, {label} {x:,.4g}"
    return Point(row.entry.method, x, row.mean or 0.0, styles[row.entry.method], note=note)


def _factor(scale: Scale) -> float:
    return 100.0 if scale.is_share else 1.0
