"""The grid of runs: what it plans, how a rate is chosen, and that what is stopped goes on to the same bytes."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_jsonl
from grids import grid_of, problems_of, record_of, run_here, toy_tree, write

from peftkit.bench.cells import Cell, cells, load_grid
from peftkit.bench.launch import job_of, run_cells
from peftkit.bench.matched import Matched
from peftkit.bench.processes import Processes
from peftkit.bench.sample import sampled
from peftkit.bench.store import Answers, Key, Record, Score, Store
from peftkit.bench.tuning import Progress, progress
from peftkit.bench.worker import outcome
from peftkit.cli import main
from peftkit.data.augment import Typos, changed_rows
from peftkit.data.files import read_file
from peftkit.data.rows import Rows
from peftkit.errors import UsageError


@pytest.fixture
def tree(tiny_bert: Path, toy_data: Path) -> dict[str, Any]:
    return toy_tree(tiny_bert, toy_data)


class TestGrid:
    def test_every_combination_is_a_cell(self, tree: dict[str, Any], tmp_path: Path) -> None:
        tree["backbones"]["again"] = tree["backbones"]["tiny"] | {"dropout": 0.2}
        tree["budgets"] = ["all", 4]
        found = [(one.backbone, one.data, one.budget, one.method) for one in cells(grid_of(tree, tmp_path))]
        expected = {(b, "toy", n, m) for b in ("tiny", "again") for n in ("all", "4") for m in ("full", "head")}
        assert set(found) == expected
        assert len(found) == len(expected)

    def test_a_run_is_named_by_what_it_computes(self, tree: dict[str, Any], tmp_path: Path) -> None:
        def names(changed: dict[str, Any]) -> list[str]:
            cell = next(cells(grid_of(changed, tmp_path)))
            return [cell.trial(1e-3).id, cell.final(1, 1e-3).id]

        plain = names(tree)
        assert len({*plain, *names(tree | {"budgets": [4]})}) == 4
        assert names(tree | {"name": "other", "seeds": [1, 2, 3]}) == plain
        robust = names(tree | {"robustness": [{"kind": "typos"}]})
        assert robust[0] == plain[0]  # a trial is not scored on test at all
        assert robust[1] != plain[1]

    def test_runs_are_what_a_configuration_of_their_own_would_be(self, tree: dict[str, Any], tmp_path: Path) -> None:
        from peftkit.config import load_run, run_id

        tree["methods"]["full"]["training"] = {"weight_decay": 0.5}
        tree["data"]["toy"]["training"] = {"max_steps": 5}
        run = next(cells(grid_of(tree, tmp_path))).final(2, 4e-3).run
        alone = {
            "backbone": tree["backbones"]["tiny"],
            "task": tree["data"]["toy"]["task"],
            "method": {"kind": "full"},
            "training": {
                "max_steps": 5,
                "evaluate_every": 3,
                "batch_size": 16,
                "weight_decay": 0.5,
                "learning_rate": 4e-3,
                "seed": 2,
            },
        }
        (tmp_path / "alone.yaml").write_text(yaml.safe_dump(alone))
        assert run_id(run) == run_id(load_run(tmp_path / "alone.yaml"))

    def test_impossible_cells_are_all_told_before_anything_runs(self, tree: dict[str, Any], tmp_path: Path) -> None:
        tree["methods"]["lora"] = {"method": {"kind": "lora"}, "learning_rates": [1e-3], "training": {"batchsize": 3}}
        tree["methods"]["same"] = tree["methods"]["full"]
        tree["data"]["toy"]["task"]["data"] |= {"test": "nowhere.jsonl"}
        told = problems_of(tree, tmp_path)
        assert "(tiny × toy × lora): training.batchsize: unk" in told
        assert "did you mean 'batch_size'" in told
        assert "tiny × toy × same is the same run as tiny × toy × full; leave one out" in told
        assert "data.toy: nowhere.jsonl: no such file" in told

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"seeds": [0, 1]}, "tuning.seed 0 is one of seeds"),
            ({"seeds": [1, 1]}, "seeds has one value twice"),
            ({"budgets": ["some"]}, "budgets"),
            ({"metods": {}}, "did you mean 'methods'"),
            ({"methods": {"full": {"method": {"kind": "full"}, "learning_rates": [1e-3]}}}, "methods lack head"),
        ],
    )
    def test_settings_that_make_no_comparison(
        self, tree: dict[str, Any], tmp_path: Path, change: dict[str, Any], told: str
    ) -> None:
        assert told in problems_of(tree | change, tmp_path)

    @pytest.mark.parametrize(("rates", "told"), [([], "learning_rates are missing"), ([2e-3, 1e-3], "must ascend")])
    def test_rates_that_cannot_be_tried(
        self, tree: dict[str, Any], tmp_path: Path, rates: list[float], told: str
    ) -> None:
        tree["methods"]["full"]["learning_rates"] = rates
        assert told in problems_of(tree, tmp_path)


def tried(cell: Cell, score: Any, lower: bool = False) -> tuple[Progress, list[float]]:
    """Run all trials, of which each scores `score(rate)`; where that ends, and the rates in the order of trial."""
    records: dict[str, Record] = {}
    order: list[float] = []
    while (found := progress(cell, records)).state == "tuning":
        for one in found.runs:
            assert one.key.phase == "trial"
            assert one.key.seed == 0
            order.append(float(one.key.learning_rate))
            records[one.id] = record_of(one, score(one.key.learning_rate), lower)
    return found, order


class TestTuning:
    @pytest.fixture
    def cell(self, tree: dict[str, Any], tmp_path: Path) -> Cell:
        tree["methods"]["full"]["learning_rates"] = [1e-3, 2e-3, 4e-3]
        return next(cells(grid_of(tree | {"tuning": {"extensions": 2}}, tmp_path)))

    def test_the_best_inside_is_taken(self, cell: Cell) -> None:
        found, order = tried(cell, lambda rate: -abs(rate - 2e-3))
        assert order == [1e-3, 2e-3, 4e-3]
        assert (found.learning_rate, found.at_edge, found.state) == (2e-3, False, "final")
        assert [(one.key.seed, one.key.learning_rate, one.key.phase) for one in found.runs] == [
            (1, 2e-3, "final"),
            (2, 2e-3, "final"),
        ]

    def test_an_edge_is_extended_until_the_best_lies_inside(self, cell: Cell) -> None:
        found, order = tried(cell, lambda rate: -abs(rate - 8e-3))
        assert order == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
        assert (found.learning_rate, found.at_edge) == (8e-3, False)

    def test_the_lower_edge_too_and_no_further_than_allowed(self, cell: Cell) -> None:
        found, order = tried(cell, lambda rate: -rate)
        assert order == [1e-3, 2e-3, 4e-3, 5e-4, 2.5e-4]
        assert (found.learning_rate, found.at_edge) == (2.5e-4, True)

    def test_of_equally_good_ones_the_smaller(self, cell: Cell) -> None:
        assert tried(cell, lambda rate: 0.5 if rate > 1e-3 else 0.4)[0].learning_rate == 2e-3

    def test_of_losses_the_lowest(self, cell: Cell) -> None:
        assert tried(cell, lambda rate: abs(rate - 2e-3), lower=True)[0].learning_rate == 2e-3

    def test_failures_are_worse_than_anything(self, cell: Cell) -> None:
        assert tried(cell, lambda rate: None if rate != 2e-3 else 0.0)[0].learning_rate == 2e-3
        found, _ = tried(cell, lambda rate: None)
        assert (found.state, found.runs) == ("stuck", ())

    def test_what_is_there_is_not_run_again(self, cell: Cell) -> None:
        found, _ = tried(cell, lambda rate: -abs(rate - 2e-3))
        trials = {(one := cell.trial(rate)).id: record_of(one, -abs(rate - 2e-3)) for rate in found.rates}
        first, second = found.runs
        left = progress(cell, trials | {first.id: record_of(first, 0.5)})
        assert left.runs == (second,)
        assert progress(cell, trials | {one.id: record_of(one, 0.5) for one in found.runs}).state == "done"


class TestStore:
    record = Record(
        id="a" * 16,
        key=Key(
            grid="g",
            backbone="b",
            data="d",
            method="m",
            budget="all",
            phase="final",
            seed=1,
            learning_rate=1e-3,
        ),
        status="finished",
    )

    def test_what_is_kept_is_read_back(self, tmp_path: Path) -> None:
        answers = Answers(predictions=({"label": "é"},), numerators=(1.0,), denominators=(1.0,))
        store = Store(tmp_path)
        store.add(self.record, answers)
        assert list(Store(tmp_path).records()) == [self.record]
        assert store.answers(self.record.id) == answers
        file = tmp_path / "answers" / f"{self.record.id}.json.gz"
        before = file.read_bytes()
        time.sleep(1.1)  # the clock that gzip would write counts seconds
        store.add(self.record, answers)
        assert file.read_bytes() == before

    @pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: text.replace("aaaa", "aaab")])
    def test_a_damaged_record_counts_as_not_there(self, tmp_path: Path, damage: Any) -> None:
        store = Store(tmp_path)
        store.add(self.record)
        file = tmp_path / "runs" / f"{self.record.id}.json"
        file.write_text(damage(file.read_text()))
        assert list(store.records()) == []
        assert list(store.damaged) == [file.name]

    def test_damaged_answers_are_told(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        store.add(self.record, Answers(predictions=("x",) * 100))
        file = tmp_path / "answers" / f"{self.record.id}.json.gz"
        whole = file.read_bytes()
        bad_code = whole[:10] + b"\xff" + whole[11:]  # zlib's own error, which is no OSError
        for content in (whole[:20], gzip.compress(b"{}"), b"", bad_code):
            file.write_bytes(content)
            with pytest.raises(UsageError, match=r"cannot be read .* remove runs/a+\.json beside it"):
                store.answers(self.record.id)


def test_so_many_rows_of_each_class() -> None:
    rows = Rows("x.csv", [{"label": "ab"[i % 3 == 0], "n": i} for i in range(60)], range(60))
    one, other = (sampled(rows, 5, "label", seed) for seed in (1, 2))
    assert Counter(record["label"] for record in one.records) == {"a": 5, "b": 5}
    assert [record["n"] for record in one.records] == sorted(record["n"] for record in one.records)
    assert one.records != other.records
    assert sampled(rows, 5, "label", 1) == one
    assert len(sampled(rows, 5, None, 1)) == 5
    with pytest.raises(UsageError, match='20 rows of class "b", and a budget of 21'):
        sampled(rows, 21, "label", 1)


class TestOutcome:
    def test_a_final_run_is_the_same_run_on_its_own(self, tree: dict[str, Any], tmp_path: Path) -> None:
        from peftkit.artifacts.predict import evaluate_rows
        from peftkit.artifacts.store import load_run
        from peftkit.config import in_folder
        from peftkit.experiment import train

        typos = Typos(rate=0.5)
        tree["methods"]["lora"] = {"method": {"kind": "lora", "rank": 2}, "learning_rates": [1e-2]}
        tree["robustness"] = [{"kind": "typos", "rate": 0.5}]
        grid = grid_of(tree, tmp_path)
        cell = next(one for one in cells(grid) if one.method == "lora")
        planned = cell.final(1, 1e-2)
        record, answers = outcome(job_of(planned, grid, tmp_path))
        assert record.error is None
        result = train(in_folder(planned.run, str(tmp_path / "alone")))
        assert record.test is not None
        assert record.test.values == result.evaluations["after"].scores.values
        assert record.trainable_parameters == result.record.trainable_parameters
        assert record.dev is not None
        assert record.dev.value == max(value for _, value in record.curve)
        assert record.head_parameters == 2 * 32 + 2
        files = list((tmp_path / "alone" / "adapter").rglob("*"))
        assert record.artifact_bytes == sum(file.stat().st_size for file in files if file.is_file())
        assert answers is not None
        assert [one["label"] for one in answers.predictions] == [
            one["label"] for one in result.evaluations["after"].predictions
        ]
        assert sum(answers.numerators) / sum(answers.denominators) == record.test.value
        assert record.merged is not None
        assert record.merged.value == record.test.value
        assert record.merged_answers_changed == 0
        assert record.majority == Score(
            headline="accuracy", value=record.majority.value, values=result.evaluations["majority"].scores.values
        )
        saved = load_run(tmp_path / "alone")
        mistyped = changed_rows(read_file(Path(tree["data"]["toy"]["task"]["data"]["test"])), ["text"], typos, "0")
        assert record.robustness["typos"].values == evaluate_rows(saved, mistyped).scores.values

    def test_a_trial_does_not_look_at_test(self, tree: dict[str, Any], tmp_path: Path) -> None:
        files = tree["data"]["toy"]["task"]["data"]
        files["test"] = str(write_jsonl(tmp_path / "test.jsonl", [{"text": "good", "label": "unheard of"}]))
        grid = grid_of(tree, tmp_path)
        cell = next(cells(grid))
        trial, answers = outcome(job_of(cell.trial(1e-3), grid, tmp_path))
        assert (trial.status, trial.test, answers) == ("finished", None, None)
        final, answers = outcome(job_of(cell.final(1, 1e-3), grid, tmp_path))
        assert (final.status, answers) == ("failed", None)
        assert "label 'unheard of' never occurs in training" in str(final.error)

    def test_other_data_of_the_same_labels(self, tree: dict[str, Any], tmp_path: Path) -> None:
        data = tree["data"]["toy"]["task"]["data"]
        own = read_file(Path(data["test"]))
        turned = [
            one | {"label": {"positive": "negative", "negative": "positive"}[one["label"]]} for one in own.records
        ]
        turned_file = write_jsonl(tmp_path / "turned.jsonl", turned)
        alien_file = write_jsonl(tmp_path / "alien.jsonl", [{"text": "good", "label": "unheard of"}])

        def final_on(**elsewhere: Path) -> tuple[Record, str]:
            named = {name: {"train": data["train"], "test": str(file)} for name, file in elsewhere.items()}
            changed = tree | {"data": {"toy": tree["data"]["toy"] | {"elsewhere": named}}}
            grid = grid_of(changed, tmp_path)
            planned = next(cells(grid)).final(1, 1e-3)
            return outcome(job_of(planned, grid, tmp_path))[0], planned.id

        record, named = final_on(turned=turned_file)
        assert record.test is not None
        assert record.elsewhere["turned"].value == pytest.approx(1 - record.test.value, abs=1e-12)
        assert named != next(cells(grid_of(tree, tmp_path))).final(1, 1e-3).id
        failed, _ = final_on(alien=alien_file)
        assert "label 'unheard of' never occurs in training" in str(failed.error)
        assert "alien.jsonl" in str(failed.error)
        missing = {"far": {"train": "nowhere.jsonl"}}
        told = problems_of(tree | {"data": {"toy": tree["data"]["toy"] | {"elsewhere": missing}}}, tmp_path)
        assert "data.toy: nowhere.jsonl: no such file" in told

    def test_entities_are_counted_as_they_are_scored(
        self, tree: dict[str, Any], toy_data: Path, tmp_path: Path
    ) -> None:
        files = {split: str(toy_data / f"entities_{split}.conll") for split in ("train", "dev", "test")}
        tree["data"]["toy"]["task"] = {"kind": "token_classification", "data": files, "max_length": 32}
        tree["training"] |= {"max_steps": 25}
        grid = grid_of(tree, tmp_path)
        record, answers = outcome(job_of(next(cells(grid)).final(1, 4e-3), grid, tmp_path))
        assert answers is not None
        assert record.test is not None
        assert record.test.value > 0.3
        right, both = sum(answers.numerators), sum(answers.denominators)
        assert record.test.value == pytest.approx(right / both, abs=1e-12)
        assert record.test.values["entity_f1"] == record.test.value

    def test_memory_that_runs_out_is_an_outcome(
        self, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from peftkit.training import loop

        def exhausted(*_: Any) -> None:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(loop, "collate", exhausted)
        grid = grid_of(tree, tmp_path)
        record, _ = outcome(job_of(next(cells(grid)).trial(1e-3), grid, tmp_path))
        assert record.status == "out_of_memory"
        assert "lower training.micro_batch_size" in str(record.error)

    def test_what_is_forgotten(self, tree: dict[str, Any], tmp_path: Path) -> None:
        data = tree["data"]["toy"]["task"]["data"]
        probe = {"train": data["train"], "test": data["test"]}
        grid = grid_of(tree | {"probe": {"name": "same words", "data": probe}}, tmp_path)
        by_method = {one.method: one for one in cells(grid)}
        head, _ = outcome(job_of(by_method["head"].final(1, 1e-2), grid, tmp_path))
        full, _ = outcome(job_of(by_method["full"].final(1, 5e-2), grid, tmp_path))
        assert head.forgetting is not None
        assert full.forgetting is not None
        assert head.forgetting.before == head.forgetting.after == head.forgetting.refitted == full.forgetting.before
        assert full.forgetting.after < full.forgetting.before
        assert len(list((tmp_path / "probes").iterdir())) == 1


class TestLaunch:
    def comparable(self, store: Store) -> dict[str, Any]:
        """What must be the same however the runs came about."""
        timed = {"cost", "environment"}
        return {one.id: one.model_dump(exclude=timed) for one in store.records()} | {
            file.name: file.read_bytes() for file in (store.folder / "answers").glob("*")
        }

    def test_killed_and_run_again_gives_the_same(self, tree: dict[str, Any], tmp_path: Path) -> None:
        tree["methods"]["full"]["learning_rates"] = [4e-3]
        file = write(tree | {"seeds": [1]}, tmp_path)
        grid = load_grid(file)
        alone = Store(tmp_path / "alone")
        run_here(grid, alone)
        folder = tmp_path / "results"
        command = [sys.executable, "-m", "peftkit.cli", "bench", "run", str(file), "--folder", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*command, "--workers", "2"], env=environment, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while not list((folder / "runs").glob("*.json")) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        done = {one.name: one.stat().st_mtime_ns for one in (folder / "runs").glob("*.json")}
        assert 0 < len(done) < len(list(alone.records()))
        again = subprocess.run(
            [*command, "--workers", "2"], env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert again.returncode == 0, again.stderr
        assert self.comparable(Store(folder)) == self.comparable(alone)
        assert {name: (folder / "runs" / name).stat().st_mtime_ns for name in done} == done
        assert not list((folder / ".locks").iterdir())
        assert "2 cells done" in again.stdout

    def test_a_worker_that_dies_is_a_row(
        self, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def killed(*_: Any, **__: Any) -> subprocess.Popen[bytes]:
            return subprocess.Popen(["bash", "-c", "kill -9 $$"], stdin=subprocess.PIPE)

        class Patched:
            Popen = staticmethod(killed)
            PIPE = subprocess.PIPE

        grid = grid_of(tree, tmp_path)
        monkeypatch.setattr("peftkit.bench.processes.subprocess", Patched)
        said: list[str] = []
        engine = Processes(2, said.append, math.inf, fork=False)
        state = run_cells(list(cells(grid)), Store(tmp_path / "results"), engine, said.append)
        assert {found.state for _, found in state.cells} == {"stuck"}
        errors = {str(record.error) for record in state.records.values()}
        assert errors == {"the process was killed by SIGKILL, as the system does where memory is short"}
        assert len(said) == 3


class TestCommandLine:
    def test_status(self, tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file, folder = write(tree, tmp_path), tmp_path / "results"
        cell = next(cells(load_grid(file)))
        store = Store(folder)
        for rate, dev in ((1e-3, 0.5), (4e-3, 0.6)):
            store.add(record_of(cell.trial(rate), dev))
        test = Score(headline="accuracy", value=0.75)
        planned = cell.final(2, 4e-3)
        store.add(record_of(planned, 0.6).model_copy(update={"test": test}))
        (folder / "runs" / "0.json").write_text("{")
        assert main(["bench", "status", str(file), "--folder", str(folder)]) == 0
        told = capsys.readouterr().out
        assert "runs/0.json cannot be read" in told
        row = next(line.split() for line in told.splitlines() if "× full" in line)
        assert row[5:] == ["final", "2", "0.004", "(edge)", "1/2", "0.7500"]
        assert main(["bench", "status", str(file), "--folder", str(folder), "--json", "--method", "head"]) == 0
        (row,) = json.loads(capsys.readouterr().out.partition("\n")[2])["cells"]
        assert (row["cell"], row["state"], row["next"]) == ("tiny × toy × head", "tuning", 1)

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["bench"], "peftkit bench needs one more word: run, status, report, compare"),
            (["bench", "rnu"], "no verb 'bench rnu'; did you mean 'bench run'?"),
            (["bench", "status", "GRID", "--method", "ful"], "--method ful: not in .*; did you mean 'full'?"),
            (["bench", "run", "nowhere.yaml"], "no configuration file nowhere.yaml"),
        ],
    )
    def test_usage(
        self,
        tree: dict[str, Any],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        told: str,
    ) -> None:
        import re

        file = write(tree, tmp_path)
        assert main([str(file) if one == "GRID" else one for one in arguments]) == 2
        assert re.search(told, capsys.readouterr().err)


def test_the_shipped_grids_are_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their files need not be here; everything else about them is checked."""
    import peftkit.bench.cells as module

    monkeypatch.setattr(module, "missing_files", lambda data: [])
    # what it asks of a backbone's configuration, which need not be here either
    monkeypatch.setattr(module, "matched", lambda method, *_: Matched(method.size, 5, 300_000, 300_000))
    grids = sorted((Path(__file__).parents[1] / "benchmarks" / "grids").glob("*.yaml"))
    assert len(grids) >= 4
    for file in grids:
        grid = load_grid(file)
        assert dataclasses.is_dataclass(next(cells(grid)))
        assert grid.name == file.stem
