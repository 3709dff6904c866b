"""The watch that processes keep on each other: who is accused of holding up a job, and above all who is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from torch.distributed import HashStore

from peftkit.training import watch
from peftkit.training.signs import DISTANT, GENEROUS, SILENT, STUCK, Seen, Signs, find

NOW = 10_000.0


def signs(rank: int, **values: Any) -> Signs:
    """Of a process that is this one, as far as the system knows."""
    return Signs(**({"rank": rank, "pid": os.getpid(), "host": "here", "launcher": 1} | values))


def accused(*processes: Signs, silence: float = 0.0) -> dict[int, str]:
    """Whom process 0 accuses when it last heard of the others `silence` seconds ago."""
    seen = {one.rank: Seen(one, NOW - (silence if one.rank else 0.0)) for one in processes}
    return dict(find(processes[0], seen, NOW))


def behind(idle: float, **values: Any) -> Signs:
    return signs(1, rounds=4, idle=idle, doing="training", detail="step 5", **values)


WAITING = signs(0, rounds=5, doing="training", longest={"training": 0.5})


def test_a_process_that_the_others_wait_for_is_stuck_after_a_while() -> None:
    assert not accused(WAITING, behind(STUCK - 1))
    (reason,) = accused(WAITING, behind(STUCK + 1, at="hook.py:3")).values()
    assert reason.startswith(f"process 1 (pid {os.getpid()} on here) has made no progress for 41 s")
    assert reason.endswith("its last work was training (step 5), at hook.py:3")


def test_work_that_takes_all_processes_long_is_given_longer() -> None:
    slow = signs(0, rounds=5, longest={"training": 20.0, "scoring": 1.0})
    assert not accused(slow, behind(GENEROUS * 20 - 1))
    assert list(accused(slow, behind(GENEROUS * 20 + 1))) == [1]
    hasty = signs(0, rounds=5, longest={"scoring": 20.0})
    assert list(accused(hasty, behind(STUCK + 1))) == [1]


def test_nobody_is_accused_while_nobody_is_ahead() -> None:
    together = signs(0, rounds=4, idle=3000.0, doing="training")
    assert not accused(together, behind(3000.0))


def test_long_work_of_one_process_for_all_is_no_hang() -> None:
    saving = signs(1, rounds=4, idle=0.0, doing="after a step")
    assert not accused(WAITING, saving)
    pace = watch.Pace()
    pace.beat("training")
    pace.rest("after a step")
    time.sleep(0.01)
    assert pace.idle() == 0.0


def test_where_weights_are_gathered_in_a_forward_pass_others_wait_inside_their_work() -> None:
    stuck = behind(STUCK + 1, steps=2)
    working = signs(0, rounds=4, steps=3, idle=1.0, doing="training")
    waiting = signs(0, rounds=4, steps=3, idle=STUCK, doing="training")
    past_all_of_it = signs(0, rounds=4, steps=3, idle=0.0, doing="after scoring")
    assert not accused(working, stuck)
    assert list(accused(waiting, stuck)) == list(accused(past_all_of_it, stuck)) == [1]


def test_a_busy_process_of_this_machine_is_not_silent_and_one_of_another_is_after_longer() -> None:
    assert not accused(signs(0), signs(1), silence=1000.0)
    assert not accused(signs(0), signs(1, host="there"), silence=DISTANT - 1)
    assert list(accused(signs(0), signs(1, host="there"), silence=DISTANT + 1)) == [1]
    assert not accused(signs(0), signs(1, host="there", done=True), silence=1000.0)


@pytest.fixture
def stopped() -> Iterator[int]:
    """The id of a process that does not get its turns."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        process.send_signal(signal.SIGSTOP)
        limit = time.monotonic() + 10
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED and time.monotonic() < limit:
            time.sleep(0.01)
        yield process.pid
        process.kill()


def test_a_stopped_process_of_this_machine_is_silent(stopped: int) -> None:
    assert not accused(signs(0), signs(1, pid=stopped), silence=SILENT - 1)
    (reason,) = accused(signs(0), signs(1, pid=stopped, doing="scoring", detail="dev"), silence=SILENT + 1).values()
    assert reason == f"process 1 (pid {stopped} on here) has fallen silent for 16 s; its last work was scoring (dev)"


def test_watches_read_each_others_signs() -> None:
    store = HashStore()
    first, second = (watch.Watch(store, rank, 2) for rank in range(2))
    second.pace.beat("training", "step 1")
    second.pace.arrive()
    second.pace.beat("scoring", "dev")
    for one in (first, second, first):
        one._exchange()
    seen = first._seen[1].signs
    assert (seen.rounds, seen.steps, seen.doing, seen.detail) == (1, 1, "scoring", "dev")
    assert seen.idle > 0
    assert list(seen.longest) == ["training"]
    assert first._seen[0].signs.beats == 2


def test_a_store_that_is_gone_is_no_error() -> None:
    def gone(*_: Any) -> None:
        raise RuntimeError("Connection reset by peer")

    one = watch.Watch(SimpleNamespace(set=gone), 0, 2)
    one._exchange()
    assert one._seen == {}


def test_a_single_process_has_no_watch() -> None:
    threads = threading.active_count()
    pace = watch.start(SimpleNamespace(num_processes=1, process_index=0))  # type: ignore[arg-type]
    pace.beat("training")
    assert threading.active_count() == threads


def test_a_watch_that_had_no_turn_itself_accuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the whole job was suspended."""
    one = watch.Watch(HashStore(), 0, 2)
    told: list[Any] = []
    monkeypatch.setattr(one, "_end_job", lambda accused: told.append(accused))
    monkeypatch.setattr(watch, "INTERVAL", 0.0)
    clock = iter([0.0, 1000.0, 1000.0 + DISTANT - 1])
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(clock))
    turns = iter([False, False, True])
    one._ended = SimpleNamespace(wait=lambda _: next(turns))  # type: ignore[assignment]
    one._seen = {0: Seen(signs(0), 0.0), 1: Seen(signs(1, host="there"), 0.0)}
    one._look_out()
    assert told == []
