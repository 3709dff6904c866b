"""Makes the runs of a comparison in miniature, rung by rung, within its time; stopped, it goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from math import ceil
from pathlib import Path
from statistics import fmean

from pydantic import Field, ValidationError

from peftkit.bench.advice.prices import Prices, Timed
from peftkit.bench.advice.schedule import (
    Arm,
    Limits,
    Outcome,
    Plan,
    Results,
    Rung,
    Trial,
    least_seconds,
    next_plan,
)
from peftkit.bench.advice.subject import Subject
from peftkit.bench.launch import run_jobs
from peftkit.bench.processes import Processes
from peftkit.bench.store import Record, Store
from peftkit.bench.worker import Job
from peftkit.disk import write_text
from peftkit.errors import PeftkitError, UsageError
from peftkit.schema import Section

STATE = "advice.json"
CALIBRATION_STEPS = 4
CALIBRATED = 2
"""Methods whose speed is measured before anything is planned."""
RESERVE, MOST_RESERVE = 0.05, 20.0
"""Share of the budget that is left for the statement at the end, and the most seconds of it."""


class State(Section):
    """What has been decided, and what it took; everything else is in the records."""

    spent: float = 0.0
    """Seconds of all calls so far."""
    calibration: Rung | None = None
    rungs: tuple[Rung, ...] = ()
    seconds: dict[str, float] = Field(default_factory=dict)
    """Of each run's process, by the run's id."""


class Conduct:
    """One call: from what is there to as much more as the time allows."""

    def __init__(
        self, subject: Subject, folder: Path, budget: float, began: float, workers: int, say: Callable[[str], object]
    ) -> None:
        """
        Args:
            budget: seconds for all calls on this folder together.
            began: when this call started, as `time.monotonic` counts.
        """
        self.subject, self.store, self.budget, self.workers, self.say = subject, Store(folder), budget, workers, say
        self.state = _read(folder / STATE)
        self._before, self._began = self.state.spent, began
        self._jobs: dict[Trial, Job] = {}
        self.records = {record.id: record for record in self.store.records()}

    @property
    def spent(self) -> float:
        """Seconds of all calls, this one included."""
        return self._before + time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds for runs."""
        return self.budget - self._reserve - self.spent

    @property
    def _reserve(self) -> float:
        return min(RESERVE * self.budget, MOST_RESERVE)

    def run(self) -> None:
        """Make runs until all is done or the time is up.

        Raises:
            UsageError: the time is too short for any comparison; says how much would do.
            PeftkitError: no run came to a good end, or a result could not be kept.
        """
        engine = Processes(self.workers, self.say)
        for record in self.records.values():
            engine.learn(record)
        deadline = time.monotonic() + self.left
        begun = self.state.rungs[-1].trials if self.state.rungs else ()
        if left := [trial for trial in begun if self.record(trial) is None]:
            self.say(f"going on with {len(left)} of {len(begun)} runs of {left[0].steps:,} steps")
        try:
            run_jobs(self._pending, self.store, engine, self._told, deadline=deadline)
        finally:
            engine.close()
            self._keep()
        if not self.state.rungs:
            raise UsageError(self._too_short())

    def job(self, trial: Trial) -> Job:
        """What a worker is to do for a trial."""
        found = self._jobs.get(trial)
        return found or self._jobs.setdefault(trial, self.subject.job(trial, self.store.folder))

    def record(self, trial: Trial) -> Record | None:
        """What came of a trial, if it has come to an end."""
        return self.records.get(self.job(trial).id)

    def is_complete(self, rung: Rung) -> bool:
        """Whether every run of a rung has come to an end."""
        return all(self.record(trial) for trial in rung.trials)

    def ended(self, arm: Arm) -> list[Trial]:
        """The runs of an arm that have come to an end, in the order of the rungs."""
        return [one for rung in self.state.rungs for one in rung.trials if one.arm == arm and self.record(one)]

    def mean(self, rung: Rung, arm: Arm) -> float | None:
        """The mean score of an arm on dev in a rung; None without any."""
        scores = [
            found.dev.value for one in rung.trials if one.arm == arm and (found := self.record(one)) and found.dev
        ]
        return fmean(scores) if scores else None

    @property
    def headline(self) -> str:
        """The name of the score on dev."""
        return next((record.dev.headline for record in self.records.values() if record.dev), "")

    @property
    def lower_is_better(self) -> bool:
        """Of the score."""
        return any(record.dev.lower_is_better for record in self.records.values() if record.dev)

    def results(self) -> Results:
        """What the scheduler takes from the runs that have come to an end."""
        trials = [trial for rung in self.state.rungs for trial in rung.trials]
        return {trial: outcome(record) for trial in trials if (record := self.record(trial))}

    def _pending(self) -> list[Job]:
        if self.state.calibration is None:
            self._keep(calibration=self._calibration())
        while True:
            rung = self.state.rungs[-1] if self.state.rungs else self.state.calibration
            assert rung is not None
            todo = [trial for trial in rung.trials if self.record(trial) is None]
            if todo:
                return [self.job(trial) for trial in takewhile(self._fits, todo)]
            plan = self._plan()
            if plan is None:
                return []
            self._keep(rungs=(*self.state.rungs, plan.rung))
            self.say(announced(plan, self.left))

    def _plan(self) -> Plan | None:
        prices = Prices.of(self._timed())
        if prices is None:
            self._refuse_failures()
            return None
        return next_plan(self._rates(), self.state.rungs, self.results(), prices, self._limits())

    def _rates(self) -> dict[str, Sequence[float]]:
        """Of the methods that did not fail as soon as they were tried."""
        calibration = self.state.calibration.trials if self.state.calibration else ()
        failed = {one.arm.method for one in calibration if (found := self.record(one)) and found.status != "finished"}
        return {name: rates for name, rates in self.subject.rates.items() if name not in failed}

    def _limits(self) -> Limits:
        least = max(one.least_steps for one in self.subject.candidates.chosen.values())
        return Limits(self.left, self.workers, least, self.subject.steps)

    def _calibration(self) -> Rung:
        """A few steps of the dearest and of the configuration's own method."""
        chosen = self.subject.candidates.chosen
        order = dict.fromkeys(["full", self.subject.candidates.own, *chosen])
        steps = min(CALIBRATION_STEPS, self.subject.steps)
        able = [chosen[name] for name in order if name in chosen and chosen[name].least_steps <= steps]
        if not able:
            able = [min(chosen.values(), key=lambda one: one.least_steps)]
            steps = able[0].least_steps
        arms = [Arm(method=one.name, learning_rate=one.rates[0]) for one in able[:CALIBRATED]]
        return Rung(steps=steps, arms=tuple(arms), last=True)

    def _fits(self, trial: Trial) -> bool:
        """Whether a run can still come to an end in time, as far as that is known."""
        prices = Prices.of(self._timed())
        return prices is None or prices.seconds(trial.arm.method, trial.steps, trial.last) <= self.left

    def _timed(self) -> Iterator[Timed]:
        calibration = [self.state.calibration] if self.state.calibration else []
        for trial in (trial for rung in (*calibration, *self.state.rungs) for trial in rung.trials):
            record = self.record(trial)
            seconds = self.state.seconds.get(self.job(trial).id)
            if record is not None and record.cost is not None and seconds is not None:
                cost = record.cost
                yield Timed(trial.arm.method, cost.steps, seconds, cost.seconds, cost.evaluation_seconds or 0.0)

    def _told(self, record: Record, seconds: float) -> None:
        self.records[record.id] = record
        self._keep(seconds=self.state.seconds | {record.id: seconds})
        key, steps = record.key, record.run["training"]["max_steps"]
        score = f"dev {record.dev.headline} {record.dev.value:.4f}" if record.dev else f"{failure(record)}"
        self.say(
            f"{key.method} at {key.learning_rate:g}, {steps:,} steps, seed {key.seed}: {score}, {seconds:.0f} s; "
            f"{max(0.0, self.left) / 60:.1f} minutes left"
        )

    def _keep(self, **changes: object) -> None:
        self.state = self.state.model_copy(update={"spent": self.spent, **changes})
        write_text(self.store.folder / STATE, self.state.model_dump_json(indent=1) + "\n")

    def _too_short(self) -> str:
        told = f"{self.budget / 60:g} minutes are too few here"
        prices = Prices.of(self._timed())
        if prices is None:
            return (
                f"--budget-minutes: {told}: not even a first run of {CALIBRATION_STEPS} steps came to its end, so "
                "nothing tells what would do; give several times as many minutes"
            )
        needed = self.spent + self._reserve + least_seconds(self._rates(), prices, self._limits())
        count = len(self._rates())
        return (
            f"--budget-minutes: {told}: to compare {count} methods takes about {ceil(needed / 60)} at least, as a few "
            "steps of some have shown; give so many, or fewer methods with --method"
        )

    def _refuse_failures(self) -> None:
        failed = [record for record in self.records.values() if record.status != "finished"]
        if failed:
            raise PeftkitError(f"no method could be run; {failed[0].key.method} {failure(failed[0])}")


