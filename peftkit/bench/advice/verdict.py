"""What a comparison in miniature says: which method to use, on what evidence, and with which doubts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

from peftkit.bench import numbers
from peftkit.bench.advice.conduct import Conduct, failure
from peftkit.bench.advice.schedule import REFERENCE, SEEDS, Arm, Rung, finalists
from peftkit.bench.analysis import LEVEL, Analysis, Row, analyse
from peftkit.bench.numbers import Scale
from peftkit.bench.recommend import recommend
from peftkit.bench.report import MARGIN
from peftkit.bench.results import Block, Results, entry_of
from peftkit.bench.store import Record
from peftkit.errors import PeftkitError


@dataclass(frozen=True)
class ArmRow:
    """What came of an arm."""

    arm: Arm
    steps: int
    """Of its longest runs."""
    seeds: int
    """Of those."""
    score: float | None
    """Their mean on dev."""
    seconds: float
    """Of training, all its runs together."""
    trainable: int | None
    fate: str


@dataclass(frozen=True)
class Verdict:
    """The advice."""

    arm: Arm
    text: str
    """In plain words, with the figures."""
    doubts: tuple[str, ...]
    rows: tuple[ArmRow, ...]
    """The furthest first."""
    seeds: int
    """Behind the chosen one's score."""
    steps: int
    headline: str
    is_share: bool

    def as_dict(self) -> dict[str, Any]:
        """All figures as JSON takes them."""
        arms = [
            {
                "method": row.arm.method,
                "learning_rate": row.arm.learning_rate,
                "steps": row.steps,
                "seeds": row.seeds,
                "dev": row.score,
                "seconds": row.seconds,
                "trainable_parameters": row.trainable,
                "fate": row.fate,
            }
            for row in self.rows
        ]
        return {
            "method": self.arm.method,
            "learning_rate": self.arm.learning_rate,
            "evidence": self.text,
            "doubts": list(self.doubts),
            "headline": self.headline,
            "arms": arms,
        }


def verdict(done: Conduct) -> Verdict:
    """What follows from the runs that are there.

    Raises:
        PeftkitError: nothing follows, because no rung was completed or all of its runs failed.
    """
    last = [rung for rung in done.state.rungs if rung.last]
    before = next((one for one in reversed(done.state.rungs) if not one.last and done.is_complete(one)), None)
    analysis = _analysis(done, last) if last else None
    if analysis is not None and (len(analysis.scored) > 1 or (analysis.scored and before is None)):
        return _compared(done, last[0], analysis)
    ranked = finalists(before, done.results(), len(before.arms)) if before else []
    if before is None or not ranked:
        raise PeftkitError(_nothing(done))
    return _verdict(done, ranked[0], _first_of(done, before, ranked), list(_doubts(done, ranked[0])), 1)


def _compared(done: Conduct, last: Rung, analysis: Analysis) -> Verdict:
    """On the last rung, as far as that came."""
    baselines = {} if done.subject.majority is None else {"majority": done.subject.majority}
    found = recommend(analysis, baselines)
    assert found is not None  # something has a score
    arm = next(one for one in last.arms if one.method == found.method)
    row = next(one for one in analysis.scored if one.entry.method == arm.method)
    doubts = [*_of_scores(done, analysis, row), *_doubts(done, arm)]
    return _verdict(done, arm, found.text, doubts, len(row.entry.runs))


def _analysis(done: Conduct, last: Sequence[Rung]) -> Analysis:
    """The last rung as a block of the benchmark, whose scores are of dev."""
    results = Results(done.store.folder)
    trials = [trial for rung in last for trial in rung.trials]
    entries = []
    for arm in dict.fromkeys(trial.arm for trial in trials):
        records = [found for trial in trials if trial.arm == arm and (found := done.record(trial))]
        entries.append(entry_of(arm.method, [_as_final(one) for one in records], (), results, done.store))
    block = Block(done.subject.run.backbone.name, done.subject.name, "all", tuple(entries))
    references = [REFERENCE] if any(entry.method == REFERENCE for entry in block.scored) else []
    return analyse(block, references, MARGIN)


def _as_final(record: Record) -> Record:
    """As if dev were test, and the seeds those of final runs."""
    return record.model_copy(update={"test": record.dev, "key": record.key.model_copy(update={"phase": "final"})})


def _first_of(done: Conduct, rung: Rung, ranked: Sequence[Arm]) -> str:
    """Where the last rung was not reached."""
    means = {arm: done.mean(rung, arm) for arm in ranked}
    best, *others = ranked
    scale = Scale(_is_share(done))
    told = (
        f"{best.method}: the best score on dev, {scale.score(means[best])} {done.headline}, after {rung.steps:,} steps"
    )
    if others:
        told += f"; next is {others[0].method} with {scale.score(means[others[0]])}"
    return f"{told}. One run each, and no test of the difference."


def _verdict(done: Conduct, arm: Arm, text: str, doubts: list[str], seeds: int) -> Verdict:
    rows = tuple(_rows(done))
    steps = next(row.steps for row in rows if row.arm == arm)
    return Verdict(arm, text, tuple(doubts), rows, seeds, steps, done.headline, _is_share(done))


