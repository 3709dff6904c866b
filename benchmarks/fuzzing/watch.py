"""The end of an examination: an error that peftkit raises on purpose, or a finding."""

from __future__ import annotations

import contextlib
import io
import signal
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from peftkit.memory import peak_resident_bytes

SECONDS = 10.0
"""Of processor time, which other work on the machine does not add to."""
WAITING = 6.0
"""How many times as long one may wait without using the processor, as for a pipe."""
GROWTH = 2**30
"""Bytes that one input may add to the peak of resident memory."""


class Finding(BaseException):
    """Something else than a result or an error that was meant. No Exception, so that nobody who catches those hides
    it."""


@contextlib.contextmanager
def watched(seconds: float = SECONDS, growth: int = GROWTH) -> Iterator[None]:
    """Look after time and memory while one input is examined.

    Raises:
        Finding: it took longer, or its peak was higher.
    """
    before, busy, start = peak_resident_bytes(), time.process_time(), time.monotonic()

    def look(number: int, frame: FrameType | None) -> None:
        if time.process_time() - busy > seconds or time.monotonic() - start > WAITING * seconds:
            raise Finding(f"longer than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, look)
    # again and again: what is raised inside of a callback is lost
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds, seconds / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, delay, interval)
        signal.signal(signal.SIGALRM, handler)
    if time.process_time() - busy > seconds:
        raise Finding(f"longer than {seconds:g} s")
    if (grown := peak_resident_bytes() - before) > growth:
        raise Finding(f"memory grew by {grown / 2**30:.1f} GiB")


def told(arguments: Sequence[str]) -> int:
    """Call the command line as a person would; returns its exit code.

    Raises:
        Finding: no code that the command line knows, or a failure without a word.
    """
    from peftkit.cli import main

    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main(list(arguments))
    said = error.getvalue()
    if code not in (0, 1, 2) or (code and not said.strip().startswith("error: ")) or "Traceback" in said:
        raise Finding(f"exit code {code} and {said[:200]!r}")
    if len(said) > 100_000:
        raise Finding(f"an error of {len(said):,} characters")
    said.encode()
    return code
