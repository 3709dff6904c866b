"""A worker that ends when the process that started it has ended, so that nothing computes for nobody.

python -m peftkit.bench.tethered PARENT < JOB
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from peftkit.bench import worker
from peftkit.console import guard

EVERY = 0.5
"""Seconds between two looks."""


def main() -> None:
    """Do the job of standard input for as long as the process of that number is this one's parent."""
    tether(int(sys.argv[1]))
    worker.main()


def tether(parent: int) -> None:
    """End this process once that of that number is no more its parent."""
    threading.Thread(target=_end_without, args=(parent,), daemon=True).start()


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(guard(main))
