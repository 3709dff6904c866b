"""SIGKILL into the training process: at random system calls of its saves, at random moments, and several in a row.

The calls of a run that nothing happens to are recorded first; a trial draws one of those on files of the run (opening,
writing, fsync, renaming, removing …) and strace kills the process as it makes that call. A trial of `row` kills the
same run four times, by turns at a call and at a moment, each time when it is given its command again; the call of that
number may then be one on another file. Every trial ends by giving the command once more, to the end. A kill that comes
after the end of its process is drawn again, earlier.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reliability import tracing
from benchmarks.reliability.runs import CRASHES, KILLED, NOT_OFFERED, SAME, again, concluded, wait_for_moment
from benchmarks.reliability.workbench import METHODS, Program, Workbench

GOOD = (SAME,)
CALLS, MOMENTS, ROWS, IN_A_ROW = 12, 4, 2, 4
"""Of every method in the full tier: kills at a call, at a moment, and runs that are killed four times."""
KINDS = ("call", "moment", "row")
EARLY = 0.5
"""The part of the calls and of the time that kills in a row are drawn from; a run that goes on has fewer left."""


def trials(tier: str) -> list[str]:
    if tier == "short":
        return ["lora-call-0"]
    counts = (("call", CALLS), ("moment", MOMENTS), ("row", ROWS))
    return [f"{method}-{kind}-{number}" for kind, count in counts for number in range(count) for method in METHODS]


def missing() -> str:
    """What this machine lacks."""
    return "" if tracing.available() else "strace is not installed"


def run(trial: str, column: str, bench: Workbench, folder: Path) -> dict[str, Any]:
    program, (method, kind, _) = bench.program(column), trial.split("-")
    if not program.offers(method):
        return NOT_OFFERED
    chance, killed = random.Random(trial), list[str]()
    kinds = ("call", "moment") * (IN_A_ROW // 2) if kind == "row" else (kind,)
    part = EARLY if kind == "row" else 1.0
    for one in kinds:
        place = _killed(WAYS[one], program, method, folder, chance, part)
        if not place:  # it does not even begin again: the conclusion says why
            break
        killed.append(place)
    target, said = folder / "run", folder / "said.txt"
    command = again(program, method, target, said)
    return {"killed": killed} | concluded(program, command, target, program.whole(method), said)


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many kills there were, of what, what came of each kind, and what could have been resumed."""
    places = Counter(place.partition(" ")[0] for row in rows for place in row.get("killed", ()))
    outcomes = {kind: dict(Counter(row["outcome"] for row in rows if f"-{kind}-" in row["trial"])) for kind in KINDS}
    crashed = [row for row in rows if row["outcome"] == CRASHES]
    older = sum(len(row["saved_steps"]) > 1 for row in crashed)
    return {
        "kills": sum(places.values()),
        "killed_at": dict(places),
        "by_kind": outcomes,
        "crashed_beside_an_older_checkpoint": older,
    }


Way = Callable[[Program, str, Path, random.Random, float], tuple[int, str]]


def _killed(way: Way, program: Program, method: str, folder: Path, chance: random.Random, part: float) -> str:
    """Kill the run, from where it is; returns where that was, nothing if it failed by itself."""
    run, before = folder / "run", folder / "before"
    if run.exists():
        shutil.copytree(run, before)
    while True:
        code, place = way(program, method, folder, chance, part)
        if code:
            shutil.rmtree(before, ignore_errors=True)
            return place if code == KILLED else ""
        shutil.rmtree(run)
        if before.exists():
            shutil.copytree(before, run)
        part *= 0.7


def _at_call(program: Program, method: str, folder: Path, chance: random.Random, part: float) -> tuple[int, str]:
    calls = _recorded(program, method)
    call = chance.choice(calls[: max(1, round(len(calls) * part))])
    process = program.forks.start(program.arguments(method, folder / "run"), folder / "said.txt", held=True)
    tracer = tracing.killed_at(process, folder / "trace.txt", call)
    code = program.forks.wait(process)
    last = tracer.calls()[-1:]
    return code, f"{call.name} {last[0].what.replace(str(folder), '')[:120] if last else ''}"


def _at_moment(program: Program, method: str, folder: Path, chance: random.Random, part: float) -> tuple[int, str]:
    said = folder / "said.txt"
    said.write_bytes(b"")
    process = program.forks.start(program.arguments(method, folder / "run"), said)
    place = wait_for_moment(program, method, said, process, chance)
    os.kill(process, signal.SIGKILL)
    return program.forks.wait(process), place


WAYS: dict[str, Way] = {"call": _at_call, "moment": _at_moment}


def _recorded(program: Program, method: str) -> list[tracing.Call]:
    """The calls on files of a run that nothing happens to, in order; recorded once."""
    run, trace = program.folder / f"traced-{method}", program.folder / f"{method}.trace"
    if not run.exists():
        process = program.forks.start(program.arguments(method, run), program.said, held=True)
        tracer = tracing.recorded(process, trace)
        if code := program.forks.wait(process):
            raise RuntimeError(f"{program.column} cannot train {method} under strace, exit code {code}")
        tracer.end()
    return [call for call in tracing.read(trace) if str(run) in call.what]
