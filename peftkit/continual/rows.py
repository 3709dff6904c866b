"""The score of every task so far, once another one was learnt: a row of R, always computed from what is on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftkit.artifacts.loading import load_run
from peftkit.artifacts.manifest import read_manifest
from peftkit.console import say
from peftkit.continual.course import Row, Stage
from peftkit.continual.heads import worn
from peftkit.continual.restored import check_chain, restored, restored_head
from peftkit.errors import ArtifactError, TrainingError
from peftkit.evaluation import evaluate
from peftkit.session import inference_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator


def add_row(stage: Stage) -> None:
    """Score a finished task and those before it, unless that was done already, and keep the row.

    Raises:
        ArtifactError: files are not what the trainings ended with.
        TrainingError: a score is not what it must be, see `_check`.
    """
    check_chain(stage)
    if stage.row() is not None:
        return
    accelerator = inference_accelerator(stage.run)
    scores = _carried(stage, accelerator) if stage.course.sequence.carries else _own(stage, accelerator)
    manifest, headline = read_manifest(stage.folder), stage.run.task.headline
    told = _told(stage, manifest, headline)
    _check(stage, scores, told["after"])
    stage.keep_row(
        Row(
            task=stage.name,
            seed=stage.seed,
            manifests=stage.manifests,
            headline=headline,
            scores=tuple(scores),
            untuned=told["untuned"],
            before=told.get("before"),
            test_rows=len(stage.prepare().test),
            trainable_parameters=manifest["training"]["trainable_parameters"],
            steps=manifest["training"]["steps"],
            seconds=manifest["training"]["seconds"],
        )
    )
    learnt = zip([*stage.earlier, stage], scores, strict=True)
    say(f"seed {stage.seed}, after {stage.name}: {', '.join(f'{one.name} {score:.4f}' for one, score in learnt)}")


def _carried(stage: Stage, accelerator: Accelerator) -> list[float]:
    """Of what all tasks share as it is now, under the head of each."""
    model, _ = restored(stage)
    found = []
    for one in stage.earlier:
        head = restored_head(one)
        with worn(model, head):
            found.append(_score(one, model, accelerator))
    return [*found, _score(stage, model, accelerator)]


def _own(stage: Stage, accelerator: Accelerator) -> list[float]:
    """Of the adapter of each task."""
    return [_score(one, load_run(one.folder).model, accelerator) for one in [*stage.earlier, stage]]


def _score(stage: Stage, model: Any, accelerator: Accelerator) -> float:
    return evaluate(model, stage.run.task, stage.prepare().test, accelerator).scores.value


def _check(stage: Stage, scores: list[float], after: float) -> None:
    """Refuse scores of saved models that are not those of the trained ones.

    With an adapter for each task nothing can be forgotten, so every score must be what it was; otherwise the last.

    Raises:
        TrainingError: names the task and both scores.
    """
    known = {stage.number: after}
    if not stage.course.sequence.carries:
        known |= {one.number: row.scores[-1] for one in stage.earlier if (row := one.row()) is not None}
    for number, expected in known.items():
        if scores[number] != expected:
            name = stage.course.sequence.tasks[number].name
            raise TrainingError(
                f"task '{name}' scored {expected!r} when it was learnt and {scores[number]!r} with the same weights "
                f"after task '{stage.name}'; if the sequence was begun on another machine, finish it there, or remove "
                f"{stage.course.folder} and learn it here"
            )


def _told(stage: Stage, manifest: dict[str, Any], headline: str) -> dict[str, float]:
    """What the trained model itself scored, by name."""
    told = {name: float(values[headline]) for name, values in manifest["scores"].items()}
    if "untuned" not in told:
        raise ArtifactError(
            f"{stage.folder} was not trained as a task of a sequence; remove it and those of later tasks, and they are "
            "trained again"
        )
    return told
