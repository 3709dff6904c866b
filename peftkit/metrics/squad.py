"""Exact match and F1 of answers as text, as SQuAD defines them (Rajpurkar et al. 2016, section 6.1; 2018, v2)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, words apart by one space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def word_f1(prediction: str, reference: str, empty_is_an_answer: bool = False) -> float:
    """F1 of the two bags of normalised words.

    Args:
        empty_is_an_answer: two texts without words agree wholly, as version 2 has it; in version 1 they do not.
    """
    predicted, wanted = normalized(prediction).split(), normalized(reference).split()
    if empty_is_an_answer and not (predicted and wanted):
        return float(predicted == wanted)
    common = (Counter(predicted) & Counter(wanted)).total()
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def answer_scores(prediction: str, references: Sequence[str], version: int) -> tuple[float, float]:
    """(exact match, F1) against the reference that suits each best.

    In version 2 references without words are left out, and a question without references wants the empty answer.
    """
    if version == 2:
        references = [one for one in references if normalized(one)] or [""]
    exact = max(float(normalized(prediction) == normalized(one)) for one in references)
    return exact, max(word_f1(prediction, one, version == 2) for one in references)


def question_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[float, float]]:
    """(exact match, F1) of each question; by version 2 where some question has no reference."""
    version = 1 if all(references) else 2
    return [answer_scores(one, wanted, version) for one, wanted in zip(predictions, references, strict=True)]


def squad_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """f1 and exact_match in [0, 1], means over questions; by version 2 where some question has no reference.

    Then also apart for questions with and without an answer: has_answer_f1, has_answer_exact_match, and
    no_answer_accuracy (exact match and F1 are the same there).
    """
    found = question_scores(predictions, references)
    values = _means("", found)
    if not all(references):
        answered = [any(map(normalized, wanted)) for wanted in references]
        values |= _means("has_answer_", [one for one, has in zip(found, answered, strict=True) if has])
        values["no_answer_accuracy"] = _mean(
            [exact for (exact, _), has in zip(found, answered, strict=True) if not has]
        )
    return values


def _means(prefix: str, found: Sequence[tuple[float, float]]) -> dict[str, float]:
    return {f"{prefix}f1": _mean([f1 for _, f1 in found]), f"{prefix}exact_match": _mean([one for one, _ in found])}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
