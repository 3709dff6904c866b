"""How fast this machine multiplies, copies and draws; measured in about a second and kept in the cache."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable

from peftkit.backbones.bundled import cache_folder
from peftkit.disk import write_text
from peftkit.environment import describe
from peftkit.memory import available_bytes
from peftkit.planning.machines import Machine

FILE = "rates.json"
SECONDS = 0.12
"""That each figure is measured for."""
TOKENS, WIDTH, INNER = 512, 768, 3072
COPIED = 2**24
"""Bytes of a copy; larger than caches, as activations are."""


def this_machine() -> Machine:
    """This computer's CPU with its rates for the threads that torch uses."""
    machine = describe()
    key = f"{machine['processor']}, {machine['threads']} threads, torch {machine['versions']['torch']}"
    file = cache_folder() / FILE
    known = _read(file)
    if key not in known:
        known[key] = measure()
        with contextlib.suppress(OSError):  # a cache that cannot be written costs a second each time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(known, indent=2))
    rates = known[key]
    return Machine(
        name=f"this CPU ({machine['threads']} threads)",
        kind="cpu",
        memory=available_bytes(),
        count=1,
        rates={name: rates[name] for name in ("float32", "bfloat16")} | {"float16": rates["bfloat16"]},
        bandwidth=rates["bandwidth"],
        random=rates["random"],
        launch=rates["launch"],
        source="measured on this machine",
    )


def measure() -> dict[str, float]:
    """Rates in units a second, and the seconds that the smallest operation takes."""
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        rates = {str(dtype).removeprefix("torch."): _matrix_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
        numbers = torch.zeros(COPIED // 4)
        other = torch.zeros_like(numbers)
        one = torch.zeros(8)
        return rates | {
            "bandwidth": 2 * COPIED / _seconds(lambda: other.copy_(numbers)),
            "random": other.numel() / _seconds(lambda: other.bernoulli_(0.9)),
            "launch": _seconds(lambda: one + one),
        }


def _matrix_rate(dtype: object) -> float:
    import torch

    hidden, weight = torch.randn(TOKENS, WIDTH).to(dtype), torch.randn(INNER, WIDTH).to(dtype)  # type: ignore[call-overload]
    return 2 * TOKENS * WIDTH * INNER / _seconds(lambda: torch.nn.functional.linear(hidden, weight))


def _seconds(call: Callable[[], object]) -> float:
    """The median time of a call; the first ones, which set things up, do not count."""
    call()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _read(file: object) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(file.read_text())  # type: ignore[attr-defined]
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
