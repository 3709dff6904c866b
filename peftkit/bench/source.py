"""A hash of the code that decides what a run computes, so that results of different code are not taken for one."""

from __future__ import annotations

from peftkit.environment import sources_sha256

PARTS = (
    *("audit", "backbones", "data", "engine", "methods", "metrics", "tasks", "training"),
    *("config.py", "evaluation.py", "prepare.py", "session.py", "token_cache.py"),
    *("bench/worker.py", "bench/scoring.py", "bench/probe.py", "bench/probes.py", "bench/sample.py"),
)


def source_sha256() -> str:
    """Sixteen hex digits."""
    return sources_sha256(*PARTS)
