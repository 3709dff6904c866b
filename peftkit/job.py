"""Runs the processes of a job, and tells once what ended it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from peftkit.config import Run
from peftkit.console import JOB, Interrupted
from peftkit.errors import JobError, UsageError, first_line
from peftkit.experiment import train
from peftkit.launch import Job, plan
from peftkit.launch_options import Asked
from peftkit.session import check_start

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
SHUTDOWN = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}
"""Seconds between passing a signal on and ending the processes, which finish their step and save."""


def launch(run: Run, options: argparse.Namespace) -> None:
    """Train a run over several processes: `peftkit launch`.

    Everything that can be refused is refused here, before there is a process.
    """
    from torch.cuda import device_count

    names = [text for name in options.allow for text in ("--allow", name)]
    script = ["peftkit.cli", "train", str(options.config), *options.overrides, *names]
    job = plan(Asked.of(options), script, gpus=device_count())
    check_start(run, job.launched)
    print(job, file=sys.stderr, flush=True)
    if not options.dry_run:
        run_job(job) if job.needs_launcher else _train_here(run, job)


def _train_here(run: Run, job: Job) -> None:
    """Accelerate refuses to launch a single process as one of several."""
    with _environment(job.variables):
        train(run)


def run_job(job: Job) -> None:
    """Start the processes and wait for their end; signals are passed on to them.

    Raises:
        JobError: what the process that failed first has to say, with its exit code.
        UsageError: Accelerate refuses the launch.
        Interrupted: a signal ended the job.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peftkit-job-")))
        stack.enter_context(_environment(SHUTDOWN | job.variables | {JOB: str(folder)}))
        stack.enter_context(_own_signals())
        # torch logs every end of a process several times
        logging.disable(logging.ERROR)
        stack.callback(logging.disable, logging.NOTSET)
        _launch(job, folder)


def _launch(job: Job, folder: Path) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(list(job.arguments)))
    except ChildFailedError as error:
        if told := _told(folder):
            _raise(told)
        raise JobError(_died(*error.get_first_failure(), job.processes)) from None
    except SignalException as error:
        told = _told(folder)
        if told and told["exit_code"] > 128:
            _raise(told)
        raise Interrupted(error.sigval) from None
    except ValueError as error:
        raise UsageError(f"accelerate launch: {first_line(error)}") from error
    except (RuntimeError, OSError) as error:
        raise JobError(f"the processes did not find each other: {first_line(error)}") from error


def _told(folder: Path) -> dict[str, Any] | None:
    """What the first process that failed left to tell."""
    left = (json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json"))
    return min(left, key=_when, default=None)


def _raise(told: dict[str, Any]) -> NoReturn:
    """Pass on what a process left to tell, as the kind of end that it was."""
    if told["exit_code"] > 128:
        raise Interrupted(told["exit_code"] - 128, told["message"]) from None
    raise JobError(told["message"].removeprefix("error: "), told["exit_code"]) from None


def _when(left: dict[str, Any]) -> float:
    return float(left["time"])


def _died(rank: int, failure: Any, processes: int) -> str:
    who = f"process {rank} of {processes} (pid {failure.pid})"
    if failure.exitcode >= 0:
        return f"{who} failed with exit code {failure.exitcode}, and the others were ended; it says why above"
    why = ", as the system does where memory runs out" if failure.exitcode == -signal.SIGKILL else ""
    return (
        f"{who} was ended by {failure.signal_name()}{why}, and the others with it; a training run goes on from its "
        "last checkpoint when the command is given again"
    )


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Put back the handlers that torch's launcher replaces and leaves."""
    before = {one: signal.getsignal(one) for one in SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
