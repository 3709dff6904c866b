"""Many runs at once: what fits into memory, what a cluster is asked for; where runs take place changes nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from grids import grid_of, record_of, run_here, toy_tree, write

from benchmarks.bench_ray import comparable, kill_a_task, tasks_below
from peftkit.bench.cells import cells
from peftkit.bench.cluster import Cluster, Share, cluster, share
from peftkit.bench.grid import Grid
from peftkit.bench.launch import job_of, run_cells, state_of
from peftkit.bench.memory import BASE, COPIES, MIB, Footprint, Footprints, footprint, startable
from peftkit.bench.processes import TRIES, Processes, Worker
from peftkit.bench.remote import Origin, Reply, make, origin
from peftkit.bench.store import Cost, Record, Store
from peftkit.bench.worker import Job
from peftkit.cli import main
from peftkit.config import run_id
from peftkit.errors import UsageError


@pytest.fixture
def tree(tiny_bert: Path, toy_data: Path) -> dict[str, Any]:
    return toy_tree(tiny_bert, toy_data)


@pytest.fixture
def grid(tree: dict[str, Any], tmp_path: Path) -> Grid:
    """Four runs: a trial and a final run of two methods."""
    tree["methods"]["full"]["learning_rates"] = [4e-3]
    return grid_of(tree | {"seeds": [1]}, tmp_path)


def with_cost(record: Record, peak: int) -> Record:
    cost = Cost(seconds=1.0, steps=1, tokens=1, tokens_per_second=1.0, peak_memory_bytes=peak)
    return record.model_copy(update={"cost": cost})


SIZES = {"a": 4, "b": 4, "c": 3, "d": 1, "e": 100, "?": math.inf}


class TestStartable:
    @pytest.mark.parametrize(
        ("pending", "running", "workers", "memory", "expected", "wanted"),
        [
            ("abcd", "", 4, 12, "abcd", None),
            ("abcd", "", 2, 12, "ab", None),  # workers, not memory
            ("abcd", "", 4, 8, "ab", 11),
            ("bcd", "a", 4, 8, "b", 11),
            ("cd", "ab", 2, 8, "", None),
            ("ead", "", 4, 8, "e", 104),  # alone, though it is larger than all there is
            ("ea", "d", 4, 8, "", 101),  # waits, and what is behind it too
            ("?a", "", 4, 8, "?", math.inf),
            ("a", "?", 4, 8, "", math.inf),
            ("", "a", 4, 8, "", None),
            ("ee", "", 2, math.inf, "ee", None),
        ],
    )
    def test_what_may_start(
        self, pending: str, running: str, workers: int, memory: float, expected: str, wanted: float | None
    ) -> None:
        rest = startable(pending, running, workers, lambda: memory, SIZES.__getitem__)
        found = []
        while True:
            try:
                found.append(next(rest))
            except StopIteration as end:
                assert ("".join(found), end.value) == (expected, wanted)
                return

    def test_nothing_is_asked_of_one_alone(self) -> None:
        def ask(*_: str) -> float:
            raise AssertionError("it takes seconds to find out")

        assert list(startable("ab", "", 1, ask, ask)) == ["a"]
        assert next(startable("ab", "", 2, ask, ask)) == "a"


class TestFootprints:
    def test_what_was_measured_counts_before_what_is_planned(
        self, grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("peftkit.bench.memory.footprint", lambda run: Footprint(700))
        full, head = cells(grid)
        said: list[str] = []
        footprints = Footprints(said.append)
        trial, final = (job_of(one, grid, tmp_path) for one in (full.trial(4e-3), full.final(1, 4e-3)))
        assert footprints.of(final) == 700
        for peak in (300, 500, 400):
            footprints.add(with_cost(record_of(full.trial(4e-3), 0.5), peak))
        footprints.add(record_of(head.trial(1e-2), None))  # a failure measured nothing
        assert (footprints.of(trial), footprints.of(final)) == (500, 500)
        assert footprints.of(job_of(head.trial(1e-2), grid, tmp_path)) == 700
        assert said == []
        footprints.add(with_cost(record_of(head.trial(1e-2), 0.5), 300).model_copy(update={"total_parameters": 10}))
        assert footprints.of(job_of(head.trial(1e-2), grid, tmp_path)) == 300
        # which is read back and merged
        assert footprints.of(job_of(head.final(1, 1e-2), grid, tmp_path)) == 300 + COPIES * 10 * 4

    def test_what_cannot_be_planned_is_told_once(
        self, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(run: Any) -> Footprint:
            raise NotImplementedError("aten::strange")

        monkeypatch.setattr("peftkit.bench.memory.footprint", refuse)
        grid = grid_of(tree | {"budgets": [4, 8, "all"]}, tmp_path)
        first, other, last = (one for one in cells(grid) if one.method == "full")
        said: list[str] = []
        footprints = Footprints(said.append)
        assert footprints.of(job_of(first.trial(1e-3), grid, tmp_path)) == math.inf
        footprints.add(with_cost(record_of(other.trial(1e-3), 0.5), 300 * MIB))
        assert footprints.of(job_of(last.trial(1e-3), grid, tmp_path)) == 300 * MIB
        assert footprints.of(job_of(last.final(1, 1e-3), grid, tmp_path)) == 300 * MIB
        assert len(said) == 2
        assert said[0].endswith("cannot be planned (aten::strange): each runs alone until one has ended")
        assert said[1].endswith("cannot be planned (aten::strange): 300 MiB, as others of this method held")

    def test_a_plan_is_above_what_the_run_with_its_data_is_planned_for(self, grid: Grid) -> None:
        from peftkit.planning.plan import plan

        full, head = cells(grid)
        run = full.final(1, 4e-3).run
        with_data = plan(run, alone=True).estimate
        assert footprint(run).parameters == with_data.trace.parameters
        assert footprint(run).peak - BASE >= with_data.peak
        wide = run.model_copy(update={"training": run.training.model_copy(update={"batch_size": 512})})
        assert footprint(wide).peak > footprint(run).peak > footprint(head.final(1, 1e-2).run).peak


class TestProcesses:
    def most_at_a_time(
        self, grid: Grid, folder: Path, memory: float, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[int, list[str]]:
        """How many run at a time where each is measured to hold 400 MiB, and what is said but of runs."""
        running: set[str] = set()
        counts: list[int] = []

        def finished(worker: Worker, job: Job) -> tuple[int, str]:
            running.add(job.id)
            time.sleep(0.02)
            counts.append(len(running))
            Store(Path(job.folder)).add(with_cost(record_of(job, 0.5), 400 * MIB))
            running.discard(job.id)
            return 0, ""

        monkeypatch.setattr(Worker, "make", finished)
        monkeypatch.setattr("peftkit.bench.memory.footprint", lambda run: Footprint(500 * MIB))
        said: list[str] = []
        state = run_cells(
            list(cells(grid)), Store(folder), Processes(3, said.append, memory, fork=False), lambda line: None
        )
        assert {found.state for _, found in state.cells} == {"done"}
        return max(counts), said

    def test_memory_bounds_how_many_run_and_says_so_once(
        self, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        grid = grid_of(tree | {"seeds": [1, 2, 3, 4, 5]}, tmp_path)
        assert self.most_at_a_time(grid, tmp_path / "much", 1500 * MIB, monkeypatch) == (3, [])
        count, said = self.most_at_a_time(grid, tmp_path / "little", 900 * MIB, monkeypatch)
        assert count == 2
        assert len(said) == 1
        assert "of 900 MiB; --memory changes that" in said[0]
        assert self.most_at_a_time(grid, tmp_path / "none", 10 * MIB, monkeypatch)[0] == 1


class TestState:
    def test_one_more_record_is_the_same_as_all_anew(self, tree: dict[str, Any], tmp_path: Path) -> None:
        tree["methods"]["full"]["learning_rates"] = [1e-3, 2e-3, 4e-3]
        every = list(cells(grid_of(tree | {"budgets": [4, "all"], "tuning": {"extensions": 2}}, tmp_path)))
        state, chance = state_of(every, {}), random.Random(0)
        count = 0
        while pending := state.pending:
            one = chance.choice(pending)
            score = chance.random()
            record = record_of(one, score if score > 0.2 else None)
            state = state.after(record)
            assert state == state_of(every, dict(state.records))
            count += 1
        assert count >= 12

    def test_an_id_is_that_of_the_whole_run_written_out(self, tree: dict[str, Any], tmp_path: Path) -> None:
        grid = grid_of(tree | {"robustness": [{"kind": "typos"}]}, tmp_path)
        for cell in cells(grid):
            for planned in (cell.trial(cell.rates[0]), cell.final(2, 3e-4), cell.final(1, cell.rates[0])):
                final = planned.key.phase == "final"
                measured = grid.model_dump(mode="json", include={"probe", "robustness"}) if final else {}
                named = json.dumps([run_id(planned.run), planned.key.phase, "all", measured], sort_keys=True)
                assert planned.id == hashlib.sha256(named.encode()).hexdigest()[:16]


class TestShare:
    @pytest.mark.parametrize(
        ("machines", "workers", "expected"),
        [
            ([{"CPU": 4, "memory": 80}], None, (4, Share(1, 0.0, 80))),
            ([{"CPU": 4, "memory": 80}], 2, (2, Share(2, 0.0, 80))),
            ([{"CPU": 4, "memory": 80}], 9, (9, Share(1, 0.0, 80))),
            ([{"CPU": 4, "memory": 80}, {"CPU": 16, "memory": 60}], None, (20, Share(1, 0.0, 80))),
            ([{"CPU": 4, "memory": 80}, {"CPU": 4, "memory": 60}], 1, (1, Share(4, 0.0, 80))),  # no machine has 8
            ([{"CPU": 16, "GPU": 2, "memory": 80}, {"CPU": 4, "memory": 9}], None, (2, Share(10, 1.0, 0))),
            ([{"CPU": 16, "GPU": 2, "memory": 80}], 3, (3, Share(5, 0.5, 0))),
            ([{"CPU": 16, "GPU": 2, "memory": 80}], 1, (1, Share(16, 1.0, 0))),
            ([{}], None, (1, Share(1, 0.0, 0))),
        ],
    )
    def test_what_a_run_gets(
        self, machines: list[dict[str, float]], workers: int | None, expected: tuple[int, Share]
    ) -> None:
        assert share(machines, workers) == expected


class Lost(Exception):
    pass


class Scripted:
    """In Ray's place: what becomes of one task after the other."""

    exceptions = SimpleNamespace(
        RayError=Lost,
        **dict.fromkeys(("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError", "ObjectLostError"), Lost),
    )

    def __init__(self, replies: list[Any]) -> None:
        self.replies, self.asked = iter(replies), []  # type: ignore[var-annotated]

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0, "memory": 1000 * MIB}}]

    def remote(self, function: Any) -> Any:
        def options(**asked: Any) -> Any:
            self.asked.append(asked)
            return SimpleNamespace(remote=lambda *_: object())

        return SimpleNamespace(options=options)

    def get(self, reference: Any) -> Any:
        reply = next(self.replies)
        if isinstance(reply, Exception):
            raise reply
        return reply


