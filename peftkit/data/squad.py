"""SQuAD's nested JSON (articles → paragraphs → questions) as one row a question, in the columns of the hub's copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peftkit.errors import DataError

Record = dict[str, Any]


def flattened(source: str, document: Any) -> Any:
    """The rows of a SQuAD file (version 1 or 2): id, title, context, question, answers, is_impossible.

    `answers` is {text: […], answer_start: […]}, both empty where there is none. Anything else is returned as it is.

    Raises:
        DataError: a part without what SQuAD has there.
    """
    articles = document.get("data") if isinstance(document, dict) else None
    if not isinstance(articles, list) or not articles:
        return document
    if not all(isinstance(article, dict) and "paragraphs" in article for article in articles[:1]):
        return document
    return [row for index, article in enumerate(articles) for row in _rows(f"{source}: data[{index}]", article)]


def _rows(where: str, article: Any) -> Iterator[Record]:
    for number, paragraph in enumerate(_part(where, article, "paragraphs", list)):
        place = f"{where}.paragraphs[{number}]"
        context = _part(place, paragraph, "context", str)
        for position, question in enumerate(_part(place, paragraph, "qas", list)):
            spot = f"{place}.qas[{position}]"
            yield {
                "id": question.get("id") if isinstance(question, dict) else None,
                "title": article.get("title"),
                "context": context,
                "question": _part(spot, question, "question", str),
                "answers": _answers(spot, question),
                "is_impossible": bool(question.get("is_impossible", False)),
            }


def _answers(where: str, question: Record) -> dict[str, list[Any]]:
    # test files come without answers
    answers = _part(where, question, "answers", list) if "answers" in question else []
    places = [(f"{where}.answers[{number}]", answer) for number, answer in enumerate(answers)]
    return {
        "text": [_part(place, answer, "text", str) for place, answer in places],
        "answer_start": [_part(place, answer, "answer_start", int) for place, answer in places],
    }


def _part(where: str, holder: Any, name: str, kind: type) -> Any:
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, kind):
        wanted = {list: "a list", str: "text", int: "a number"}[kind]
        raise DataError(f"{where}: '{name}' is not {wanted}, as in SQuAD; mend it, or write one object a question")
    return value
