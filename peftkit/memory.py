"""What this process holds in memory, and the most it has held since a moment that can be chosen."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

CLEAR = Path("/proc/self/clear_refs")
CGROUP = Path("/sys/fs/cgroup")
GROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Files of the limit and of what is used, of the second and of the first version of control groups."""
MAPPED = 2**20
"""From this size on, blocks have pages of their own after `give_back_freed_blocks`."""
RESET_PEAK = "5"
"""What Linux takes, from 4.0 on, as the wish to set the peak back to what is resident now (proc(5))."""


def resident_bytes() -> int:
    """What is resident now; where the system does not tell, the most that ever was."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most that was resident since the process began, or since `reset_peak`."""
    if peak := _status("VmHWM"):
        return peak
    # macOS counts in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Let the peak be counted from now on, where the system allows it; elsewhere it stays that of the whole process."""
    with contextlib.suppress(OSError):
        CLEAR.write_text(RESET_PEAK, encoding="ascii")


def give_back_freed_blocks() -> bool:
    """Let glibc map every block of `MAPPED` bytes and more by itself, for all of this process's life; False where the C
    library is another."""
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # M_MMAP_THRESHOLD, and M_MMAP_MAX, beyond which blocks come from the heap after all (mallopt(3))
    return bool(mallopt(-3, MAPPED)) and bool(mallopt(-4, 2**20))


def available_bytes() -> int:
    """What a process can still take: the least of what the machine has free and what its control groups leave."""
    free = _entry(Path("/proc/meminfo"), "MemAvailable") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *_left_by_groups()])


def _left_by_groups() -> list[int]:
    found = []
    for limit, used in GROUPS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number, and means no limit
            found.append(int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text()))
    return [one for one in found if one > 0]


def _status(name: str) -> int | None:
    return _entry(Path("/proc/self/status"), name)


def _entry(file: Path, name: str) -> int | None:
    """A figure that Linux tells in KiB, in bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in file.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
