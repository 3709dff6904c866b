"""Processes of their own for what is measured, and what they have to say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit.errors import JobError

ROOT = Path(__file__).parents[2]
SECONDS = 7200
"""The longest that a process may take."""
SHOWN = 12
"""Lines of its complaint that an error shows."""


def run(arguments: Sequence[str], python: str = sys.executable) -> str:
    """What a process prints; it finds this checkout's packages, whichever Python it is, and no network.

    Raises:
        JobError: it fails, with the end of what it says, or takes too long.
    """
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": places, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [python, *arguments], capture_output=True, text=True, timeout=SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise JobError(f"{' '.join(arguments[:3])} took longer than {SECONDS:,} s and was ended") from None
    if done.returncode:
        told = "\n".join(done.stderr.strip().splitlines()[-SHOWN:])
        raise JobError(f"{' '.join(arguments[:3])} ended with exit code {done.returncode}:\n{told}")
    return done.stdout


def answer(module: str, asked: dict[str, Any], python: str = sys.executable) -> dict[str, Any]:
    """The JSON that a module of this package prints last, told what is asked by its only argument."""
    lines = run(["-m", f"benchmarks.speed.{module}", json.dumps(asked)], python).strip().splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return found


def lacks(python: str, packages: Sequence[str]) -> str:
    """Why a Python cannot serve, or nothing: it is not there, or lacks a package."""
    code = "import importlib.metadata as m, sys; [m.version(name) for name in sys.argv[1:]]"
    try:
        done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        return f"{python}: {error.strerror}"
    return f"{python} has not all of {', '.join(packages)}" if done.returncode else ""
