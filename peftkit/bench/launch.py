"""Runs what is left of a grid, several at once, and can be stopped at any time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from peftkit.bench.cells import Cell, Planned
from peftkit.bench.grid import Grid
from peftkit.bench.store import Record, Store
from peftkit.bench.tuning import Progress, progress
from peftkit.bench.worker import Job
from peftkit.errors import PeftkitError


@dataclass(frozen=True)
class State:
    """How far a grid is: a cell after the other."""

    cells: tuple[tuple[Cell, Progress], ...]
    records: dict[str, Record]

    @property
    def pending(self) -> list[Planned]:
        """What can be run now, in the order of the grid."""
        return [run for _, found in self.cells for run in found.runs]

    def after(self, record: Record) -> State:
        """How far it is with one more record. Only the cell that was waiting for it is looked at again."""
        self.records[record.id] = record
        waited = (
            place for place, (_, found) in enumerate(self.cells) if any(one.id == record.id for one in found.runs)
        )
        place = next(waited)
        cell = self.cells[place][0]
        changed = (cell, progress(cell, self.records))
        return State((*self.cells[:place], changed, *self.cells[place + 1 :]), self.records)


class Engine(Protocol):
    """Where runs take place."""

    workers: int
    """The most runs at a time."""

    def startable(self, pending: Iterable[Job], running: Sequence[Job]) -> Iterator[Job]:
        """Those of `pending` that may start beside those running."""

    def work(self, job: Job, store: Store) -> None:
        """Make a run to its end, whatever that is; the store then holds its record, unless it was ended by `end`."""

    def learn(self, record: Record) -> None:
        """Take note of what a run took."""

    def end(self) -> None:
        """End all that is running; what was not finished is run again next time."""


def state_of(cells: Sequence[Cell], records: dict[str, Record]) -> State:
    """What the records say of each cell."""
    return State(tuple((cell, progress(cell, records)) for cell in cells), records)


def run_cells(
    cells: Sequence[Cell], store: Store, engine: Engine, say: Callable[[str], object], limit: int | None = None
) -> State:
    """Run until every cell is done or stuck, or `limit` runs were made; each result is kept as soon as it is there."""
    records = {record.id: record for record in store.records()}
    for record in records.values():
        engine.learn(record)
    state = state_of(cells, records)

    def told(record: Record, _: float) -> None:
        nonlocal state
        state = state.after(record)
        say(_line(record, state))

    run_jobs(lambda: (job_of(one, cells[0].grid, store.folder) for one in state.pending), store, engine, told, limit)
    return state


def run_jobs(
    pending: Callable[[], Iterable[Job]],
    store: Store,
    engine: Engine,
    told: Callable[[Record, float], object],
    limit: int | None = None,
    deadline: float | None = None,
) -> None:
    """Run what is pending until nothing is, `limit` runs were made, or the deadline has come.

    Args:
        pending: tells what can be run now, in order; what is running may be among it.
        told: is given each new record and the seconds that its run took.
        deadline: as `time.monotonic` counts; what is running then is ended, and nothing of it is kept.
    """
    running: dict[Future[None], tuple[Job, float]] = {}
    started = 0
    with ThreadPoolExecutor(engine.workers) as pool:
        try:
            while True:
                busy = {one.id for one, _ in running.values()}
                waiting = (one for one in pending() if one.id not in busy)
                left = None if limit is None else limit - started
                for job in islice(engine.startable(waiting, [one for one, _ in running.values()]), left):
                    running[pool.submit(engine.work, job, store)] = (job, time.monotonic())
                    started += 1
                if not running:
                    return
                seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
                done, _ = wait(running, seconds, return_when=FIRST_COMPLETED)
                if not done:
                    engine.end()
                    return
                for future in done:
                    job, began = running.pop(future)
                    future.result()
                    record = _found(job, store)
                    engine.learn(record)
                    told(record, time.monotonic() - began)
        except BaseException:
            engine.end()
            raise


def _found(job: Job, store: Store) -> Record:
    record = store.find(job.id)
    if record is None:
        raise PeftkitError(f"{store.folder}: run {job.id} left no record; is the disk full?")
    return record


def _line(record: Record, state: State) -> str:
    key, score = record.key, record.test or record.dev
    rate = "" if key.learning_rate is None else f" at {key.learning_rate:g}"
    value = f"{'test' if record.test else 'dev'} {score.headline} {score.value:.4f}" if score else f"{record.error}"
    seconds = f", {record.cost.seconds:.0f} s" if record.cost else ""
    left = len(state.pending)
    which = f"{key.backbone} × {key.data} × {key.method}"
    return f"{which} {key.phase} seed {key.seed}{rate}: {record.status}, {value}{seconds}; {left} can be run next"


def job_of(planned: Planned, grid: Grid, folder: Path) -> Job:
    """What a worker is to do for a run of a grid.

    Args:
        folder: of the results.
    """
    return Job(
        id=planned.id,
        key=planned.key,
        run=planned.run,
        folder=str(folder),
        probe=grid.probe,
        robustness=grid.robustness,
        elsewhere=grid.data[planned.key.data].elsewhere,
    )
