"""Versions and devices, for bug reports and beside every measured figure."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from peftkit.artifacts.store import versions


def describe() -> dict[str, Any]:
    """Everything about this machine that can change a result or a speed."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "versions": versions(),
    }


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
