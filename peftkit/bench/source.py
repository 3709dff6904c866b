"""A hash of the code that decides what a run computes, so that results of different code are not taken for one."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

PARTS = (
    *("audit", "backbones", "data", "engine", "methods", "metrics", "tasks", "training"),
    *("config.py", "evaluation.py", "prepare.py", "session.py"),
    *("bench/worker.py", "bench/scoring.py", "bench/probe.py", "bench/probes.py", "bench/sample.py"),
)


@cache
def source_sha256() -> str:
    """Sixteen hex digits."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for part in PARTS:
        place = root / part
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
