"""Extractive question answering: the answer is a piece of the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from peftkit.backbones.load import Head
from peftkit.data.collate import IGNORED
from peftkit.data.files import Rows
from peftkit.errors import UsageError
from peftkit.metrics.squad import question_scores, squad_scores
from peftkit.tasks.answer_spans import NULL, answer_of, best_spans, context_mask, first_sentence, stripped, sure
from peftkit.tasks.base import Batch, Counts, Encoded, Example, Prediction, Scores, Task, refuse_rows
from peftkit.tasks.columns import texts_in
from peftkit.tasks.losses import AnyLoss
from peftkit.tasks.question_windows import Answer, Windows

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

NO_ANSWER = "no answer"
FAR_BELOW = -1e4
"""The logit of positions that cannot be an answer: exp(·) is 0 in float32, and differences stay finite."""


class QuestionAnswering(Task):
    """SQuAD and its like: rows of a question, a context, and answers {text: […], answer_start: […]}.

    Contexts longer than `max_length` become windows. Training supervises the first answer: its first and last token in
    windows that hold it whole, the first token of the sequence ([CLS]) in all others (Devlin et al. 2019, section 4.2
    and 4.3). Start and end are chosen among the tokens of the context and that first one.
    """

    kind: Literal["question_answering"] = "question_answering"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    max_length: Annotated[int, Field(gt=2)] = 384
    """Tokens of question and context in one window; only the context is ever cut."""
    stride: Annotated[int, Field(ge=0)] = 128
    """Tokens of the context that a window shares with the one before it."""
    max_answer_length: Annotated[int, Field(gt=0)] = 30
    """Most tokens of a predicted answer."""
    n_best: Annotated[int, Field(gt=0)] = 5
    """Answers that a prediction lists."""
    unanswerable: Literal["auto"] | bool = "auto"
    """Whether "" can be the answer, as in SQuAD 2; `auto`: where training has questions without answers."""
    null_threshold: float = 0.0
    """The answer is "" where its score exceeds that of the best span by more than this."""

    @field_validator("loss")
    @classmethod
    def _of_positions(cls, loss: AnyLoss) -> AnyLoss:
        if loss.kind not in ("cross_entropy", "focal"):
            raise ValueError(f"{loss.kind} is for classes, and answers are positions; use cross_entropy or focal")
        return loss

    @model_validator(mode="after")
    def _windows_move_on(self) -> QuestionAnswering:
        if self.stride >= self.max_length:
            raise ValueError(f"stride {self.stride} is not below max_length, which is {self.max_length}")
        return self

    @property
    def headline(self) -> str:
        return "f1"

    @property
    def figures(self) -> tuple[str, ...]:
        return ("f1", "exact_match")

    @property
    def text_pair(self) -> str:
        """What the second text of typed pairs is."""
        return self.context

    @property
    def free_texts(self) -> tuple[str, ...]:
        return (self.question,)

    def label_column(self) -> None:
        return None

    def head(self, train: Rows) -> Head:
        answerless = [index for index, texts in enumerate(self.references(train, ())) if not texts]
        if self.unanswerable is False:
            mend = "give it one, or set task.unanswerable: true"
            refuse_rows(train, answerless, f"no answer in '{self.answers}'", mend)
        has_null = bool(answerless) if self.unanswerable == "auto" else self.unanswerable
        labels = ("start", "end", *([NO_ANSWER] if has_null else []))
        return Head("AutoModelForQuestionAnswering", labels, outputs=2)

    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], supervised: bool = True
    ) -> Encoded:
        questions, contexts = (texts_in(rows, column) for column in (self.question, self.context))
        answers = self._spans(rows) if supervised else None
        windows = Windows(self.max_length, self.stride)
        return windows.encoded(questions, contexts, rows, tokenizer, answers)

    def class_weights(self, encoded: Encoded, labels: Sequence[str]) -> list[float]:
        return []

    def example_weight(self, example: Example, class_weights: Sequence[float]) -> float:
        """Its supervised positions, start and end: the mean over both is what a step minimises."""
        return float(sum(label != IGNORED for label in example["labels"]))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Shape (examples, 2, tokens): of the start, and of the end. Padding has the lowest logit of its row."""
        import torch

        names = ("input_ids", "attention_mask", "token_type_ids")
        output = model(**{name: batch[name] for name in names if name in batch})
        logits = torch.stack([output.start_logits, output.end_logits], dim=1)
        padding = batch["attention_mask"][:, None] == 0
        lowest = logits.masked_fill(padding, torch.inf).amin(-1, keepdim=True)
        return torch.where(padding, lowest, logits)

    def supervised_logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (items, tokens) and positions (items,): of each supervised window its start, then its end."""
        logits = self.logits(model, batch).float()
        possible = context_mask(batch)
        possible[:, NULL] = True
        kept = batch["labels"] != IGNORED
        return logits.masked_fill(~possible[:, None], FAR_BELOW)[kept], batch["labels"][kept]

    def loss_of(self, logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
        return self.loss.item_losses(logits.float(), labels).sum()

    def predict(self, model: nn.Module, batch: Batch, labels: Sequence[str]) -> list[Prediction]:
        """The best spans of each window, as characters of the context: {spans: [[score, start, end], …]}, and `null`,
        the score of the first token, where questions can be without an answer."""
        logits = self.logits(model, batch).float()
        found = best_spans(logits, context_mask(batch), self.n_best, self.max_answer_length)
        nulls = logits[:, :, NULL].sum(1).tolist()
        predictions: list[Prediction] = []
        for offsets, spans, null in zip(batch["offsets"], found, nulls, strict=True):
            places = [[score, offsets[first][0], offsets[last][1]] for score, first, last in spans]
            predictions.append({"spans": places} | ({"null": null} if NO_ANSWER in labels else {}))
        return predictions

    def join(
        self, found: Sequence[Prediction], encoded: Encoded, rows: Rows, tokenizer: PreTrainedTokenizerBase
    ) -> list[Prediction]:
        windows: list[list[Prediction]] = [[] for _ in rows.records]
        for index, one in enumerate(found):
            windows[encoded.owner(index)].append(one)
        contexts = (record[self.context] for record in rows.records)
        both = zip(windows, contexts, strict=True)
        return [answer_of(parts, context, self.n_best, self.null_threshold) for parts, context in both]

    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        texts = [prediction["answer"] for prediction in predictions]
        return Scores(self.headline, squad_scores(texts, self.references(rows, labels)), examples=len(texts))

    def counts(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str], figure: str | None = None
    ) -> Counts | None:
        """F1 or exact match of each question, of which the figure is the mean."""
        if figure not in (None, *self.figures):
            return None
        found = question_scores([one["answer"] for one in predictions], self.references(rows, labels))
        return Counts([exact if figure == "exact_match" else f1 for exact, f1 in found], [1.0] * len(found))

    def metric_inputs(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        """As the `squad` metric takes them, and `squad_v2` where "" can be the answer."""
        ids = [str(record.get("id") or index) for index, record in enumerate(rows.records)]
        given = [{"id": one, "prediction_text": p["answer"]} for one, p in zip(ids, predictions, strict=True)]
        if NO_ANSWER in labels:
            for one, prediction in zip(given, predictions, strict=True):
                nothing = [c["probability"] for c in prediction["candidates"] if c["start"] is None]
                one["no_answer_probability"] = sum(nothing)
        wanted = [record[self.answers] for record in rows.records]
        return given, [{"id": one, "answers": answers} for one, answers in zip(ids, wanted, strict=True)]

    def rows_from_text(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Rows:
        """Questions, with the contexts as second texts."""
        if pairs is None or len(pairs) != len(texts):
            given = "no contexts" if pairs is None else f"{len(pairs)} contexts"
            raise UsageError(
                f"{len(texts)} questions and {given}; give each question its context as the second text (--text-pair)"
            )
        records = [{self.question: one, self.context: two} for one, two in zip(texts, pairs, strict=True)]
        return Rows("input", records, range(1, len(records) + 1))

    def describe(self, prediction: Prediction, record: dict[str, Any]) -> dict[str, Any]:
        return {"question": record[self.question]} | prediction

    def references(self, rows: Rows, labels: Sequence[str]) -> list[list[str]]:
        rows.require(self.answers)
        return [[text for text, _ in answers] for answers in self._answers(rows)]

    def majority(self, train: Rows, rows: Rows, labels: Sequence[str]) -> list[Prediction]:
        """The first sentence of the context, or "" where most questions of train have no answer."""
        wanted = self.references(train, labels)
        if 2 * sum(not texts for texts in wanted) > len(wanted):
            return [sure("")] * len(rows)
        return [first_sentence(context) for context in texts_in(rows, self.context)]

    def _answers(self, rows: Rows) -> list[list[tuple[str, int]]]:
        """(text, start) of every answer of every row; raises where they are not in SQuAD's form."""
        values = [_listed(record[self.answers]) for record in rows.records]
        mend = "write {text: […], answer_start: […]}, as in SQuAD"
        refuse_rows(rows, _where(values, lambda one: one is None), f"'{self.answers}' holds no answers", mend)
        found = [value or [] for value in values]
        blank = _where(found, lambda one: any(not text.strip() for text, _ in one))
        refuse_rows(rows, blank, "an answer is blank", "leave the list empty where there is no answer")
        flags = [record.get("is_impossible") for record in rows.records]
        odd = [
            i for i, (flag, one) in enumerate(zip(flags, found, strict=True)) if flag is not None and flag == bool(one)
        ]
        refuse_rows(rows, odd, "'is_impossible' and the answers say opposite things", "mend one of them")
        return found

    def _spans(self, rows: Rows) -> list[Answer | None]:
        """The characters of each row's first answer, without white space at its ends."""
        rows.require(self.answers)
        spans: list[Answer | None] = []
        misplaced: list[int] = []
        for index, (record, answers) in enumerate(zip(rows.records, self._answers(rows), strict=True)):
            context = record[self.context]
            if any(start < 0 or context[start : start + len(text)] != text for text, start in answers):
                misplaced.append(index)
            text, start = answers[0] if answers else ("", 0)
            spans.append(stripped(context, start, start + len(text)) if answers else None)
        mend = "count answer_start in characters of the context, from 0"
        refuse_rows(rows, misplaced, "an answer does not stand in the context at its answer_start", mend)
        return spans


def _listed(answers: Any) -> list[tuple[str, int]] | None:
    """(text, start) of each answer, from {text: […], answer_start: […]} or a list of {text, answer_start}."""
    if isinstance(answers, list) and all(isinstance(one, dict) for one in answers):
        answers = {name: [one.get(name) for one in answers] for name in ("text", "answer_start")}
    if not isinstance(answers, dict):
        return None
    texts, starts = answers.get("text"), answers.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return None
    pairs = list(zip(texts, starts, strict=True))
    return pairs if all(isinstance(text, str) and isinstance(start, int) for text, start in pairs) else None


def _where(values: Sequence[Any], holds: Callable[[Any], bool]) -> list[int]:
    return [index for index, value in enumerate(values) if holds(value)]
