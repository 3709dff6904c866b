"""How much memory the runs of a grid take, and which of them may run beside one another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import cache
from math import inf
from typing import TYPE_CHECKING, TypeVar

from peftkit.bench.store import Record
from peftkit.config import Run
from peftkit.errors import first_line
from peftkit.memory import available_bytes

if TYPE_CHECKING:
    from peftkit.bench.worker import Job
    from peftkit.planning.machines import Machine

MIB = 2**20
BASE = 460 * MIB
"""What the process of a run holds before its backbone: libraries and encoded data; the runs of benchmarks/results/main
held 455 to 458 MiB."""
MANY_ROWS = 1_000_000
"""Of train, where their number is not known: an epoch of them wears the heap as far as it goes."""
Cell = tuple[str, str, str, str]
One = TypeVar("One")


def startable(
    pending: Iterable[One], running: Sequence[One], workers: int, memory: float, need: Callable[[One], float]
) -> Generator[One, None, float | None]:
    """Those of `pending` that may start now, in order. The first that does not fit waits, and those behind it with it,
    so that a large one has its turn; one may always start alone. Returns how much memory would have been needed for
    the one that waits; None where none waits for memory.

    Args:
        memory: bytes for all of them together.
        need: bytes of one, infinite where they are not known; not asked before two are to run at a time.
    """
    beside = list(running)
    for one in pending:
        if len(beside) == workers:
            break
        if beside and (wanted := sum(map(need, [*beside, one]))) > memory:
            return wanted
        beside.append(one)
        yield one
    return None


class Footprints:
    """The most that a run holds: as much as finished runs of its cell did, else what is planned for it.

    May be asked by several threads.
    """

    def __init__(self, say: Callable[[str], object], records: Iterable[Record] = ()) -> None:
        self._say = say
        self._measured: dict[Cell, int] = {}
        self._planned: dict[Cell, float] = {}
        self._lock = threading.Lock()
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Learn from a run that has ended."""
        if record.cost is not None:
            cell = record.key.cell
            self._measured[cell] = max(self._measured.get(cell, 0), record.cost.peak_memory_bytes)

    def of(self, job: Job) -> float:
        """Bytes; infinite where neither a plan nor a finished run says how many."""
        cell = job.key.cell
        with self._lock:
            if cell in self._measured:
                return self._measured[cell]
            if cell not in self._planned:
                self._planned[cell] = self._plan(job)
            return self._planned[cell]

    def _plan(self, job: Job) -> float:
        try:
            return planned_bytes(job.run)
        except Exception as error:  # other libraries' code runs here without values, which may fail in any way
            reason = first_line(error)
        backbone, data, _, method = job.key.cell
        alike = [size for cell, size in self._measured.items() if (cell[0], cell[3]) == (backbone, method)]
        instead = (
            f"{in_mib(max(alike))}, as others of this method held" if alike else "each runs alone until one has ended"
        )
        self._say(f"{backbone} × {data} × {method}: the memory of its runs cannot be planned ({reason}): {instead}")
        return max(alike, default=inf)


@cache
def this_machine() -> Machine:
    """Where runs take place: the first GPU where there is one, else the processor."""
    import torch

    from peftkit.planning.machines import without_rates

    if torch.cuda.is_available():
        return without_rates("gpu", int(torch.cuda.mem_get_info()[0]))
    return without_rates("cpu", available_bytes())


def planned_bytes(run: Run) -> int:
    """The peak of a run's process by the trace of `peftkit plan`, every text as long as the task allows: an upper bound
    that needs no data.

    Raises:
        Exception: what cannot be traced.
    """
    from peftkit.planning.estimate import estimate
    from peftkit.planning.machines import CONTEXT
    from peftkit.planning.plan import head_without_data
    from peftkit.planning.workload import longest_possible

    machine, head = this_machine(), head_without_data(run)
    found = estimate(run, head, longest_possible(run, head, MANY_ROWS, 1, "none was read"), machine)
    return found.peak + (CONTEXT if machine.kind == "gpu" else BASE)


def in_mib(size: float) -> str:
    """Bytes for people."""
    return "an unknown amount" if size == inf else f"{size / MIB:,.0f} MiB"
