"""SIGTERM at a random moment: the process ends within its step, and the run goes on to the same bytes.

peftkit must end with exit code 143. The stock process ends by the signal, as Python does; Trainer's own handling
(`enable_jit_checkpoint`) waits three seconds before it acts, which is longer than these runs, and is not asked for.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks.reliability.runs import NOT_OFFERED, SAME, again, concluded, continued_from, last_error
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
    usual = program.seconds(method)
    while True:  # a moment at which the run had already ended is drawn again, earlier
        moment = chance.uniform(0.05, 0.9) * usual
        target = folder / f"run-{moment:.4f}"
        process = program.forks.start(program.arguments(method, target), said)
        time.sleep(moment)
        os.kill(process, signal.SIGTERM)
        code = program.forks.wait(process)
        if code:
            break
        usual *= 0.7
    found = {"moment": round(moment, 4), "exit_code": code, "told_step": continued_from(said)}
    if code != ENDINGS[column]:
        return {"outcome": WRONG_CODE, "error": last_error(said)} | found
    command = again(program, method, target, said)
    return concluded(program, command, target, program.whole(method), said) | found
