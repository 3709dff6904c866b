"""What advice is given on: a configuration, its data without test, and the runs that can be made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.bench.advice.candidates import Candidates, candidates, names
from peftkit.bench.advice.schedule import Trial
from peftkit.bench.sample import fewer
from peftkit.bench.source import source_sha256
from peftkit.bench.store import Key
from peftkit.bench.worker import Job
from peftkit.config import OutputSettings, Run, TrainingSettings, run_id
from peftkit.data.mix import missing_files
from peftkit.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEV_ROWS = 1000
"""The most that are scored in each run: the score of so many is good to 2 or 3 points, and more take long to answer."""


@dataclass(frozen=True)
class Subject:
    """Everything that stays the same while advice is sought."""

    name: str
    """Of the configuration."""
    run: Run
    candidates: Candidates
    steps: int
    """Of the configuration's own training."""
    train_rows: int
    dev_rows: int
    """That are scored."""
    majority: float | None
    """The score on dev of the answer that ignores the input."""
    fingerprint: str
    """Of the encoded data."""
    notes: tuple[str, ...]
    """What was done to the data."""

    @property
    def rates(self) -> Mapping[str, Sequence[float]]:
        """Learning rates of each method, in the order of trial."""
        return {name: one.rates for name, one in self.candidates.chosen.items()}

    @property
    def id(self) -> str:
        """Names what is asked and all that the answer depends on, but for the time that is given to it."""
        from peftkit.environment import versions

        methods = {name: one.method.model_dump(mode="json") for name, one in self.candidates.chosen.items()}
        named = [run_id(self.run), methods, dict(self.rates), self.dev_rows, self.fingerprint, source_sha256()]
        return hashlib.sha256(json.dumps([named, versions()], sort_keys=True).encode()).hexdigest()[:12]

    def run_of(self, trial: Trial) -> Run:
        """The configuration's run with the arm's method and rate: trained for fewer steps, and scored at their end."""
        method = self.candidates.chosen[trial.arm.method].method
        training = _shortened(self.run.training, trial, self.run.training.warmup(self.steps) / self.steps)
        return self.run.model_copy(update={"method": method, "training": training, "output": OutputSettings()})

    def job(self, trial: Trial, folder: Path) -> Job:
        """What a worker is to do for a trial."""
        run = self.run_of(trial)
        key = Key(
            grid="advise",
            backbone=run.backbone.name,
            data=self.name,
            method=trial.arm.method,
            budget="all",
            phase="trial",
            seed=trial.seed,
            learning_rate=trial.arm.learning_rate,
        )
        named = json.dumps([run_id(run), self.dev_rows, trial.last])
        name = hashlib.sha256(named.encode()).hexdigest()[:16]
        return Job(id=name, key=key, run=run, folder=str(folder), dev_rows=self.dev_rows, answers=trial.last)


def subject_of(name: str, run: Run, asked: Sequence[str]) -> Subject:
    """What there is to advise on.

    Args:
        name: of the configuration.
        asked: methods to compare; none for the usual ones.

    Raises:
        UsageError: an unknown method, fewer than two that can be tried, a configuration that trains nothing or starts
            from another run, or data without what training takes.
        DataError: rows that would make the runs worthless.
    """
    from peftkit.artifacts.loading import merge_backbone
    from peftkit.evaluation import baselines
    from peftkit.prepare import prepare

    if not run.method.trains:
        raise UsageError(
            f"method '{run.method.kind}' trains nothing, and what is compared are trainings: name a method that does, "
            "such as method='{kind: lora}' training.learning_rate=1e-3"
        )
    wanted = names(run, asked)
    if run.method.start_from is not None:
        raise UsageError("method.start_from is set, and methods are compared from the untouched backbone; leave it out")
    if missing := missing_files(run.task.data):
        raise ConfigError(missing)
    merge_backbone(run)
    splits = run.task.splits()
    dev = fewer(splits.dev, DEV_ROWS)
    data = prepare(run, replace(splits, dev=dev, test=None))
    steps = run.training.total_steps(len(data.train.encoded))
    majority = baselines(run.task, data.train, data.dev)
    notes = [note for note in data.notes if not note.startswith("no test split")]
    if len(dev) < len(splits.dev):
        notes.append(f"dev: {len(dev):,} of {len(splits.dev):,} rows, drawn once, are scored")
    return Subject(
        name=name,
        run=run,
        candidates=candidates(run, data, wanted, steps),
        steps=steps,
        train_rows=len(data.train),
        dev_rows=len(dev),
        majority=majority["majority"].scores.value if majority else None,
        fingerprint=data.fingerprint,
        notes=tuple(notes),
    )


def _shortened(training: TrainingSettings, trial: Trial, warmup: float) -> TrainingSettings:
    changes = {
        "learning_rate": trial.arm.learning_rate,
        "seed": trial.seed,
        "max_steps": trial.steps,
        "evaluate_every": trial.steps,
        "checkpoint_every": "evaluation",
        "early_stopping_patience": None,
        "keep_best": False,
        "warmup_steps": None,
        "warmup_ratio": warmup,
    }
    return training.model_copy(update=changes)
