"""Work that may hang, take all memory or run somebody's code: under a clock, or in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TypeVar

import psutil

from peftkit.memory import peak_resident_bytes, resident_bytes

Value = TypeVar("Value")
MEGABYTE = 10**6


class Late(BaseException):
    """The time is over. No Exception, so that nobody who catches those goes on."""


def within(seconds: float, action: Callable[[], Value]) -> Value:
    """What `action` returns.

    Raises:
        Late: it was not done in time.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Late

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return action()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def apart(action: Callable[[], dict[str, Any]], seconds: float, megabytes: int) -> dict[str, Any]:
    """What `action` returns in a forked process, with what it took there.

    Args:
        seconds: of the clock, after which the process is ended.
        megabytes: of address space that it may take beyond what it has when it begins.

    Returns:
        `cpu_seconds` and `megabytes` (the growth of its resident set at the highest), and `ended`: "" where it
        returned, otherwise what ended it: "time", "memory" or the exit code.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        _answer(action, writing, megabytes)
    os.close(writing)
    late = _ended_after(process, seconds)
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(process, 0)
    if answer:
        found: dict[str, Any] = json.loads(answer)
        return found
    return {"ended": "time" if late else f"exit code {os.waitstatus_to_exitcode(status)}"}


def _ended_after(process: int, seconds: float) -> bool:
    """Wait for the end of a process, which is not reaped, or bring it about."""
    late = time.monotonic() + seconds
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > late:
            os.kill(process, signal.SIGKILL)
            return True
        time.sleep(0.002)
    return False


def _answer(action: Callable[[], dict[str, Any]], writing: int, megabytes: int) -> NoReturn:
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        before, cpu = resident_bytes(), time.process_time()
        most = psutil.Process().memory_info().vms + megabytes * MEGABYTE
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        ended = ""
        found: dict[str, Any] = {}
        try:
            found = action()
        except MemoryError:
            ended = "memory"
        took = {
            "cpu_seconds": round(time.process_time() - cpu, 4),
            "megabytes": round((peak_resident_bytes() - before) / 2**20, 1),
        }
        os.write(writing, json.dumps({"ended": ended} | found | took).encode())
    except BaseException:
        os.write(writing, json.dumps({"ended": traceback.format_exc()[-300:]}).encode())
    finally:
        os._exit(0)
