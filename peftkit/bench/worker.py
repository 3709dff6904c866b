"""One run of a grid in a process of its own: train, score, merge, see what was forgotten, and keep all that.

    python -m peftkit.bench.worker < JOB

A job is the JSON of a `Job`. The run's own folder is temporary; what is kept goes to the folder of results.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.bench.probes import Probes, probe_of
from peftkit.bench.sample import sampled
from peftkit.bench.source import source_sha256
from peftkit.bench.store import Answers, Cost, Key, Record, Score, Store
from peftkit.config import Run, in_folder
from peftkit.console import guard
from peftkit.data.augment import AnyAugmentation, changed_rows
from peftkit.errors import NotMergeable, PeftkitError, TrainingError
from peftkit.schema import Section
from peftkit.tasks.prompted import Prompted

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from peftkit.backbones.load import Backbone
    from peftkit.bench.probe import Forgotten
    from peftkit.data.sources import Splits
    from peftkit.evaluation import Evaluation
    from peftkit.prepare import Prepared
    from peftkit.training.record import TrainRecord

LOSS = "loss"
"""The one headline of which less is better."""
ANSWER = ("label", "labels", "tags", "text")
"""What of a prediction is an answer; the rest says how certain it is."""
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


def main() -> None:
    """Do the job that standard input describes, unless somebody else has done it meanwhile."""
    from filelock import FileLock

    job = Job.model_validate_json(sys.stdin.read())
    store = Store(Path(job.folder))
    locks = store.folder / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / job.id):
        if store.find(job.id) is None:
            store.add(*outcome(job))
    (locks / job.id).unlink(missing_ok=True)


def outcome(job: Job) -> tuple[Record, Answers | None]:
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
            return _done(job, in_folder(job.run, str(Path(folder) / "run")), known)
    except (PeftkitError, RuntimeError, MemoryError) as error:
        short = is_shortage(error) or (error.__cause__ is not None and is_shortage(error.__cause__))
        told = {"status": "out_of_memory" if short else "failed", "error": f"{type(error).__name__}: {error}"}
        return Record(**known, **told), None


def _done(job: Job, run: Run, known: dict[str, Any]) -> tuple[Record, Answers | None]:
    from peftkit.artifacts.store import save, saved_parameters
    from peftkit.backbones.load import load
    from peftkit.demonstrations import lacking, with_demonstrations
    from peftkit.evaluation import evaluate
    from peftkit.methods.base import inside, numel, trained_parameters
    from peftkit.prepare import prepare
    from peftkit.session import start
    from peftkit.training.loop import train

    splits = _rows(job, run)
    if lacking(run):
        run = with_demonstrations(run, splits)
    accelerator = start(run)
    data = prepare(run, splits)
    backbone = load(run.backbone, data.head)
    final, figure = job.key.phase == "final", job.key.score
    forgotten = _probe(job, run, backbone, accelerator) if final else None
    untuned = _untuned(run, data, backbone, accelerator, figure) if final else None
    model = run.method.attach(backbone, total_steps=run.training.total_steps(len(data.train.encoded)))
    record = train(model, run, data, accelerator)
    heads = [one for name, one in trained_parameters(model).items() if inside(name, backbone.head_modules)]
    known |= _trained(run, record, data) | {
        "head_parameters": sum(map(numel, heads)),
        "untuned": untuned,
    }
    if not final:
        return Record(**known, status="finished", cost=_cost(record)), None
    before = time.perf_counter()
    after = evaluate(model, run.task, data.test, accelerator)
    seconds = time.perf_counter() - before
    folder = save(run, data, backbone, model, record, {"after": after}, accelerator)
    artifact = folder / run.method.artifact
    known |= {
        "cost": _cost(record, seconds, len(data.test)),
        "test": _score(after, figure),
        "majority": _majority(run, data, figure),
        "artifact_bytes": sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file()),
        "saved_parameters": saved_parameters(artifact),
        "robustness": {one.kind: _changed(one, run, data, model, accelerator, figure) for one in job.robustness},
        "forgetting": forgotten(model) if forgotten else None,
    }
    known |= _merged(run, folder, data, after, accelerator, figure)
    return Record(**known, status="finished"), _answers(run, data, after, figure)


def _rows(job: Job, run: Run) -> Splits:
    """Without test for a trial, which must not read it; with as many rows of train as the budget says."""
    splits = run.task.splits()
    if job.key.budget != "all":
        train = sampled(splits.train, int(job.key.budget), run.task.label_column(), job.key.seed)
        splits = replace(splits, train=train)
    return splits if job.key.phase == "final" else replace(splits, test=None)


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


def _untuned(
    run: Run, data: Prepared, backbone: Backbone, accelerator: Accelerator, figure: str | None
) -> Score | None:
    """The score of the backbone before any method is attached, where nothing else says what it does by itself: neither
    an answer that ignores the input nor, of what is prompted, the row of prompting."""
    from peftkit.bench.probe import placed
    from peftkit.evaluation import evaluate

    if not run.method.trains or isinstance(run.task, Prompted):
        return None
    if run.task.majority(data.train.rows, data.test.rows, data.test.labels) is not None:
        return None
    with placed(backbone.model, accelerator):
        return _score(evaluate(backbone.model, run.task, data.test, accelerator), figure)


def _score(evaluation: Evaluation, figure: str | None) -> Score:
    """Under the figure that is compared; None: the headline."""
    scores = evaluation.scores.by(figure) if figure else evaluation.scores
    return Score(
        headline=scores.headline, value=scores.value, lower_is_better=scores.lower_is_better, values=scores.values
    )


def _majority(run: Run, data: Prepared, figure: str | None) -> Score | None:
    from peftkit.evaluation import baselines

    found = baselines(run.task, data.train, data.test)
    return _score(found["majority"], figure) if found else None


def _answers(run: Run, data: Prepared, after: Evaluation, figure: str | None) -> Answers:
    """Refuses counts that do not add up to the score that was told."""
    counts = run.task.counts(after.predictions, data.test.rows, data.test.labels, figure)
    predictions = tuple({k: v for k, v in one.items() if k != "probabilities"} for one in after.predictions)
    if counts is None or not sum(counts.denominators):  # without any example there is nothing to divide by
        return Answers(predictions=predictions)
    told, ratio = _score(after, figure), sum(counts.numerators) / sum(counts.denominators)
    value = math.exp(min(ratio, 700.0)) if counts.transform == "exp" else ratio
    if abs(value - told.value) > 1e-9 * max(1.0, abs(value)):
        raise TrainingError(
            f"{told.headline} is {told.value!r}, and its rows add up to {value!r}; this is a fault of peftkit: please "
            "report it with `peftkit env`"
        )
    return Answers(
        predictions=predictions,
        numerators=tuple(counts.numerators),
        denominators=tuple(counts.denominators),
        transform=counts.transform,
    )


def _changed(
    change: Any, run: Run, data: Prepared, model: nn.Module, accelerator: Accelerator, figure: str | None
) -> Score:
    """The score on the test texts as somebody in a hurry would have typed them."""
    from peftkit.evaluation import evaluate
    from peftkit.prepare import encode_split

    rows = changed_rows(data.test.rows, run.task.free_texts, change, str(change.seed))
    split = encode_split(run, "test", rows, data.head, data.tokenizer)
    return _score(evaluate(model, run.task, split, accelerator), figure)


def _merged(
    run: Run, folder: Path, data: Prepared, after: Evaluation, accelerator: Accelerator, figure: str | None
) -> dict[str, Any]:
    """The score of what was saved, read back and merged, where the method merges."""
    from peftkit.artifacts.loading import in_full_precision
    from peftkit.artifacts.store import load_run
    from peftkit.evaluation import evaluate

    saved = load_run(folder)
    try:
        model = run.method.merge(in_full_precision(saved))
    except NotMergeable:
        return {}
    found = evaluate(model, run.task, data.test, accelerator)
    pairs = zip(after.predictions, found.predictions, strict=True)
    changed = sum(any(one.get(key) != other.get(key) for key in ANSWER) for one, other in pairs)
    return {"merged": _score(found, figure), "merged_answers_changed": changed}


def _probe(job: Job, run: Run, backbone: Backbone, accelerator: Accelerator) -> Forgotten | None:
    settings = probe_of(job.probe, run.task)
    if settings is None:
        return None
    from peftkit.bench.probe import probed

    return probed(settings, run, backbone, accelerator, Path(job.folder) / "probes")


if __name__ == "__main__":
    sys.exit(guard(main))
