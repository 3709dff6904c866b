"""SIGTERM at a random moment: the process ends within its step, and the run goes on to the same bytes.

peftkit must end with exit code 143. The stock process ends by the signal, as Python does; Trainer's own handling
(`enable_jit_checkpoint`) waits three seconds before it acts, which is longer than these runs, and is not asked for.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

from benchmarks.reliability.runs import NOT_OFFERED, SAME, again, concluded, last_error, wait_for_moment
from benchmarks.reliability.workbench import METHODS, Workbench

GOOD = (SAME,)
WRONG_CODE = "wrong exit code"
ENDINGS = {"peftkit": 128 + signal.SIGTERM, "stock": -signal.SIGTERM}


def trials(tier: str) -> list[str]:
    if tier == "short":
        return ["lora-0"]
    return [f"{method}-{number}" for number in range(10) for method in METHODS]


def run(trial: str, column: str, bench: Workbench, folder: Path) -> dict[str, Any]:
    program, method = bench.program(column), trial.partition("-")[0]
    if not program.offers(method):
        return NOT_OFFERED
    said, chance = folder / "said.txt", random.Random(trial)
    while True:  # a moment at which the run had already ended is drawn again
        target = folder / f"run-{chance.random()}"
        said.write_bytes(b"")
        process = program.forks.start(program.arguments(method, target), said)
        moment = wait_for_moment(program, method, said, process, chance)
        os.kill(process, signal.SIGTERM)
        code = program.forks.wait(process)
        if code:
            break
    found = {"moment": moment, "exit_code": code}
    if code != ENDINGS[column]:
        return {"outcome": WRONG_CODE, "error": last_error(said)} | found
    command = again(program, method, target, said)
    return concluded(program, command, target, program.whole(method), said) | found
