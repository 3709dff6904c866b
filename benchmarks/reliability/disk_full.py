"""A disk that fills up while a run is under way: 20 sizes of what is left.

Each trial has a small tmpfs, which only root can mount. The process is stopped once it has begun its run folder, the
disk is filled but for a part of what the run needs at its peak, and the process goes on. It ends when it finds no room;
then room is made, and the command given again. peftkit must end with exit code 1 and a plain line that says so.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.reliability.forks import is_running
from benchmarks.reliability.runs import SAME, again, concluded, last_error
from benchmarks.reliability.workbench import Program, Workbench

GOOD = (SAME,)
NOT_TOLD = "not told plainly"
SIZES = 20
METHOD = "full"
LARGE = 2**26
"""Bytes of the disk; enough for a run."""


def trials(tier: str) -> list[str]:
    return [f"{number}-of-{SIZES}" for number in ([7] if tier == "short" else range(SIZES))]


def missing() -> str:
    """What this machine lacks."""
    return "" if os.geteuid() == 0 and shutil.which("mount") else "only root can mount a tmpfs"


def run(trial: str, column: str, bench: Workbench, folder: Path) -> dict[str, Any]:
    program, said = bench.program(column), folder / "said.txt"
    room = round((int(trial.partition("-")[0]) + 0.5) / SIZES * _peak(program))
    with _disk(folder / "disk") as disk:
        target, filler = disk / "run", disk / "filler"
        process = program.forks.start(program.arguments(METHOD, target), said)
        _stop_when_begun(process, target)
        left = shutil.disk_usage(disk).free
        with filler.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(1, left - room))
        os.kill(process, signal.SIGCONT)
        code = program.forks.wait(process)
        told = last_error(said)
        found = {"room": room, "exit_code": code, "said": told}
        filler.unlink()
        if code == 0:
            return {"outcome": SAME, "fitted": True} | found
        if column == "peftkit" and not (code == 1 and told.startswith("error: no space left on the disk")):
            return {"outcome": NOT_TOLD} | found
        return concluded(program, again(program, METHOD, target, said), target, program.whole(METHOD), said) | found


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many found no room, and after how many checkpoints."""
    short = [row for row in rows if row["exit_code"]]
    return {"ran out": len(short), "checkpoints left": sorted(len(row.get("saved_steps", ())) for row in short)}


def _peak(program: Program) -> int:
    """The most bytes that a run needs on its disk, measured once."""
    kept = program.folder / "peak"
    if not kept.exists():
        with _disk(program.folder / "disk") as disk:
            process, most = program.forks.start(program.arguments(METHOD, disk / "run"), program.said), 0
            while is_running(process):
                most = max(most, shutil.disk_usage(disk).used)
                time.sleep(0.002)
            program.forks.wait(process)
        kept.write_text(str(most), encoding="utf-8")
    return int(kept.read_text(encoding="utf-8"))


def _stop_when_begun(process: int, run: Path) -> None:
    late = time.monotonic() + 60
    while not run.exists():
        if time.monotonic() > late:
            raise RuntimeError(f"{run} was not begun in a minute")
        time.sleep(0.002)
    os.kill(process, signal.SIGSTOP)


@contextmanager
def _disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={LARGE}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, timeout=60)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)
        folder.rmdir()
