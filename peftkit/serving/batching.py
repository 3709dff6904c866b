"""One thread that has the model, and a queue in front of it in which requests become batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from peftkit.errors import PeftkitError
from peftkit.serving.options import Limits
from peftkit.serving.resident import Adapter
from peftkit.tasks.base import Example, Prediction, Task


@dataclass(eq=False)
class Job:
    """The examples of one request; its answer has one prediction for each."""

    adapter: Adapter
    task: Task
    examples: Sequence[Example]
    lane: Hashable
    """Examples of one lane can be in one batch."""
    heard: Callable[[int, list[int]], None] | None = None
    """Told (example, all of its tokens so far) while text is written."""
    answer: Future[list[Prediction]] = field(default_factory=Future)
    found: dict[int, Prediction] = field(default_factory=dict)

    @property
    def abandoned(self) -> bool:
        """Nobody waits for the answer any more, or it failed already."""
        return self.answer.done()

    def take(self, index: int, prediction: Prediction) -> None:
        """Note the prediction of one example; the last one completes the answer."""
        self.found[index] = prediction
        if len(self.found) == len(self.examples) and not self.abandoned:
            self.answer.set_result([self.found[at] for at in range(len(self.examples))])

    def fail(self, error: BaseException) -> None:
        """The answer is this error."""
        if not self.abandoned:
            self.answer.set_exception(error)


@dataclass(frozen=True, eq=False)
class Unit:
    """One example of a job in the queue."""

    job: Job
    index: int
    arrived: float

    @property
    def example(self) -> Example:
        """Its token ids."""
        return self.job.examples[self.index]

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.example["input_ids"])


class Stopped(PeftkitError):
    """The service is about to end and takes no more requests."""


class Batcher:
    """Whoever comes first sets the lane of the next batch, and others of that lane come along.

    While the model is busy, what arrives waits together; an idle model waits for `limits.wait` seconds at most.
    """

    def __init__(self, limits: Limits, compute: Callable[[list[Unit]], None]) -> None:
        self.limits, self.compute = limits, compute
        self._lanes: dict[Hashable, deque[Unit]] = {}
        self._chores: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="peftkit-model", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests will be answered."""
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Examples in the queue."""
        return sum(map(len, list(self._lanes.values())))

    def submit(self, job: Job) -> None:
        """Put all examples of a job into the queue.

        Raises:
            Stopped: the service is about to end.
        """
        now = time.monotonic()
        with self._changed:
            if self._stopping:
                raise Stopped("the service is stopping")
            lane = self._lanes.setdefault(job.lane, deque())
            lane.extend(Unit(job, index, now) for index in range(len(job.examples)))
            self._changed.notify()

    def between(self, chore: Callable[[], Any]) -> Future[Any]:
        """Have something done in the model's thread between two batches, as loading an adapter must be: torch's default
        dtype, which it changes for a while, is everybody's."""
        done: Future[Any] = Future()
        with self._changed:
            if self._stopping:
                raise Stopped("the service is stopping")
            self._chores.append((chore, done))
            self._changed.notify()
        return done

    def stop(self, seconds: float) -> bool:
        """Take nothing more, finish what is in the queue, and end; False where that takes longer."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._lanes or self._chores or self._stopping):
                    self._changed.wait()
                chore = self._chores.popleft() if self._chores else None
                if chore is None and not self._lanes:
                    return
                batch = [] if chore else self._next_batch()
            if chore is not None:
                _settle(*chore)
            elif batch:
                self._compute(batch)

    def _compute(self, batch: list[Unit]) -> None:
        try:
            self.compute(batch)
        except Exception as error:  # whatever a model raises is the answer to these requests, not the end of all others
            for unit in batch:
                unit.job.fail(error)

    def _next_batch(self) -> list[Unit]:
        """The examples that go next; called with the lock held, which is let go while others are waited for."""
        lane = min(self._lanes, key=lambda one: self._lanes[one][0].arrived)
        until = self._lanes[lane][0].arrived + self.limits.wait
        while not self._stopping and len(self._lanes[lane]) < self.limits.batch:
            left = until - time.monotonic()
            if left <= 0:
                break
            self._changed.wait(left)
        batch: list[Unit] = []
        longest = 0
        units = self._lanes[lane]
        while units and len(batch) < self.limits.batch:
            longest = max(longest, units[0].length)
            if batch and longest * (len(batch) + 1) > self.limits.batch_tokens:
                break
            unit = units.popleft()
            if not unit.job.abandoned:
                batch.append(unit)
        if not units:
            del self._lanes[lane]
        return batch


def _settle(chore: Callable[[], Any], done: Future[Any]) -> None:
    try:
        done.set_result(chore())
    except Exception as error:  # told to whoever asked for it
        done.set_exception(error)
