"""A watch that the processes of a job keep on each other, so that one that hangs ends the job within a minute.

Collective operations wait ten to thirty minutes for a process that will not come. Here every process leaves a sign of
life in the launcher's store once a second, and reads those of the others.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import platform
import signal
import sys
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from peftkit.console import tell
from peftkit.training.signs import SILENT, Seen, Signs, are_siblings, find

if TYPE_CHECKING:
    from accelerate import Accelerator

INTERVAL = 1.0
"""Seconds between two signs of life."""
STARVED = 5.0
"""Seconds without a turn after which a watch has seen too little to judge by."""
TURN = 5.0
"""Seconds that a process leaves to the one that tells, before it ends without a word."""
SWITCH = "PEFTKIT_WATCH"
"""`off` for a debugger, which makes a process stand still."""


class Pace:
    """The progress of this process, as its main thread notes it; costs next to nothing.

    `beat` opens a piece of work that all processes do alike, `arrive` comes before a collective operation, `rest`
    before anything else.
    """

    def __init__(self) -> None:
        self.doing, self.detail, self.rounds, self.steps = "starting", "", 0, 0
        self.longest: dict[str, float] = {}
        self._since: float | None = None

    def beat(self, doing: str, detail: str = "") -> None:
        """A piece of work begins; the one before it has ended."""
        self._end()
        self.steps += 1
        self.doing, self.detail, self._since = doing, detail, time.monotonic()

    def arrive(self) -> None:
        """All processes come here equally often, and wait for each other."""
        self._end()
        self.rounds, self.steps = self.rounds + 1, 0

    def rest(self, doing: str) -> None:
        """What follows has no pace: one process may do it for all."""
        self._end()
        self.steps += 1
        self.doing, self.detail = doing, ""

    def idle(self) -> float:
        """Seconds since the last beat; 0 in a collective operation or at rest."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def _end(self) -> None:
        if self._since is not None:
            took = time.monotonic() - self._since
            self.longest[self.doing] = max(took, self.longest.get(self.doing, 0.0))
            self._since = None


class Watch:
    """Leaves and reads signs of life in a store in one thread, and judges by them in another.

    A store whose machine has died may not even refuse an answer.
    """

    def __init__(self, store: Any, rank: int, processes: int) -> None:
        self.pace = Pace()
        self._store, self._ended = store, threading.Event()
        self._own = Signs(rank, os.getpid(), platform.node(), os.getppid())
        self._keys = [f"peftkit/watch/{one}" for one in range(processes)]
        self._seen: dict[int, Seen] = {}
        self._main = threading.main_thread().ident
        self._signs = threading.Thread(target=self._leave_signs, name="peftkit-signs", daemon=True)
        self._judge = threading.Thread(target=self._look_out, name="peftkit-watch", daemon=True)

    def start(self) -> None:
        """Begin, and leave off when this process ends."""
        self._signs.start()
        self._judge.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Tell the others that this process has come to its end."""
        self._ended.set()
        self._signs.join(timeout=2 * INTERVAL)

    def _leave_signs(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._exchange()
        self._own.done = True
        self._exchange()

    def _look_out(self) -> None:
        turn = time.monotonic()
        while not self._ended.wait(INTERVAL):
            now = time.monotonic()
            if now - turn > STARVED:
                self._seen = {rank: Seen(one.signs, now) for rank, one in self._seen.items()}
            turn = now
            if accused := dict(find(self._own, dict(self._seen), now)):
                self._end_job(accused)

    def _exchange(self) -> None:
        """Leave own signs, and read those of the others; a store that does not answer leaves them as they were."""
        own, pace = self._own, self.pace
        own.beats, own.rounds, own.steps = own.beats + 1, pace.rounds, pace.steps
        own.doing, own.detail, own.idle, own.longest = pace.doing, pace.detail, pace.idle(), dict(pace.longest)
        own.at = self._where() if own.idle > STARVED else ""
        try:
            self._store.set(self._keys[own.rank], json.dumps(asdict(own)))
            texts = self._store.multi_get(self._keys) if self._store.check(self._keys) else []
        except RuntimeError:  # torch's errors of a store are kinds of it
            return
        for text in texts:
            signs = Signs(**json.loads(text))
            before = self._seen.get(signs.rank)
            if before is None or before.signs.beats != signs.beats:
                self._seen[signs.rank] = Seen(signs, time.monotonic())

    def _where(self) -> str:
        """The line of Python that the main thread stands at."""
        frame = sys._current_frames().get(self._main or 0)
        return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""

    def _end_job(self, accused: dict[int, str]) -> None:
        """Tell once, end the accused where they are of this machine, and end this process."""
        own = self._own
        siblings = [seen.signs for seen in self._seen.values() if are_siblings(seen.signs, own)]
        first = min((one.rank for one in siblings if one.rank not in accused), default=own.rank)
        if own.rank != first:
            time.sleep(TURN)
            os._exit(1)
        reasons = "; ".join(accused.values())
        tell(
            f"error: {reasons}. The whole job was ended; a training run goes on from its last checkpoint when the "
            "command is given again",
            first=True,
        )
        for one in siblings:
            if one.rank in accused and one.pid != own.pid:
                os.kill(one.pid, signal.SIGKILL)  # a process that is stopped heeds no other signal
        os._exit(1)


def start(accelerator: Accelerator) -> Pace:
    """Watch over the processes of `accelerator`, if there are several; returns where progress is noted."""
    watch = _watch(accelerator.process_index, accelerator.num_processes)
    return watch.pace if watch else Pace()


@functools.cache
def _watch(rank: int, processes: int) -> Watch | None:
    """One for a process and all its life, whatever it runs; none for a single process."""
    store = _store() if processes > 1 else None
    if store is None:
        return None
    watch = Watch(store, rank, processes)
    watch.start()
    return watch


def pace_of(accelerator: Accelerator) -> Pace:
    """Where progress is noted; of an accelerator that nobody watches, nowhere that matters."""
    pace: Pace = getattr(accelerator, "pace", None) or Pace()
    return pace


def _store() -> Any:
    """The store of torch's launcher, which outlives the processes; None where another launcher started them."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get(SWITCH) == "off":
        return None
    from datetime import timedelta

    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SILENT))
