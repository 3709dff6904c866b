"""Runs in processes of this machine, as many at a time as its cores and its memory allow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from peftkit.bench.forks import Forks, Outcome, with_threads, written
from peftkit.bench.memory import Footprints, in_mib, startable, this_machine
from peftkit.bench.store import Record, Store
from peftkit.bench.worker import Job

TRIES = 2
"""Of a run whose process a signal killed; what fails by itself fails again."""
TOLD = 2000
"""Characters of what a process that died wrote last."""


class Maker(Protocol):
    """Makes runs, each in a process that it alone is in; may be asked by several threads."""

    ending: bool
    """`end` was called."""

    def make(self, job: Job) -> Outcome:
        """Make a run to its end: the exit code of its process, negative for a signal, and what that wrote."""

    def close(self) -> None:
        """Let go of what was kept for more runs."""

    def end(self) -> None:
        """End all of them; what they had not finished is run again next time."""


class Worker:
    """Makes runs in processes of their own, and can end them all."""

    def __init__(self, module: Sequence[str], threads: int) -> None:
        """
        Args:
            module: that does a job, and arguments for it.
            threads: that torch uses in each.
        """
        self._command = [sys.executable, "-m", *module]
        self._threads = threads
        self._running: set[subprocess.Popen[bytes]] = set()
        self.ending = False

    def make(self, job: Job) -> Outcome:
        """Make a run, in a process that knows of no other."""
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=with_threads(self._threads),
                start_new_session=True,  # Ctrl-C is for the launcher, which ends its workers itself
            )
            self._running.add(process)
            if self.ending:
                process.kill()
            process.communicate(job.model_dump_json().encode())
            self._running.discard(process)
            return process.returncode, written(log)

    def close(self) -> None:
        """Nothing is left to be ended."""

    def end(self) -> None:
        """End all of them; what they had not finished is run again next time."""
        self.ending = True
        for process in list(self._running):
            process.kill()


class Processes:
    """The engine `local`."""

    def __init__(
        self, workers: int, say: Callable[[str], object], memory: float | None = None, fork: bool = True
    ) -> None:
        """
        Args:
            workers: processes at a time, which share the processor's cores out.
            say: is told once that memory, and not `workers`, decides how many there are.
            memory: bytes that all of them may hold together; default: what is free when the first has started.
            fork: let runs share libraries, data and weights, on Linux without a GPU.
        """
        self.workers, self._fork = workers, fork
        self._memory, self._say = memory, say
        self._footprints = Footprints(say)
        self._maker: Maker | None = None
        self._lock = threading.Lock()
        self._has_told = False

    def startable(self, pending: Iterable[Job], running: Sequence[Job]) -> Iterator[Job]:
        """Those that fit into what memory is left."""
        wanted = yield from startable(pending, running, self.workers, self._room, self._footprints.of)
        if wanted is not None and not self._has_told:
            self._has_told = True
            self._say(
                f"memory and not the number of workers decides how many run at a time: with the next they would take "
                f"{in_mib(wanted)} of {in_mib(self._room())}; --memory changes that"
            )

    def _room(self) -> float:
        return this_machine().memory if self._memory is None else self._memory

    def work(self, job: Job, store: Store) -> None:
        """Make a run to its end; of one that died without a word a record says so."""
        maker, code, said = self._chosen(), 0, ""
        for _ in range(TRIES):
            code, said = maker.make(job)
            if maker.ending or code == 0:
                return
            if code > 0:
                break
        store.add(died(job, how_it_ended(code, said)))

    def _chosen(self) -> Maker:
        with self._lock:
            if self._maker is None:
                threads = max(1, (os.cpu_count() or 1) // self.workers)
                # what is known of a GPU does not survive a fork
                if self._fork and sys.platform == "linux" and this_machine().kind == "cpu":
                    self._maker = Forks(threads, self.workers)
                else:
                    self._maker = Worker(["peftkit.bench.tethered", str(os.getpid())], threads)
            return self._maker

    def learn(self, record: Record) -> None:
        """From what a run held, how much others of its cell will."""
        self._footprints.add(record)

    def close(self) -> None:
        """Let go of what was kept for more runs."""
        if self._maker is not None:
            self._maker.close()

    def end(self) -> None:
        """Kill all of them, and let none begin."""
        self._chosen().end()


def how_it_ended(code: int, said: str) -> str:
    """What went wrong, by the exit code of a process and what it wrote."""
    if code >= 0:
        return f"the process ended with {code}: {said.strip()[-TOLD:]}"
    name = signal.Signals(-code).name
    hint = ", as the system does where memory is short" if name == "SIGKILL" else ""
    return f"the process was killed by {name}{hint}"


def died(job: Job, told: str) -> Record:
    """The record of a run whose process ended without one."""
    from peftkit.bench.source import source_sha256
    from peftkit.environment import versions

    known: dict[str, Any] = {"id": job.id, "key": job.key, "run": job.run.model_dump(mode="json")}
    environment = {"versions": versions()}
    return Record(**known, status="failed", error=told, code=source_sha256(), environment=environment)


def default_workers() -> int:
    """One for each core: runs are independent, and a small model does not keep two cores busy."""
    return os.cpu_count() or 1
