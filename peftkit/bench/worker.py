"""One run of a grid in a process of its own: train, score, merge, see what was forgotten, and keep all that.

    python -m peftkit.bench.worker < JOB

A job is the JSON of a `Job`. The run's own folder is temporary; what is kept goes to the folder of results.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from peftkit.bench.probes import Probes, probe_of
from peftkit.bench.sample import fewer, sampled
from peftkit.bench.scoring import (
    answers_of,
    majority_score,
    merged_scores,
    other_split,
    score_of,
    score_of_changed,
    untuned_score,
)
from peftkit.bench.source import source_sha256
from peftkit.bench.store import Answers, Cost, Key, Record, Score, Store
from peftkit.config import Run, in_folder
from peftkit.console import guard
from peftkit.data.augment import AnyAugmentation
from peftkit.data.mix import AnyData
from peftkit.errors import PeftkitError
from peftkit.schema import Section

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from peftkit.backbones.load import Backbone
    from peftkit.bench.probe import Forgotten
    from peftkit.bench.shared import Shared
    from peftkit.data.sources import Splits
    from peftkit.prepare import Prepared
    from peftkit.training.record import TrainRecord

LOSS = "loss"
"""The one headline of which less is better."""
CURVE = 100
"""Points of a learning curve that are kept."""


class Job(Section):
    """What a worker is to do."""

    id: str
    key: Key
    run: Run
    folder: str
    """Of results."""
    probe: Probes | None = None
    robustness: tuple[AnyAugmentation, ...] = ()
    elsewhere: dict[str, AnyData] = Field(default_factory=dict)
    dev_rows: int | None = None
    """The most rows of dev that a trial is scored on."""
    answers: bool = False
    """Keep what a trial answers on dev."""


def main() -> None:
    """Do the job that standard input describes."""
    make(Job.model_validate_json(sys.stdin.read()))


def make(job: Job, shared: Shared | None = None) -> None:
    """Do a job and keep what came of it, unless somebody else has done it meanwhile.

    Args:
        shared: what this process and others have of data and weights already.
    """
    from filelock import FileLock

    store = Store(Path(job.folder))
    locks = store.folder / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / job.id):
        if store.find(job.id) is None:
            store.add(*outcome(job, shared))
    (locks / job.id).unlink(missing_ok=True)


def outcome(job: Job, shared: Shared | None = None) -> tuple[Record, Answers | None]:
    """What came of a job; errors that say what is wrong with it are an outcome too."""
    from peftkit.environment import describe
    from peftkit.training.shortage import is_shortage

    known: dict[str, Any] = {
        "id": job.id,
        "key": job.key,
        "run": job.run.model_dump(mode="json"),
        "code": source_sha256(),
        "environment": describe(),
    }
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _done(job, in_folder(job.run, str(Path(folder) / "run")), known, shared)
    except (PeftkitError, RuntimeError, MemoryError) as error:
        short = is_shortage(error) or (error.__cause__ is not None and is_shortage(error.__cause__))
        told = {"status": "out_of_memory" if short else "failed", "error": f"{type(error).__name__}: {error}"}
        return Record(**known, **told), None


def _done(job: Job, run: Run, known: dict[str, Any], shared: Shared | None) -> tuple[Record, Answers | None]:
    from peftkit.artifacts.store import save, saved_parameters
    from peftkit.backbones.load import load
    from peftkit.demonstrations import lacking, with_demonstrations
    from peftkit.evaluation import evaluate
    from peftkit.methods.base import inside, numel, trained_parameters
    from peftkit.prepare import prepare, require_fit
    from peftkit.session import start
    from peftkit.training.loop import train

    if data := shared.data(job) if shared else None:
        accelerator = start(run)
        require_fit(run, data)
    else:
        splits = rows_of(job)
        if lacking(run):
            run = with_demonstrations(run, splits)
        accelerator = start(run)
        data = prepare(run, splits)
    backbone = load(run.backbone, data.head)
    if shared:
        shared.lend_weights(backbone.model)
    final, figure = job.key.phase == "final", job.key.score
    others = {name: other_split(name, one, run, data) for name, one in job.elsewhere.items()} if final else {}
    forgotten = _probe(job, run, backbone, accelerator) if final else None
    untuned = untuned_score(run, data, backbone, accelerator, figure) if final else None
    model = run.method.attach(backbone, total_steps=run.training.total_steps(len(data.train.encoded)))
    record = train(model, run, data, accelerator)
    heads = [one for name, one in trained_parameters(model).items() if inside(name, backbone.head_modules)]
    known |= _trained(run, record, data) | {
        "head_parameters": sum(map(numel, heads)),
        "untuned": untuned,
    }
    if not final:
        cost, answers = _tried(job, run, model, data, record, accelerator)
        return Record(**known, status="finished", cost=cost), answers
    before = time.perf_counter()
    after = evaluate(model, run.task, data.test, accelerator)
    seconds = time.perf_counter() - before
    folder = save(run, data, backbone, model, record, {"after": after}, accelerator)
    artifact = folder / run.method.artifact
    known |= {
        "cost": _cost(record, seconds, len(data.test)),
        "test": score_of(after, figure),
        "majority": majority_score(run, data, figure),
        "artifact_bytes": sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file()),
        "saved_parameters": saved_parameters(artifact),
        "robustness": {
            one.kind: score_of_changed(one, run, data, model, accelerator, figure) for one in job.robustness
        },
        "elsewhere": {
            name: score_of(evaluate(model, run.task, split, accelerator), figure) for name, split in others.items()
        },
        "forgetting": forgotten(model) if forgotten else None,
    }
    known |= merged_scores(run, folder, data, after, accelerator, figure)
    return Record(**known, status="finished"), answers_of(run.task, data.test, after, figure)


def _tried(
    job: Job, run: Run, model: nn.Module, data: Prepared, record: TrainRecord, accelerator: Accelerator
) -> tuple[Cost, Answers | None]:
    """What a trial took, and what it answers on dev where that is asked for."""
    from peftkit.evaluation import evaluate

    if not job.answers:
        return _cost(record), None
    task, before = run.task.while_training(), time.perf_counter()
    found = evaluate(model, task, data.dev, accelerator)
    seconds = time.perf_counter() - before
    return _cost(record, seconds, len(data.dev)), answers_of(task, data.dev, found)


def rows_of(job: Job) -> Splits:
    """Without test for a trial, which must not read it; with as many rows of train as the budget says."""
    task = job.run.task
    splits = task.splits()
    if job.key.budget != "all":
        train = sampled(splits.train, int(job.key.budget), task.label_column(), job.key.seed)
        splits = replace(splits, train=train)
    if job.key.phase == "final":
        return splits
    return replace(splits, dev=fewer(splits.dev, job.dev_rows), test=None)


def _trained(run: Run, record: TrainRecord, data: Prepared) -> dict[str, Any]:
    headline = run.task.while_training().headline
    curve = [(int(one["step"]), float(one[f"dev_{headline}"])) for one in record.evaluations]
    kept = dict(curve).get(record.best_step)
    lower = headline == LOSS
    return {
        "dev": Score(headline=headline, value=kept, lower_is_better=lower) if kept is not None else None,
        "best_step": record.best_step,
        "curve": tuple(curve),
        "losses": _thinned(record.losses),
        "trainable_parameters": record.trainable_parameters,
        "total_parameters": record.total_parameters,
        "notes": data.notes,
        "data_sha256": data.fingerprint,
    }


def _thinned(losses: tuple[float, ...]) -> tuple[tuple[int, float], ...]:
    size = max(1, -(-len(losses) // CURVE))
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    return tuple((min(len(losses), (index + 1) * size), sum(part) / len(part)) for index, part in enumerate(parts))


def _cost(record: TrainRecord, evaluation_seconds: float | None = None, rows: int | None = None) -> Cost:
    return Cost(
        seconds=record.seconds,
        steps=record.steps,
        tokens=record.tokens,
        tokens_per_second=record.tokens_per_second,
        evaluation_seconds=evaluation_seconds,
        evaluation_rows=rows,
        peak_memory_bytes=record.peak_memory_bytes,
        memory_growth_bytes=record.memory_growth_bytes,
    )


def _probe(job: Job, run: Run, backbone: Backbone, accelerator: Accelerator) -> Forgotten | None:
    settings = probe_of(job.probe, run.task)
    if settings is None:
        return None
    from peftkit.bench.probe import probed

    return probed(settings, run, backbone, accelerator, Path(job.folder) / "probes")


if __name__ == "__main__":
    sys.exit(guard(main))
