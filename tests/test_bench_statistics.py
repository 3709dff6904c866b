"""Intervals, paired tests, corrections, groups and ranks, against formulas, loops, scipy and simulation."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.bench_statistics import World, mcnemar_all
from peftkit.bench.families import Pairs, against, all_pairs, groups, holm, win_tie_loss
from peftkit.bench.power import power, smallest_detectable
from peftkit.bench.ranks import agreement, rank_stability
from peftkit.bench.resampling import bootstrap_interval, paired_bootstrap_p, resampled_means, weights
from peftkit.bench.samples import Samples
from peftkit.bench.statistics import difference, equivalence, interval, limits, mcnemar
from peftkit.bench.variance import Components, mean_squares
from peftkit.errors import DataError


def answers(seeds: int = 5, examples: int = 40, accuracy: float = 0.7, seed: int = 0) -> Samples:
    random = np.random.default_rng(seed)
    hard = random.normal(size=examples) + random.normal(size=(seeds, examples)) * 0.5
    return Samples(hard < scipy.stats.norm.ppf(accuracy), np.ones((seeds, examples)))


def spans(seed: int = 0, seeds: int = 4, examples: int = 60) -> Samples:
    random = np.random.default_rng(seed)
    right = random.poisson(0.7, (seeds, examples))
    return Samples(2 * right, 2 * right + random.poisson(0.4, (seeds, examples)))


def perplexities(seed: int = 0) -> Samples:
    random = np.random.default_rng(seed)
    tokens = np.tile(random.integers(5, 50, 30), (3, 1))
    return Samples(tokens * random.gamma(9, 0.2, (3, 30)), tokens, lower_is_better=True, transform="exp")


def test_scores_are_ratios_of_sums() -> None:
    counts = Samples([[2, 0, 4], [1, 0, 0]], [[3, 0, 5], [2, 0, 2]])
    assert counts.values == pytest.approx([6 / 8, 1 / 4])
    assert counts.mean == pytest.approx(0.5)
    assert Samples([[2, 4]], [[1, 2]], transform="exp").values == pytest.approx([np.exp(2)])


@pytest.mark.parametrize("samples", [answers(), spans(), perplexities()])
def test_what_an_example_says_is_the_derivative_of_the_score_by_its_weight(samples: Samples) -> None:
    assert samples.per_example.mean(axis=1) == pytest.approx(samples.values)
    step = 1e-6
    for example in (0, 7):
        weight = np.ones(samples.examples)
        weight[example] += step
        heavier = Samples(samples.numerators * weight, samples.denominators * weight, transform=samples.transform)
        slope = (heavier.values - samples.values) / step * samples.examples
        assert samples.per_example[:, example] - samples.values == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("numerators", "denominators", "options", "told"),
    [
        ([1, 0], [1, 1], {}, "one row a seed"),
        ([[1]], [[1]], {}, "at least two examples"),
        ([[1, 0], [1]], [[1, 1], [1]], {}, "all rows of one length"),
        ([["a", "b"]], [[1, 1]], {}, "must be numbers"),
        ([[1, np.nan]], [[1, 1]], {}, "numerators of seed 0, example 1 .* is nan"),
        ([[1, 0]], [[1, np.inf]], {}, "denominators of seed 0, example 1 .* is inf"),
        ([[1, 0]], [[1, 1], [1, 1]], {}, "1 seeds × 2 examples and denominators 2 seeds × 2"),
        ([[1, 0]], [[1, -1]], {}, "below 0"),
        ([[1, 0], [0, 0]], [[1, 1], [0, 0]], {}, "seed 1 .* are 0"),
        ([[2000, 0]], [[1, 1]], {"transform": "exp"}, "beyond the largest number"),
        ([[1, 0]], [[1, 1]], {"transform": "log"}, "must be identity or exp"),
    ],
)
def test_samples_that_are_none_are_refused(numerators, denominators, options, told: str) -> None:
    with pytest.raises(DataError, match=told):
        Samples(numerators, denominators, **options)


def test_the_analysis_of_variance_is_that_of_the_textbook() -> None:
    values = np.random.default_rng(1).normal(size=(4, 7)) + np.arange(4)[:, None] + np.arange(7)
    found, grand = mean_squares(values), values.mean()
    seeds = examples = rest = 0.0
    for row in range(4):
        seeds += 7 * (values[row].mean() - grand) ** 2 / 3
        for column in range(7):
            fitted = values[row].mean() + values[:, column].mean() - grand
            rest += (values[row, column] - fitted) ** 2 / 18
    for column in range(7):
        examples += 4 * (values[:, column].mean() - grand) ** 2 / 6
    assert (found.seeds, found.examples, found.rest) == pytest.approx((seeds, examples, rest))
    assert found.variance == pytest.approx((seeds + examples - rest) / 28)
    of = found.components
    assert (of.seeds, of.examples, of.rest) == pytest.approx(((seeds - rest) / 7, (examples - rest) / 4, rest))
    together = mean_squares(np.stack([values, 2 * values]))
    assert together.rest == pytest.approx([rest, 4 * rest])


def test_where_examples_matter_nothing_the_paired_test_is_students_over_seeds() -> None:
    # every example of a seed moves alike, so MSₙ = MSᵣ = 0
    first = np.repeat(np.random.default_rng(2).normal(size=(6, 1)), 30, axis=1)
    second = np.repeat(np.random.default_rng(3).normal(size=(6, 1)), 30, axis=1)
    ones = np.ones((6, 30))
    found = difference(Samples(first, ones), Samples(second, ones), 0.9)
    expected = scipy.stats.ttest_rel(first[:, 0], second[:, 0])
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.9)))


def test_with_one_seed_the_paired_test_is_students_over_examples() -> None:
    first, second = answers(1, 80, 0.8, 4), answers(1, 80, 0.6, 5)
    found = difference(first, second)
    expected = scipy.stats.ttest_rel(first.numerators[0], second.numerators[0])
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert "one seed; how much seeds vary is not in it" in found.how


def test_where_seeds_are_alike_the_test_is_students_over_examples_and_it_is_said() -> None:
    first, second = (Samples(np.repeat(answers(1, 80, p, 4).numerators, 5, 0), np.ones((5, 80))) for p in (0.8, 0.6))
    expected = scipy.stats.ttest_rel(first.numerators[0], second.numerators[0])
    found = difference(first, second)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert "all 5 seeds are alike" in found.how


def test_between_the_two_the_critical_value_is_weighted_as_cochran_and_cox_do() -> None:
    squares = mean_squares(answers().per_example)
    seeds, examples = squares.seeds / 200, max(squares.examples - squares.rest, 0) / 200
    expected = (seeds * scipy.stats.t.ppf(0.995, 4) + examples * scipy.stats.t.ppf(0.995, 39)) / (seeds + examples)
    assert squares.critical(0.01) == pytest.approx(expected)
    shifted = squares.grand + expected * np.sqrt(squares.variance)
    assert squares.p_value(shifted) == pytest.approx(0.01)


def test_a_p_value_and_the_interval_agree_at_any_level() -> None:
    first, second = answers(seed=6), answers(accuracy=0.5, seed=7)
    p_value = difference(first, second).p_value
    found = difference(first, second, 1 - p_value)
    assert min(abs(found.low), abs(found.high)) == pytest.approx(0, abs=1e-9)


def test_the_interval_of_a_share_is_even_on_the_logit_scale_and_stays_between_0_and_1() -> None:
    samples = answers(3, 12, 0.95)
    found, squares = interval(samples), mean_squares(samples.per_example)
    mean, logit = samples.mean, scipy.special.logit
    assert 0 < found.low < mean < found.high < 1
    assert logit(mean) - logit(found.low) == pytest.approx(logit(found.high) - logit(mean))
    error = np.sqrt(squares.variance) / (mean * (1 - mean))
    assert logit(found.high) - logit(mean) == pytest.approx(squares.critical(0.05) * error)


def test_the_interval_of_a_perplexity_is_even_on_the_log_scale() -> None:
    found = interval(perplexities())
    assert found.low * found.high == pytest.approx(found.mean**2)
    assert found.low < found.mean < found.high


@pytest.mark.parametrize("right", [0, 1])
def test_where_all_is_right_or_wrong_the_bound_is_that_of_as_many_examples(right: int) -> None:
    found = interval(Samples(np.full((5, 50), right), np.ones((5, 50))))
    expected = scipy.stats.binomtest(50 * right, 50).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_two_seeds_far_apart_make_an_interval_that_says_so_without_overflow() -> None:
    found = interval(Samples(np.vstack([np.zeros(40), np.ones(40)]), np.ones((2, 40))))
    assert found.low < 0.01 < 0.99 < found.high


def test_confidence_and_level_must_lie_between_0_and_1() -> None:
    for call in (lambda: interval(answers(), 95), lambda: equivalence(answers(), answers(), 0.1, 0)):
        with pytest.raises(DataError, match="between 0 and 1"):
            call()


@given(st.integers(0, 10**6), st.floats(-3, 3))
@settings(max_examples=30, deadline=None)
def test_a_shift_of_both_changes_no_difference_and_of_one_moves_it(seed: int, shift: float) -> None:
    first, second = spans(seed), spans(seed + 1)
    moved, also = (Samples(one.numerators + shift * one.denominators, one.denominators) for one in (first, second))
    before, after, apart = difference(first, second), difference(moved, also), difference(moved, second)
    assert (after.mean, after.low, after.p_value) == pytest.approx((before.mean, before.low, before.p_value), abs=1e-9)
    assert (apart.low, apart.high) == pytest.approx((before.low + shift, before.high + shift), abs=1e-9)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_order_of_seeds_and_examples_does_not_matter(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = spans(seed), spans(seed + 1)
    rows, columns = random.permutation(first.seeds), random.permutation(first.examples)
    mixed = [Samples(one.numerators[rows][:, columns], one.denominators[rows][:, columns]) for one in (first, second)]
    assert interval(mixed[0]).low == pytest.approx(interval(first).low)
    assert difference(*mixed).p_value == pytest.approx(difference(first, second).p_value)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_a_difference_turned_round_is_its_mirror_image(seed: int) -> None:
    one, other = difference(spans(seed), spans(seed + 1)), difference(spans(seed + 1), spans(seed))
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))
    assert one.p_value == pytest.approx(other.p_value)
    assert 0 <= one.p_value <= 1
    assert one.low < one.mean < one.high


def test_a_method_does_not_differ_from_itself_as_far_as_so_many_examples_can_tell() -> None:
    found = difference(answers(), answers())
    unseen = scipy.stats.binomtest(0, 40).proportion_ci(0.95, "exact").high
    assert (found.mean, found.p_value) == (0, 1)
    assert (found.low, found.high) == pytest.approx((-unseen, unseen))
    assert equivalence(answers(), answers(), 0.05).verdict == "undecided"
    assert equivalence(answers(), answers(), 0.05).p_equivalent == pytest.approx(scipy.stats.binom.pmf(0, 40, 0.05))
    assert equivalence(answers(), answers(), 0.1).verdict == "as good as"
    losses = perplexities()
    assert (difference(losses, losses).low, difference(losses, losses).p_value) == (0, 1)


def test_where_every_example_tells_two_apart_there_are_still_only_so_many() -> None:
    right, wrong = (Samples(np.full((5, 20), value), np.ones((5, 20))) for value in (1, 0))
    found = difference(right, wrong)
    assert found.mean == 1
    assert found.p_value == pytest.approx(scipy.stats.binomtest(20, 20).pvalue)


def test_two_seeds_whose_scores_are_equal_by_chance_do_not_make_a_difference_certain() -> None:
    first = np.zeros((2, 100))
    first[0, :10] = first[1, 10:20] = 1
    found = difference(Samples(first, np.ones_like(first)), Samples(np.zeros_like(first), np.ones_like(first)))
    squares = mean_squares(first)
    assert squares.seeds == pytest.approx(0)
    assert squares.variance == pytest.approx(squares.rest / 200)
    assert 0.01 < found.p_value < 1


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(DataError, match="5 seeds × 40 examples with 4 seeds × 40"):
        difference(answers(), answers(4))
    loss = Samples(answers().numerators, answers().denominators, lower_is_better=True)
    with pytest.raises(DataError, match="two different scores"):
        difference(answers(), loss)


def test_gain_is_positive_where_the_first_is_better() -> None:
    low, high = perplexities(1), perplexities(2)
    low, high = sorted((low, high), key=lambda one: one.mean)
    assert difference(low, high).mean < 0 < difference(low, high).gain
    assert difference(answers(accuracy=0.9), answers(accuracy=0.5)).gain > 0


@pytest.mark.parametrize("split", [(0, 0), (3, 9), (12, 0), (5, 5)])
def test_mcnemar_is_a_binomial_test_of_where_they_disagree(split: tuple[int, int]) -> None:
    first = np.repeat([1, 1, 0, 0], [8, split[0], split[1], 6])
    second = np.repeat([1, 0, 1, 0], [8, split[0], split[1], 6])
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == split
    expected = scipy.stats.binomtest(split[0], sum(split)).pvalue if sum(split) else 1.0
    assert found.p_value == pytest.approx(expected)
    assert mcnemar_all((first - second)[None]) == pytest.approx([expected])
    with pytest.raises(DataError, match="one 0 or 1 for each example"):
        mcnemar(first, second[1:])


def test_equivalence_is_two_one_sided_tests() -> None:
    # one seed: Student's t over examples, which scipy has for one side
    random = np.random.default_rng(8)
    first, second = random.normal(0.1, 1, 200), random.normal(0, 1, 200)
    found = equivalence(*(Samples([values], np.ones((1, 200))) for values in (first, second)), margin=0.3)
    apart = first - second
    not_worse = scipy.stats.ttest_1samp(apart, -0.3, alternative="greater").pvalue
    not_better = scipy.stats.ttest_1samp(apart, 0.3, alternative="less").pvalue
    assert found.p_not_worse == pytest.approx(not_worse)
    assert found.p_equivalent == pytest.approx(max(not_worse, not_better))
    assert found.p_worse == pytest.approx(1 - not_worse)


@pytest.mark.parametrize(
    ("gain", "margin", "verdict"),
    [(0.0, 0.2, "as good as"), (0.5, 0.2, "not worse than"), (-0.5, 0.2, "worse than"), (0.0, 0.01, "undecided")],
)
@pytest.mark.parametrize("lower", [False, True])
def test_the_verdict_says_what_was_shown(gain: float, margin: float, verdict: str, lower: bool) -> None:
    random = np.random.default_rng(9)
    base = random.normal(size=(5, 300))
    noise = random.normal(0, 0.3, (5, 300))
    noise -= noise.mean()
    first = base + noise + (-gain if lower else gain)
    ones = np.ones_like(base)
    found = equivalence(Samples(first, ones, lower), Samples(base, ones, lower), margin)
    assert found.verdict == verdict
    assert found.gain == pytest.approx(gain, abs=1e-9)


@pytest.mark.parametrize("margin", [0, -1, np.nan, np.inf])
def test_a_margin_has_to_be_stated(margin: float) -> None:
    with pytest.raises(DataError, match="margin"):
        equivalence(answers(), answers(seed=1), margin)


@pytest.mark.parametrize("samples", [answers(), spans(), perplexities()])
def test_the_bootstrap_by_weights_is_that_of_drawn_rows_and_columns(samples: Samples) -> None:
    of_seeds, of_examples = weights(samples.seeds, samples.examples, 20, 3)
    found = resampled_means(samples, 20, 3)
    for at in range(20):
        rows = np.repeat(np.arange(samples.seeds), np.rint(of_seeds[at] * samples.seeds).astype(int))
        columns = np.repeat(np.arange(samples.examples), np.rint(of_examples[at] * samples.examples).astype(int))
        assert (len(rows), len(columns)) == (samples.seeds, samples.examples)
        ratios = [samples.numerators[row, columns].sum() / samples.denominators[row, columns].sum() for row in rows]
        values = np.exp(ratios) if samples.transform == "exp" else ratios
        assert found[at] == pytest.approx(np.mean(values))


def test_with_one_seed_the_bootstrap_is_scipys() -> None:
    samples = answers(1, 200, 0.8)
    found = bootstrap_interval(samples, 0.9, 20_000)
    expected = scipy.stats.bootstrap(
        (samples.numerators[0],), np.mean, confidence_level=0.9, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.006)


def test_the_stretched_bootstrap_has_the_spread_of_seeds() -> None:
    # nothing but seeds varies: percentiles of means of 4 drawn numbers, times √(4 / 3)
    values = np.array([0.0, 1.0, 3.0, 8.0])
    samples = Samples(np.repeat(values[:, None], 10, axis=1), np.ones((4, 10)))
    assert resampled_means(samples, 50_000).std() == pytest.approx(values.std() / 2, rel=0.02)
    all_means = np.array(np.meshgrid(*[values] * 4)).reshape(4, -1).mean(axis=0)
    ends = np.quantile(all_means, [0.065, 0.935])
    found = bootstrap_interval(samples, 0.87, 50_000)
    assert (found.low, found.high) == pytest.approx(tuple(3 + (ends - 3) * np.sqrt(4 / 3)))


def test_a_seed_makes_the_bootstrap_repeatable() -> None:
    assert bootstrap_interval(answers(), seed=4) == bootstrap_interval(answers(), seed=4)
    assert bootstrap_interval(answers(), seed=4) != bootstrap_interval(answers(), seed=5)
    first, second = answers(), answers(accuracy=0.6, seed=1)
    assert paired_bootstrap_p(first, second, seed=1) == paired_bootstrap_p(second, first, seed=1)


def test_the_paired_bootstrap_finds_what_is_there_and_never_says_0() -> None:
    assert paired_bootstrap_p(answers(examples=400, accuracy=0.9), answers(examples=400, accuracy=0.6), 500) == 1 / 501
    assert paired_bootstrap_p(answers(), answers()) == 1


def test_too_few_examples_that_count_are_not_resampled() -> None:
    below = np.zeros((2, 30))
    below[:, 0] = 1
    with pytest.raises(DataError, match="only 1 of 30 examples count"):
        bootstrap_interval(Samples(below, below))
    assert "30 examples" in interval(Samples(below, below)).how


def test_holm_is_its_formula() -> None:
    values = [0.01, 0.04, 0.03, 0.005, 0.5]
    # sorted 0.005 0.01 0.03 0.04 0.5, times 5 4 3 2 1
    assert holm(values) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5])
    assert holm([0.4, 0.3]) == pytest.approx([0.6, 0.6])
    assert holm([]).shape == (0,)
    for bad in ([0.5, 1.5], [np.nan], [[0.1]]):
        with pytest.raises(DataError, match="from 0 to 1"):
            holm(bad)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_step_by_step(values: list[float]) -> None:
    adjusted = holm(values)
    for level in (0.05, 0.3):
        rejected = set()
        for count, at in enumerate(sorted(range(len(values)), key=lambda at: values[at])):
            if values[at] * (len(values) - count) > level:
                break
            rejected.add(at)
        assert {int(at) for at in np.flatnonzero(adjusted <= level)} == rejected


def test_methods_are_compared_with_a_reference_with_one_correction() -> None:
    others = {
        "a": answers(accuracy=0.9, seed=1),
        "b": answers(accuracy=0.72, seed=2),
        "c": answers(accuracy=0.2, seed=3),
    }
    found = against(answers(), others)
    assert [one.name for one in found] == ["a", "b", "c"]
    assert [one.p_adjusted for one in found] == pytest.approx(list(holm([one.difference.p_value for one in found])))
    assert found[0].difference == difference(others["a"], answers())


def matrix(count: int, apart: set[tuple[int, int]]) -> np.ndarray:
    p_values = np.ones((count, count))
    for row, column in apart:
        p_values[row, column] = p_values[column, row] = 0.01
    return p_values


def test_groups_overlap_where_the_middle_differs_from_neither_end() -> None:
    found = groups("abcd", matrix(4, {(0, 2), (0, 3), (1, 3)}))
    assert found.members == (("a", "b"), ("b", "c"), ("c", "d"))
    assert found.letters == {"a": "a", "b": "ab", "c": "bc", "d": "c"}
    assert groups("abc", matrix(3, set())).members == (("a", "b", "c"),)
    assert groups("abc", matrix(3, {(0, 1), (0, 2), (1, 2)})).members == (("a",), ("b",), ("c",))
    assert groups([], np.ones((0, 0))).members == ()


@given(st.integers(1, 7), st.data())
@settings(max_examples=60, deadline=None)
def test_groups_are_all_largest_sets_and_letters_are_shared_by_whom_they_hold(count: int, data: st.DataObject) -> None:
    pairs = list(combinations(range(count), 2))
    apart = set(data.draw(st.lists(st.sampled_from(pairs), unique=True))) if pairs else set()
    names = [f"m{at}" for at in range(count)]
    found = groups(names, matrix(count, apart))
    fits = [
        frozenset(chosen)
        for size in range(1, count + 1)
        for chosen in combinations(range(count), size)
        if not set(combinations(chosen, 2)) & apart
    ]
    largest = {one for one in fits if not any(one < other for other in fits)}
    assert {frozenset(names.index(name) for name in one) for one in found.members} == largest
    for row, column in pairs:
        shared = set(found.letters[names[row]]) & set(found.letters[names[column]])
        assert bool(shared) == ((row, column) not in apart)


def test_a_matrix_of_p_values_is_symmetric_and_of_all_names() -> None:
    with pytest.raises(DataError, match="symmetric square"):
        groups("ab", [[1, 0.1], [0.2, 1]])
    with pytest.raises(DataError, match="3 different methods"):
        groups("abc", np.ones((2, 2)))


def test_all_pairs_come_best_first_with_one_correction() -> None:
    methods = {f"m{at}": answers(accuracy=p, seed=at, examples=300) for at, p in enumerate((0.3, 0.8, 0.79))}
    found = all_pairs(methods)
    assert found.means == pytest.approx(sorted((one.mean for one in methods.values()), reverse=True))
    upper = np.triu_indices(3, 1)
    assert found.p_adjusted[upper] == pytest.approx(holm(found.p_values[upper]))
    first, last = (methods[found.names[at]] for at in (0, 2))
    assert found.p_values[0, 2] == pytest.approx(difference(first, last).p_value)
    assert found.gains[0, 2] == pytest.approx(first.mean - last.mean) == -found.gains[2, 0]
    assert groups(found.names, found.p_adjusted).members == ((found.names[0], found.names[1]), ("m0",))
    losses = {name: Samples(one.numerators, one.denominators, lower_is_better=True) for name, one in methods.items()}
    turned = all_pairs(losses)
    assert turned.names == found.names[::-1]
    assert turned.gains[0, 2] > 0


def test_wins_ties_and_losses_are_counted_over_data_sets() -> None:
    gains = np.array([[0, 0.1, 0.2], [-0.1, 0, 0.1], [-0.2, -0.1, 0]])
    p_values = matrix(3, {(0, 2)})
    one = Pairs(("a", "b", "c"), np.array([0.9, 0.8, 0.7]), gains, p_values, p_values)
    two = Pairs(("b", "a"), np.array([0.9, 0.8]), gains[:2, :2], matrix(2, {(0, 1)}), matrix(2, {(0, 1)}))
    found = {record.name: (record.wins, record.ties, record.losses) for record in win_tie_loss({"x": one, "y": two})}
    assert found == {"b": (1, 2, 0), "a": (1, 1, 1), "c": (0, 1, 1)}
    assert next(iter(found)) == "b"


def test_kendalls_w_is_its_formula() -> None:
    ranks = np.array([[1.0, 2, 3, 4], [1, 3, 2, 4], [2, 1, 3, 4]])
    # sums 4 6 8 12, mean 7.5: 12 · (12.25 + 2.25 + 0.25 + 20.25) / (9 · 60)
    assert agreement(ranks)[0] == pytest.approx(12 * 35 / 540)
    tied = np.array([[1.5, 1.5, 3], [1, 2, 3]])
    # sums 2.5 3.5 6, mean 4: 12 · 6.5 / (4 · 24 − 2 · 6)
    assert agreement(tied)[0] == pytest.approx(12 * 6.5 / 84)
    assert agreement(np.full((3, 4), 2.5)) == (0, 1)
    assert agreement(ranks[:1]) == (1, 1)
    assert agreement(np.tile(ranks[0], (3, 1))) == (1, pytest.approx(1 / 24**2, rel=0.8))


def test_chance_agreement_has_the_p_value_of_all_permutations() -> None:
    ranks = np.array([[1.0, 2, 3], [1, 3, 2], [1, 2, 3]])
    orders = [np.array(one) for one in ((1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1))]
    spread = [np.var(a + b + c) for a in orders for b in orders for c in orders]
    expected = np.mean(np.array(spread) >= ranks.sum(axis=0).var() - 1e-9)
    assert agreement(ranks)[1] == pytest.approx(expected, abs=0.02)


def test_ranks_are_stable_where_methods_differ_and_not_where_they_do_not() -> None:
    cells = {
        title: {
            "good": answers(accuracy=0.9, seed=at, examples=300),
            "also": answers(accuracy=0.9, seed=10 + at, examples=300),
            "bad": answers(accuracy=0.3, seed=20 + at, examples=300),
        }
        for at, title in enumerate(("x", "y"))
    }
    found = rank_stability(cells, 300)
    places = {one.name: one for one in found.places}
    assert list(places)[-1] == "bad"
    assert (places["bad"].low, places["bad"].high, places["bad"].first) == (3, 3, 0)
    assert places["good"].low < places["good"].high
    assert sum(one.first for one in found.places) == pytest.approx(1)
    assert places["bad"].ranks == {"x": 3, "y": 3}
    assert found == rank_stability(cells, 300)
    turned = {
        title: {name: Samples(one.numerators, one.denominators, lower_is_better=True) for name, one in named.items()}
        for title, named in cells.items()
    }
    assert rank_stability(turned, 300).places[0].name == "bad"


def test_ranks_need_the_same_methods_everywhere() -> None:
    with pytest.raises(DataError, match="b of y is missing on another data set"):
        rank_stability({"x": {"a": answers(), "c": answers()}, "y": {"a": answers(), "b": answers(), "c": answers()}})
    with pytest.raises(DataError, match="two methods"):
        rank_stability({"x": {"a": answers()}})
    with pytest.raises(DataError, match="one data set"):
        rank_stability({})


def test_power_where_seeds_alone_matter_is_that_of_students_test() -> None:
    components = Components(seeds=0.04, examples=0.0, rest=0.0)
    for effect in (0.0, 0.1, 0.3):
        shift, needed = effect / np.sqrt(0.04 / 5), scipy.stats.t.ppf(0.975, 4)
        expected = scipy.stats.nct.sf(needed, 4, shift) + scipy.stats.nct.cdf(-needed, 4, shift)
        assert power(components, effect, 5, 1000) == pytest.approx(expected, abs=0.004)


def test_power_where_examples_alone_matter_is_that_of_a_normal_test() -> None:
    components = Components(seeds=0.0, examples=0.3, rest=0.0)
    expected = scipy.stats.norm.sf(1.96 - 0.03 / np.sqrt(0.3 / 2000))
    assert power(components, 0.03, 5, 2000) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_the_smallest_detectable_difference_has_the_power_asked_for(seeds: int) -> None:
    components = Components(0.0001, 0.05, 0.02)
    found = smallest_detectable(components, seeds, 600, power=0.9, comparisons=11)
    assert power(components, found, seeds, 600, comparisons=11) == pytest.approx(0.9, abs=1e-6)
    assert found > smallest_detectable(components, seeds, 600)
    assert found > smallest_detectable(components, 10, 600, power=0.9, comparisons=11)
    assert smallest_detectable(Components(0, 0, 0), seeds, 600) == 0


def test_power_asks_nothing_of_one_seed_that_it_cannot_know() -> None:
    pilot = difference(answers(1), answers(1, seed=1)).components
    assert 0 < power(pilot, 0.1, 1, 40) < 1
    with pytest.raises(DataError, match="from one seed"):
        power(pilot, 0.1, 5, 40)
    with pytest.raises(DataError, match="two examples at least"):
        power(pilot, 0.1, 1, 1)


@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_intervals_hold_the_truth_as_often_as_they_say_where_naive_ones_do_not(spread: float) -> None:
    world = World(spread, 5, 600, np.random.default_rng(11))
    squares = mean_squares(world.answers(0.85, world.shared(600)))
    low, high = limits(squares, "logit", 0.95, 600)
    held = ((low <= 0.85) & (high >= 0.85)).mean()
    assert held >= 0.93  # 95 % less 2.2 standard errors of 600 repetitions
    assert held <= 0.985
    over_seeds = scipy.stats.t.ppf(0.975, 4) * np.sqrt(squares.seeds / 3000)
    over_examples = 1.96 * np.sqrt(squares.examples / 3000)
    naive = over_seeds if spread == 0 else over_examples
    assert (np.abs(squares.grand - 0.85) <= naive).mean() < 0.91


def test_paired_tests_err_no_more_than_they_say_where_one_seed_alone_does() -> None:
    world = World(0.02, 5, 600, np.random.default_rng(12))
    common = world.shared(600)
    apart = world.answers(0.85, common) - world.answers(0.85, common)
    assert (mean_squares(apart).p_value() <= 0.05).mean() <= 0.07  # 5 % and 2.2 standard errors
    assert (mcnemar_all(apart[:, 0]) <= 0.05).mean() > 0.15


def test_the_published_simulation_is_nominal_and_is_what_the_docs_say() -> None:
    root = Path(__file__).parents[1]
    result = json.loads((root / "benchmarks/results/bench_statistics.json").read_text(encoding="utf-8"))
    text, found = (root / "docs/statistics.md").read_text(encoding="utf-8"), result["lowest_and_highest_percent"]
    error = result["monte_carlo_error_at_95"]
    assert found["coverage"]["chosen"][0] > 95 - 2 * error
    assert found["one_test"]["chosen"][1] < 5 + 2 * error
    assert found["family"]["chosen"][1] < 5 + 2 * error
    for low, high in found["coverage"].values():
        assert f"| {low:.1f} | {high:.1f} |" in text
    for name, (low, high) in found["one_test"].items():
        least, most = found["family"][name]
        assert f"| {low:.1f} to {high:.1f} | {least:.1f} to {most:.1f} |" in text
    for row in result["pairs"]:
        assert max(row["equivalence"][f"at_margin_{kind}"] for kind in ("as_good", "not_worse")) < 5 + 2 * error
        for power_of in row["power"]["differences"]:
            share = power_of["predicted"] / 100
            expected = 100 * np.sqrt(share * (1 - share) / result["repetitions"])
            assert power_of["found"] == pytest.approx(power_of["predicted"], abs=3.5 * expected)


def test_statistics_need_no_torch() -> None:
    names = "families, power, ranks, resampling, samples, statistics, variance"
    heavy = {"torch", "transformers", "peft", "scipy"}
    code = f"import sys; from peftkit.bench import {names}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
