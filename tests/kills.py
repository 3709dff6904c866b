"""A process that forks runs of peftkit, which end at a chosen moment; what it has imported is imported for all of them.

    python tests/kills.py COMMAND…

trains once, which imports all that training needs. Then it reads requests from stdin, one JSON object a line, and
answers each with the exit codes of the run's processes:

    arguments   of the command line
    processes   how many
    rank        which of them the moment is of; the others are killed once it is dead
    moment      null, or one of
                ["step", N]         killed when step N is taken, before anything of it is saved
                ["file", K]         killed at the K-th operation on a file of the checkpoints
                ["SIGTERM", N]      sent this signal within step N; any name of a signal
    output      the file that gets what the processes say
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.reliability.forks import forget_processes, leave_with


class Killer:
    """The test's end of the process."""

    def __init__(self, output: Path, *command: str) -> None:
        self.output = output
        self._process = subprocess.Popen(
            [sys.executable, __file__, *command],
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},  # threads do not survive a fork
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, moment: Any = None, processes: int = 1, rank: int = 0) -> list[int]:
        """The exit codes of the processes of a run; `said` is what they said."""
        request = {"arguments": arguments, "moment": moment, "processes": processes, "rank": rank}
        assert self._process.stdin and self._process.stdout
        print(json.dumps(request | {"output": str(self.output)}), file=self._process.stdin, flush=True)
        codes: list[int] = json.loads(self._process.stdout.readline())
        return codes

    @property
    def said(self) -> str:
        """What the last run said."""
        return self.output.read_text()

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)


def serve(command: list[str]) -> None:
    from peftkit.cli import main

    with contextlib.redirect_stdout(sys.stderr):
        assert main(command) == 0
    for line in sys.stdin:
        print(json.dumps(answered(json.loads(line))), flush=True)


def answered(request: dict[str, Any]) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    Path(request["output"]).write_bytes(b"")
    children = [forked(request, rank, port) for rank in range(request["processes"])]
    codes = {}
    while len(codes) < len(children):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] == -signal.SIGKILL:
            for other in set(children) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in children]


def forked(request: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if not pid:
        child(request, rank, port)
    return pid


def child(request: dict[str, Any], rank: int, port: int) -> NoReturn:
    def work() -> int:
        output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)
        if request["processes"] > 1:
            forget_processes()
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["processes"])}
            os.environ |= {"LOCAL_WORLD_SIZE": str(request["processes"]), "ACCELERATE_USE_CPU": "true"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if request["moment"] and rank == request["rank"]:
            what, number = request["moment"]
            MOMENTS.get(what, at_signal)(what, number)
        from peftkit.cli import main

        return main(request["arguments"])

    leave_with(work)


def at_step(what: str, number: int) -> None:
    from peftkit.training.loop import _Loop

    taken = _Loop._train_step

    def step(loop: Any, *given: Any) -> None:
        taken(loop, *given)
        if loop.progress.step == number:
            os.kill(os.getpid(), signal.SIGKILL)

    _Loop._train_step = step  # type: ignore[method-assign]


def at_file(what: str, number: int) -> None:
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event.partition(".")[0] in ("open", "os", "shutil") and any("/checkpoints" in str(one) for one in arguments):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def at_signal(what: str, number: int) -> None:
    from peftkit.training.loop import _Loop

    loss, sent = _Loop._micro_loss, list[str]()

    def signalled(loop: Any, *given: Any) -> Any:
        if loop.progress.step == number - 1 and not sent:
            sent.append(what)
            os.kill(os.getpid(), getattr(signal, what))
        return loss(loop, *given)

    _Loop._micro_loss = signalled  # type: ignore[method-assign]


MOMENTS: dict[str, Callable[[str, int], None]] = {"step": at_step, "file": at_file}


if __name__ == "__main__":
    serve(sys.argv[1:])
