"""How the command line and the recipes end: one clear message and the right exit code."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from peftkit.errors import ConfigError, PeftkitError, UsageError

PATIENCE = 10.0
"""Seconds that a process waits for the first one to tell what is wrong, before it does so itself."""
JOB = "PEFTKIT_JOB"
"""The folder in which the processes of `peftkit launch` leave what is wrong, for the launcher to tell once."""
INTERRUPTED = (
    "interrupted; nothing half-written is left. A training run goes on from its last checkpoint when its command is "
    "given again, without output.overwrite"
)


class Interrupted(KeyboardInterrupt):
    """Work that a signal ended. No Exception, so that nobody who catches those keeps it from ending."""

    def __init__(self, number: int, message: str = INTERRUPTED) -> None:
        self.exit_code = 128 + number
        super().__init__(message)


def positive(text: str) -> int:
    """The type of arguments that count from 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises, so that `guard` tells what is wrong once, however many processes run."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` shows what there is")

    def print_help(self, file: Any = None) -> None:
        if _is_first():
            super().print_help(file)


def guard(action: Callable[[], object]) -> int:
    """Run `action`; returns the exit code. What peftkit refuses is told in plain words, once a machine.

    An error that nobody foresaw keeps its traceback, except where it only says that another process is gone.
    """
    try:
        try:
            with _heeding_sigterm():
                action()
        finally:
            sys.stdout.flush()  # here, where a reader that has gone can still be told from a failure
    except PeftkitError as error:
        tell(_message(error), error.exit_code)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        ended = interrupt if isinstance(interrupt, Interrupted) else Interrupted(signal.SIGINT)
        if _is_first() or JOB in os.environ:
            tell(str(ended), ended.exit_code)
        return ended.exit_code
    except BrokenPipeError:
        # the reader of our output has gone; flushing at exit would complain a second time
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno != errno.ENOSPC:
            if error.filename is None:
                raise
            tell(f"error: {error.filename}: {error.strerror}; check the path and its permissions")
            return 1
        tell(f"error: no space left on the disk that holds {error.filename or 'the output'}; free some and run again")
        return 1
    except Exception as error:
        if not _is_told_by_another(error):
            raise
        tell("error: the connection to another process broke off, because that one failed or was ended")
        return 1
    return 0


@contextmanager
def _heeding_sigterm() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does.

    Not in one of several processes: who waits for one that has failed would not hear of it.
    """
    alone = "RANK" not in os.environ and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def say(line: str = "") -> None:
    """Print a line of results; only the first process does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _message(error: PeftkitError) -> str:
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        return "\n".join([f"error: {len(error.problems)} problems", *(f"  {one}" for one in error.problems)])
    return f"error: {error}"


def tell(message: str, exit_code: int = 1, first: bool = False) -> None:
    """Say what is wrong, once a machine however many processes say the same: at once, or by the launcher.

    Args:
        first: this process tells it for the others, as the first one does otherwise.
    """
    if job := os.environ.get(JOB):
        rank = int(os.environ.get("RANK", "0"))
        text = json.dumps({"time": time.time(), "rank": rank, "message": message, "exit_code": exit_code})
        (Path(job) / f"{rank}.json").write_text(text, encoding="utf-8")
        return
    if not first and not _is_first():
        # the first process mostly fails alike, and the launcher then ends this one before its turn comes
        time.sleep(PATIENCE)
    print(message, file=sys.stderr, flush=True)


def _is_told_by_another(error: Exception) -> bool:
    """Whether an error says no more than that another process is gone; waits, so that the other can tell why.

    The launcher mostly ends this process meanwhile, because the other has failed.
    """
    lost = type(error).__name__.startswith("Dist") or "gloo/transport" in str(error)
    if lost or not _is_first():
        time.sleep(2 * PATIENCE if lost else PATIENCE)
    return lost


def _is_first() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"
