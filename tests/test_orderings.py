"""Orderings are judged by paired tests, and what was not run is said to be missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from benchmarks.made_results import Made, Method, write
from benchmarks.orderings import ORDERINGS, Ordering, Verdict, at_least, far_behind, forgets_more, verdicts
from benchmarks.repeated import compared
from peftkit.bench.analysis import Analysis, analyse
from peftkit.bench.results import read
from peftkit.bench.store import Store
from peftkit.errors import UsageError

METHODS = (
    Method("full", 0.90, 22_000_000, 1e-4),
    Method("lora", 0.90, 300_000, 1e-3),
    Method("lora_qv", 0.60, 100_000, 1e-3),
    Method("prefix", 0.80, 100_000, 3e-3),
    Method("prompt", 0.95, 8_000, 3e-3),
    Method("head", 0.70, 770, 3e-3),
)


@pytest.fixture(scope="module")
def analyses(tmp_path_factory: pytest.TempPathFactory) -> list[Analysis]:
    folder = tmp_path_factory.mktemp("results")
    write(folder, Made(methods=METHODS).runs())
    return [analyse(block, ("full", "lora"), 0.01) for block in read(folder).blocks]


def told(analyses: list[Analysis], *orderings: Ordering) -> list[Verdict]:
    return verdicts(analyses, orderings)


def test_each_claim_is_judged_on_each_data_set(analyses: list[Analysis]) -> None:
    words = [(one.claim[:12], one.data, one.word) for one in verdicts(analyses)]
    expected = ["agrees", "agrees", "missing", "disagrees", "agrees", "agrees"]
    assert words == [
        (ordering.claim[:12], data, word)
        for ordering, word in zip(ORDERINGS, expected, strict=True)
        for data in ("sst2", "tweet_emotion")
    ]


def test_equal_methods_neither_agree_nor_disagree(analyses: list[Analysis]) -> None:
    (one, _) = told(analyses, Ordering("", "", at_least("full", "lora")))
    assert one.word == "not separable"


def test_a_little_behind_is_not_far_behind(tmp_path: Path) -> None:
    methods = (Method("full", 0.90), Method("near", 0.88), Method("edge", 0.85), Method("far", 0.70))
    write(tmp_path, Made(methods=methods, data=("sst2",)).runs())
    found = [analyse(block, ("full",), 0.01) for block in read(tmp_path).blocks]
    words = [told(found, Ordering("", "", far_behind(name, "full")))[0].word for name in ("near", "edge", "far")]
    assert words == ["disagrees", "not separable", "agrees"]


def test_forgetting_is_paired_over_seeds_and_corrected_over_data_sets(analyses: list[Analysis]) -> None:
    raw = []
    for analysis in analyses:
        lost = {
            name: [run.forgetting.after for run in entry.runs if run.forgetting]
            for name in ("full", "lora")
            for entry in analysis.block.entries
            if entry.method == name
        }
        raw.append(ttest_rel(lost["full"], lost["lora"]).pvalue)
    first, second = np.sort(raw)
    corrected = {min(raw): 2 * first, max(raw): max(2 * first, second)}
    for one, p_value in zip(told(analyses, Ordering("", "", forgets_more("full", "lora"))), raw, strict=True):
        shown = "p < 0.001" if corrected[p_value] < 0.001 else f"p = {corrected[p_value]:.3f}"
        assert one.evidence.endswith(shown)


def test_a_rate_within_a_factor_of_two_of_ten_times(tmp_path: Path) -> None:
    verdict = []
    for at, rate in enumerate((4e-4, 5e-4, 2e-3, 3e-3)):
        methods = (Method("full", 0.9, best_rate=1e-4), Method("lora", 0.9, best_rate=rate))
        write(tmp_path / str(at), Made(methods=methods, data=("sst2",), examples=50).runs())
        found = [analyse(block, ("full",), 0.01) for block in read(tmp_path / str(at)).blocks]
        verdict.append(told(found, ORDERINGS[1])[0].word)
    assert verdict == ["disagrees", "agrees", "agrees", "disagrees"]


def test_runs_made_again_on_another_machine_are_set_beside_the_first(tmp_path: Path) -> None:
    write(tmp_path / "here", Made(methods=METHODS[:2]).runs())
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    finals = [one for one in here.records() if one.test and one.key.method == "lora"]
    for record in finals[:3]:
        assert record.test is not None
        answers = here.answers(record.id)
        first, *others = answers.predictions
        there.add(
            record.model_copy(
                update={
                    "environment": record.environment | {"processor": "another"},
                    "test": record.test.model_copy(update={"value": record.test.value + 0.25}),
                }
            ),
            answers.model_copy(update={"predictions": (f"not {first}", *others)}),
        )
    same = finals[3]
    there.add(same, here.answers(same.id))  # on the same machine: says nothing
    found = compared(here, there)
    assert found["count"] == 3
    assert found["mean_difference"] == pytest.approx(0.25)
    assert found["largest_difference"] == pytest.approx(0.25)
    assert found["answers_changed"] == pytest.approx(3 / sum(row["answers"] for row in found["runs"]))
    with pytest.raises(UsageError, match="repeats no scored run"):
        compared(here, here)