class TestCluster:
    def test_tries_are_bounded_and_the_record_says_what_became_of_them(
        self, grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("peftkit.bench.memory.footprint", lambda run: Footprint(500))
        full, head = cells(grid)
        jobs = [job_of(one, grid, tmp_path) for one in (full.trial(4e-3), full.final(1, 4e-3), head.trial(1e-2))]
        whole = Reply(record=record_of(jobs[1], 0.5).model_dump_json())
        killed, refused = Reply(exit_code=-9, told="killed"), Reply(exit_code=2, told="no such thing")
        ray = Scripted([Lost("the node is gone")] * TRIES + [killed, whole] + [refused])
        engine, store = Cluster(ray, None, lambda line: None), Store(tmp_path / "results")
        for job in jobs:
            engine.work(job, store)
            engine.work(job, store)  # is there, so that nothing is asked
        found = [store.find(job.id) for job in jobs]
        assert [(one.status, one.error) for one in found if one] == [
            ("failed", "Lost: the node is gone"),
            ("finished", None),
            ("failed", "no such thing"),
        ]
        assert len(ray.asked) == TRIES + 2 + 1
        expected = {"num_cpus": 1, "num_gpus": 0.0, "max_retries": 0, "memory": 500}
        assert all(asked.items() >= expected.items() for asked in ray.asked)
        assert not list((store.folder / ".locks").iterdir())

    def test_a_machine_that_is_not_alike_refuses(self, grid: Grid, tmp_path: Path) -> None:
        text = job_of(next(cells(grid)).trial(4e-3), grid, tmp_path).model_dump_json()
        here = origin()
        for asked, told in (
            (Origin(here.folder, "other", here.versions), "its peftkit has other code"),
            (
                Origin(here.folder, here.code, here.versions | {"torch": "1.0"}),
                "and the machine that gives the runs 1.0",
            ),
        ):
            assert told in make(text, 1, asked).refused
        lacking = text.replace("sentiment_train.jsonl", "elsewhere.jsonl")
        refused = make(lacking, 1, here).refused
        assert "elsewhere.jsonl: no such file" in refused
        assert refused.endswith("every machine needs the data at the same path")
        ray = Scripted([Reply(refused="node-7: it has torch 1.0")])
        with pytest.raises(UsageError, match="node-7"):
            run_cells(list(cells(grid)), Store(tmp_path / "none"), Cluster(ray, 1, lambda line: None), print)

    def test_a_cluster_that_cannot_be_had_is_told_before_anything_is_written(
        self, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = ["bench", "run", str(write(tree, tmp_path)), "--folder", str(tmp_path / "results")]
        assert main([*run, "--engine", "ray", "--ray-address", "127.0.0.1:1"]) == 2
        assert "cannot join the Ray cluster at 127.0.0.1:1: " in capsys.readouterr().err
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        for arguments, told in (
            (["--engine", "ray"], "error: --engine ray needs Ray: pip install 'peftkit[ray]'"),
            (["--ray-address", "auto"], "error: --ray-address goes with --engine ray"),
            (["--engine", "ray", "--processes", "fresh"], "error: --processes goes with --engine local"),
            (["--memory", "much"], "error: --memory: 'much' is not an amount of memory such as 24GiB or 800MiB"),
        ):
            assert main([*run, *arguments]) == 2
            assert capsys.readouterr().err.strip() == told
        assert not (tmp_path / "results").exists()


@pytest.mark.timeout(900)
def test_a_ray_cluster_with_a_worker_killed_gives_the_same(grid: Grid, tmp_path: Path) -> None:
    import ray

    before = psutil.Process().children(recursive=True)
    alone, store = Store(tmp_path / "alone"), Store(tmp_path / "results")
    every = list(cells(grid))
    run_here(grid, alone)

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    killed: list[psutil.Process] = []
    killer = threading.Thread(target=kill_a_task, args=(store.folder, killed, 0, 240.0))
    said: list[str] = []
    with cluster(None, 2, None, said.append) as engine:
        killer.start()
        with pytest.raises(KeyboardInterrupt):
            run_cells(every, store, engine, stop)
        killer.join()
        assert killed
        assert not psutil.wait_procs([*killed, *tasks_below()], timeout=30)[1]  # nothing computes for nobody
        assert 0 < len(list(store.records())) < 4
        run_cells(every, store, Cluster(ray, 2, said.append), said.append)
        started = [one for one in psutil.Process().children(recursive=True) if one not in before]
    assert said[0] == "Ray: 1 machine, 2 runs at a time, each with 1 CPU"
    assert comparable(store) == comparable(alone)
    assert len(list(store.records())) == 4
    assert not list((store.folder / ".locks").iterdir())
    assert not psutil.wait_procs(started, timeout=30)[1]
