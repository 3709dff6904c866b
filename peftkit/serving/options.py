"""What `peftkit serve` takes on the command line. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peftkit.console import Parser, positive
from peftkit.errors import UsageError

KEYS = "PEFTKIT_API_KEYS"
"""The environment variable of API keys, separated by white space."""
SHORTEST_KEY = 16
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Limits:
    """What a request may cost, and how requests are put together."""

    batch: int = 32
    """Most examples in one forward pass."""
    batch_tokens: int = 8192
    """Most tokens in one forward pass, padding included; a single longer example still goes."""
    wait: float = 0.003
    """Seconds that an example waits for others, where the model is idle."""
    body: int = 2**20
    """Bytes."""
    texts: int = 64
    """In a request."""
    tokens: int = 16384
    """In a request, over all of its texts."""
    new_tokens: int = 256
    """Written for one text."""
    concurrency: int = 256
    """Requests at a time; further ones are refused."""
    seconds: float = 30.0
    """From the first byte of a request to the last one of its answer."""


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    """Names of this machine that a request may have in its Host header; None: any."""


def add_serve_options(parser: Parser) -> None:
    """Everything behind `peftkit serve`."""
    limits = Limits()
    add = parser.add_argument
    add("runs", nargs="+", metavar="[NAME=]FOLDER", help="a finished run, or what `peftkit bundle` wrote")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=_port, default=8000, help="0: a free one (default: 8000)")
    add("--key-file", type=Path, metavar="FILE", help=f"API keys, one a line (or {KEYS}); needed beyond this machine")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    for name, what in (
        ("batch", "most examples in one forward pass"),
        ("batch_tokens", "most tokens in one forward pass, with padding"),
        ("body", "most bytes of a request"),
        ("texts", "most texts in a request"),
        ("tokens", "most tokens in a request"),
        ("new_tokens", "most tokens written for one text"),
        ("concurrency", "most requests at a time"),
    ):
        default = getattr(limits, name)
        flag = f"--max-{name.replace('_', '-')}" + ("-bytes" if name == "body" else "")
        add(flag, dest=name, type=positive, default=default, metavar="N", help=f"{what} (default: {default:,})")
    add("--wait-ms", type=_milliseconds, default=limits.wait, metavar="MS", help="wait for company (default: 3)")
    add(
        "--timeout", type=_seconds, default=limits.seconds, metavar="S", help="seconds a request may take (default: 30)"
    )
    add(
        "--stop-timeout", type=_seconds, default=30.0, metavar="S", help="seconds to finish in on SIGTERM (default: 30)"
    )
    add("--log-texts", action="store_true", help="let texts into the log, which otherwise has none")


def limits_of(options: argparse.Namespace) -> Limits:
    """The limits among parsed options."""
    names = ("batch", "batch_tokens", "body", "texts", "tokens", "new_tokens", "concurrency")
    return Limits(wait=options.wait_ms, seconds=options.timeout, **{name: getattr(options, name) for name in names})


def access_of(options: argparse.Namespace) -> Access:
    """Who may ask: whoever has a key, and without keys this machine alone.

    Raises:
        UsageError: no keys for an address that others reach, or a key file that is missing, open or empty.
    """
    keys = _keys(options.key_file)
    local = options.host in LOOPBACK
    if not keys and not local:
        raise UsageError(
            f"--host {options.host} lets other machines ask, so it needs API keys: give --key-file FILE or set {KEYS}"
        )
    # a page in this machine's browser could otherwise reach the service under a name of its own (DNS rebinding)
    return Access(keys, None if keys else LOOPBACK)


def named_folders(runs: Sequence[str]) -> dict[str, Path]:
    """Name and folder of every `[NAME=]FOLDER`.

    Raises:
        UsageError: a name that is no name, or that two folders have.
    """
    found: dict[str, Path] = {}
    for text in runs:
        name, equals, folder = text.partition("=")
        if not equals or "/" in name:
            name, folder = Path(text).resolve().name, text
        if not NAME.fullmatch(name):
            raise UsageError(
                f"'{name}' cannot be an adapter's name (letters, digits, '.', '_', '-'; at most 64); "
                f"write NAME={folder}"
            )
        if name in found:
            raise UsageError(f"{found[name]} and {folder} would both be called '{name}'; write NAME={folder}")
        found[name] = Path(folder)
    return found


def _keys(file: Path | None) -> tuple[str, ...]:
    if file is None:
        keys, place = os.environ.get(KEYS, "").split(), KEYS
    else:
        keys, place = _read(file).split(), str(file)
        if not keys:
            raise UsageError(f"{file} holds no key; write one a line")
    for key in keys:
        if len(key) < SHORTEST_KEY or not key.isascii():
            raise UsageError(f"{place}: a key has fewer than {SHORTEST_KEY} characters, or others than ASCII")
    return tuple(dict.fromkeys(keys))


def _read(file: Path) -> str:
    try:
        if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UsageError(f"{file} can be read by others; `chmod 600 {file}` first")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--key-file: cannot read {file}: {error}") from error


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not a number of milliseconds from 0 to 1000")
    return value / 1000