def _of_scores(done: Conduct, analysis: Analysis, row: Row) -> Iterator[str]:
    """How far the scores themselves can be trusted."""
    scale, samples = Scale(analysis.block.is_share), row.entry.samples
    if samples is not None and row.entry.per_example:
        spread = float(np.std(samples.per_example.mean(axis=0))) / sqrt(samples.examples)
        half = NormalDist().inv_cdf(0.975) * spread
        yield (
            f"All scores are of {done.subject.dev_rows:,} rows of dev, which alone leaves ± {scale.score(half)} in each"
            " (95 %); differences are paired over rows, and the same rows chose the learning rates."
        )
    names = analysis.pairs.names
    if row.entry.method in names:
        at = names.index(row.entry.method)
        alike = [name for name, p in zip(names, analysis.pairs.p_values[at], strict=True) if p > LEVEL]
        if others := [name for name in alike if name != row.entry.method]:
            yield f"The difference from {' and '.join(others)} is within the noise of these rows and seeds."
    if 1 < len(row.entry.runs) < len(SEEDS):
        yield f"It rests on {len(row.entry.runs)} of {len(SEEDS)} seeds: the time was up."


def _doubts(done: Conduct, arm: Arm) -> Iterator[str]:
    """What keeps the advice from being more than it is."""
    subject = done.subject
    longest = max((trial.steps for trial in done.ended(arm)), default=0)
    if longest < subject.steps:
        yield (
            f"It was compared after {longest:,} steps, and the configuration trains for {subject.steps:,}: the order "
            "may change on the way."
        )
    if edge := _edge(done, arm):
        yield edge
    failed = {one.key.method: one for one in done.records.values() if one.status != "finished"}
    for name, record in failed.items():
        yield f"A run of {name} {failure(record)}."
    if REFERENCE not in subject.candidates.chosen:
        why = subject.candidates.left_out.get(REFERENCE, "it was not asked for")
        yield f"Full fine-tuning is not beside it: {why}."
    if not any(rung.last and done.is_complete(rung) for rung in done.state.rungs):
        yield "The time was up before the last rung was complete; more minutes go on from here."


def _edge(done: Conduct, arm: Arm) -> str:
    """Where a better learning rate may lie outside what was tried."""
    first = done.state.rungs[0]
    rates = sorted(one.learning_rate for one in first.arms if one.method == arm.method)
    shown = numbers.rate(arm.learning_rate)
    if len(rates) == 1:
        return f"{shown} is the only learning rate that was tried for {arm.method}, for want of time."
    if arm.learning_rate not in (rates[0], rates[-1]):
        return ""
    which = "smallest" if arm.learning_rate == rates[0] else "greatest"
    return f"{shown} is the {which} of {len(rates)} learning rates that were tried for {arm.method}; try beyond it."


def _rows(done: Conduct) -> Iterator[ArmRow]:
    """Every arm: those that came furthest first, and of these the best."""
    found = []
    for arm in dict.fromkeys(arm for rung in done.state.rungs for arm in rung.arms):
        ended = done.ended(arm)
        steps = max((trial.steps for trial in ended), default=0)
        longest = [trial for trial in ended if trial.steps == steps and trial.last == any(one.last for one in ended)]
        records = [record for trial in ended if (record := done.record(trial))]
        scores = [record.dev.value for trial in longest if (record := done.record(trial)) and record.dev]
        row = ArmRow(
            arm,
            steps,
            len(scores),
            numbers.mean(scores),
            sum(record.cost.seconds for record in records if record.cost),
            next((record.trainable_parameters for record in records if record.trainable_parameters), None),
            _fate(done, arm),
        )
        in_last = any(trial.last for trial in ended)
        goodness = (row.score or 0.0) * (-1 if done.lower_is_better else 1)
        found.append(((not in_last, -steps, row.score is None, -goodness), row))
    yield from (row for _, row in sorted(found, key=lambda one: one[0]))


def _fate(done: Conduct, arm: Arm) -> str:
    rungs = [at for at, rung in enumerate(done.state.rungs, 1) if arm in rung.arms]
    statuses = {record.status for trial in done.ended(arm) if (record := done.record(trial))}
    if bad := statuses - {"finished"}:
        return " and ".join(sorted(bad)).replace("_", " ")
    if done.state.rungs[rungs[-1] - 1].last:
        return "last rung"
    if rungs[-1] == len(done.state.rungs):
        return f"in rung {rungs[-1]} when the time was up"
    return f"dropped after rung {rungs[-1]}"


def _is_share(done: Conduct) -> bool:
    values = [record.dev.value for record in done.records.values() if record.dev]
    return not done.lower_is_better and all(0 <= value <= 1 for value in values)


def _nothing(done: Conduct) -> str:
    failed = [one for one in done.records.values() if one.status != "finished"]
    if failed:
        return f"no run came to a good end; {failed[0].key.method} {failure(failed[0])}"
    return (
        f"--budget-minutes: the time was up before every method had had its turn; {done.budget / 60:g} minutes are too "
        f"few here: give about {done.budget / 30:g}, and the same command goes on from here"
    )
