"""What every request passes before it is read: its host, its key, its size, and how many there are already."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from peftkit.serving.metrics import Metrics
from peftkit.serving.options import Access, Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
OPEN = ("/health", "/ready")
"""Routes that need no key and count for nothing, so that whoever watches the service can."""
FAILED = "the service failed; its log says where"
REFUSED = {400: "host", 401: "key", 408: "time", 413: "body", 429: "concurrency"}

log = logging.getLogger("peftkit.serving")


class Refused(Exception):
    """An answer before the request has reached a route."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        self.status, self.headers = status, headers
        super().__init__(message)


class Gate:
    """The outermost layer: refuses, counts, logs, and answers for whatever else goes wrong.

    Logged are method, route, status, adapter and time; never what a request holds.
    """

    def __init__(
        self, app: Any, limits: Limits, access: Access, metrics: Metrics, has: Callable[[str], bool], texts: bool
    ) -> None:
        self.app, self.limits, self.access, self.metrics = app, limits, access, metrics
        self.has, self.log_texts = has, texts
        self.keys = [hashlib.sha256(key.encode()).digest() for key in access.keys]
        self.in_flight = 0
        metrics.in_flight.set_function(lambda: self.in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        is_open = scope["path"] in OPEN
        self.in_flight += not is_open
        try:
            self._check(scope, is_open)
            await self.app(scope, await self._read(scope, receive), noted)
        except Refused as refused:
            self.metrics.refused.labels(REFUSED[refused.status]).inc()
            await _answer(noted, refused.status, str(refused), refused.headers)
        except Exception as error:
            self._log_failure(error)
            if not status:  # an answer that has begun cannot become another
                await _answer(noted, 500, FAILED, {})
        finally:
            self.in_flight -= not is_open
            self._note(scope, status, time.perf_counter() - started)

    def _check(self, scope: Scope, is_open: bool) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self.access.hosts is not None and _host(headers.get("host", "")) not in self.access.hosts:
            raise Refused(400, "this service answers to localhost only; give it API keys to use it by another name")
        if is_open:
            return
        if self.keys and not self._has_key(headers):
            raise Refused(
                401, "no valid API key; send it as `Authorization: Bearer KEY`", **{"www-authenticate": "Basic"}
            )
        if self.in_flight > self.limits.concurrency:
            raise Refused(429, f"more than {self.limits.concurrency} requests at a time", **{"retry-after": "1"})
        size = headers.get("content-length", "0")
        if not size.isdecimal() or int(size) > self.limits.body:
            raise Refused(413, f"the request is larger than {self.limits.body:,} bytes", connection="close")

    def _has_key(self, headers: dict[str, str]) -> bool:
        """Whether a known key comes as bearer token, as `X-API-Key`, or as the password that a browser asks for."""
        kind, _, value = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key", "")
        if kind.lower() == "bearer":
            given = value.strip()
        elif kind.lower() == "basic":
            try:
                given = base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        digest = hashlib.sha256(given.encode()).digest()
        return sum(hmac.compare_digest(digest, key) for key in self.keys) > 0  # all are compared, whichever fits

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body, within its limits; returns what hands it on."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    body += message.get("body", b"")
                    if len(body) > self.limits.body:
                        raise Refused(413, f"the request is larger than {self.limits.body:,} bytes", connection="close")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Refused(408, f"the request took longer than {self.limits.seconds:g} s", connection="close") from None
        pending = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def handed_on() -> MutableMapping[str, Any]:
            return pending.pop() if pending else await receive()

        return handed_on

    def _log_failure(self, error: Exception) -> None:
        """Where it happened; what it says may be text of a request."""
        said = f": {error}" if self.log_texts else ""
        lines = [f"{one.filename}:{one.lineno} in {one.name}" for one in traceback.extract_tb(error.__traceback__)]
        log.error("failed with %s%s at %s", type(error).__name__, said, " < ".join(reversed(lines[-6:])))

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        name = str(scope.get("path_params", {}).get("name", ""))
        adapter = name if self.has(name) else ""
        self.metrics.requests.labels(route, adapter, str(status)).inc()
        if route in OPEN:
            return
        self.metrics.seconds.labels(route).observe(seconds)
        line = {"method": scope["method"], "route": route, "adapter": adapter, "status": status}
        log.info("%s", json.dumps(line | {"milliseconds": round(1000 * seconds, 1)}))


def _host(header: str) -> str:
    """A Host header without its port."""
    return header.rpartition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0].lower()


async def _answer(send: Send, status: int, message: str, headers: dict[str, str]) -> None:
    body = json.dumps({"error": message}).encode()
    named = {"content-type": "application/json", "content-length": str(len(body))} | headers
    listed = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": listed})
    await send({"type": "http.response.body", "body": body})
