"""A process that has imported everything, and forks the training processes of one column.

    python -m benchmarks.reliability.forks peftkit|stock ARGUMENT…

trains once with the arguments, which imports all that training needs, and then does what stdin says, one JSON object a
line, each answered with one line: `start` a process, or `wait` for its end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil

ROOT = Path(__file__).parents[2]
HANGS = 300.0
"""Seconds after which a process is ended and called hanging; a tiny run takes two."""
HUNG = 1000
"""The exit code of such a process."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""Threads do not survive a fork, and a tiny model gains nothing from them."""
ANY = -1
PR_SET_PTRACER = 0x59616D61


class Forks:
    """The bench's end of the process."""

    def __init__(self, column: str, arguments: Sequence[str], log: Path) -> None:
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.reliability.forks", column, *arguments],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._answer()

    def start(
        self, arguments: Sequence[str], said: Path, held: bool = False, environment: Mapping[str, str] | None = None
    ) -> int:
        """Start a training process; returns its id.

        Args:
            said: the file that what it says is added to.
            held: it stands still before its first line, until SIGCONT.
        """
        request = {"arguments": list(arguments), "said": str(said), "held": held, "environment": environment or {}}
        return int(self._asked("start", request))

    def wait(self, process: int) -> int:
        """Its exit code, negative for a signal; `HUNG` if it had to be ended."""
        return self.wait_for_all([process])[0]

    def wait_for_all(self, job: Sequence[int]) -> list[int]:
        """The exit codes of processes that work together: where one is killed the others are, as launchers do."""
        codes: list[int] = json.loads(self._asked("wait", {"job": list(job)}))
        return codes

    def run(self, arguments: Sequence[str], said: Path) -> int:
        """The exit code of a process that nothing is done to."""
        return self.wait(self.start(arguments, said))

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)
        self._log.close()

    def _asked(self, what: str, request: dict[str, Any]) -> str:
        assert self._process.stdin
        print(json.dumps({"what": what} | request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout
        if answer := self._process.stdout.readline():
            return answer
        raise RuntimeError(f"the forking process has ended: {Path(self._log.name).read_text()[-2000:]}")


def is_running(process: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


def main_of(column: str) -> Callable[[list[str]], int]:
    """The command line of a column."""
    if column == "peftkit":
        from peftkit.cli import main

        return main
    from benchmarks.reliability import stock

    return stock.main


def serve(column: str, arguments: list[str], answers: IO[str]) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        assert main_of(column)(arguments) == 0
    sys.stderr.flush()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = started(column, request) if request["what"] == "start" else json.dumps(ended(request["job"]))
        print(answer, file=answers, flush=True)


def started(column: str, request: dict[str, Any]) -> int:
    process = os.fork()
    if not process:
        child(column, request)
    if request["held"]:
        os.waitpid(process, os.WUNTRACED)
    return process


def ended(job: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    late = time.monotonic() + HANGS
    while len(codes) < len(job):
        for process in set(job) - codes.keys():
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                codes[process] = os.waitstatus_to_exitcode(status)
            elif -signal.SIGKILL in codes.values():
                os.kill(process, signal.SIGKILL)
            elif time.monotonic() > late:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                codes[process] = HUNG
        time.sleep(0.005)
    return [codes[process] for process in job]


def child(column: str, request: dict[str, Any]) -> NoReturn:
    def work() -> int:
        output = os.open(request["said"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, number in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(descriptor, number)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        if request["environment"]:
            forget_processes()
            os.environ |= request["environment"]
        if request["held"]:
            # whoever starts strace need not be an ancestor of this process
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(ANY), 0, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
        return main_of(column)(request["arguments"])

    leave_with(work)


def leave_with(work: Callable[[], int]) -> NoReturn:
    """Do the work of a forked process, and end it with that exit code; nothing of the one that forked it goes on."""
    code = 70
    try:
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def forget_processes() -> None:
    """What the process that forks took itself for: the only one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:], sys.stdout)
