"""Classification by a language model: the label whose words are the most likely continuation of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from peftkit.backbones.load import Head
from peftkit.data.files import Rows
from peftkit.data.prompts import bare_ids, fitted_prompts, leading_tokens
from peftkit.data.templates import Template, columns, render_rows
from peftkit.errors import DataError, UsageError
from peftkit.schema import did_you_mean
from peftkit.tasks.base import Batch, Counts, Encoded, Prediction, Scores
from peftkit.tasks.likelihood import Words, log_likelihoods
from peftkit.tasks.prompted import Prompted
from peftkit.tasks.sequence_classification import SequenceClassification

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


class LabelWords(Prompted):
    """Each label is scored by log p(its words | the prompt), summed over their tokens (nats).

    The columns are those of `kind: sequence_classification`, and so are the scores. Texts are cut to
    `max_length`; the template and the words never are.
    """

    kind: Literal["label_words"] = "label_words"
    text: str = "text"
    """The column that `peftkit predict RUN TEXT` fills."""
    text_pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | None = None
    """Label order, and names where the data has numbers. Default: as in `kind: sequence_classification`."""
    template: Template
    """The prompt, such as `Review: {text}` and, on the next line, `Sentiment:`. Where words are set apart by
    spaces it ends without one, and the label words begin with it."""
    words: dict[str, str] | None = None
    """The words of each label. Default: a space and the label's name."""
    separator: str = "\n\n"
    """What stands after each demonstration."""
    loss_over: Literal["words", "vocabulary"] = "words"
    """What training compares the right words with. `words`: the other labels' words, by a softmax over the
    scores. `vocabulary`: all tokens, so that the loss is −log p(right words | prompt)."""
    normalise: Literal["none", "length"] = "none"
    """`length`: a score is the mean over the tokens of its words, so that long words are at no disadvantage."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        taken = columns(self.template)
        for column in filter(None, (self.text, self.text_pair)):
            if column not in taken:
                raise ValueError(f"the template has no {{{column}}}{did_you_mean(column, taken) if taken else ''}")
        if self.label in taken:
            raise ValueError(f"the template shows the answer: {{{self.label}}} is the label column")
        if self.loss_over == "vocabulary" and self.loss.kind not in ("cross_entropy", "weighted"):
            raise ValueError(f"loss_over: vocabulary has no loss '{self.loss.kind}'; use loss_over: words")
        if self.words is not None and self.labels is not None:
            _refuse_words(self.words, self.labels)
        return self

    @property
    def headline(self) -> str:
        return "accuracy"

    @property
    def figures(self) -> tuple[str, ...]:
        return self._classes().figures

    def label_column(self) -> str:
        return self.label

    def demonstration_columns(self) -> tuple[str, ...]:
        return (*columns(self.template), self.label)

    def head(self, train: Rows) -> Head:
        labels = self._classes().head(train).labels
        if self.words is not None:
            try:
                _refuse_words(self.words, labels)
            except ValueError as error:
                raise UsageError(f"task.words: {error}") from None
        return Head("AutoModelForCausalLM", labels)

    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], supervised: bool = True
    ) -> Encoded:
        start, texts = leading_tokens(tokenizer), self._words(labels)
        longest = max(map(len, bare_ids(tokenizer, texts)))
        room = self.max_length - len(start) - longest
        prompts, truncated = fitted_prompts(self.template, rows, tokenizer, room, self._preamble(labels))
        prompt_ids = bare_ids(tokenizer, prompts)
        words = [_continuations(prompt_ids, prompts, text, tokenizer, rows) for text in texts]
        examples = [
            {"input_ids": start + ids, "words": tuple(own)} for ids, *own in zip(prompt_ids, *words, strict=True)
        ]
        self._check_different(examples, labels)
        if supervised:
            ids_of = {label: index for index, label in enumerate(labels)}
            for example, reference in zip(examples, self.references(rows, labels), strict=True):
                example["labels"] = ids_of[reference]
        return Encoded(examples, truncated)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The score of each label, in float32; shape (examples, labels)."""
        return self._scores(model, batch, batch["words"])

    def summed_loss(self, model: nn.Module, batch: Batch, class_weights: Tensor) -> Tensor:
        if self.loss_over == "words":
            return super().summed_loss(model, batch, class_weights)
        right = [(words[label],) for words, label in zip(batch["words"], batch["labels"].tolist(), strict=True)]
        return -(self._scores(model, batch, right).squeeze(1) * class_weights[batch["labels"]]).sum()

    def predict(self, model: nn.Module, batch: Batch, labels: Sequence[str]) -> list[Prediction]:
        scores = self.logits(model, batch)
        probabilities = scores.softmax(-1).tolist()
        return [
            {
                "label": labels[max(range(len(labels)), key=row.__getitem__)],
                "probability": max(row),
                "probabilities": dict(zip(labels, row, strict=True)),
                "log_likelihoods": dict(zip(labels, likelihoods, strict=True)),
            }
            for row, likelihoods in zip(probabilities, scores.tolist(), strict=True)
        ]

    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        return self._classes().score(predictions, rows, labels)

    def counts(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str], figure: str | None = None
    ) -> Counts | None:
        return self._classes().counts(predictions, rows, labels, figure)

    def metric_inputs(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        return self._classes().metric_inputs(predictions, rows, labels)

    def rows_from_text(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Rows:
        others = set(columns(self.template)) - {self.text, self.text_pair}
        if others:
            raise UsageError(f"the template also takes {', '.join(sorted(others))}; give the rows as --file FILE")
        return self._classes().rows_from_text(texts, pairs)

    def describe(self, prediction: Prediction, record: dict[str, Any]) -> dict[str, Any]:
        return self._classes().describe(prediction, record)

    def references(self, rows: Rows, labels: Sequence[str]) -> list[str]:
        found: list[str] = self._classes().references(rows, labels)
        return found

    def majority(self, train: Rows, rows: Rows, labels: Sequence[str]) -> list[Prediction] | None:
        return self._classes().majority(train, rows, labels)

    def _classes(self) -> SequenceClassification:
        """Labels, references and scores, which are the same for a head of classes."""
        return SequenceClassification(
            data=self.data, text=self.text, text_pair=self.text_pair, label=self.label, labels=self.labels
        )

    def _words(self, labels: Sequence[str]) -> list[str]:
        given = self.words or {}
        return [given.get(label, f" {label}") for label in labels]

    def _preamble(self, labels: Sequence[str]) -> str:
        """The demonstrations, each with the words of its label and the separator behind it."""
        rows = self.demonstration_rows()
        words = dict(zip(labels, self._words(labels), strict=True))
        solved = zip(render_rows(self.template, rows), self.references(rows, labels), strict=True)
        return "".join(prompt + words[label] + self.separator for prompt, label in solved)

    def _check_different(self, examples: Sequence[dict[str, Any]], labels: Sequence[str]) -> None:
        for example in examples:
            first: dict[tuple[int, ...], str] = {}
            for label, ids in zip(labels, example["words"], strict=True):
                if ids in first:
                    raise DataError(
                        f"labels '{first[ids]}' and '{label}' have the same tokens, so nothing can tell them apart; "
                        "give them different task.words"
                    )
                first[ids] = label

    def _scores(self, model: nn.Module, batch: Batch, words: Sequence[Words]) -> Tensor:
        """The scores of each example's words, of which all examples have equally many; shape (examples, words)."""
        scores = log_likelihoods(model, batch, words)
        if self.normalise == "none":
            return scores
        return scores / scores.new_tensor([[len(ids) for ids in own] for own in words])


def _refuse_words(words: dict[str, str], labels: Sequence[str]) -> None:
    """A ValueError unless each label has its words, and nothing else has."""
    for label in labels:
        if label not in words:
            raise ValueError(f"words has none for label '{label}'")
    for label, text in words.items():
        if label not in labels:
            raise ValueError(f"words names '{label}', which is no label{did_you_mean(label, labels)}")
        if not text.strip():
            raise ValueError(f"the words of label '{label}' are empty")


def _continuations(
    prompt_ids: Sequence[list[int]],
    prompts: Sequence[str],
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
) -> list[tuple[int, ...]]:
    """The tokens of `text` behind each prompt, as the tokenizer writes prompt and text together.

    Raises:
        DataError: prompt and text share a token, so that the text has no likelihood of its own.
    """
    found = []
    for index, whole in enumerate(bare_ids(tokenizer, [prompt + text for prompt in prompts])):
        size = len(prompt_ids[index])
        if whole[:size] != prompt_ids[index] or len(whole) == size:
            raise DataError(
                f"{rows.where(index)}: the end of the prompt and '{text}' share a token; end the template without "
                "a space and begin the label words with one"
            )
        found.append(tuple(whole[size:]))
    return found
