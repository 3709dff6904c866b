"""How a run that something happened to is given its command again, and what it came to."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reliability.forks import HUNG, is_running
from benchmarks.reliability.workbench import STEPS, Program, differing

KILLED = -signal.SIGKILL
LOSS = re.compile(r"  loss \d|'loss': ")
"""In what peftkit and Trainer say of a step."""
NOT_OFFERED = {"outcome": "not offered"}
SAME, DIFFERS, CRASHES, STARTS_OVER, HANGS = "same bytes", "diverges silently", "crashes", "starts over", "hangs"


def wait_for_steps(said: Path, steps: int, process: int) -> None:
    """Wait until a process has said the losses of so many steps, or has ended; `said` is empty when it starts."""
    while is_running(process):
        if said.is_file() and len(LOSS.findall(said.read_text(encoding="utf-8", errors="replace"))) >= steps:
            return
        time.sleep(0.002)


def wait_for_moment(program: Program, method: str, said: Path, process: int, chance: random.Random) -> str:
    """Wait for a random moment of a run, whatever the load of the machine; returns what it was.

    One in six falls before the first step, at a random part of the time that a whole run takes; the others up to a
    twentieth of a second after a random step.
    """
    if chance.random() < 1 / 6:
        seconds = chance.uniform(0, 0.4) * program.seconds(method)
        time.sleep(seconds)
        return f"moment {seconds:.3f} s"
    steps, rest = chance.randint(1, STEPS - 2), chance.uniform(0, 0.05)
    wait_for_steps(said, steps, process)
    time.sleep(rest)
    return f"moment {rest:.3f} s after step {steps} of this process"


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
