"""Runs in forks of one process that holds what they have in common; this is the side of who asks for them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO

from peftkit.bench.worker import Job

Outcome = tuple[int, str]
"""Of a process: its exit code, negative for a signal, and what it wrote."""


@dataclass
class _Resident:
    """A process of `peftkit.bench.resident`, and who waits for it."""

    process: subprocess.Popen[bytes]
    channel: Connection
    log: IO[bytes]
    listener: threading.Thread | None = None
    waiting: dict[str, Future[Outcome]] = field(default_factory=dict)


class Forks:
    """Makes runs in forks of a process that is started with the first and, should it end, anew with the next.

    May be asked by several threads.
    """

    def __init__(self, threads: int, at_once: int) -> None:
        """
        Args:
            threads: that torch uses in each run.
            at_once: runs at a time.
        """
        self._threads, self._at_once = threads, at_once
        self._resident: _Resident | None = None
        self._lock = threading.Lock()
        self.ending = False

    def make(self, job: Job) -> Outcome:
        """Make a run to its end."""
        answer: Future[Outcome] = Future()
        with self._lock:
            if self.ending:
                return -signal.SIGKILL, ""
            if self._resident is None:
                self._resident = self._started()
            self._resident.waiting[job.id] = answer
            with contextlib.suppress(OSError):  # it has just ended, as who listens to it is about to tell
                self._resident.channel.send(job.model_dump_json())
        return answer.result()

    def end(self) -> None:
        """End all of them; what they had not finished is run again next time."""
        with self._lock:
            self.ending = True
            if self._resident is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._resident.process.pid, signal.SIGKILL)  # its group, which its forks are in

    def close(self) -> None:
        """Let the process end, which has nothing to do any more, and wait until it has."""
        with self._lock:
            resident = self._resident
            if resident is not None:
                with contextlib.suppress(OSError):
                    resident.channel.send(None)
        if resident is not None and resident.listener is not None:
            resident.listener.join()

    def _started(self) -> _Resident:
        ours, theirs = Pipe()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed once it is read
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "peftkit.bench.resident", str(theirs.fileno()), str(self._at_once)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=with_threads(self._threads),
                start_new_session=True,  # Ctrl-C is for the launcher, which ends its workers itself
            )
        resident = _Resident(process, ours, log)
        resident.listener = threading.Thread(target=self._listen, args=(resident,), daemon=True)
        resident.listener.start()
        return resident

    def _listen(self, resident: _Resident) -> None:
        """Hand over what comes from a process, and when it has ended tell all who still wait."""
        with resident.channel, resident.log:
            while True:
                try:
                    name, code, said = resident.channel.recv()
                except (EOFError, OSError):
                    break
                with self._lock:
                    answer = resident.waiting.pop(name)
                answer.set_result((code, said))
            code = resident.process.wait()
            said = written(resident.log)
            with self._lock:
                if self._resident is resident:
                    self._resident = None
                left = list(resident.waiting.values())
            for answer in left:
                answer.set_result((code, said))


def with_threads(count: int) -> dict[str, str]:
    """The environment of a process whose libraries are to use so many threads."""
    return os.environ | {name: str(count) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def written(log: IO[bytes]) -> str:
    """All that was written into a file."""
    log.seek(0)
    return log.read().decode(errors="replace")
