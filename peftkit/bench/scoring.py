"""What a trained model is worth on test: its score, those it stands beside, and what it answered."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.bench.store import Answers, Score
from peftkit.config import Run
from peftkit.data.augment import changed_rows
from peftkit.data.mix import AnyData, read_data
from peftkit.errors import NotMergeable, TrainingError
from peftkit.tasks.prompted import Prompted

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from peftkit.backbones.load import Backbone
    from peftkit.evaluation import Evaluation
    from peftkit.prepare import Prepared, Split
    from peftkit.tasks.base import Task

ANSWER = ("label", "labels", "tags", "text")
"""What of a prediction is an answer; the rest says how certain it is."""


def untuned_score(
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
        return score_of(evaluate(backbone.model, run.task, data.test, accelerator), figure)


def score_of(evaluation: Evaluation, figure: str | None) -> Score:
    """Under the figure that is compared; None: the headline."""
    scores = evaluation.scores.by(figure) if figure else evaluation.scores
    return Score(
        headline=scores.headline, value=scores.value, lower_is_better=scores.lower_is_better, values=scores.values
    )


def majority_score(run: Run, data: Prepared, figure: str | None) -> Score | None:
    from peftkit.evaluation import baselines

    found = baselines(run.task, data.train, data.test)
    return score_of(found["majority"], figure) if found else None


def answers_of(task: Task, split: Split, after: Evaluation, figure: str | None = None) -> Answers:
    """Refuses counts that do not add up to the score that was told."""
    counts = task.counts(after.predictions, split.rows, split.labels, figure)
    predictions = tuple({k: v for k, v in one.items() if k != "probabilities"} for one in after.predictions)
    if counts is None or not sum(counts.denominators):  # without any example there is nothing to divide by
        return Answers(predictions=predictions)
    told, ratio = score_of(after, figure), sum(counts.numerators) / sum(counts.denominators)
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


def other_split(name: str, settings: AnyData, run: Run, data: Prepared) -> Split:
    """The test rows of other data, read as those of the run are.

    Raises:
        DataError: columns or labels that the run does not have.
    """
    from peftkit.prepare import encode_split

    rows = read_data(settings, label=run.task.label_column()).held_out
    return encode_split(run, name, rows, data.head, data.tokenizer)


def score_of_changed(
    change: Any, run: Run, data: Prepared, model: nn.Module, accelerator: Accelerator, figure: str | None
) -> Score:
    """The score on the test texts as somebody in a hurry would have typed them."""
    from peftkit.evaluation import evaluate
    from peftkit.prepare import encode_split

    rows = changed_rows(data.test.rows, run.task.free_texts, change, str(change.seed))
    split = encode_split(run, "test", rows, data.head, data.tokenizer)
    return score_of(evaluate(model, run.task, split, accelerator), figure)


def merged_scores(
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
    return {"merged": score_of(found, figure), "merged_answers_changed": changed}
