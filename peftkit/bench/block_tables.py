"""The tables of one block: scores and comparisons, costs, what became of the model, learning rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import isclose
from operator import attrgetter

from peftkit.bench import numbers
from peftkit.bench.analysis import Against, Analysis, Row
from peftkit.bench.document import Cell, Table, Tone
from peftkit.bench.numbers import NOTHING, Scale
from peftkit.bench.rates import best_rate, dev_means
from peftkit.bench.results import Entry
from peftkit.bench.store import Record, Score
from peftkit.methods import METHODS

TONES: Mapping[str, Tone] = {
    "better": "good",
    "better within the margin": "good",
    "worse": "bad",
    "worse within the margin": "bad",
    "as good as": "same",
    "not separable": "quiet",
}


def state(entry: Entry) -> str:
    """What is not there of a cell, in words; empty where all of it is."""
    if not entry.runs and not entry.failed:
        if any(trial.status == "finished" for trial in entry.trials):
            return "tuned, final runs missing"
        return "no trial succeeded" if entry.trials else "missing"
    memory = [run for run in entry.failed if run.status == "out_of_memory"]
    failed = [run for run in entry.failed if run.status == "failed"]
    told = [
        f"{len(some)} {what}" if entry.runs or len(some) < len(entry.planned) else what
        for some, what in ((memory, "out of memory"), (failed, "failed"), (entry.missing, "missing"))
        if some
    ]
    return ", ".join(told)


def scores(analysis: Analysis, baselines: Mapping[str, float]) -> Table:
    """Methods by score, each beside the references; then the answers that need no tuning, and what has no score."""
    scale, references = Scale(analysis.block.is_share), list(analysis.detectable)
    better = "lower is better" if analysis.block.lower_is_better else "higher is better"
    head = ["method", f"{analysis.block.headline} ({better})", "95 % interval", "seeds"]
    for name in references:
        head += [f"− {name}", f"p, against {name}", f"against {name}"]
    head.append("group")
    rows: list[Sequence[Cell | str]] = [_scored(row, scale, references, analysis) for row in analysis.scored]
    blank = [""] * (3 * len(references) + 1)
    for name, value in baselines.items():
        rows.append([Cell(name, "quiet"), Cell(scale.score(value), "quiet"), "", "", *blank])
    for row in analysis.rows:
        if row.mean is None:
            rows.append([row.entry.method, Cell(state(row.entry), "bad"), "", "0", *blank])
    letters = "Methods that share a letter are not separable."
    points = " Scores, differences and intervals of this table are points of a hundred." if scale.is_share else ""
    return Table(head, rows, f"Mean over seeds, and below their number the lowest and highest.{points} {letters}")


def costs(analysis: Analysis, reference: str | None) -> Table:
    """What each method trains, keeps and takes; means over seeds."""
    full = analysis.row(reference) if reference else None
    whole = _trained(full.entry.runs) if full else None
    share = f"of {reference}'s" if whole else "of the model's"
    is_matched = any(run.key.parameters for run in analysis.block.runs)
    head = ["method", "learning rate", "trainable", *(["matched to"] if is_matched else [])]
    head += ["head's part", share, "artifact", "training", "tokens/s", "memory growth", "peak memory", "evaluation"]
    rows = []
    for row in analysis.scored:
        runs = row.entry.runs
        of = whole or numbers.mean(run.total_parameters for run in runs) or 0
        cells = [
            row.entry.method,
            numbers.rate(runs[0].key.learning_rate),
            numbers.count(_trained(runs)),
            *([_matched(runs[0])] if is_matched else []),
            numbers.count(numbers.mean(run.head_parameters for run in runs)),
            numbers.share(_trained(runs), of) if of else NOTHING,
            numbers.size(numbers.mean(run.artifact_bytes or None for run in runs)),
        ]
        rows.append([*cells, *_cost(runs)])
    return Table(
        head, rows, "Means over seeds; training is of training steps alone, evaluation of the test split once."
    )


def afterwards(analysis: Analysis) -> Table | None:
    """Merged models, forgetting and robustness, as far as any was recorded; None where nothing was."""
    scale = Scale(analysis.block.is_share)
    every = [run for row in analysis.scored for run in row.entry.runs]
    columns: dict[str, Callable[[Row], Cell | str]] = {}
    if any(run.merged for run in every):
        columns["merged model"] = lambda row: _merged(row, scale)
        columns["answers that merging changed"] = lambda row: _changed(row)
    if any(run.forgetting for run in every):
        for name in sorted({run.forgetting.probe for run in every if run.forgetting}):
            columns[f"forgetting: {name}"] = lambda row, name=name: _forgetting(row, name)  # type: ignore[misc]
    for told, beside in (("under", attrgetter("robustness")), ("on", attrgetter("elsewhere"))):
        for name in sorted({name for run in every for name in beside(run)}):
            columns[f"{told} {name}"] = partial(_beside, scores=beside, name=name, scale=scale)
    if not columns:
        return None
    rows = [[row.entry.method, *(show(row) for show in columns.values())] for row in analysis.scored]
    return Table(["method", *columns], rows, "Means over seeds; below in small, the change from the score above.")


def learning_rates(analysis: Analysis) -> tuple[Table, list[str]] | None:
    """Dev scores by learning rate, the chosen one marked, and what is to be said of choices; None without trials."""
    entries = [row.entry for row in analysis.rows]
    tuned = [entry for entry in entries if any(trial.key.learning_rate for trial in entry.trials)]
    rates = sorted({trial.key.learning_rate for entry in tuned for trial in entry.trials if trial.key.learning_rate})
    if not rates:
        return None
    scored = [trial.dev for entry in tuned for trial in entry.trials if trial.dev]
    scale = Scale(all(not one.lower_is_better and 0 <= one.value <= 1 for one in scored))
    rows = [[entry.method, *(_tried(entry, rate, scale) for rate in rates)] for entry in tuned]
    notes = [note for entry in tuned for note in _choice(entry)]
    return Table(
        ["method", *map(numbers.rate, rates)], rows, "Score on dev by learning rate; the chosen one is bold."
    ), notes


def chosen_rate(entry: Entry) -> float | None:
    """What the final runs have, else the best of the trials."""
    return entry.runs[0].key.learning_rate if entry.runs else best_rate(entry.trials)


def untested(baseline: str, records: Sequence[Record]) -> float | None:
    """The mean of `majority` or `untuned` over the seeds that have it."""
    by_seed = {run.key.seed: getattr(run, baseline).value for run in records if getattr(run, baseline)}
    return numbers.mean(by_seed.values())


def forgetting(runs: Sequence[Record], probe: str) -> list[float]:
    """By how much each seed does worse on a probe than the backbone did; negative where it does better."""
    found = [run.forgetting for run in runs if run.forgetting and run.forgetting.probe == probe]
    return [(one.after - one.before) * (1 if one.lower_is_better else -1) for one in found]


def _scored(row: Row, scale: Scale, references: Sequence[str], analysis: Analysis) -> list[Cell | str]:
    entry = row.entry
    interval = scale.between(row.interval.low, row.interval.high) if row.interval else NOTHING
    cells: list[Cell | str] = [
        entry.method,
        Cell(scale.score(row.mean), "chosen" if analysis.is_best(row) else ""),
        interval,
        Cell(str(len(entry.seeds)), "", "; ".join(filter(None, (_range(entry, scale), state(entry))))),
    ]
    for name in references:
        cells += _compared(row.against.get(name), scale) if name != entry.method else ["", "", Cell("itself", "quiet")]
    return [*cells, row.letters or NOTHING]


def _range(entry: Entry, scale: Scale) -> str:
    """The scores of the lowest and the highest seed; empty of one."""
    assert entry.samples is not None
    values = entry.samples.values
    return scale.between(float(values.min()), float(values.max())) if len(values) > 1 else ""


def _compared(found: Against | None, scale: Scale) -> list[Cell | str]:
    if found is None:
        return [NOTHING, NOTHING, Cell("not comparable", "quiet")]
    one = found.difference
    return [
        Cell(scale.change(one.mean), "", scale.change_between(one.low, one.high)),
        numbers.probability(found.p_adjusted),
        Cell(found.verdict, TONES[found.verdict]),
    ]


def _matched(run: Record) -> Cell | str:
    """The number of parameters that a method was brought to, how far it is from that, and the size it took."""
    asked = run.key.parameters
    if asked is None:
        return NOTHING
    apart = run.trainable_parameters - run.head_parameters - asked
    method = run.run.get("method", {})
    size = METHODS[method["kind"]].size if method.get("kind") in METHODS else None
    told = f"; {size}={method.get(size)}" if size else ""
    return Cell(numbers.count(asked), "", f"{numbers.true_minus(f'{100 * apart / asked:+.2g}')} %{told}")


def _cost(runs: Sequence[Record]) -> Iterator[str]:
    found = [run.cost for run in runs if run.cost]
    yield numbers.seconds(numbers.mean(one.seconds for one in found))
    yield numbers.count(numbers.mean(one.tokens_per_second or None for one in found))
    yield numbers.size(numbers.mean(one.memory_growth_bytes for one in found))
    yield numbers.size(numbers.mean(one.peak_memory_bytes for one in found))
    yield numbers.seconds(numbers.mean(one.evaluation_seconds for one in found))


def _trained(runs: Sequence[Record]) -> float:
    return numbers.mean(run.trainable_parameters for run in runs) or 0.0


def _merged(row: Row, scale: Scale) -> Cell | str:
    both = [(run.merged.value, run.test.value) for run in row.entry.runs if run.merged and run.test]
    if not both:
        return NOTHING
    merged, plain = (numbers.mean(values) or 0.0 for values in zip(*both, strict=True))
    return Cell(scale.score(merged), "", scale.change(merged - plain))


def _changed(row: Row) -> str:
    counts = [run.merged_answers_changed for run in row.entry.runs if run.merged_answers_changed is not None]
    examples = row.entry.samples.examples if row.entry.samples else 0
    return (
        f"{sum(counts):,} of {len(counts) * examples:,}"
        if counts and row.entry.per_example
        else (f"{sum(counts):,}" if counts else NOTHING)
    )


def _forgetting(row: Row, probe: str) -> Cell | str:
    found = [run.forgetting for run in row.entry.runs if run.forgetting and run.forgetting.probe == probe]
    if not found:
        return NOTHING
    before, after = (numbers.mean(getattr(one, name) for one in found) or 0.0 for name in ("before", "after"))
    refitted = numbers.mean(one.refitted for one in found)
    values = [value for one in found for value in (one.before, one.after)]
    scale = Scale(all(0 <= value <= 1 for value in values) and not found[0].lower_is_better)
    lost = forgetting(row.entry.runs, probe)
    spread = numbers.half_width(lost)
    told = f"{scale.change(after - before)}{f' ± {scale.score(spread)}' if spread is not None else ''}"
    again = f"; refitted {scale.score(refitted)}" if refitted is not None else ""
    return Cell(f"{scale.score(before)} → {scale.score(after)}{again}", "", told)


def _beside(row: Row, scores: Callable[[Record], Mapping[str, Score]], name: str, scale: Scale) -> Cell | str:
    """The same models on other texts."""
    both = [(scores(run)[name].value, run.test.value) for run in row.entry.runs if name in scores(run) and run.test]
    if not both:
        return NOTHING
    there, plain = (numbers.mean(values) or 0.0 for values in zip(*both, strict=True))
    return Cell(scale.score(there), "", scale.change(there - plain))


def _tried(entry: Entry, rate: float, scale: Scale) -> Cell | str:
    trials = [trial for trial in entry.trials if trial.key.learning_rate == rate]
    value = dev_means(trials).get(rate)
    if value is None:
        return Cell(trials[0].status.replace("_", " "), "bad") if trials else ""
    return Cell(scale.score(value), "chosen" if rate == chosen_rate(entry) else "")


def _choice(entry: Entry) -> Iterator[str]:
    means, chosen = dev_means(entry.trials), chosen_rate(entry)
    if not means or chosen is None:
        return
    best, shown = best_rate(entry.trials), numbers.rate(chosen)
    if chosen not in means:
        yield f"{entry.method}: its final runs have {shown}, which was not tried."
        return
    if best is not None and not isclose(means[chosen], means[best]):
        yield f"{entry.method}: its final runs have {shown}, though {numbers.rate(best)} did best on dev."
    if len(means) == 1:
        yield f"{entry.method}: {shown} is the only learning rate that was tried."
    elif chosen in (min(means), max(means)):
        end = "lowest" if chosen == min(means) else "highest"
        yield f"{entry.method}: the chosen {shown} is the {end} that was tried; a better one may lie beyond."
