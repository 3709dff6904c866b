"""Versions and devices, for bug reports and beside every measured figure."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("peftkit", "torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "bitsandbytes")


def describe() -> dict[str, Any]:
    """Everything about this machine that can change a result or a speed."""
    import torch

    machine = hardware()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": machine["processor"],
        "cores": machine["cores"],
        "threads": torch.get_num_threads(),
        "gpus": machine["gpus"],
        "cuda": torch.version.cuda,
        "versions": versions(),
    }


def hardware() -> dict[str, Any]:
    """What this machine computes with."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"processor": _processor(), "cores": os.cpu_count(), "gpus": gpus}


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes; `missing` for one that is not installed."""
    return {name: _version(name) for name in PACKAGES}


@cache
def sources_sha256(*parts: str) -> str:
    """Sixteen hex digits: a hash of modules and folders of this package, by their paths in it."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for part in parts:
        place = root / part
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
