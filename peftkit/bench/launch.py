"""Runs what is left of a grid in processes of this machine, several at once, and can be stopped at any time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from peftkit.bench.grid import Cell, Grid, Planned
from peftkit.bench.store import Record, Store
from peftkit.bench.tuning import Progress, progress
from peftkit.bench.worker import Job
from peftkit.errors import PeftkitError

TRIES = 2
"""Of a run whose process a signal killed; what fails by itself fails again."""
TOLD = 2000
"""Characters of what a process that died wrote last."""


@dataclass(frozen=True)
class State:
    """How far a grid is: a cell after the other."""

    cells: tuple[tuple[Cell, Progress], ...]
    records: dict[str, Record]

    @property
    def pending(self) -> list[Planned]:
        """What can be run now, in the order of the grid."""
        return [run for _, found in self.cells for run in found.runs]


def state_of(cells: Sequence[Cell], records: dict[str, Record]) -> State:
    """What the records say of each cell."""
    return State(tuple((cell, progress(cell, records)) for cell in cells), records)


def run_cells(
    cells: Sequence[Cell], store: Store, workers: int, say: Callable[[str], object], limit: int | None = None
) -> State:
    """Run until every cell is done or stuck, or `limit` runs were made; each result is kept as soon as it is there.

    Args:
        workers: processes at a time, which share the processor's cores out.
    """
    records = {record.id: record for record in store.records()}
    state = state_of(cells, records)

    def told(record: Record, _: float) -> None:
        nonlocal state
        state = state_of(cells, records)
        say(_line(record, state))

    run_jobs(lambda: [_job(one, cells[0].grid, store) for one in state.pending], records, store, workers, told, limit)
    return state


def run_jobs(
    pending: Callable[[], Sequence[Job]],
    records: dict[str, Record],
    store: Store,
    workers: int,
    told: Callable[[Record, float], object],
    limit: int | None = None,
    deadline: float | None = None,
) -> None:
    """Run what is pending until nothing is, `limit` runs were made, or the deadline has come.

    Args:
        pending: tells what can be run now, in order; what is running may be among it.
        records: what is there; each new record is added before it is told.
        told: is given each new record and the seconds that its run took.
        deadline: as `time.monotonic` counts; what is running then is ended, and nothing of it is kept.
    """
    running: dict[Future[None], tuple[Job, float]] = {}
    started = 0
    processes = _Processes(workers)
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                busy = {one.id for one, _ in running.values()}
                for job in pending():
                    if len(running) == workers or (limit is not None and started == limit):
                        break
                    if job.id not in busy:
                        running[pool.submit(processes.work, job, store)] = (job, time.monotonic())
                        started += 1
                if not running:
                    return
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                done, _ = wait(running, left, return_when=FIRST_COMPLETED)
                if not done:
                    processes.end()
                    return
                for future in done:
                    job, began = running.pop(future)
                    future.result()
                    records[job.id] = _found(job, store)
                    told(records[job.id], time.monotonic() - began)
        except BaseException:
            processes.end()
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


def _job(planned: Planned, grid: Grid, store: Store) -> Job:
    return Job(
        id=planned.id,
        key=planned.key,
        run=planned.run,
        folder=str(store.folder),
        probe=grid.probe,
        robustness=grid.robustness,
        elsewhere=grid.data[planned.key.data].elsewhere,
    )


class _Processes:
    """The workers that are running."""

    def __init__(self, workers: int) -> None:
        self._threads = max(1, (os.cpu_count() or 1) // workers)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ending = False

    def work(self, job: Job, store: Store) -> None:
        """Run a worker to its end; of one that died without a word a record says so."""
        told = ""
        for _ in range(TRIES):
            code, told = self._ended(job)
            if self._ending or code == 0:
                return
            if code > 0:
                break
        store.add(_died(job, told))

    def _ended(self, job: Job) -> tuple[int, str]:
        """(exit code, what went wrong) of a worker."""
        environment = os.environ | {name: str(self._threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "peftkit.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the launcher, which ends its workers itself
            )
            self._running.add(process)
            if self._ending:  # `end` came between, and did not see it
                process.kill()
            process.communicate(job.model_dump_json().encode())
            self._running.discard(process)
            code = process.returncode
            if code >= 0:
                log.seek(0)
                lines = log.read().decode(errors="replace").strip()[-TOLD:]
                return code, f"the process ended with {code}: {lines}"
            name = signal.Signals(-code).name
            hint = ", as the system does where memory is short" if name == "SIGKILL" else ""
            return code, f"the process was killed by {name}{hint}"

    def end(self) -> None:
        """End all of them; what they had not finished is run again next time."""
        self._ending = True
        for process in list(self._running):
            process.kill()


def _died(job: Job, told: str) -> Record:
    from peftkit.bench.source import source_sha256
    from peftkit.environment import versions

    known: dict[str, Any] = {"id": job.id, "key": job.key, "run": job.run.model_dump(mode="json")}
    environment = {"versions": versions()}
    return Record(**known, status="failed", error=told, code=source_sha256(), environment=environment)


def default_workers() -> int:
    """One for each core: runs are independent, and a small model does not keep two cores busy."""
    return os.cpu_count() or 1
