"""Orderings that the literature agrees on, and whether the results of a comparison bear them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from peftkit.bench import numbers
from peftkit.bench.analysis import LEVEL, Analysis
from peftkit.bench.block_tables import chosen_rate, forgetting
from peftkit.bench.families import holm
from peftkit.bench.numbers import NOTHING, Scale
from peftkit.bench.pairing import on_shared_seeds
from peftkit.bench.results import Entry
from peftkit.bench.samples import Samples
from peftkit.bench.statistics import difference, equivalence

FAR = 0.05
"""How much lower a score is that is far behind: five points of a hundred."""
TIMES, FACTOR = 10.0, 2.0
"""LoRA's best learning rate over full fine-tuning's, and how far from it counts as about."""


@dataclass(frozen=True)
class Tested:
    """One data set on one ordering."""

    holds: bool
    """As far as the mean goes."""
    p_value: float | None
    """Two-sided; None where the ordering is not one of scores."""
    evidence: str


@dataclass(frozen=True)
class Ordering:
    """A claim, where it comes from, and how one data set is asked; None where runs are missing."""

    claim: str
    source: str
    test: Callable[[Analysis], Tested | None]


@dataclass(frozen=True)
class Verdict:
    """What one data set says of one ordering."""

    claim: str
    source: str
    data: str
    word: str
    """`agrees`, `disagrees`, `not separable`, or `missing`."""
    evidence: str


def at_least(better: str, worse: str) -> Callable[[Analysis], Tested | None]:
    """That the first has the higher expected score, paired over seeds and examples."""

    def judge(first: Samples, second: Samples) -> tuple[bool, float]:
        apart = difference(first, second)
        return apart.gain > 0, apart.p_value

    return _compared(better, worse, judge)


def far_behind(worse: str, better: str) -> Callable[[Analysis], Tested | None]:
    """That the first has an expected score that is lower by more than `FAR`."""

    def judge(first: Samples, second: Samples) -> tuple[bool, float]:
        found = equivalence(first, second, FAR)
        return found.p_worse < found.p_not_worse, min(1.0, 2 * min(found.p_worse, found.p_not_worse))

    return _compared(worse, better, judge)


def _compared(
    first: str, second: str, judge: Callable[[Samples, Samples], tuple[bool, float]]
) -> Callable[[Analysis], Tested | None]:
    """A claim on two methods' scores; `judge` says whether it holds, and its two-sided p."""

    def test(analysis: Analysis) -> Tested | None:
        entries = [_entry(analysis, name) for name in (first, second)]
        shared = on_shared_seeds(entries[0], entries[1]) if entries[0] and entries[1] else None
        if shared is None:
            return None
        apart, scale = difference(*shared), Scale(analysis.block.is_share)
        told = f"{scale.change(apart.mean)} ({scale.change_between(apart.low, apart.high)})"
        return Tested(*judge(*shared), told)

    return test


def forgets_more(more: str, less: str) -> Callable[[Analysis], Tested | None]:
    """That the first loses more on the probe, paired over seeds: Student's t."""

    def test(analysis: Analysis) -> Tested | None:
        from scipy.stats import ttest_rel

        first, second = (lost(_entry(analysis, name)) for name in (more, less))
        seeds = sorted(first.keys() & second.keys())
        if len(seeds) < 2:
            return None
        pairs = [[one[seed] for seed in seeds] for one in (first, second)]
        p_value = float(ttest_rel(*pairs).pvalue)
        told = f"{more} loses {100 * fmean(pairs[0]):.1f} points, {less} {100 * fmean(pairs[1]):.1f}"
        return Tested(fmean(pairs[0]) > fmean(pairs[1]), p_value, told)

    return test


def times_the_rate(first: str, second: str) -> Callable[[Analysis], Tested | None]:
    """That the first's learning rate, as chosen on dev, is about ten times the second's."""

    def test(analysis: Analysis) -> Tested | None:
        entries = [_entry(analysis, name) for name in (first, second)]
        rates = [chosen_rate(one) if one else None for one in entries]
        if rates[0] is None or rates[1] is None:
            return None
        times = rates[0] / rates[1]
        told = f"{times:.3g} times: {numbers.rate(rates[0])} against {numbers.rate(rates[1])}"
        return Tested(TIMES / FACTOR <= times <= TIMES * FACTOR, None, told)

    return test


ORDERINGS = (
    Ordering(
        "LoRA on all linear layers ≥ LoRA on queries and values, both of rank 8",
        "Dettmers et al. 2023; Biderman et al. 2024",
        at_least("lora", "lora_qv"),
    ),
    Ordering(
        f"LoRA's best learning rate is about {TIMES:g} times full fine-tuning's (within a factor of {FACTOR:g})",
        "Schulman et al. 2025",
        times_the_rate("lora", "full"),
    ),
    Ordering(
        "AdaLoRA ≥ LoRA at a tiny budget, both of rank 1",
        "Zhang et al. 2023",
        at_least("adalora_rank_1", "lora_rank_1"),
    ),
    Ordering("prompt tuning < prefix tuning", "Li & Liang 2021; Liu et al. 2022", at_least("prefix", "prompt")),
    Ordering(
        f"the head alone is far behind full fine-tuning: more than {100 * FAR:g} points",
        "common experience, no single source",
        far_behind("head", "full"),
    ),
    Ordering(
        "full fine-tuning forgets more than LoRA",
        "Biderman et al. 2024",
        forgets_more("full", "lora"),
    ),
)


def verdicts(analyses: Sequence[Analysis], orderings: Sequence[Ordering] = ORDERINGS) -> list[Verdict]:
    """What each data set says of each ordering; p values of one ordering are corrected over its data sets (Holm)."""
    told = []
    for ordering in orderings:
        found = [ordering.test(one) for one in analyses]
        asked = [one.p_value for one in found if one and one.p_value is not None]
        corrected = iter(holm(asked))
        for analysis, one in zip(analyses, found, strict=True):
            p_value = float(next(corrected)) if one and one.p_value is not None else None
            word, evidence = _worded(one, p_value)
            told.append(Verdict(ordering.claim, ordering.source, analysis.block.data, word, evidence))
    return told


def _worded(found: Tested | None, p_value: float | None) -> tuple[str, str]:
    if found is None:
        return "missing", NOTHING
    word = "agrees" if found.holds else "disagrees"
    if p_value is None:
        return word, found.evidence
    told = numbers.probability(p_value)
    sign = "" if told.startswith("<") else "= "
    return word if p_value <= LEVEL else "not separable", f"{found.evidence}, p {sign}{told}"


def _entry(analysis: Analysis, method: str) -> Entry | None:
    return next((entry for entry in analysis.block.entries if entry.method == method), None)


def lost(entry: Entry | None) -> dict[int, float]:
    """Seed → by how much it does worse on the probe than before, as a share."""
    runs = entry.runs if entry else ()
    return {run.key.seed: forgetting([run], run.forgetting.probe)[0] for run in runs if run.forgetting}
