"""The routes of the service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from peftkit.errors import PeftkitError
from peftkit.serving.asking import Asked, asked, asked_to_write, writes
from peftkit.serving.gate import FAILED, OPEN, Gate
from peftkit.serving.messages import (
    AdapterInfo,
    Adapters,
    Answer,
    Event,
    Failure,
    Question,
    Reloaded,
    State,
    WritingQuestion,
)
from peftkit.serving.metrics import Metrics
from peftkit.serving.options import Access, Limits
from peftkit.serving.registry import Registry
from peftkit.serving.resident import Adapter
from peftkit.serving.service import Problem, Service

log = logging.getLogger("peftkit.serving")

REASONS = {
    400: "Not a request that can be read.",
    401: "No valid API key.",
    404: "No such adapter.",
    408: "The request came too slowly.",
    413: "More bytes, texts or tokens than allowed.",
    422: "A request that does not fit the adapter.",
    429: "Too many requests at a time.",
    500: "The service failed.",
    503: "The service is stopping.",
    504: "The answer took too long.",
}
Described = dict[int | str, dict[str, Any]]
ERRORS: Described = {status: {"model": Failure, "description": reason} for status, reason in REASONS.items()}
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def build(
    registry: Registry, limits: Limits, access: Access, stop_seconds: float = 30.0, log_texts: bool = False
) -> tuple[Gate, Service]:
    """The ASGI application, and what its routes share, over loaded adapters."""
    metrics = Metrics()
    service = Service(registry, limits, metrics, stop_seconds)
    app = FastAPI(
        title="peftkit",
        version="1",
        description="Adapters over one backbone. Where keys are set, every route but /health and /ready takes one.",
        docs_url=None,  # these would fetch scripts from elsewhere; the page at / shows the routes
        redoc_url=None,
        lifespan=service.running,
    )
    _add_errors(app)
    _add_state(app, service)
    _add_asking(app, service)
    _complete(app, [one.name for one in registry])
    gate = Gate(app, limits, access, metrics, lambda name: registry.get(name) is not None, log_texts)
    return gate, service


def _add_state(app: FastAPI, service: Service) -> None:
    registry, metrics = service.registry, service.metrics

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        text = files("peftkit.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"})

    @app.get("/health")
    async def health() -> State:
        """The process is alive."""
        return State(status="alive")

    @app.get("/ready", responses={503: ERRORS[503]})
    async def ready() -> State:
        """Requests are answered."""
        if not service.batcher.is_alive:
            raise Problem(503, "not ready: the service is stopping")
        return State(status="ready")

    described: Described = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' format."}
    }

    @app.get("/metrics", response_class=PlainTextResponse, responses=described | _errors(401, 429, 500))
    async def figures() -> Response:
        """Prometheus metrics."""
        metrics.waiting.set(service.batcher.waiting)
        metrics.ready.set(service.batcher.is_alive)
        return Response(metrics.page(), media_type="text/plain; version=1.0.0; charset=utf-8")

    @app.get("/v1/adapters", responses=_errors(401, 429, 500))
    async def adapters() -> Adapters:
        """What can be asked."""
        resident = registry.resident
        return Adapters(
            backbone=resident.backbone_name,
            weights_sha256=resident.weights_sha256,
            backbone_bytes=resident.backbone_bytes(),
            adapters=[_described(one) for one in registry],
        )

    conflict: Described = {
        409: {"model": Reloaded, "description": "Some folders cannot be loaded; what was served of them stays."}
    }

    @app.post("/v1/reload", responses=conflict | _errors(401, 429, 500))
    async def reload() -> Reloaded:
        """Load again what has changed in the folders that were named at the start; no request is dropped."""
        outcome = await asyncio.to_thread(service.reload)
        if outcome.kept:
            return JSONResponse(outcome.model_dump(), 409)  # type: ignore[return-value]
        return outcome


def _add_asking(app: FastAPI, service: Service) -> None:
    @app.post("/v1/adapters/{name}/predict", responses=ERRORS)
    async def predict(name: str, question: Question, request: Request) -> Answer:
        """What `peftkit predict` gives for these texts or rows."""
        found = await asyncio.to_thread(_asked, service.adapter(name), question, service.limits)
        predictions = await service.answered(found, request)
        shown = await asyncio.to_thread(found.answer, predictions)
        return Answer(adapter=name, predictions=shown, tokens=found.tokens, cut=found.split.encoded.truncated)

    # before OpenAPI 3.2, the schema of a stream is that of one event
    events = {"text/event-stream": {"schema": Event.model_json_schema()}}

    @app.post(
        "/v1/adapters/{name}/stream",
        response_class=StreamingResponse,
        responses=ERRORS | {200: {"content": events, "description": "Pieces of text, then `done` or `error`."}},
    )
    async def stream(name: str, question: WritingQuestion, request: Request) -> Response:
        """Text while it is written, as server-sent events: `{"text": piece}` each, then an event `done` with what
        `peftkit predict` shows, or `error`."""
        heard: asyncio.Queue[list[int]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(index: int, tokens: list[int]) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, list(tokens))

        try:
            found = await asyncio.to_thread(asked_to_write, service.adapter(name), question, service.limits, tell)
        except PeftkitError as error:
            raise service.problem(error) from error
        service.submit(found)
        at_once = {"cache-control": "no-store", "x-accel-buffering": "no"}  # proxies are not to collect it
        return StreamingResponse(_events(found, heard, request, service), 200, at_once, "text/event-stream")

    def _asked(adapter: Adapter, question: Question, limits: Limits) -> Asked:
        try:
            return asked(adapter, question, limits)
        except PeftkitError as error:
            raise service.problem(error) from error


async def _events(
    found: Asked, heard: asyncio.Queue[list[int]], request: Request, service: Service
) -> AsyncIterator[str]:
    """The server-sent events of one text."""
    answer, sent = asyncio.wrap_future(found.job.answer), ""
    until = time.monotonic() + service.limits.seconds
    try:
        while not answer.done():
            with contextlib.suppress(TimeoutError):
                tokens = await asyncio.wait_for(heard.get(), 0.1)
                while not heard.empty():
                    tokens = heard.get_nowait()
                text = await asyncio.to_thread(found.text_so_far, tokens)
                if text.startswith(sent) and text != sent:
                    yield _event({"text": text[len(sent) :]})
                    sent = text
            if await request.is_disconnected():
                return
            if time.monotonic() > until:
                yield _event({"error": f"no answer within {service.limits.seconds:g} s"}, "error")
                return
        try:
            shown = await asyncio.to_thread(found.answer, answer.result())
        except PeftkitError as error:
            yield _event({"error": str(error)}, "error")
            return
        yield _event(shown[0], "done")
    finally:
        if not found.job.answer.done():
            found.job.answer.cancel()
            service.metrics.abandoned.inc()


def _event(value: dict[str, Any], name: str = "") -> str:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _described(adapter: Adapter) -> AdapterInfo:
    saved = adapter.saved
    return AdapterInfo(
        name=adapter.name,
        task=saved.run.task.kind,
        method=saved.run.method.kind,
        labels=list(saved.head.labels),
        takes_pairs=bool(getattr(saved.run.task, "text_pair", None)),
        writes=writes(adapter),
        mixes=not adapter.alone,
        alone_because=adapter.alone,
        own_bytes=adapter.own_bytes,
        run_id=saved.manifest["run_id"],
    )


def _errors(*statuses: int) -> Described:
    return {status: ERRORS[status] for status in statuses}


def _add_errors(app: FastAPI) -> None:
    """Every error is `{"error": what is wrong}`."""

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> Response:
        return JSONResponse({"error": str(error)}, error.status)

    @app.exception_handler(PeftkitError)
    async def failed(request: Request, error: PeftkitError) -> Response:
        log.error("failed with %s", type(error).__name__)
        return JSONResponse({"error": str(error)}, 500)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:  # logged by the gate
        return JSONResponse({"error": FAILED}, 500)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        told = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5]]
        return JSONResponse({"error": "; ".join(told)}, 422)


def _complete(app: FastAPI, names: list[str]) -> None:
    """Let the OpenAPI document say where keys go, and which adapters there are; that does not change."""
    document = app.openapi()
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "name":
                    parameter["schema"]["enum"] = names
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    document["security"] = [{"bearer": []}, {"header": []}]
    for path in OPEN:
        for operation in document["paths"][path].values():
            operation["security"] = []
