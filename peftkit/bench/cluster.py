"""Runs as tasks of a Ray cluster. Their results come back to this process, which alone writes them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from filelock import FileLock

from peftkit.bench.memory import Footprints, startable
from peftkit.bench.processes import TRIES, default_workers, died
from peftkit.bench.remote import Reply, make, origin
from peftkit.bench.store import Record, Store
from peftkit.bench.worker import Job
from peftkit.errors import PeftkitError, UsageError, first_line

ADDRESS = "RAY_ADDRESS"
LIKE_LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to Ray's authors
    "RAY_worker_niceness": "0",  # else 15, and beside other work a run would take longer than in a plain process
}
"""Of a cluster that is started here, unless the environment says otherwise."""
OBJECTS = 128 * 2**20
"""Bytes of a local cluster's object store; a result takes some KiB, with its answers seldom more than a MiB."""
PATIENCE = 10.0
"""Seconds in which a cluster's machine has to answer."""
LOST = ("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError", "ObjectLostError")
"""Ray's errors that say nothing against the run: what it ran on has gone, or was ended to free memory."""
KILLED = -1
"""The exit code of a run whose Ray process has gone."""


@contextmanager
def cluster(
    address: str | None, workers: int | None, memory: int | None, say: Callable[[str], object]
) -> Iterator[Cluster]:
    """The engine `ray`: the cluster of an address or of RAY_ADDRESS, else one of this machine while it is used.

    Args:
        workers: runs at a time; default: as many as the cluster has GPUs, or CPUs where it has none.
        memory: bytes that the runs of a cluster of this machine may hold together; default: what is free.

    Raises:
        UsageError: Ray is not installed, the cluster cannot be joined, or brings memory limits of its own.
        PeftkitError: Ray does not start.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray: pip install 'peftkit[ray]'")
    address = address or os.environ.get(ADDRESS)
    if address and memory is not None:
        raise UsageError(
            "--memory is for a cluster that is started here; the nodes of one that is joined have their own"
        )
    if address:
        _refuse_unreachable(address)
    ray: Any = importlib.import_module("ray")
    with _connected(ray, address, workers, memory):
        engine = Cluster(ray, workers, say)
        say(engine.described)
        yield engine


def _refuse_unreachable(address: str) -> None:
    """At once, where nothing listens; Ray would try for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not host or not port.isdecimal():
        return  # such as auto, which Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot join the Ray cluster at {address}: {first_line(error)}") from None


@contextmanager
def _connected(ray: Any, address: str | None, workers: int | None, memory: int | None) -> Iterator[None]:
    for name, value in LIKE_LOCAL.items():
        os.environ.setdefault(name, value)
    heeded = signal.getsignal(signal.SIGTERM)
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        settings |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECTS, "_memory": memory}
        settings["num_cpus"] = max(default_workers(), workers or 1)
    else:
        settings["address"] = address
    try:
        try:
            ray.init(**settings)
        except Exception as error:  # Ray raises many kinds, plain Exception among them
            if address:
                raise UsageError(f"cannot join the Ray cluster at {address}: {first_line(error)}") from None
            raise PeftkitError(f"Ray does not start on this machine: {first_line(error)}") from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, heeded)  # which Ray has taken
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Share:
    """What one run asks of a machine."""

    cpus: int
    gpus: float
    memory: int
    """At most, in bytes: what the largest machine has. Of machines with GPUs it is not asked for."""


def share(machines: Sequence[dict[str, float]], workers: int | None) -> tuple[int, Share]:
    """(runs at a time, the share of each) by what the machines have of `CPU`, `GPU` and `memory`.

    Where there are GPUs, every run has one, or so many share one that `workers` find a place; elsewhere `workers` runs
    share the cores out as those of the local engine do.
    """
    total = {name: sum(one.get(name, 0.0) for one in machines) for name in ("CPU", "GPU")}
    most = {name: int(max((one.get(name, 0.0) for one in machines), default=0)) for name in ("CPU", "memory")}
    places = int(total["GPU"]) or int(total["CPU"])
    count = workers or max(1, places)
    cpus = max(1, min(int(total["CPU"]) // count, most["CPU"]))
    gpus = 1 / math.ceil(count / int(total["GPU"])) if int(total["GPU"]) else 0.0
    return count, Share(cpus, gpus, 0 if gpus else most["memory"])


class Cluster:
    """The engine `ray`."""

    def __init__(self, ray: Any, workers: int | None, say: Callable[[str], object]) -> None:
        """
        Args:
            ray: the module, which is connected to a cluster.
        """
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.workers, self._share = share(machines, workers)
        gpus = f" and {self._share.gpus:.3g} GPU" if self._share.gpus else ""
        self.described = (
            f"Ray: {_counted(len(machines), 'machine')}, {self.workers} runs at a time, each with "
            f"{_counted(self._share.cpus, 'CPU')}{gpus}"
        )
        self._ray, self._footprints = ray, Footprints(say)
        self._task = ray.remote(make)
        self._origin = origin()
        self._waited_for: set[Any] = set()
        self._ending = False

    def startable(self, pending: Iterable[Job], running: Sequence[Job]) -> Iterator[Job]:
        """As many as may be under way; Ray waits for a machine that has room."""
        yield from startable(pending, running, self.workers, lambda: math.inf, lambda _: 0)

    def work(self, job: Job, store: Store) -> None:
        """Make a run somewhere, unless somebody else has done it meanwhile, and store what came of it."""
        locks = store.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / job.id):
            if store.find(job.id) is None:
                self._make(job, store)
        (locks / job.id).unlink(missing_ok=True)

    def _make(self, job: Job, store: Store) -> None:
        told = ""
        for _ in range(TRIES):
            reply = self._reply(job)
            if self._ending:
                return
            if reply.refused:
                raise UsageError(reply.refused)
            if reply.record:
                store.add(*reply.results())
                return
            told = reply.told
            if reply.exit_code > 0:
                break
        store.add(died(job, told))

    def _reply(self, job: Job) -> Reply:
        """Of one try. Where the process or the machine has gone, or `end` was called, without a record."""
        errors = self._ray.exceptions
        asked = {"num_cpus": self._share.cpus, "num_gpus": self._share.gpus, "max_retries": 0, "name": f"run {job.id}"}
        if self._share.memory:
            asked["memory"] = int(min(self._footprints.of(job), self._share.memory))
        reference = self._task.options(**asked).remote(job.model_dump_json(), self._share.cpus, self._origin)
        self._waited_for.add(reference)
        try:
            if self._ending:
                self._ray.cancel(reference, force=True)
            reply: Reply = self._ray.get(reference)
            return reply
        except tuple(getattr(errors, name) for name in LOST) as error:
            return Reply(exit_code=KILLED, told=f"{type(error).__name__}: {first_line(error)}")
        except errors.RayError as error:
            if self._ending:
                return Reply(exit_code=KILLED)
            raise PeftkitError(
                f"run {job.id} could not be given to a machine of the cluster: "
                f"{first_line(getattr(error, 'cause', None) or error)}; every machine needs the same Python, Ray and "
                "peftkit as this one"
            ) from None
        finally:
            self._waited_for.discard(reference)

    def learn(self, record: Record) -> None:
        """From what a run held, how much others of its cell will."""
        self._footprints.add(record)

    def end(self) -> None:
        """Let Ray kill what is under way."""
        self._ending = True
        for reference in list(self._waited_for):
            with contextlib.suppress(self._ray.exceptions.RayError, RuntimeError):  # a cluster that has gone
                self._ray.cancel(reference, force=True)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
