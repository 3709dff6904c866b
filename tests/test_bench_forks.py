"""Runs in forks of one process: what they share changes nothing of what they give; what dies is told or mended."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from grids import grid_of, run_here, toy_tree

from benchmarks.bench_ray import comparable
from peftkit.backbones.load import BEFORE, Backbone, load
from peftkit.bench.cells import cells
from peftkit.bench.forks import Forks
from peftkit.bench.grid import Grid
from peftkit.bench.launch import job_of, run_cells
from peftkit.bench.processes import TRIES, Processes, Worker
from peftkit.bench.shared import Shared
from peftkit.bench.store import Store
from peftkit.bench.worker import Job, outcome
from peftkit.memory import resident_bytes

RESIDENT = "peftkit.bench.resident"


@pytest.fixture
def tree(tiny_bert: Path, toy_data: Path) -> dict[str, Any]:
    tree = toy_tree(tiny_bert, toy_data)
    tree["methods"] |= {
        "full": {"method": {"kind": "full"}, "learning_rates": [4e-3]},
        "lora": {"method": {"kind": "lora", "rank": 2, "dropout": 0.1}, "learning_rates": [4e-3]},
    }
    return tree | {"seeds": [1]}


@pytest.fixture
def grid(tree: dict[str, Any], tmp_path: Path) -> Grid:
    """Six runs: a trial and a final run of three methods; the first writes into the memory that the others read."""
    return grid_of(tree, tmp_path)


def residents() -> list[psutil.Process]:
    """The processes below this one that fork for runs, without the forks."""
    below = psutil.Process().children()
    return [one for one in below if one.status() != psutil.STATUS_ZOMBIE and RESIDENT in one.cmdline()]


def a_job(grid: Grid, folder: Path, method: str = "head", **changes: Any) -> Job:
    cell = next(one for one in cells(grid) if one.method == method)
    return job_of(cell.trial(cell.rates[0]), grid, folder).model_copy(update=changes)


@contextmanager
def killing(which: Callable[[psutil.Process], list[psutil.Process]], count: int) -> Iterator[list[psutil.Process]]:
    """SIGKILL the first processes that `which` finds by the resident one, in the background; yields those killed."""
    killed: list[psutil.Process] = []

    def kill() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and len(killed) < count:
            time.sleep(0.02)
            for one in (one for resident in residents() for one in which(resident) if one not in killed):
                one.kill()
                killed.append(one)

    killer = threading.Thread(target=kill)
    killer.start()
    yield killed
    killer.join()


class TestForks:
    def test_all_methods_give_the_same_as_alone(self, grid: Grid, tmp_path: Path) -> None:
        alone, store = Store(tmp_path / "alone"), Store(tmp_path / "results")
        run_here(grid, alone)
        said: list[str] = []
        with closing(Processes(2, said.append, math.inf)) as engine:
            state = run_cells(list(cells(grid)), store, engine, said.append)
            assert len(residents()) == 1
            (resident,) = residents()
            assert resident.num_threads() == 1
        assert {found.state for _, found in state.cells} == {"done"}
        assert comparable(store) == comparable(alone)
        assert len(list(store.records())) == 6
        assert not psutil.wait_procs([resident], timeout=30)[1]

    def test_deaths_are_mended_or_told(self, grid: Grid, tmp_path: Path) -> None:
        store, job = Store(tmp_path), a_job(grid, tmp_path)
        with closing(Processes(2, print, math.inf)) as engine:
            with killing(lambda resident: resident.children(), TRIES) as forks:
                engine.work(job, store)
            assert len(forks) == TRIES
            (record,) = store.records()
            assert record.error == "the process was killed by SIGKILL, as the system does where memory is short"
            store.remove(job.id)
            with killing(lambda resident: [resident] if resident.children() else [], 1) as killed:
                engine.work(job, store)
            assert [one.status for one in store.records()] == ["finished"]
            assert residents() != killed
            assert not psutil.wait_procs([*forks, *killed], timeout=30)[1]
            engine.end()
            store.remove(job.id)
            engine.work(job, store)
            assert not list(store.records())

    def test_a_launcher_that_is_killed_leaves_nothing_computing(self, grid: Grid, tmp_path: Path) -> None:
        job = a_job(grid, tmp_path)
        (tmp_path / "job.json").write_text(job.model_dump_json())
        program = (
            "import sys; from peftkit.bench.forks import Forks; from peftkit.bench.worker import Job; "
            "Forks(1, 2).make(Job.model_validate_json(open(sys.argv[1]).read()))"
        )
        launcher = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "job.json")])
        until = time.monotonic() + 120
        below: list[psutil.Process] = []
        while time.monotonic() < until and len(below) < 2:
            below = psutil.Process(launcher.pid).children(recursive=True)
            time.sleep(0.02)
        assert len(below) >= 2
        launcher.kill()
        launcher.wait(30)
        assert not psutil.wait_procs(below, timeout=30)[1]

    def test_what_is_wrong_with_a_run_is_told_as_in_a_process_of_its_own(self, grid: Grid, tmp_path: Path) -> None:
        broken = tmp_path / "broken.jsonl"
        broken.write_text('{"text": "a b c", "label": 1}\n{"text": ')
        job = a_job(grid, tmp_path)
        data = job.run.task.data.model_copy(update={"train": str(broken)})  # type: ignore[union-attr]
        run = job.run.model_copy(update={"task": job.run.task.model_copy(update={"data": data})})
        with closing(Forks(1, 2)) as forks:
            assert forks.make(job.model_copy(update={"run": run}))[0] == 0
        (record,) = Store(tmp_path).records()
        assert record.error == outcome(job.model_copy(update={"run": run}))[0].error
        assert "broken.jsonl" in str(record.error)

    def test_what_is_ended_before_its_first_run_makes_none(self, grid: Grid, tmp_path: Path) -> None:
        """Ctrl-C while libraries are still being imported."""
        engine = Processes(1, print, math.inf)
        engine.end()
        engine.work(a_job(grid, tmp_path), Store(tmp_path))
        assert not residents()
        assert not list(Store(tmp_path).records())

    @pytest.mark.parametrize(
        ("kind", "fork", "expected"), [("cpu", True, Forks), ("gpu", True, Worker), ("cpu", False, Worker)]
    )
    def test_where_runs_are_forked(
        self, kind: str, fork: bool, expected: type, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a process knows of a GPU does not survive a fork."""
        monkeypatch.setattr("peftkit.bench.processes.this_machine", lambda: SimpleNamespace(kind=kind))
        assert type(Processes(2, print, math.inf, fork)._chosen()) is expected

    def test_a_resident_that_cannot_start_is_told(
        self, grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        (tmp_path / "peft.py").write_text("raise ImportError('no such library here')")
        store = Store(tmp_path / "results")
        engine = Processes(1, print, math.inf)
        engine.work(a_job(grid, store.folder), store)
        (record,) = store.records()
        assert str(record.error).startswith("the process ended with 1: ")
        assert "no such library here" in str(record.error)


class TestCommon:
    @pytest.fixture
    def job(self, grid: Grid, tmp_path: Path) -> Job:
        return a_job(grid, tmp_path)

    def test_data_is_that_of_runs_alike_and_of_no_others(self, grid: Grid, job: Job) -> None:
        shared = Shared(with_weights=False)
        assert shared.data(job) is None
        shared.make_ready(job)
        data = shared.data(job)
        assert data is not None
        assert data.test is data.dev  # a trial has no test
        lora = next(one for one in cells(grid) if one.method == "lora")
        assert shared.data(job_of(lora.trial(1e-3), grid, Path(job.folder))) is data
        assert shared.data(job_of(lora.final(1, 1e-3), grid, Path(job.folder))) is None
        task, key, training = job.run.task, job.key, job.run.training
        others: list[dict[str, Any]] = [
            {"dev_rows": 3},
            {"key": key.model_copy(update={"budget": "4"})},
            {"run": job.run.model_copy(update={"task": task.model_copy(update={"max_length": 16})})},
            {"run": job.run.model_copy(update={"training": training.model_copy(update={"evaluation_batch_size": 3})})},
        ]
        for changes in others:
            other = job.model_copy(update=changes)
            assert shared.data(other) is None
            shared.make_ready(other)
            assert shared.data(other) not in (None, data)
        seeds = [
            job.model_copy(update={"key": key.model_copy(update={"budget": "4", "seed": seed})}) for seed in (7, 8)
        ]
        for one in seeds:
            shared.make_ready(one)
        first, second = (shared.data(one) for one in seeds)
        assert first is not None
        assert second is not None
        assert first.fingerprint != second.fingerprint
        assert shared.data(job) is None  # the one that was not asked for the longest

    def test_weights_are_read_where_they_are(self, job: Job) -> None:
        shared = Shared()
        shared.make_ready(job)
        data = shared.data(job)
        assert data is not None

        def loaded() -> tuple[Backbone, torch.Tensor]:
            torch.manual_seed(3)
            return load(job.run.backbone, data.head), torch.rand(1)

        alone, drawn = loaded()
        backbone, drawn_again = loaded()
        assert drawn == drawn_again
        before = getattr(backbone.model, BEFORE)
        shared.lend_weights(backbone.model)
        pairs = list(zip(alone.model.named_parameters(), backbone.model.parameters(), strict=True))
        assert all(torch.equal(one, other) for (_, one), other in pairs)
        held = {one.data_ptr() for one in shared._weights.values()}
        apart = {name for (name, _), other in pairs if other.data_ptr() not in held}
        assert apart == {"classifier.weight"}  # which each run draws; a bias of zeros is the same for all
        size = sum(other.nbytes for (name, _), other in pairs if name not in apart)
        assert getattr(backbone.model, BEFORE) == before - size
        assert before <= resident_bytes() + 2**20  # a page may have gone meanwhile
