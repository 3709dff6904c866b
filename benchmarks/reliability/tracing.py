"""strace around a training process: what it does to the files of its run, and its end at one of these calls."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CALLS = (
    *("openat", "close", "write", "writev", "pwrite64", "ftruncate", "fsync", "fdatasync", "sendfile"),
    *("rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir", "chmod", "fchmod", "fchmodat"),
)
"""Those by which a save writes, names and removes files."""
ENTRY = re.compile(r"^(\d+) +(\w+)\((.*)$")
ATTACHED = 10.0
"""Seconds in which strace must have taken hold of a process."""


@dataclass(frozen=True)
class Call:
    """One system call of the main thread."""

    name: str
    number: int
    """Its place among the calls of that name, from 1."""
    what: str
    """Its arguments, as strace writes them."""


def available() -> bool:
    """Whether there is a strace."""
    return shutil.which("strace") is not None


class Tracer:
    """strace, attached to a process that stands still, which then runs."""

    def __init__(self, process: int, file: Path, options: Sequence[str]) -> None:
        self.file = file
        command = ["strace", "-f", "-y", "-e", "signal=none", *options, "-o", str(file), "-p", str(process)]
        self._strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._strace.stderr
        line = self._strace.stderr.readline()
        if "attached" not in line:
            os.kill(process, signal.SIGKILL)
            raise RuntimeError(f"strace cannot attach: {line.strip()}")
        os.kill(process, signal.SIGCONT)

    def end(self) -> None:
        """Wait until all is written; for after the end of the process."""
        self._strace.communicate(timeout=ATTACHED)

    def calls(self) -> list[Call]:
        """What a process that has ended did."""
        self.end()
        return read(self.file)


def read(file: Path) -> list[Call]:
    """The calls of the main thread, in order."""
    counts = Counter[str]()
    found, main = list[Call](), None
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        entry = ENTRY.match(line)
        if entry and entry[1] == (main := main or entry[1]):
            counts[entry[2]] += 1
            found.append(Call(entry[2], counts[entry[2]], entry[3]))
    return found


def recorded(process: int, file: Path) -> Tracer:
    """Let a process run, and write down its calls."""
    return Tracer(process, file, ["-e", f"trace={','.join(CALLS)}"])


def killed_at(process: int, file: Path, call: Call) -> Tracer:
    """Let a process run, and kill it at a call."""
    inject = f"inject={call.name}:signal=KILL:when={call.number}"
    return Tracer(process, file, ["-e", f"trace={call.name}", "-e", inject])
