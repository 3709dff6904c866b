"""What is said over several blocks: the scores of all, wins and losses, ranks, few-shot curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from peftkit.bench import numbers
from peftkit.bench.analysis import LEVEL, POWER, Analysis
from peftkit.bench.block_charts import Styles
from peftkit.bench.block_tables import state
from peftkit.bench.charts import Line, legend, lines
from peftkit.bench.document import Cell, Charts, Heading, Paragraph, Part, Table
from peftkit.bench.families import win_tie_loss
from peftkit.bench.numbers import NOTHING, Scale
from peftkit.bench.ranks import rank_stability
from peftkit.bench.recommend import Recommendation
from peftkit.bench.results import in_words

RESAMPLES = 500


def summary(analyses: Sequence[Analysis]) -> list[Part]:
    """Methods × data sets, one table a backbone and budget."""
    parts: list[Part] = []
    for (backbone, budget), group in by_setting(analyses).items():
        if len(group) > 1:
            parts += [Heading(f"{backbone}, {in_words(budget)}", 3), _all_scores(group)]
    return parts


def _all_scores(group: Sequence[Analysis]) -> Table:
    head = ["method", *(f"{one.block.data} ({one.block.headline})" for one in group)]
    rows = [[Cell(name), *(_summed(one, name) for one in group)] for name in _by_mean_rank(group)]
    caption = (
        "Mean over seeds, the best of a column in bold; below it the 95 % interval, and the verdict against "
        f"{next(iter(group[0].detectable), 'a reference')}."
    )
    return Table(head, rows, caption)


def recommendations(found: Sequence[tuple[Analysis, Recommendation | None]]) -> Table:
    """One row a block."""
    rows: list[list[Cell | str]] = [
        [
            one.block.data,
            one.block.backbone,
            one.block.budget,
            Cell(advice.method if advice else NOTHING, "chosen"),
            advice.text if advice else "nothing has a score",
        ]
        for one, advice in found
    ]
    return Table(["data set", "backbone", "budget", "use", "because"], rows, words=(1, 2, 3, 4))


def wins(analyses: Sequence[Analysis]) -> Table | None:
    """How often each method is better than another, not separable, or worse, over all blocks."""
    blocks = {one.block.title: one.pairs for one in analyses if len(one.pairs.names) > 1}
    if not blocks:
        return None
    rows = [[one.name, str(one.wins), str(one.ties), str(one.losses)] for one in win_tie_loss(blocks, LEVEL)]
    where = "one data set" if len(blocks) == 1 else f"{len(blocks)} combinations of data set, backbone and budget"
    caption = f"All pairs of methods on {where}, with Holm's correction within each."
    return Table(["method", "better", "not separable", "worse"], rows, caption)


def ranks(analyses: Sequence[Analysis]) -> list[Part]:
    """Places over data sets, with how sure they are; one table a backbone and budget of several data sets."""
    parts: list[Part] = []
    for (backbone, budget), group in by_setting(analyses).items():
        tested = [one for one in group if len(one.pairs.names) > 1]
        shared = set.intersection(*(set(one.pairs.names) for one in tested)) if tested else set()
        if len(tested) < 2 or len(shared) < 2 or len({one.block.lower_is_better for one in tested}) > 1:
            continue
        samples = {
            one.block.data: {
                entry.method: entry.samples for entry in one.block.scored if entry.method in shared and entry.samples
            }
            for one in tested
        }
        found = rank_stability(samples, RESAMPLES)
        rows: list[list[Cell | str]] = [
            [
                place.name,
                Cell(f"{place.mean_rank:.2f}", "", f"{place.low:.2f} to {place.high:.2f}"),
                f"{100 * place.first:.0f} %",
                *(f"{place.ranks[one.block.data]:g}" for one in tested),
            ]
            for place in found.places
        ]
        agreement = (
            f"Data sets agree on the order with Kendall's W = {found.kendalls_w:.2f} (0 not at all, 1 entirely; p "
            f"{numbers.probability(found.p_value)} of so much by chance), over {len(tested)} data sets and "
            f"{len(shared)} methods that all of them have."
        )
        head = ["method", "mean rank", "is first", *(one.block.data for one in tested)]
        caption = f"Ranks by mean score; intervals and shares from {RESAMPLES} resamples of seeds and examples."
        parts += [Heading(f"{backbone}, {in_words(budget)}", 3), Paragraph(agreement), Table(head, rows, caption)]
    return parts


def few_shot(analyses: Sequence[Analysis], styles: Styles) -> list[Part]:
    """Score over the budget of training rows, where a data set has several."""
    places: dict[tuple[str, str], list[Analysis]] = {}
    for one in analyses:
        if one.scored:
            places.setdefault((one.block.backbone, one.block.data), []).append(one)
    several = {f"{data} · {backbone}": group for (backbone, data), group in places.items() if len(group) > 1}
    if not several:
        return []
    drawn = [(title, _over_budgets(group, styles)) for title, group in several.items()]
    shown = {row.entry.method for group in several.values() for one in group for row in one.scored}
    marks = legend([(name, style) for name, style in styles.items() if name in shown])
    return [Charts(drawn), Charts([("", marks)]), *(_by_budget(title, group) for title, group in several.items())]


def _over_budgets(group: Sequence[Analysis], styles: Styles) -> str:
    series = [
        Line(name, tuple((float(at), mean) for at, mean in enumerate(means) if mean is not None), styles[name])
        for name, means in _means(group).items()
    ]
    factor = 100.0 if all(one.block.is_share for one in group) else 1.0
    budgets = [one.block.budget for one in group]
    return lines(series, "training rows of each class", group[0].block.headline, factor, budgets)


def _by_budget(title: str, group: Sequence[Analysis]) -> Table:
    scale = Scale(all(one.block.is_share for one in group))
    rows = [[name, *(scale.score(mean) for mean in means)] for name, means in _means(group).items()]
    caption = f"{title}: {group[0].block.headline} by training rows of each class."
    return Table(["method", *(one.block.budget for one in group)], rows, caption)


def _means(group: Sequence[Analysis]) -> dict[str, list[float | None]]:
    """Method → its mean in each block, the best of the last block first."""
    names = dict.fromkeys(row.entry.method for one in reversed(group) for row in one.scored)
    found = {name: [one.row(name) for one in group] for name in names}
    return {name: [row.mean if row else None for row in rows] for name, rows in found.items()}


def detectable(analyses: Sequence[Analysis]) -> Table | None:
    """What the results could have shown."""
    head = [
        "data set · backbone · budget",
        "against",
        "seeds",
        "test examples",
        "smallest detectable",
        "alone",
        "margin",
    ]
    rows = [[one.block.title, name, *_design(one, name)] for one in analyses for name in one.detectable]
    caption = (
        f"The smallest true difference that would be found with a probability of {100 * POWER:g} %, for the comparison "
        "of median spread: at the first step of Holm's correction, and as the only comparison. “Not separable” says "
        "little of smaller ones."
    )
    return Table(head, rows, caption, (1,)) if rows else None


def _design(analysis: Analysis, reference: str) -> Iterator[str]:
    row, scale = analysis.row(reference), Scale(analysis.block.is_share)
    assert row is not None and row.entry.samples is not None
    yield str(len(row.entry.seeds))
    yield f"{row.entry.samples.examples:,}" if row.entry.per_example else NOTHING
    for smallest in analysis.detectable[reference]:
        yield scale.margin(float(f"{smallest:.3g}"))
    yield scale.margin(analysis.margin)


def by_setting(analyses: Sequence[Analysis]) -> Mapping[tuple[str, str], list[Analysis]]:
    """(backbone, budget) → its data sets with a score."""
    found: dict[tuple[str, str], list[Analysis]] = {}
    for one in analyses:
        if one.scored:
            found.setdefault((one.block.backbone, one.block.budget), []).append(one)
    return found


def _by_mean_rank(group: Sequence[Analysis]) -> list[str]:
    places: dict[str, list[float]] = {}
    for one in group:
        for place, row in enumerate(one.rows):
            places.setdefault(row.entry.method, []).append(place / max(1, len(one.rows) - 1))
    return sorted(places, key=lambda name: (sum(places[name]) / len(places[name]), name))


def _summed(analysis: Analysis, name: str) -> Cell:
    row = analysis.row(name)
    if row is None:
        entry = next((row.entry for row in analysis.rows if row.entry.method == name), None)
        return Cell(state(entry) if entry else "not in the grid", "bad" if entry else "quiet")
    scale = Scale(analysis.block.is_share)
    told = [scale.between(row.interval.low, row.interval.high)] if row.interval else []
    first = next(iter(analysis.detectable), "")
    told += [row.against[first].verdict] if first in row.against else []
    return Cell(scale.score(row.mean), "chosen" if analysis.is_best(row) else "", "; ".join(told))
