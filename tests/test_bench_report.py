"""The report of a comparison says what its raw results say, and nothing that they do not."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, chromium

from benchmarks.made_results import ENVIRONMENT, Made, Method, write
from peftkit.bench import block_charts, numbers
from peftkit.bench.charts import Axis, Point
from peftkit.bench.compare import compare, shown
from peftkit.bench.families import against
from peftkit.bench.report import FILES, report
from peftkit.bench.report_command import add_compare_options, add_report_options, compare_command, report_command
from peftkit.bench.results import read
from peftkit.bench.samples import Samples
from peftkit.bench.statistics import equivalence, interval
from peftkit.bench.store import Answers, PlannedCell, Record, Score, Store
from peftkit.console import Parser, guard
from peftkit.errors import DataError, UsageError

EXAMPLES = 1000
TRUE = (
    Method("full", 0.85, 20_000_000, 1e-4, 100.0),
    Method("better", 0.95, 2_000_000, 1e-3, 80.0),
    Method("lora", 0.85, 300_000, 1e-3, 50.0),
    Method("worse", 0.70, 1_000, 3e-3, 20.0),
)
MADE = Made(methods=TRUE, data=("sst2",), examples=EXAMPLES)
HOSTILE = '<script>alert("x")</script>|`a`&\x00=1'
VOID = {"meta"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four methods with known truths, one that ran out of memory, one that nobody ran, one seed that failed."""
    folder = tmp_path_factory.mktemp("made") / "results"
    write(folder, paired(MADE))
    store = Store(folder)
    for seed in MADE.seeds:
        store.add(unscored("wide", seed, "out_of_memory", "no room for 3 GiB"))
    store.add(unscored("late", 1, "failed", "the loss is NaN at step 12\nmore"))
    methods = [*(one.name for one in TRUE), "wide", "late"]
    store.plan(
        PlannedCell(backbone="minilm", data=data, budget="all", method=method, seeds=tuple(MADE.seeds))
        for data, names in (("sst2", methods), ("trec", methods[:1]))
        for method in names
    )
    return folder


@pytest.fixture(scope="module")
def out(made: Path) -> Path:
    return report(made, made.parent / "report").files[0].parent


def paired(grid: Made) -> Iterable[tuple[Record, Answers | None]]:
    """The runs of a grid; `lora` answers as `full` does but for one example, right for two seeds of five."""
    full: dict[int, Answers] = {}
    for record, answers in grid.runs():
        key = record.key
        if answers is not None and key.method == "full":
            full[key.seed] = answers
        if answers is not None and key.method == "lora":
            right = np.array(full[key.seed].numerators)
            right[np.flatnonzero(right == key.seed % 2)[key.seed]] = 1 - key.seed % 2
            yield scored(record, right)
        else:
            yield record, answers


def scored(record: Record, right: Any, **changes: Any) -> tuple[Record, Answers]:
    """The record with these answers, each right (1) or wrong (0)."""
    score = Score(headline="accuracy", value=float(np.mean(right)))
    answers = Answers(
        predictions=tuple(int(one) for one in right),
        numerators=tuple(float(one) for one in right),
        denominators=(1.0,) * len(right),
    )
    return record.model_copy(update={"test": score, "merged": None, **changes}), answers


def unscored(method: str, seed: int, status: Any, error: str) -> Record:
    record = next(iter(MADE.runs()))[0]
    key = record.key.model_copy(update={"method": method, "phase": "final", "seed": seed})
    changes = {"id": f"{method}{seed}", "key": key, "status": status, "error": error, "cost": None}
    return record.model_copy(update=changes)


def raw(folder: Path, method: str, data: str = "sst2") -> Samples:
    """Straight from the files: (seeds, examples)."""
    rows = {}
    for file in (folder / "runs").glob("*.json"):
        record = json.loads(file.read_text())
        if (record["key"]["method"], record["key"]["data"], record["key"]["phase"]) == (method, data, "final"):
            packed = (folder / "answers" / f"{record['id']}.json.gz").read_bytes()
            rows[record["key"]["seed"]] = json.loads(gzip.decompress(packed))["numerators"]
    values = np.array([rows[seed] for seed in sorted(rows)])
    return Samples(values, np.ones_like(values))


