"""A folder of results, read and put in order: blocks that are compared, methods within them, seeds within those."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from peftkit.bench.provenance import differing, refuse_mixed
from peftkit.bench.rates import best_rate
from peftkit.bench.samples import Array, Samples, Transform
from peftkit.bench.store import ANSWERS, RUNS, PlannedCell, Record, Store
from peftkit.errors import DataError, PeftkitError, UsageError

Place = tuple[str, str, str]
"""(backbone, data, budget)."""
Names = tuple[str, str, str, str]
"""(backbone, data, budget, method)."""
Row = tuple[Array, Array, Transform, bool]
"""Numerators, denominators, transform, and whether they are of examples."""
OF_A_HUNDRED = ("bleu", "chrf", "ter")
"""Scores that go to 100 by themselves, by the beginning of their names."""
TOLERANCE = 1e-6
"""How far a score may be from what its answers say, relative to the larger of the score and 1."""


@dataclass(frozen=True)
class Entry:
    """One method on one backbone, data set and budget: a cell of the grid."""

    method: str
    runs: tuple[Record, ...] = ()
    """Finished final runs, one a seed, by seed."""
    failed: tuple[Record, ...] = ()
    """Final runs that failed or ran out of memory, by seed."""
    trials: tuple[Record, ...] = ()
    planned: tuple[int, ...] = ()
    """Seeds that were asked for."""
    samples: Samples | None = None
    """Of `runs`, in their order; None where there are none, or none that can be put together."""
    per_example: bool = True
    """False where the score is no ratio of sums: `samples` then hold the score of each seed alone."""

    @property
    def unvaried(self) -> bool:
        """Whether all seeds have one score, and no single examples have any: then nothing tells how far chance goes."""
        if self.samples is None or self.per_example:
            return False
        return bool((self.samples.values == self.samples.values[0]).all())

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of finished final runs."""
        return tuple(run.key.seed for run in self.runs)

    @property
    def missing(self) -> tuple[int, ...]:
        """Seeds that were asked for and of which nothing is there."""
        there = {run.key.seed for run in (*self.runs, *self.failed)}
        return tuple(seed for seed in self.planned if seed not in there)


@dataclass(frozen=True)
class Block:
    """The methods that are compared with one another."""

    backbone: str
    data: str
    budget: str
    entries: tuple[Entry, ...]

    @property
    def place(self) -> Place:
        """Where it stands among the others."""
        return (self.backbone, self.data, self.budget)

    @property
    def title(self) -> str:
        """For headings."""
        return f"{self.data} · {self.backbone} · {in_words(self.budget)}"

    @cached_property
    def scored(self) -> tuple[Entry, ...]:
        """Those with a score."""
        return tuple(entry for entry in self.entries if entry.samples is not None)

    @cached_property
    def runs(self) -> tuple[Record, ...]:
        """All finished final runs."""
        return tuple(run for entry in self.entries for run in entry.runs)

    @property
    def headline(self) -> str:
        """The name of the score; empty where nothing was scored."""
        return next((run.test.headline for run in self.runs if run.test), "")

    @property
    def lower_is_better(self) -> bool:
        """Of the score."""
        return any(entry.samples.lower_is_better for entry in self.scored if entry.samples)

    @cached_property
    def is_share(self) -> bool:
        """Whether the scores are shares, as accuracy and F1, which are shown as points of a hundred."""
        values = [value for entry in self.scored if entry.samples for value in entry.samples.values]
        hundreds = self.headline.startswith(OF_A_HUNDRED)
        return not self.lower_is_better and not hundreds and all(0 <= value <= 1 for value in values)


@dataclass
class Results:
    """All that a folder holds."""

    folder: Path
    blocks: tuple[Block, ...] = ()
    damaged: dict[str, str] = field(default_factory=dict)
    """File → what is wrong with it; none of it counts."""
    left_out: list[str] = field(default_factory=list)
    """Runs that are whole and do not count, with the reason."""
    differing: dict[str, dict[str, int]] = field(default_factory=dict)
    """What is not the same in all finished runs → value → runs with it."""
    records: tuple[Record, ...] = ()
    """Every whole one, by id."""

    @property
    def finals(self) -> tuple[Record, ...]:
        """Final runs, whatever came of them."""
        return tuple(record for record in self.records if record.key.phase == "final")


def in_words(budget: str) -> str:
    """Which training rows a budget is."""
    return "all training rows" if budget == "all" else f"{budget} rows a class"


def read(folder: Path, mixed: bool = False) -> Results:
    """Everything in a folder of results.

    Args:
        mixed: let finished runs of different versions, code or machines stand together.

    Raises:
        UsageError: no results there, or different versions, code or machines that were not asked for.
        DataError: results that cannot be compared.
    """
    if not (folder / RUNS).is_dir():
        raise UsageError(f"{folder}: no results here; it must hold {RUNS}/, as `peftkit bench run` writes it")
    store = Store(folder)
    records = tuple(store.records())
    if not records and store.damaged:
        name, why = next(iter(store.damaged.items()))
        raise DataError(f"{folder}: none of {len(store.damaged)} result files can be read; {RUNS}/{name}: {why}")
    if not records:
        raise UsageError(f"{folder}: no run has come to an end yet; `peftkit bench status` tells how far it is")
    finished = [record for record in records if record.status == "finished"]
    differences = differing(finished)
    if not mixed:
        refuse_mixed(folder, differences)
    damaged = {f"{RUNS}/{name}": why for name, why in store.damaged.items()}
    results = Results(folder, (), damaged, [], differences, records)
    results.blocks = tuple(_blocks(results, store))
    return results


