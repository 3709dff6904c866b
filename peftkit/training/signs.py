"""The signs of life that the processes of a job give each other, and who of them holds up the job.

A process has **fallen silent** where its signs stop: for `SILENT` seconds where the system says that it is stopped, for
`DISTANT` on another machine. It is **stuck** where others have come further and wait, and it has made no progress for
`STUCK` seconds and `GENEROUS` times the longest that any process ever took for such a piece of work. Only what all
processes do alike is measured so: training, predicting, scoring. What one does for all, such as saving, may take as
long as it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

SILENT = 15.0
DISTANT = 40.0
STUCK = 40.0
GENEROUS = 5.0


@dataclass
class Signs:
    """What one process tells the others."""

    rank: int
    pid: int
    host: str
    launcher: int
    """The process id of its launcher: a sibling has the same, on the same host."""
    beats: int = 0
    rounds: int = 0
    """Collective operations that it has come to."""
    steps: int = 0
    """Pieces of work that it has begun since, and rests."""
    doing: str = "starting"
    detail: str = ""
    idle: float = 0.0
    """Seconds since it last made progress; 0 while its progress is not measured."""
    at: str = ""
    """The line that it stands at, where it has stood for a while."""
    longest: dict[str, float] = field(default_factory=dict)
    """Seconds that its longest piece of each kind of work took."""
    done: bool = False

    @property
    def name(self) -> str:
        return f"process {self.rank} (pid {self.pid} on {self.host})"

    @property
    def work(self) -> str:
        return f"{self.doing} ({self.detail})" if self.detail else self.doing


@dataclass(frozen=True)
class Seen:
    """The signs of a process, and when they last changed."""

    signs: Signs
    since: float


def find(own: Signs, seen: dict[int, Seen], now: float) -> Iterator[tuple[int, str]]:
    """The processes that hold up the job, each with what is wrong with it."""
    for rank, one in seen.items():
        if not one.signs.done and (reason := _silent(own, one, now) or _stuck(one, seen, now)):
            yield rank, reason


def _silent(own: Signs, one: Seen, now: float) -> str:
    silence, signs = now - one.since, one.signs
    near = are_siblings(signs, own)
    if silence < (SILENT if near else DISTANT) or (near and _is_running(signs.pid)):
        return ""
    return f"{signs.name} has fallen silent for {silence:.0f} s; its last work was {signs.work}"


def _stuck(one: Seen, seen: dict[int, Seen], now: float) -> str:
    signs, idle = one.signs, _idle(one, now)
    longest = max(other.signs.longest.get(signs.doing, 0.0) for other in seen.values())
    if idle < max(STUCK, GENEROUS * longest) or not any(_waits_for(signs, other, now) for other in seen.values()):
        return ""
    place = f", at {signs.at}" if signs.at else ""
    return (
        f"{signs.name} has made no progress for {idle:.0f} s, while the others wait for it; "
        f"its last work was {signs.work}{place}"
    )


def _idle(one: Seen, now: float) -> float:
    return one.signs.idle + now - one.since if one.signs.idle else 0.0


def _waits_for(signs: Signs, other: Seen, now: float) -> bool:
    """Whether a process has come to a collective operation before this one, has all its measured work behind it, or
    stands still inside a later piece, as where weights are gathered in the forward pass."""
    if other.signs.rounds != signs.rounds:
        return other.signs.rounds > signs.rounds
    return other.signs.steps > signs.steps and (not other.signs.idle or _idle(other, now) > STUCK / 2)


def are_siblings(one: Signs, other: Signs) -> bool:
    return (one.host, one.launcher) == (other.host, other.launcher)


def _is_running(pid: int) -> bool:
    """Whether a process of this machine gets its turns: one that only keeps Python to itself is not silent."""
    import psutil

    try:
        return psutil.Process(pid).status() not in (
            psutil.STATUS_STOPPED,
            psutil.STATUS_TRACING_STOP,
            psutil.STATUS_ZOMBIE,
            psutil.STATUS_DEAD,
        )
    except psutil.Error:
        return False
