"""A process that makes each run in a fork of itself, so that libraries, encoded data and weights are loaded once.

    python -m peftkit.bench.resident CHANNEL AT_ONCE

Jobs come through CHANNEL, the number of an inherited connection, as JSON; back go the job's id, the exit code of its
process and what that wrote. At its end, or the launcher's, all is ended. It has one thread: another could hold a lock
at the moment of a fork, which nobody would then release. `peftkit.bench.forks` is the other side.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import IO, TYPE_CHECKING, Any

from peftkit.bench import worker
from peftkit.bench.forks import written
from peftkit.bench.shared import Shared
from peftkit.bench.tethered import tether
from peftkit.console import guard

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


def main() -> None:
    """Fork for each job that comes, until None does, or there is nobody who could send one."""
    number, at_once = map(int, sys.argv[1:])
    channel, shared = Connection(number), Shared(with_weights=at_once > 1)
    threads = _load_libraries()
    running: dict[int, tuple[str, BaseProcess, IO[bytes]]] = {}
    while True:
        for ready in wait([channel, *running]):
            if isinstance(ready, int):
                channel.send(_ended(*running.pop(ready)))
                continue
            try:
                text = channel.recv()
            except EOFError:
                os.killpg(0, signal.SIGKILL)
            if text is None:
                return
            job = worker.Job.model_validate_json(text)
            shared.make_ready(job)
            log = tempfile.TemporaryFile()  # noqa: SIM115 - closed once it is read
            process = get_context("fork").Process(target=_make, args=(job, shared, threads, channel, log))
            process.start()
            running[process.sentinel] = job.id, process, log


def _load_libraries() -> int:
    """Import what every run needs, without a thread; returns how many threads torch would have."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import peft  # noqa: F401 - takes longer than all the others
    import torch

    import peftkit.artifacts.store
    import peftkit.bench.probe
    import peftkit.evaluation
    import peftkit.session
    import peftkit.training.loop  # noqa: F401

    threads: int = torch.get_num_threads()
    torch.set_num_threads(1)
    return threads


def _make(job: worker.Job, shared: Shared, threads: int, channel: Any, log: IO[bytes]) -> None:
    """Do a job, in the fork."""
    import torch

    channel.close()  # or the launcher would not see the parent's end
    tether(os.getppid())
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log.fileno(), stream.fileno())
    torch.set_num_threads(threads)
    if code := guard(lambda: worker.make(job, shared)):
        sys.exit(code)


def _ended(name: str, process: BaseProcess, log: IO[bytes]) -> tuple[str, int, str]:
    process.join()
    with log:
        said = written(log)
    assert process.exitcode is not None
    return name, process.exitcode, said


if __name__ == "__main__":
    sys.exit(guard(main))