def table(out: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((out / name).read_text(encoding="utf-8"))))


def cell(out: Path, method: str) -> dict[str, str]:
    (found,) = [row for row in table(out, "cells.csv") if (row["method"], row["data"]) == (method, "sst2")]
    return found


def of_row(page: str, start: str) -> list[list[str]]:
    """The cells of every table row of a page that begins with a name; smaller print after a space."""
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)]
    plain = [[re.sub(r"<[^>]*>", " ", one).strip() for one in row] for row in rows if row]
    return [row for row in plain if row[0] == start]


def run(command: Callable[[argparse.Namespace], None], add: Callable[[Any], None], *arguments: object) -> int:
    parser = Parser(prog="peftkit bench")
    add(parser)
    return guard(lambda: command(parser.parse_args([str(one) for one in arguments])))


class TestKnownAnswers:
    @pytest.mark.parametrize("method", [one.name for one in TRUE])
    def test_scores_and_intervals_are_those_of_the_raw_answers(self, made: Path, out: Path, method: str) -> None:
        samples = raw(made, method)
        mean, ends = samples.numerators.mean(), interval(samples)
        row = cell(out, method)
        assert float(row["mean"]) == pytest.approx(mean, abs=1e-12)
        assert (float(row["low"]), float(row["high"])) == pytest.approx((ends.low, ends.high))
        page, text = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
        (shown_row, *_) = [found for found in of_row(page, method) if len(found) > 10 and "to" in found[2]]
        assert shown_row[1:3] == [f"{100 * mean:.2f}", f"{100 * ends.low:.2f} to {100 * ends.high:.2f}"]
        assert shown_row[3] == f"5 {100 * samples.values.min():.2f} to {100 * samples.values.max():.2f}"
        score = f"**{100 * mean:.2f}**" if method == "better" else f"{100 * mean:.2f}"
        assert f"| {method} | {score} | {100 * ends.low:.2f} to {100 * ends.high:.2f} | 5 (" in text

    @pytest.mark.parametrize("reference", ["full", "lora"])
    def test_differences_are_paired_and_corrected(self, made: Path, out: Path, reference: str) -> None:
        others = {one.name: raw(made, one.name) for one in TRUE if one.name != reference}
        for one in against(raw(made, reference), others):
            row = cell(out, one.name)
            told = [float(row[f"{reference}_{name}"]) for name in ("difference", "low", "high", "p_holm")]
            expected = [one.difference.mean, one.difference.low, one.difference.high, one.p_adjusted]
            assert told == pytest.approx(expected, rel=1e-6, abs=1e-9)

    def test_verdicts(self, made: Path, out: Path) -> None:
        verdicts = {one.name: cell(out, one.name)["full_verdict"] for one in TRUE}
        assert verdicts == {"full": "", "better": "better", "lora": "as good as", "worse": "worse"}
        pair = raw(made, "lora"), raw(made, "full")
        assert equivalence(*pair, 0.01).p_equivalent < 0.05 / 3

    def test_as_good_as_depends_on_the_margin(self, made: Path, tmp_path: Path) -> None:
        report(made, tmp_path, margin=0.0001)
        assert cell(tmp_path, "lora")["full_verdict"] == "not separable"
        assert "0.01 points" in (tmp_path / "report.html").read_text()

    def test_groups(self, out: Path) -> None:
        letters = {one.name: cell(out, one.name)["group"] for one in TRUE}
        assert letters == {"better": "a", "full": "b", "lora": "b", "worse": "c"}

    def test_the_recommendation_is_the_best_where_nothing_is_as_good(self, made: Path, tmp_path: Path) -> None:
        advice = {block.data: found for block, found in report(made, tmp_path).advice}
        assert advice["trec"] is None
        assert advice["sst2"] and advice["sst2"].method == "better"
        assert "no cheaper method was found to be as good" in advice["sst2"].text

    def test_ties_go_to_fewer_parameters(self, tmp_path: Path) -> None:
        write(tmp_path / "in", paired(replace(MADE, methods=[one for one in TRUE if one.name != "better"])))
        ((_, advice),) = report(tmp_path / "in", tmp_path / "out").advice
        assert advice and advice.method == "lora"
        assert "not separable from the best mean, full" in advice.text
        assert "with 1.5 % of its trainable parameters and 51 % of its training time" in advice.text
        assert "it trains fewest parameters" in advice.text

    def test_what_has_no_score_is_shown(self, out: Path) -> None:
        page = (out / "report.html").read_text(encoding="utf-8")
        (memory, *_) = of_row(page, "wide")
        (late, *_) = of_row(page, "late")
        assert memory[1] == "out of memory"
        assert late[1] == "1 failed, 4 missing"
        assert "out of memory: no room for 3 GiB" in page
        assert "failed: the loss is NaN at step 12" in page
        assert cell(out, "late")["missing"] == "4"
        assert "trec · minilm · all training rows" in page
        assert "20 runs scored on test, 5 seeds a method, tuned in 16 trials on dev; 6 failed or out of memory" in page

    def test_one_row_a_final_run(self, made: Path, out: Path) -> None:
        rows = table(out, "results.csv")
        assert len(rows) == 26
        assert {row["status"] for row in rows} == {"finished", "out_of_memory", "failed"}
        one = next(row for row in rows if row["method"] == "better" and row["seed"] == "3")
        record = Store(made).find(one["id"])
        assert record and record.test and record.cost and record.forgetting
        told = [one["test"], one["seconds"], one["forgetting_after"], one["robustness_typos"]]
        expected = [record.test.value, record.cost.seconds, record.forgetting.after, record.robustness["typos"].value]
        assert [float(value) for value in told] == expected

    def test_baselines(self, out: Path) -> None:
        page = (out / "report.html").read_text(encoding="utf-8")
        assert of_row(page, "majority")[0][1] == "50.90"
        assert of_row(page, "untuned")[0][1] == "52.00"

    def test_a_seed_that_learnt_nothing_is_told(self, tmp_path: Path) -> None:
        methods = [TRUE[0], replace(TRUE[2], accuracy=0.45)]
        write(tmp_path / "in", replace(MADE, methods=methods, seeds=(1, 2)).runs())
        ((_, advice),) = report(tmp_path / "in", tmp_path / "out").advice
        page = (tmp_path / "out" / "report.html").read_text()
        assert "lora: seeds 1, 2 did no better than always giving the most frequent answer" in page
        assert "full: seed" not in page
        assert advice and advice.method == "full"

    def test_learning_rates(self, out: Path) -> None:
        page = (out / "report.html").read_text(encoding="utf-8")
        assert ["full", "85.00", "84.05", "83.00", "82.05"] in of_row(page, "full")
        assert '<td class="chosen">85.00</td>' in page
        assert "full: the chosen 1e-4 is the lowest that was tried; a better one may lie beyond." in page
        assert "lora: the chosen" not in page

    def test_costs(self, out: Path) -> None:
        page = (out / "report.html").read_text(encoding="utf-8")
        (costs,) = [row for row in of_row(page, "lora") if "1e-3" in row]
        assert costs[1:8] == ["1e-3", "300,000", "770", "1.5 %", "1.14 MiB", "53.0 s", "8,000"]

    def test_what_a_method_was_brought_to(self, tmp_path: Path) -> None:
        runs = []
        for record, answers in replace(MADE, methods=[TRUE[0], TRUE[2]], seeds=(1, 2), examples=20).runs():
            if record.key.method == "lora":
                run = {"method": {"kind": "lora", "rank": 7}}
                key = record.key.model_copy(update={"parameters": 250_000})
                record = record.model_copy(update={"key": key, "run": run})
            runs.append((record, answers))
        write(tmp_path / "in", runs)
        report(tmp_path / "in", tmp_path / "out")
        page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        (costs,) = [row for row in of_row(page, "lora") if "1e-3" in row]
        # 300,000 that train, of which 770 are the head's, are 299,230
        assert costs[2:5] == ["300,000", "250,000 +20 %; rank=7", "770"]
        found = {name: cell(tmp_path / "out", name)["matched_to_parameters"] for name in ("full", "lora")}
        assert found == {"full": "", "lora": "250000"}


