"""`peftkit serve`: load, listen, answer, and stop when told to."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import logging
import socket
import sys
from typing import TYPE_CHECKING

from peftkit.console import say
from peftkit.errors import UsageError
from peftkit.serving.options import Access, access_of, limits_of, named_folders

if TYPE_CHECKING:
    from peftkit.serving.registry import Registry

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that are being answered then are still answered.

    Raises:
        UsageError: packages of the extra `serve` are missing; a name, folder, key file or address that does not do.
        PeftkitError: a run that cannot be loaded.
    """
    require_packages()
    folders, access = named_folders(options.runs), access_of(options)
    with _bound(options.host, options.port) as listening:
        from peftkit.processes import require_one_process
        from peftkit.serving.computing import device_named
        from peftkit.serving.registry import Registry
        from peftkit.serving.resident import Resident

        require_one_process("a service")
        say(f"loading {len(folders)} adapter{'s' if len(folders) > 1 else ''}")
        registry = Registry(Resident(folders, device_named(options.device)), folders)
        registry.load()
        _show(registry)
        _listen(listening, registry, access, options)
    say("stopped")


def _listen(listening: socket.socket, registry: Registry, access: Access, options: argparse.Namespace) -> None:
    import uvicorn

    from peftkit.serving.routes import build

    app, _ = build(registry, limits_of(options), access, options.stop_timeout, options.log_texts)
    _start_log()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="on",
            ws="none",
            http="h11",
            timeout_graceful_shutdown=max(1, round(options.stop_timeout)),
        )
    )
    address = f"[{options.host}]" if ":" in options.host else options.host
    who = "API keys" if access.keys else "no keys: this machine only"
    say(f"http://{address}:{listening.getsockname()[1]}  ({who})")
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn has stopped gracefully, and raises the signal again
        if not server.started:
            raise


def require_packages() -> None:
    """Refuse to start without the packages of the extra.

    Raises:
        UsageError: names them, and the command that installs them.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UsageError(f"peftkit serve needs {', '.join(missing)}: pip install 'peftkit[serve]'")


def _bound(host: str, port: int) -> socket.socket:
    """A socket of this address, on which nobody can connect yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only for sockets that name their protocol; with it, answers wait 40 ms
    one = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        one.bind((host, port))
    except OSError as error:
        one.close()
        mend = "stop what listens there, or give another --port" if error.errno == errno.EADDRINUSE else "check --host"
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}; {mend}") from None
    return one


def _show(registry: Registry) -> None:
    resident = registry.resident
    say(
        f"{resident.backbone_name}: {resident.backbone_bytes() / 2**20:,.1f} MiB on {resident.device}, once for all of:"
    )
    for adapter in registry:
        run = adapter.saved.run
        batches = f"alone: {adapter.alone}" if adapter.alone else "shares batches"
        size = f"{adapter.own_bytes / 2**20:,.2f} MiB of its own"
        say(f"  {adapter.name}: {run.task.kind}, {run.method.kind}, {size}, {batches}")


def _start_log() -> None:
    """One line a request, to stderr; warnings of the server itself too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("peftkit.serving", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
