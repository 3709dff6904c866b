"""How much memory the runs of a grid take, and which of them may run beside one another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import TYPE_CHECKING, TypeVar

from peftkit.bench.store import Record
from peftkit.config import Run
from peftkit.errors import first_line
from peftkit.memory import available_bytes
from peftkit.methods import Full

if TYPE_CHECKING:
    from peftkit.bench.worker import Job
    from peftkit.planning.machines import Machine

MIB = 2**20
BASE = 460 * MIB
"""What the process of a run holds before its backbone: libraries and encoded data; the runs of benchmarks/results/main
held 455 to 458 MiB."""
MANY_ROWS = 1_000_000
"""Of train, where their number is not known: an epoch of them wears the heap as far as it goes."""
COPIES = 2
"""Of the backbone in float32, beside the peak: a final run reads back what it saved, and merges it. Of MiniLM with LoRA
the process held 1.6 of them more than its training; with full fine-tuning, which merges nothing, none."""
Cell = tuple[str, str, str, str]
One = TypeVar("One")


def startable(
    pending: Iterable[One],
    running: Sequence[One],
    workers: int,
    memory: Callable[[], float],
    need: Callable[[One], float],
) -> Generator[One, None, float | None]:
    """Those of `pending` that may start now, in order. The first that does not fit waits, and those behind it with it,
    so that a large one has its turn; one may always start alone. Returns how much memory would have been needed for
    the one that waits; None where none waits for memory.

    Args:
        memory: bytes for all of them together.
        need: bytes of one, infinite where they are not known. Neither is asked before two are to run at a time.
    """
    beside = list(running)
    for one in pending:
        if len(beside) == workers:
            break
        if beside and (wanted := sum(map(need, [*beside, one]))) > memory():
            return wanted
        beside.append(one)
        yield one
    return None


@dataclass(frozen=True)
class Footprint:
    """What runs of a cell hold."""

    peak: float
    """Bytes of the process in training."""
    parameters: int = 0

    def of(self, job: Job) -> float:
        """Bytes that one of them holds."""
        merges = job.key.phase == "final" and not isinstance(job.run.method, Full)
        return self.peak + COPIES * 4 * self.parameters * merges


class Footprints:
    """The most that a run holds: as much as finished runs of its cell did, else what is planned for it.

    May be asked by several threads.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._measured: dict[Cell, Footprint] = {}
        self._planned: dict[Cell, Footprint] = {}
        self._lock = threading.Lock()

    def add(self, record: Record) -> None:
        """Learn from a run that has ended."""
        if record.cost is not None:
            found = Footprint(record.cost.peak_memory_bytes, record.total_parameters)
            known = self._measured.get(record.key.cell, found)
            self._measured[record.key.cell] = max(known, found, key=lambda one: one.peak)

    def of(self, job: Job) -> float:
        """Bytes; infinite where neither a plan nor a finished run says how many."""
        cell = job.key.cell
        with self._lock:
            if cell not in self._measured and cell not in self._planned:
                self._planned[cell] = self._plan(job)
            return (self._measured.get(cell) or self._planned[cell]).of(job)

    def _plan(self, job: Job) -> Footprint:
        try:
            return footprint(job.run)
        except Exception as error:  # other libraries' code runs here without values, which may fail in any way
            reason = first_line(error)
        backbone, data, _, method = job.key.cell
        alike = [found for cell, found in list(self._measured.items()) if (cell[0], cell[3]) == (backbone, method)]
        instead = max(alike, default=Footprint(inf), key=lambda one: one.peak)
        told = (
            f"{in_mib(instead.peak)}, as others of this method held" if alike else "each runs alone until one has ended"
        )
        self._say(f"{backbone} × {data} × {method}: the memory of its runs cannot be planned ({reason}): {told}")
        return instead


@cache
def this_machine() -> Machine:
    """Where runs take place: the first GPU where there is one, else the processor."""
    import torch

    from peftkit.planning.machines import without_rates

    if torch.cuda.is_available():
        return without_rates("gpu", int(torch.cuda.mem_get_info()[0]))
    return without_rates("cpu", available_bytes())


def footprint(run: Run) -> Footprint:
    """By the trace of `peftkit plan`, every text as long as the task allows: an upper bound that needs no data.

    Raises:
        Exception: what cannot be traced.
    """
    from peftkit.planning.estimate import estimate
    from peftkit.planning.machines import CONTEXT
    from peftkit.planning.plan import head_without_data
    from peftkit.planning.workload import longest_possible

    machine, head = this_machine(), head_without_data(run)
    found = estimate(run, head, longest_possible(run, head, MANY_ROWS, 1, "none was read"), machine)
    return Footprint(found.peak + (CONTEXT if machine.kind == "gpu" else BASE), found.trace.parameters)


def in_mib(size: float) -> str:
    """Bytes for people."""
    return "an unknown part" if size == inf else f"{size / MIB:,.0f} MiB"
