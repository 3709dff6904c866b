"""How the command line and the recipes end: one clear message and the right exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from peftkit.errors import ConfigError, PeftkitError

INTERRUPTED = 130


def guard(action: Callable[[], object]) -> int:
    """Run `action`; returns the exit code. What peftkit refuses is told in plain words, once a machine.

    An error that nobody foresaw keeps its traceback.
    """
    try:
        action()
    except PeftkitError as error:
        _tell(_message(error))
        return error.exit_code
    except KeyboardInterrupt:
        _tell("interrupted; nothing half-written is left, and the same command goes on from the last checkpoint")
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of our output has gone; flushing at exit would complain a second time
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _tell(f"error: no space left on the disk that holds {error.filename or 'the output'}; free some and run again")
        return 1
    return 0


def say(line: str = "") -> None:
    """Print a line of results; only the first process does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _message(error: PeftkitError) -> str:
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        return "\n".join([f"error: {len(error.problems)} problems", *(f"  {one}" for one in error.problems)])
    return f"error: {error}"


def _tell(message: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)
