"""SIGKILL into jobs of two processes over gloo: into either of them, or both.

In trials of `row` the two processes are forked, and one job is killed four times at random moments: its first process,
its second, both, and one of them again; the others are killed as soon as one is dead, as launchers do. Trials of
`launch` are whole jobs of `peftkit launch --processes 2 --cpu`, of which one process, or the launcher with both, is
killed at a random step. They start everything anew and take minutes, so that they are tried with peftkit alone.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.reliability.forks import ROOT
from benchmarks.reliability.runs import KILLED, SAME, concluded, wait_for_steps
from benchmarks.reliability.workbench import STEPS, Program, Workbench

GOOD = (SAME, "not tried")
NOT_TRIED = {"outcome": "not tried"}
PROCESSES = 2
VICTIMS = ((0,), (1,), (0, 1))
LONG = 900.0
"""Seconds in which a launched job must end."""


def trials(tier: str) -> list[str]:
    if tier == "short":
        return ["lora-row-0"]
    rows = [f"{method}-row-{number}" for number in range(2) for method in ("lora", "adalora")]
    return [*rows, *(f"lora-launch-{number}" for number in (0, 2))]


def run(trial: str, column: str, bench: Workbench, folder: Path) -> dict[str, Any]:
    program, (method, kind, number) = bench.program(column), trial.split("-")
    if kind == "launch":
        return _launched(program, method, VICTIMS[int(number)], folder) if column == "peftkit" else NOT_TRIED
    whole = _whole(program, method)
    chance, killed = random.Random(trial), list[str]()
    target, said = folder / "run", folder / "said.txt"

    def command() -> int:
        return max(program.forks.wait_for_all(_job(program, method, target, said)), key=abs)

    for victims in (*VICTIMS, chance.choice(VICTIMS)):
        said.write_bytes(b"")
        job, steps, rest = _job(program, method, target, said), chance.randint(2, 6), chance.uniform(0, 0.1)
        wait_for_steps(said, steps, job[0])
        time.sleep(rest)
        for rank in victims:
            os.kill(job[rank], signal.SIGKILL)
        codes = program.forks.wait_for_all(job)
        if KILLED not in codes:  # it was over, or failed to go on, which the conclusion tells
            break
        killed.append(f"after {steps} steps: {', '.join(map(str, victims))}")
    return {"killed": killed} | concluded(program, command, target, whole, said)


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many jobs were killed."""
    return {"kills": sum(len(row.get("killed", ())) for row in rows)}


def _whole(program: Program, method: str) -> Path:
    """A job that nothing happened to, trained once."""
    run = program.folder / f"whole-{method}-{PROCESSES}"
    if not run.exists() and any(codes := program.forks.wait_for_all(_job(program, method, run, program.said))):
        raise RuntimeError(f"{program.column} cannot train {method} in {PROCESSES} processes: {codes}")
    return run


def _job(program: Program, method: str, run: Path, said: Path) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alike = {"WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES), "ACCELERATE_USE_CPU": "true"}
    alike |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [alike | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(PROCESSES)]
    arguments = program.arguments(method, run)
    return [program.forks.start(arguments, said, environment=environment) for environment in ranks]


def _launched(program: Program, method: str, victims: Sequence[int], folder: Path) -> dict[str, Any]:
    target, said = folder / "run", folder / "said.txt"
    whole = _whole(program, method)
    step = random.Random(str(victims)).randint(2, STEPS - 2)
    job = _launch(program, method, target, said)
    wait_for_steps(said, step, job.pid)
    ranks = _ranks(job.pid)
    for process in ranks if len(victims) > 1 else [ranks[victims[0]]]:
        process.kill()
    if len(victims) > 1:
        job.kill()
    code = job.wait(LONG)
    found = {"killed": [f"step {step}: {', '.join(map(str, victims))}"], "exit_code": code}
    return found | concluded(program, lambda: _launch(program, method, target, said).wait(LONG), target, whole, said)


def _launch(program: Program, method: str, run: Path, said: Path) -> subprocess.Popen[bytes]:
    config, *overrides = program.arguments(method, run)[1:]
    command = [sys.executable, "-m", "peftkit.cli", "launch", "--processes", str(PROCESSES), "--cpu", config]
    with said.open("ab") as output:
        return subprocess.Popen([*command, *overrides], cwd=ROOT, stdout=output, stderr=output)


def _ranks(launcher: int) -> list[psutil.Process]:
    """The training processes of a launcher, by rank."""
    found = [one for one in psutil.Process(launcher).children(recursive=True) if "RANK" in one.environ()]
    return sorted(found, key=lambda one: int(one.environ()["RANK"]))