class TestThePage:
    def test_it_is_well_formed_and_needs_nothing_else(self, out: Path) -> None:
        page = (out / "report.html").read_text(encoding="utf-8")
        reader = Balance()
        reader.feed(page)
        reader.close()
        assert not reader.open
        assert reader.seen > 700
        assert not re.search(r"https?:|src=|<script|@import|url\(|<link|<iframe", page)
        assert page.count("<svg") >= 7

    def test_hostile_names_are_text(self, tmp_path: Path) -> None:
        methods = [Method("full", 0.8), Method(HOSTILE, 0.7), Method("=1+1", 0.75)]
        grid = replace(MADE, methods=methods, data=(HOSTILE,), budgets=("16", "all"), backbones=("a", HOSTILE))
        write(tmp_path / "in", grid.runs())
        report(tmp_path / "in", tmp_path / "out", title=HOSTILE)
        page, text = ((tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
        reader = Balance()
        reader.feed(page)
        assert not reader.open
        assert "<script" not in page + text.replace("\\<", "")
        assert "\x00" not in page + text
        assert not [line for line in text.splitlines() if line.startswith("| ") and re.search(r"[^\\]`", line)]
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| ")}
        assert max(widths) < 15
        assert "**Learning curves**" not in text
        assert "> **Use** " in text
        assert "'=1+1" in (tmp_path / "out" / "cells.csv").read_text()

    def test_the_same_results_give_the_same_bytes(self, made: Path, out: Path, tmp_path: Path) -> None:
        names = sorted((made / "runs").iterdir(), reverse=True)
        (tmp_path / "in" / "runs").mkdir(parents=True)
        shutil.copytree(made / "answers", tmp_path / "in" / "answers")
        for name in names:
            shutil.copy(name, tmp_path / "in" / "runs")
        shutil.copy(made / "planned.json", tmp_path / "in")
        report(tmp_path / "in", tmp_path / "out")
        for name in FILES:
            assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()

    def test_it_needs_no_torch(self, made: Path, tmp_path: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from peftkit.bench.report import report\n"
            "report(Path(sys.argv[1]), Path(sys.argv[2]))\n"
            "assert not {'torch', 'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code, made, tmp_path / "out"], check=True, timeout=120)

    @pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
    def test_a_browser_shows_it(self, out: Path, tmp_path: Path) -> None:
        with Browser(tmp_path / "profile") as browser:
            browser.open((out / "report.html").as_uri())
            assert browser.value("document.querySelectorAll('svg').length") >= 7
            assert browser.value("document.documentElement.scrollWidth <= window.innerWidth")
            too_far = (
                "[...document.querySelectorAll('svg text')].filter(one => { const box = one.getBoundingClientRect(),"
            )
            too_far += (
                " all = one.ownerSVGElement.getBoundingClientRect(); return box.width && (box.left < all.left - 1"
            )
            too_far += " || box.right > all.right + 1 || box.top < all.top - 1 || box.bottom > all.bottom + 1) })"
            assert browser.value(f"{too_far}.map(one => one.textContent)") == []
            assert "better" in browser.value("document.body.innerText")
            assert len(browser.screenshot()) > 10_000
            assert not browser.problems
            assert [one for one in browser.requested if not one.startswith("file:")] == []


class Balance(HTMLParser):
    """Which tags stay open, or are closed in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


class TestWhatCannotBeCompared:
    def test_no_results(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(report_command, add_report_options, tmp_path) == 2
        assert "no results here" in capsys.readouterr().err
        (tmp_path / "runs").mkdir()
        assert run(report_command, add_report_options, tmp_path) == 2
        assert "no run has come to an end yet" in capsys.readouterr().err

    @pytest.mark.parametrize("what", ["environment", "code"])
    def test_mixed_results_must_be_asked_for(self, tmp_path: Path, what: str) -> None:
        others = {
            "environment": ENVIRONMENT | {"versions": {"torch": "2.12.0", "peft": "0.21.2"}},
            "code": "dead" * 16,
        }
        grid = replace(MADE, data=("sst2",), seeds=(1, 2), rates=(1e-3,), examples=50)
        write(tmp_path / "in", grid.runs())
        changed = replace(grid, methods=[Method("new", 0.9)], changes={what: others[what]})
        write(tmp_path / "in", changed.runs())
        told = "torch: 2.13.0 (12 runs), 2.12.0 (3 runs)" if what == "environment" else "code: c0dec0dec0de (12 runs)"
        with pytest.raises(UsageError, match=re.escape(told)):
            report(tmp_path / "in", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        report(tmp_path / "in", tmp_path / "out", mixed=True)
        assert told in (tmp_path / "out" / "report.html").read_text()

    def test_damaged_files_are_told_and_do_not_count(
        self, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(made, tmp_path / "in")
        ids = sorted(record.id for record in read(made).finals if record.key.method == "worse")
        half, cut, gone, wrong = ids[:4]
        record = tmp_path / "in" / "runs" / f"{half}.json"
        record.write_text(record.read_text()[:300])
        answers = tmp_path / "in" / "answers"
        packed = (answers / f"{cut}.json.gz").read_bytes()
        (answers / f"{cut}.json.gz").write_bytes(packed[: len(packed) // 2])
        (answers / f"{gone}.json.gz").unlink()
        other = next(file for file in answers.iterdir() if file.name[:16] not in ids)
        shutil.copy(other, answers / f"{wrong}.json.gz")
        assert run(report_command, add_report_options, tmp_path / "in", "--out", tmp_path / "out") == 1
        told = capsys.readouterr().err
        assert "4 files are damaged, and the report is without them" in told
        for name in (f"runs/{half}.json", *(f"answers/{one}.json.gz" for one in (cut, gone, wrong))):
            assert name in told
        assert "these answers score" in told
        row = cell(tmp_path / "out", "worse")
        assert (row["seeds"], row["missing"]) == ("1", "4")
        assert "Damaged files" in (tmp_path / "out" / "report.html").read_text()

    def test_nothing_but_damage(self, tmp_path: Path) -> None:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "a.json").write_text('{"id": "a", ')
        with pytest.raises(DataError, match="none of 1 result files can be read"):
            read(tmp_path)

    def test_one_seed(self, tmp_path: Path) -> None:
        write(tmp_path / "in", replace(MADE, seeds=(1,)).runs())
        ((_, advice),) = report(tmp_path / "in", tmp_path / "out").advice
        assert "Every method has one seed" in (tmp_path / "out" / "report.md").read_text()
        assert advice and "It rests on one seed." in advice.text

    def test_one_method(self, tmp_path: Path) -> None:
        write(tmp_path / "in", replace(MADE, methods=TRUE[1:2]).runs())
        ((_, advice),) = report(tmp_path / "in", tmp_path / "out").advice
        text = (tmp_path / "out" / "report.md").read_text()
        assert "there is nothing to compare it with" in text
        assert "Neither full fine-tuning nor LoRA is here" in text
        assert advice and "the only method with a score" in advice.text

    def test_trials_alone(self, tmp_path: Path) -> None:
        write(tmp_path / "in", replace(MADE, seeds=()).runs())
        report(tmp_path / "in", tmp_path / "out")
        text = (tmp_path / "out" / "report.md").read_text()
        assert "No final run has a score yet" in text
        assert "| full | **85.00** |" in text

    def test_no_trial_succeeded(self, tmp_path: Path) -> None:
        changes = {"status": "out_of_memory", "error": "no room for 7 GiB", "dev": None}
        write(tmp_path / "in", replace(MADE, methods=TRUE[:1]).runs())
        write(tmp_path / "in", replace(MADE, methods=TRUE[1:2], seeds=(), changes=changes).runs())
        report(tmp_path / "in", tmp_path / "out")
        page = (tmp_path / "out" / "report.html").read_text()
        assert of_row(page, "better")[0][1] == "no trial succeeded"
        assert of_row(page, "better")[-2][1:] == ["out of memory"] * 4
        assert "out of memory: no room for 7 GiB" in page

    def test_a_method_with_one_seed_of_five_is_not_tested(self, tmp_path: Path) -> None:
        write(tmp_path / "in", replace(MADE, methods=TRUE[:3]).runs())
        write(tmp_path / "in", replace(MADE, methods=TRUE[3:], seeds=(4,)).runs())
        report(tmp_path / "in", tmp_path / "out")
        assert (cell(tmp_path / "out", "worse")["group"], cell(tmp_path / "out", "worse")["full_p"]) == ("", "")
        assert (
            "Not compared for want of shared seeds or test rows: worse" in (tmp_path / "out" / "report.md").read_text()
        )

    def test_pairs_share_their_seeds(self, tmp_path: Path) -> None:
        write(tmp_path / "in", replace(MADE, methods=TRUE[:2]).runs())
        write(tmp_path / "in", replace(MADE, methods=TRUE[3:], seeds=(3, 4, 5)).runs())
        report(tmp_path / "in", tmp_path / "out")
        full, worse = (raw(tmp_path / "in", name).numerators for name in ("full", "worse"))
        told = float(cell(tmp_path / "out", "worse")["full_difference"])
        assert told == pytest.approx(worse.mean() - full[2:].mean())

    def test_final_runs_of_another_rate_do_not_count(self, tmp_path: Path) -> None:
        write(tmp_path / "in", MADE.runs())
        write(tmp_path / "in", replace(MADE, methods=[replace(TRUE[0], best_rate=5e-5)], rates=()).runs())
        results = read(tmp_path / "in")
        (block,) = results.blocks
        full = next(entry for entry in block.entries if entry.method == "full")
        assert {record.key.learning_rate for record in full.runs} == {1e-4}
        assert len(results.left_out) == 5
        assert "its learning rate is 5e-05, that of the others 0.0001" in results.left_out[0]

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["--margin", "0"], "a margin of 0.0"),
            (["--margin", "nan"], "a margin of nan"),
            (["--reference", "Lora"], "did you mean 'lora'?"),
            (["--out", __file__], "is a file"),
        ],
    )
    def test_wrong_options(
        self, made: Path, arguments: Sequence[str], told: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(report_command, add_report_options, made, *arguments) == 2
        assert told in capsys.readouterr().err


class TestOtherScores:
    def test_what_is_no_ratio_of_sums_is_over_seeds_alone(self, tmp_path: Path) -> None:
        values = {"full": [40.1, 40.9, 40.4], "lora": [39.0, 39.2, 38.8]}
        runs = []
        for record, _ in replace(MADE, methods=[TRUE[0], TRUE[2]], seeds=(1, 2, 3), examples=20).runs():
            if record.key.phase == "final":
                score = Score(headline="bleu", value=values[record.key.method][record.key.seed - 1])
                changes = {"test": score, "majority": None, "untuned": None, "merged": None}
                runs.append((record.model_copy(update=changes), Answers(predictions=("a",))))
        write(tmp_path / "in", runs)
        report(tmp_path / "in", tmp_path / "out")
        from scipy.stats import t, ttest_rel

        row = cell(tmp_path / "out", "lora")
        mean, half = np.mean(values["lora"]), t.ppf(0.975, 2) * np.std(values["lora"], ddof=1) / np.sqrt(3)
        told = [float(row[name]) for name in ("mean", "low", "high")]
        assert told == pytest.approx([mean, mean - half, mean + half])
        assert float(row["full_p"]) == pytest.approx(ttest_rel(values["lora"], values["full"]).pvalue)
        assert float(row["full_margin"]) == pytest.approx(0.01 * np.mean(values["full"]))
        assert "bleu is no ratio of sums over examples" in (tmp_path / "out" / "report.md").read_text()

    def test_what_every_seed_gives_alike_has_no_interval(self, tmp_path: Path) -> None:
        values = {"full": [0.81, 0.95, 0.92], "better": [0.5] * 3, "lora": [0.4] * 3}
        runs = []
        for record, _ in replace(MADE, methods=TRUE[:3], seeds=(1, 2, 3), examples=20).runs():
            if record.key.phase == "final":
                score = Score(headline="bleu", value=values[record.key.method][record.key.seed - 1])
                changes = {"test": score, "majority": None, "untuned": None, "merged": None}
                runs.append((record.model_copy(update=changes), Answers(predictions=("a",))))
        write(tmp_path / "in", runs)
        report(tmp_path / "in", tmp_path / "out")
        from scipy.stats import t, ttest_1samp

        row, other = (cell(tmp_path / "out", name) for name in ("better", "lora"))
        assert (row["mean"], row["low"], row["lora_p"]) == ("0.5", "", "")
        assert set(row["group"]) & set(other["group"])  # 0.5 and 0.4, and nothing that tells chance
        apart = ttest_1samp(values["full"], 0.5)
        assert float(row["full_p"]) == pytest.approx(apart.pvalue)
        half = t.ppf(0.975, 2) * np.std(values["full"], ddof=1) / np.sqrt(3)
        assert float(row["full_low"]) == pytest.approx(0.5 - np.mean(values["full"]) - half)
        page = (tmp_path / "out" / "report.md").read_text()
        assert "better, lora: every seed gives the same bleu, so there is no interval" in page
        assert "| 0.5 |" in page  # of a hundred, and no share

    def test_a_lower_perplexity_is_better(self, tmp_path: Path) -> None:
        random, runs = np.random.default_rng(0), []
        for record, _ in replace(MADE, methods=[TRUE[0], TRUE[2]], examples=200).runs():
            if record.key.phase == "final":
                tokens = random.integers(5, 20, 200).astype(float)
                loss = tokens * (1.5 if record.key.method == "lora" else 2.0)
                value = float(np.exp(loss.sum() / tokens.sum()))
                score = Score(headline="perplexity", value=value, lower_is_better=True)
                answers = Answers(predictions=(), numerators=tuple(loss), denominators=tuple(tokens), transform="exp")
                changes = {"test": score, "majority": None, "untuned": None, "merged": None}
                runs.append((record.model_copy(update=changes), answers))
        write(tmp_path / "in", runs)
        ((_, advice),) = report(tmp_path / "in", tmp_path / "out").advice
        row = cell(tmp_path / "out", "lora")
        assert float(row["mean"]) == pytest.approx(np.exp(1.5))
        assert float(row["full_difference"]) == pytest.approx(np.exp(1.5) - np.exp(2))
        assert (row["full_verdict"], advice and advice.method) == ("better", "lora")


class TestSeveralBlocks:
    def test_wins_ranks_and_budgets(self, tmp_path: Path) -> None:
        write(tmp_path / "in", replace(MADE, data=("a", "b", "c"), budgets=("16", "64", "all")).runs())
        report(tmp_path / "in", tmp_path / "out")
        page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        assert ["better", "27", "0", "0"] in of_row(page, "better")
        assert ["worse", "0", "0", "27"] in of_row(page, "worse")
        (rank, *_) = [row for row in of_row(page, "better") if row[1].startswith("1.00")]
        assert rank[2:] == ["100 %", "1", "1", "1"]
        assert "Kendall" in page
        assert "Fewer training rows" in page
        titles = re.findall(r"<h2 id=\"block-\d+\">(.*?)</h2>", page)
        assert titles[:3] == [
            f"a · minilm · {rows}" for rows in ("16 rows a class", "64 rows a class", "all training rows")
        ]


class TestManyRuns:
    def test_six_hundred_runs_take_their_share_of_a_minute(self, tmp_path: Path) -> None:
        methods = [Method(f"method {at}", 0.9 - 0.01 * at) for at in range(10)]
        data = tuple(f"data {at}" for at in range(6))
        grid = Made(methods=methods, data=data, rates=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1), examples=EXAMPLES)
        assert write(tmp_path / "in", grid.runs()) == 600
        import scipy.stats  # noqa: F401  # what takes long to import is not what is measured

        before = time.process_time()
        report(tmp_path / "in", tmp_path / "out")
        assert time.process_time() - before < 60 * 600 / 10_000
        assert len(table(tmp_path / "out", "cells.csv")) == 60


class TestCompare:
    def test_the_same_twice(self, made: Path) -> None:
        found = compare(made, made)
        assert {one.verdict for one in found.changes} == {"the same"}
        assert (found.only_first, found.only_second, found.differing) == ((), (), {})
        assert len(found.changes) == 4

    def test_a_change(self, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        changes = {"environment": ENVIRONMENT | {"versions": {"torch": "2.14.0", "peft": "0.21.2"}}}
        methods = [replace(TRUE[0], accuracy=0.95), TRUE[1], Method("new", 0.9)]
        write(tmp_path / "other", replace(MADE, methods=methods, changes=changes).runs())
        found = compare(made, tmp_path / "other")
        by_method = {one.method: one for one in found.changes}
        before, after = raw(made, "full").mean, raw(tmp_path / "other", "full").mean
        assert by_method["full"].difference == pytest.approx(after - before)
        assert by_method["full"].verdict == "better"
        assert [names[3] for names in found.only_first] == ["lora", "worse"]
        assert [names[3] for names in found.only_second] == ["new"]
        assert found.differing == {"version of torch": ("2.13.0", "2.14.0")}
        assert "differs: version of torch: 2.13.0 → 2.14.0" in shown(found)
        assert run(compare_command, add_compare_options, made, tmp_path / "other", "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert {one["method"]: one["verdict"] for one in told["changes"]}["full"] == "better"

    def test_other_test_rows(self, made: Path, tmp_path: Path) -> None:
        write(tmp_path / "other", replace(MADE, examples=30).runs())
        found = compare(made, tmp_path / "other")
        assert found.changes == ()
        assert set(found.not_comparable.values()) == {"the test examples are not the same"}
        assert "no cell has final runs in both" in shown(found)


class TestPieces:
    def test_the_front_is_what_nothing_beats(self) -> None:
        random = np.random.default_rng(1)
        points = [Point(str(at), x, y, 0) for at, (x, y) in enumerate(random.random((40, 2)).tolist())]
        for lower in (False, True):
            sign = 1 if lower else -1
            beaten = {
                one.name
                for one in points
                for other in points
                if other.x <= one.x and sign * other.y <= sign * one.y and other is not one
            }
            assert set(block_charts.front(points, lower)) == {one.name for one in points} - beaten

    def test_curves_are_means_where_all_seeds_are(self) -> None:
        assert block_charts.mean_curve([[(1, 1.0), (2, 2.0)], [(1, 3.0)], []]) == ((1.0, 2.0),)

    @pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.913, 0.917), (-3.0, 250.0), (1e6, 3e6), (5e-5, 6e-5)])
    def test_ticks_are_round_and_inside(self, low: float, high: float) -> None:
        ticks = Axis(low, high, 0, 100).ticks()
        assert 2 <= len(ticks) <= 6
        assert all(low - 1e-9 * high <= one <= high * (1 + 1e-9) for one in ticks)

    def test_numbers(self) -> None:
        assert numbers.Scale(True).change(-0.0031) == "−0.31"
        assert numbers.Scale(True).score(-0.00001) == "0.00"
        assert [numbers.rate(one) for one in (2e-4, 1e-3, 0.5)] == ["2e-4", "1e-3", "5e-1"]
        assert [numbers.size(one) for one in (512, 3 * 2**20, 2**31)] == ["512 B", "3 MiB", "2 GiB"]
        assert [numbers.seconds(one) for one in (12.34, 3600, 36_000)] == ["12.3 s", "60 min", "10 h 0 min"]
        from scipy.stats import t

        values = [1.0, 2.0, 4.0]
        assert numbers.half_width(values) == pytest.approx(t.ppf(0.975, 2) * np.std(values, ddof=1) / 3**0.5)