def _blocks(results: Results, store: Store) -> Iterable[Block]:
    there: dict[Names, list[Record]] = {}
    for record in results.records:
        there.setdefault(record.key.cell, []).append(record)
    asked = store.planned()
    planned = _planned(asked, results.records)
    methods = dict.fromkeys([*(cell[3] for cell in planned), *sorted({cell[3] for cell in there})])
    known = list(dict.fromkeys((one.backbone, one.data, one.budget) for one in asked))
    others = {cell[:3] for cell in (*there, *planned)} - set(known)
    for place in [*known, *sorted(others, key=_place_order)]:
        cells = [(*place, method) for method in methods]
        block = Block(
            *place,
            tuple(
                entry_of(cell[3], there.get(cell, []), planned.get(cell, ()), results, store)
                for cell in cells
                if cell in there or cell in planned
            ),
        )
        headlines = {run.test.headline for run in block.runs if run.test}
        if len(headlines) > 1:
            raise DataError(f"{block.title}: scored by {' and by '.join(sorted(headlines))}; give each its own folder")
        yield block


def _planned(asked: Sequence[PlannedCell], records: Sequence[Record]) -> dict[Names, tuple[int, ...]]:
    """The seeds that each cell was to have.

    Where nobody said, every method is expected wherever any is, with every seed of any.
    """
    if asked:
        return {(one.backbone, one.data, one.budget, one.method): one.seeds for one in asked}
    seeds = tuple(sorted({record.key.seed for record in records if record.key.phase == "final"}))
    places = {record.key.cell[:3] for record in records}
    return {(*place, method): seeds for place in places for method in sorted({one.key.method for one in records})}


def _place_order(place: Place) -> tuple[str, str, float, str]:
    """By backbone, data, and then from the smallest budget to all rows."""
    backbone, data, budget = place
    return (backbone, data, float(budget) if budget.isdecimal() else float("inf"), budget)


def entry_of(method: str, records: Sequence[Record], planned: Sequence[int], results: Results, store: Store) -> Entry:
    """The runs of one cell with what they answered; what cannot be used is noted in `results`."""
    trials = tuple(record for record in records if record.key.phase == "trial")
    finals = sorted((one for one in records if one.key.phase == "final"), key=lambda one: (one.key.seed, one.id))
    counted, rows = [], []
    for record in _one_a_seed([one for one in finals if one.status == "finished"], trials, results.left_out):
        if (row := _answers(record, results, store)) is not None:
            counted.append(record)
            rows.append(row)
    there = {record.key.seed for record in counted}
    failed = {one.key.seed: one for one in finals if one.status != "finished" and one.key.seed not in there}
    entry = Entry(method, tuple(counted), tuple(failed.values()), trials, tuple(planned))
    return _with_samples(entry, rows, results.left_out) if counted else entry


def _one_a_seed(finished: Sequence[Record], trials: Sequence[Record], left_out: list[str]) -> list[Record]:
    """One run of each seed, all with one learning rate: the best of the trials, else what most seeds have."""
    rates = Counter(record.key.learning_rate for record in finished)
    chosen = best_rate(trials)
    if len(rates) > 1 and chosen not in rates:
        chosen = min(rates, key=lambda rate: (-rates[rate], rate or 0.0))
    kept: dict[int, Record] = {}
    for record in finished:
        key = record.key
        if len(rates) > 1 and key.learning_rate != chosen:
            left_out.append(f"{_name(record)}: its learning rate is {key.learning_rate}, that of the others {chosen}")
        elif key.seed in kept:
            left_out.append(f"{_name(record)}: run {kept[key.seed].id} is of the same seed and learning rate")
        else:
            kept[key.seed] = record
    return list(kept.values())


def _answers(record: Record, results: Results, store: Store) -> Row | None:
    """Numerators and denominators of each test example, or the score twice where it is no ratio of sums.

    None where nothing can be made of the run; the reason is then in `results.damaged`.
    """
    file = f"{ANSWERS}/{record.id}.json.gz"
    if record.test is None:
        results.damaged[f"{RUNS}/{record.id}.json"] = "a finished final run without a score on test"
        return None
    try:
        answers = store.answers(record.id)
    except UsageError as error:
        results.damaged[file] = f"run {record.id} does not count: {str(error).partition(': ')[2]}"
        return None
    value = record.test.value
    if not answers.numerators:
        # two alike: the analysis of variance over seeds and examples is then Student's t over seeds
        return (np.full(2, value), np.ones(2), "identity", False)
    numerators, denominators = np.array(answers.numerators), np.array(answers.denominators)
    try:
        told = float(Samples(numerators[None], denominators[None], transform=answers.transform).values[0])
    except PeftkitError as error:
        results.damaged[file] = str(error)
        return None
    if abs(told - value) > TOLERANCE * max(1.0, abs(value)):
        results.damaged[file] = f"these answers score {told:.6g}, and runs/{record.id}.json says {value:.6g}"
        return None
    return (numerators, denominators, answers.transform, True)


def _with_samples(entry: Entry, rows: Sequence[Row], left_out: list[str]) -> Entry:
    """The entry with what its seeds answered, or without where they were tested on different rows."""
    if len({(len(row[0]), *row[2:]) for row in rows}) > 1:
        left_out.append(f"{_name(entry.runs[0])} and its other seeds: their test rows are not the same")
        return entry
    numerators, denominators = (np.stack([row[at] for row in rows]) for at in (0, 1))
    lower = bool(entry.runs[0].test and entry.runs[0].test.lower_is_better)
    samples = Samples(numerators, denominators, lower, rows[0][2])
    return replace(entry, samples=samples, per_example=rows[0][3])


def _name(record: Record) -> str:
    key = record.key
    return f"{key.data}, {key.backbone}, {key.budget}, {key.method}, seed {key.seed} (run {record.id})"
