"""What came of a sequence over all seeds: matrices, figures, and tables for people."""

from __future__ import annotations

import json
from statistics import mean, stdev
from typing import Any

from peftkit.console import say
from peftkit.continual.course import Course, Row
from peftkit.continual.figures import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)
from peftkit.continual.sequence import sequence_id
from peftkit.disk import write_text
from peftkit.environment import describe
from peftkit.errors import ArtifactError
from peftkit.tables import table

RESULT = "result.json"
Matrix = list[list[float | None]]
FIGURES = {
    "average_accuracy": "mean score on all tasks in the end",
    "learning_accuracy": "mean score on each task when it was just learnt",
    "backward_transfer": "what later tasks did to earlier ones; below 0: cost them",
    "forgetting": "how far earlier tasks fell from their best",
    "forward_transfer": "what earlier tasks did for one not yet learnt, under a fresh head",
}


def conclude(course: Course) -> dict[str, Any]:
    """Write `result.json` into the sequence's folder, and show its tables.

    Raises:
        ArtifactError: a task is not learnt and scored yet.
    """
    sequence = course.sequence
    rows = {seed: _rows(course, seed) for seed in sequence.seeds}
    matrices = {seed: matrix_of(one) for seed, one in rows.items()}
    figures = {seed: figures_of(matrices[seed], [row.untuned for row in one]) for seed, one in rows.items()}
    document = {
        "sequence": sequence_id(sequence),
        "strategy": sequence.strategy,
        "method": sequence.method.model_dump(mode="json"),
        "training": sequence.training.model_dump(mode="json", exclude={"seed"}),
        "replay": sequence.replay and sequence.replay.model_dump(mode="json"),
        "tasks": [one.name for one in sequence.tasks],
        "headline": rows[sequence.seeds[0]][0].headline,
        "test_rows": [row.test_rows for row in rows[sequence.seeds[0]]],
        "mean": {name: _mean([one[name] for one in figures.values()]) for name in FIGURES},
        "spread": {name: _spread([one[name] for one in figures.values()]) for name in FIGURES},
        "seeds": [
            {
                "seed": seed,
                "matrix": matrices[seed],
                "untuned": [row.untuned for row in rows[seed]],
                "figures": figures[seed],
                "trainable_parameters": [row.trainable_parameters for row in rows[seed]],
                "steps": [row.steps for row in rows[seed]],
                "seconds": [row.seconds for row in rows[seed]],
            }
            for seed in sequence.seeds
        ],
        "environment": describe(),
    }
    write_text(course.folder / RESULT, json.dumps(document, indent=2) + "\n")
    say(f"\n{tables(document)}\n\nwritten to {course.folder / RESULT}")
    return document


def matrix_of(rows: list[Row]) -> Matrix:
    """R, with the score of each task before it was learnt where it began with what the one before it left."""
    count = len(rows)
    matrix: Matrix = [[*row.scores, *[None] * (count - len(row.scores))] for row in rows]
    for task, row in enumerate(rows[1:], start=1):
        matrix[task - 1][task] = row.before
    return matrix


def figures_of(matrix: Matrix, untuned: list[float]) -> dict[str, float | None]:
    """The figures of one seed by name; None where one is not defined."""
    return {
        "average_accuracy": average_accuracy(matrix),
        "learning_accuracy": learning_accuracy(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forgetting": forgetting(matrix),
        "forward_transfer": forward_transfer(matrix, untuned),
    }


def tables(document: dict[str, Any]) -> str:
    """R and the figures as text: mean over seeds ± their standard deviation."""
    names, seeds = document["tasks"], document["seeds"]
    title = f"{document['headline']}, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}"
    lines = [[title, *names], ["untuned", *_cells([one["untuned"] for one in seeds])]]
    for number, name in enumerate(names):
        lines.append([f"after {name}", *_cells([one["matrix"][number] for one in seeds])])
    figures = [
        [name.replace("_", " "), _figure(document["mean"][name], document["spread"][name]), meaning]
        for name, meaning in FIGURES.items()
    ]
    width = max(len(value) for _, value, _ in figures)
    told = [f"{name:18} {value:>{width}}  {meaning}" for name, value, meaning in figures]
    return "\n".join([f"strategy {document['strategy']}", table(lines), "", *told])


def _rows(course: Course, seed: int) -> list[Row]:
    found = []
    for stage in (one for one in course.stages() if one.seed == seed):
        row = stage.row() if stage.is_trained else None
        if row is None:
            raise ArtifactError(f"{stage.folder}: task '{stage.name}' is not learnt and scored; run the command again")
        found.append(row)
    return found


def _cells(rows: list[list[float | None]]) -> list[str]:
    return [_figure(_mean(list(column)), _spread(list(column))) for column in zip(*rows, strict=True)]


def _figure(value: float | None, spread: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")


def _mean(values: list[float | None]) -> float | None:
    known = [one for one in values if one is not None]
    return mean(known) if known else None


def _spread(values: list[float | None]) -> float | None:
    """The standard deviation over seeds; None of a single one."""
    known = [one for one in values if one is not None]
    return stdev(known) if len(known) > 1 else None