def announced(plan: Plan, left: float) -> str:
    """What is going to be done, and about how long that takes."""
    parts = [f"{size} runs of {steps:,} steps" for size, steps in zip(plan.sizes[:-1], plan.steps[:-1], strict=True)]
    once = f" with seed {plan.rung.seeds[0]}" if plan.rung.last else ""
    seeds = f" × {plan.seeds} seeds" if plan.seeds > 1 else once
    parts.append(f"{plan.sizes[-1]} methods{seeds} of {plan.steps[-1]:,} steps")
    return f"next: {', then '.join(parts)}; about {plan.seconds / 60:.1f} of {left / 60:.1f} minutes that are left"


def outcome(record: Record) -> Outcome:
    """What the scheduler takes from a record."""
    if record.status != "finished" or record.dev is None:
        return Outcome(None)
    value = -record.dev.value if record.dev.lower_is_better else record.dev.value
    return Outcome(value, record.losses[-1][1] if record.losses else 0.0)


def failure(record: Record) -> str:
    """What became of a run that did not come to a good end, in one line."""
    reason = (record.error or "without a word").strip().splitlines()[-1]
    return f"{'ran out of memory' if record.status == 'out_of_memory' else 'failed'}: {reason}"


def _read(file: Path) -> State:
    try:
        return State.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return State()
    except ValidationError as error:
        raise UsageError(f"{file}: damaged; remove it, and the runs beside it are used again") from error
