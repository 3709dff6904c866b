"""How a run that something happened to is given its command again, and what it came to."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reliability.forks import HUNG
from benchmarks.reliability.workbench import Program, differing

KILLED = -signal.SIGKILL
NOT_OFFERED = {"outcome": "not offered"}
SAME, DIFFERS, CRASHES, STARTS_OVER, HANGS = "same bytes", "diverges silently", "crashes", "starts over", "hangs"


def again(program: Program, method: str, run: Path, said: Path) -> Callable[[], int]:
    """What gives the command of a run of one process again; returns the exit code."""
    return lambda: program.forks.run(program.arguments(method, run), said)


def concluded(program: Program, command: Callable[[], int], run: Path, whole: Path, said: Path) -> dict[str, Any]:
    """Give the command of a run again, twice if it fails, and compare with `whole`, that nothing happened to.

    A run that is over is not given its command: it was killed after it had saved its result.

    Returns:
        `outcome`: `same bytes`; `starts over`, which are the same bytes too, but from step 0 although there was a whole
        checkpoint; `diverges silently` with what differs; `crashes` with the error; or `hangs`. Also `saved_steps`,
        those of the checkpoints that were there, and `from_step`.
    """
    if program.finished(run):
        return compared(program, run, whole)
    saved = [int(folder.name.rpartition("-")[2]) for folder in program.checkpoints(run)]
    said.write_bytes(b"")
    if code := command() and command():
        told = {"resumed_with": code, "error": last_error(said)}
        return {"outcome": HANGS if code == HUNG else CRASHES, "saved_steps": saved} | told
    found = {"from_step": continued_from(said), "saved_steps": saved}
    outcome = compared(program, run, whole)
    if outcome["outcome"] == SAME and found["from_step"] == 0 and len(saved) > 1:
        outcome = {"outcome": STARTS_OVER}
    return outcome | found


def compared(program: Program, run: Path, whole: Path) -> dict[str, Any]:
    """The `outcome` of a run that has ended well."""
    different = differing(program.made(run), program.made(whole))
    return {"outcome": DIFFERS, "differs": different} if different else {"outcome": SAME}


def continued_from(said: Path) -> int:
    """The step that the last process went on from; 0 if it began."""
    text = said.read_text(encoding="utf-8", errors="replace")
    steps = re.findall(r"continuing from (?:step |\S*checkpoint-)([\d,]+)", text)
    return int(steps[-1].replace(",", "")) if steps else 0


def last_error(said: Path) -> str:
    """The last line of what a process said that is not empty."""
    lines = said.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
