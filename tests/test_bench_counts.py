"""What each row counts for adds up to the score of all, of every task and figure that is a ratio of sums over rows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from peftkit.data.files import Rows
from peftkit.data.sources import DataSettings
from peftkit.tasks import Completion, LabelWords, PlainText, QuestionAnswering, RelationExtraction
from peftkit.tasks import SequenceClassification as Sequences
from peftkit.tasks.base import Task

DATA = DataSettings(train="t.jsonl")
COUNT = 60
LABELS = ("bad", "fine", "good")
Case = tuple[Task, list[dict[str, Any]], list[dict[str, Any]], tuple[str, ...], set[str]]
"""A task, predictions, the rows' records, labels, and the figures that no row has a part of."""


def words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choices(["the", "cat", "cats", "run", "ran", "42", "a"], k=count))


def classes(chance: random.Random, task: Task) -> Case:
    records = [{"text": "x", "label": chance.choice(LABELS)} for _ in range(COUNT)]
    found = [{"label": chance.choice(LABELS)} for _ in records]
    return task, found, records, LABELS, {"macro_f1", "weighted_f1", "matthews"}


def one_label(chance: random.Random) -> Case:
    return classes(chance, Sequences(data=DATA))


def label_words(chance: random.Random) -> Case:
    return classes(chance, LabelWords(data=DATA, template="{text}"))


def many_labels(chance: random.Random) -> Case:
    task = Sequences(data=DATA, problem="multi_label")
    records = [{"text": "x", "label": chance.sample(LABELS, chance.randrange(3))} for _ in range(COUNT)]
    found = [{"labels": chance.sample(LABELS, chance.randrange(3))} for _ in records]
    return task, found, records, LABELS, {"macro_f1", "weighted_f1", "subset_accuracy"}


def numbers(chance: random.Random) -> Case:
    task = Sequences(data=DATA, problem="regression")
    records = [{"text": "x", "label": chance.random()} for _ in range(COUNT)]
    return task, [{"value": chance.random()} for _ in records], records, ("label",), set(task.figures)


def relations(chance: random.Random) -> Case:
    task = RelationExtraction(data=DATA, no_relation="fine")
    found, records = classes(chance, task)[1:3]
    return task, found, records, LABELS, set()


def relations_of_semeval(chance: random.Random) -> Case:
    task = RelationExtraction(data=DATA, scoring="semeval", no_relation="fine")
    found, records = classes(chance, task)[1:3]
    return task, found, records, LABELS, {"macro_f1"}


def questions(chance: random.Random, answerless: bool = False) -> Case:
    def answers() -> dict[str, list[Any]]:
        texts = [words(chance, 3) for _ in range(chance.randrange(0 if answerless else 1, 3))]
        return {"text": texts, "answer_start": [0] * len(texts)}

    records = [{"question": "?", "context": "c", "answers": answers()} for _ in range(COUNT)]
    found = [{"answer": words(chance, chance.randrange(4))} for _ in records]
    return QuestionAnswering(data=DATA), found, records, ("start", "end"), set()


def questions_without_answer(chance: random.Random) -> Case:
    return questions(chance, answerless=True)


def losses(chance: random.Random, count: int = COUNT) -> list[dict[str, Any]]:
    sizes = [chance.randrange(9) for _ in range(count)]
    return [{"nats": 2.5 * n * chance.random(), "tokens": n, "right": chance.randrange(n + 1)} for n in sizes]


def plain_text(chance: random.Random) -> Case:
    return PlainText(data=DATA), losses(chance), [{"text": "x"}] * COUNT, (), set()


def masked_text(chance: random.Random) -> Case:
    return PlainText(data=DATA, objective="masked"), losses(chance), [{"text": "x"}] * COUNT, (), set()


def written(chance: random.Random) -> Case:
    task = Completion.model_validate(
        {"data": DATA, "generation": {"metrics": ["bleu", "rouge", "exact_match", "gsm8k", "chrf", "ter"], "limit": 40}}
    )
    records = [{"prompt": "x", "completion": f"{words(chance, 3)} 42"} for _ in range(COUNT)]
    found = losses(chance)
    for one, record in zip(found[:40], records, strict=False):
        one["text"] = record["completion"] if chance.random() < 0.3 else words(chance, 4)
    return task, found, records, (), {"bleu", "chrf", "ter"}


@pytest.mark.parametrize(
    "case",
    [
        *(one_label, label_words, many_labels, numbers, relations, relations_of_semeval),
        *(questions, questions_without_answer, plain_text, masked_text, written),
    ],
)
def test_rows_add_up_to_the_score(case: Callable[[random.Random], Case]) -> None:
    task, found, records, labels, without = case(random.Random(7))
    rows = Rows("t.jsonl", records, range(1, len(records) + 1))
    values = task.score(found, rows, labels).values
    assert task.figures[0] == task.headline
    counted = {figure: task.counts(found, rows, labels, figure) for figure in task.figures}
    assert {figure for figure, counts in counted.items() if counts is None} == without
    for figure, counts in counted.items():
        if counts is not None:
            ratio = sum(counts.numerators) / sum(counts.denominators)
            told = math.exp(ratio) if counts.transform == "exp" else ratio
            assert told == pytest.approx(values[figure], rel=1e-12, abs=1e-12), figure
            assert told > 0
    headline = task.counts(found, rows, labels)
    assert headline == counted[task.headline]


def test_rows_that_nothing_is_written_for_have_no_part() -> None:
    task, found, records, _, _ = written(random.Random(3))
    rows = Rows("t.jsonl", records, range(1, len(records) + 1))
    rouge, loss = (task.counts(found, rows, (), figure) for figure in ("rougeL", "loss"))
    assert rouge is not None
    assert loss is not None
    assert (len(rouge.numerators), len(loss.numerators)) == (40, COUNT)
