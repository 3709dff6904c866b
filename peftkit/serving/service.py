"""What the routes share: the adapters, the queue, and how an answer is waited for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import threading
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request

from peftkit.errors import PeftkitError
from peftkit.serving.asking import Asked, TooMuch
from peftkit.serving.batching import Batcher, Stopped
from peftkit.serving.computing import Computer
from peftkit.serving.messages import Reloaded
from peftkit.serving.metrics import Metrics
from peftkit.serving.options import Limits
from peftkit.serving.registry import Registry
from peftkit.serving.resident import Adapter
from peftkit.tasks.base import Prediction

LEFT = 499
"""The status that is noted where nobody is left to read one, as nginx does."""

log = logging.getLogger("peftkit.serving")


class Problem(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class Service:
    """What the routes share."""

    def __init__(self, registry: Registry, limits: Limits, metrics: Metrics, stop_seconds: float) -> None:
        self.registry, self.limits, self.metrics = registry, limits, metrics
        self.stop_seconds = stop_seconds
        self.batcher = Batcher(limits, Computer(registry.resident, metrics.batch))
        self.reloading = threading.Lock()

    def adapter(self, name: str) -> Adapter:
        """The adapter of this name."""
        found = self.registry.get(name)
        if found is None:
            raise Problem(404, f"no adapter '{name}'; /v1/adapters lists what there is")
        return found

    async def answered(self, found: Asked, request: Request) -> list[Prediction]:
        """The predictions, unless the client leaves or time runs out; then nothing more is computed for it."""
        self.submit(found)
        answer = asyncio.wrap_future(found.job.answer)
        gone = asyncio.ensure_future(_left(request))
        try:
            waited: set[asyncio.Future[Any]] = {answer, gone}
            await asyncio.wait(waited, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not answer.done():
                answer.cancel()
                self.metrics.abandoned.inc()
        if gone.done() and not gone.cancelled():
            raise Problem(LEFT, "the client left")
        if answer.cancelled():
            raise Problem(504, f"no answer within {self.limits.seconds:g} s")
        return answer.result()

    def submit(self, found: Asked) -> None:
        """Put a request into the queue."""
        self.metrics.tokens.labels(found.adapter.name).inc(found.tokens)
        try:
            self.batcher.submit(found.job)
        except Stopped as error:
            raise Problem(503, str(error)) from error

    def problem(self, error: PeftkitError) -> Problem:
        """How a request is refused that does not fit."""
        if isinstance(error, TooMuch):
            self.metrics.refused.labels(error.limit).inc()
            return Problem(413, str(error))
        return Problem(422, str(error))

    def reload(self) -> Reloaded:
        """Load what has changed; one reload at a time."""
        with self.reloading:
            loaded, kept = self.registry.reload(self.batcher)
        self.metrics.reloads.labels("failed" if kept else "done").inc()
        log.info("%s", json.dumps({"reloaded": loaded, "kept": kept}))
        return Reloaded(loaded=loaded, kept=kept)

    @contextlib.asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """From the first request to the last one."""
        self.batcher.start()
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_sighup)
        try:
            yield
        finally:
            if not await asyncio.to_thread(self.batcher.stop, self.stop_seconds):
                log.warning("stopped with requests unanswered")

    def _on_sighup(self) -> None:
        threading.Thread(target=self.reload, daemon=True).start()


async def _left(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
