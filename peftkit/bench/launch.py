"""Runs what is left of a grid in processes of this machine, several at once, and can be stopped at any time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
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
    running: dict[Future[None], Planned] = {}
    started = 0
    processes = _Processes(workers)
    with ThreadPoolExecutor(workers) as pool:
        state = state_of(cells, records)
        try:
            while True:
                busy = {one.id for one in running.values()}
                for planned in state.pending:
                    if len(running) == workers or (limit is not None and started == limit):
                        break
                    if planned.id not in busy:
                        running[pool.submit(processes.work, planned, cells[0].grid, store)] = planned
                        started += 1
                if not running:
                    return state
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    planned = running.pop(future)
                    future.result()
                    record = store.find(planned.id)
                    if record is None:
                        raise PeftkitError(f"{store.folder}: run {planned.id} left no record; is the disk full?")
                    records[planned.id] = record
                    state = state_of(cells, records)
                    say(_line(record, state))
        except BaseException:
            processes.end()
            raise


def _line(record: Record, state: State) -> str:
    key, score = record.key, record.test or record.dev
    rate = "" if key.learning_rate is None else f" at {key.learning_rate:g}"
    value = f"{'test' if record.test else 'dev'} {score.headline} {score.value:.4f}" if score else f"{record.error}"
    seconds = f", {record.cost.seconds:.0f} s" if record.cost else ""
    left = len(state.pending)
    which = f"{key.backbone} × {key.data} × {key.method}"
    return f"{which} {key.phase} seed {key.seed}{rate}: {record.status}, {value}{seconds}; {left} can be run next"


class _Processes:
    """The workers that are running."""

    def __init__(self, workers: int) -> None:
        self._threads = max(1, (os.cpu_count() or 1) // workers)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ending = False

    def work(self, planned: Planned, grid: Grid, store: Store) -> None:
        """Run a worker to its end; of one that died without a word a record says so."""
        job = Job(
            id=planned.id,
            key=planned.key,
            run=planned.run,
            folder=str(store.folder),
            probe=grid.probe,
            robustness=grid.robustness,
        )
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
