"""A request as examples for the model, and predictions as its answer, through the code of the task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.artifacts.loading import SavedRun
from peftkit.data.rows import Rows
from peftkit.errors import PeftkitError, UsageError
from peftkit.prepare import Split, encode_split
from peftkit.serving.batching import Job
from peftkit.serving.computing import lane_of
from peftkit.serving.messages import Question, WritingQuestion
from peftkit.serving.options import Limits
from peftkit.serving.resident import Adapter
from peftkit.tasks.base import Prediction, Task
from peftkit.tasks.generation import Generation
from peftkit.tasks.language_model import LanguageModel
from peftkit.tasks.plain_text import PlainText

Heard = Callable[[int, list[int]], None]


class TooMuch(UsageError):
    """A request that a limit refuses."""

    def __init__(self, limit: str, message: str) -> None:
        self.limit = limit
        super().__init__(message)


@dataclass(frozen=True)
class Asked:
    """A request on its way."""

    adapter: Adapter
    split: Split
    job: Job

    @property
    def tokens(self) -> int:
        """Read, over all texts."""
        return sum(self.split.encoded.lengths)

    def answer(self, predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
        """What `peftkit predict` shows of each row."""
        task, rows = self.job.task, self.split.rows
        with self.adapter.tokenizing:
            joined = task.join(predictions, self.split.encoded, rows, self.split.tokenizer)
        return [task.describe(one, record) for one, record in zip(joined, rows.records, strict=True)]

    def text_so_far(self, tokens: Sequence[int]) -> str:
        """What is sure of a text whose first tokens these are: not the half of a letter, nor what may begin a stop."""
        with self.adapter.tokenizing:
            found = self.job.task.join(
                [{"generated": list(tokens)}], self.split.encoded, self.split.rows, self.split.tokenizer
            )
        generation: Generation | None = getattr(self.job.task, "generation", None)
        return _sure(str(found[0]["text"]), generation.stop if generation else ())


def writes(adapter: Adapter) -> bool:
    """Whether an adapter's predictions are text that it writes."""
    task = adapter.saved.run.task
    return isinstance(task, LanguageModel) and not isinstance(task, PlainText)


def asked(adapter: Adapter, question: Question, limits: Limits) -> Asked:
    """Read and tokenize a request; nothing is computed yet.

    Raises:
        TooMuch: more texts or tokens than allowed.
        PeftkitError: texts that do not fit the task, as `peftkit predict` refuses them.
    """
    if question.size > limits.texts:
        raise TooMuch("texts", f"{question.size:,} texts, and at most {limits.texts:,} are taken in a request")
    return _encoded(adapter, adapter.saved.run.task, _rows(adapter.saved.run.task, question), limits, None)


def asked_to_write(adapter: Adapter, question: WritingQuestion, limits: Limits, heard: Heard) -> Asked:
    """The same of one text that is to be written on.

    Raises:
        TooMuch: more tokens than allowed.
        PeftkitError: an adapter that does not write.
    """
    task: Any = adapter.saved.run.task
    if not writes(adapter):
        raise UsageError(f"'{adapter.name}' does not write text (its task is '{task.kind}'); ask it at /predict")
    settings: Generation = task.generation or Generation()
    if question.max_new_tokens is not None:
        most = max(limits.new_tokens, settings.max_new_tokens)
        if question.max_new_tokens > most:
            raise TooMuch("new_tokens", f"{question.max_new_tokens:,} new tokens, and at most {most:,} are written")
        settings = settings.model_copy(update={"max_new_tokens": question.max_new_tokens})
    task = task.model_copy(update={"generation": settings})
    return _encoded(adapter, task, task.rows_from_text([question.text]), limits, heard)


def _rows(task: Task, question: Question) -> Rows:
    if question.rows:
        return Rows("request", question.rows, range(1, len(question.rows) + 1), by_line=False)
    return task.rows_from_text(question.texts, question.pairs or None)


def _encoded(adapter: Adapter, task: Task, rows: Rows, limits: Limits, heard: Heard | None) -> Asked:
    saved = adapter.saved
    run = saved.run.model_copy(update={"task": task})
    try:
        with adapter.tokenizing:
            split = encode_split(run, rows.source, rows, saved.head, saved.tokenizer, supervised=False)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, PeftkitError) or rows.source != "request":
            raise
        columns = ", ".join(task.text_columns(rows))
        raise UsageError(f"the rows do not fit task '{task.kind}', in their columns ({columns}) or in types") from None
    examples = split.encoded.examples
    job = Job(adapter, task, examples, lane_of(adapter, task, examples[0]), heard)
    found = Asked(adapter, split, job)
    if found.tokens > limits.tokens:
        raise TooMuch("tokens", f"{found.tokens:,} tokens, and at most {limits.tokens:,} are read in a request")
    if writes(adapter):
        _check_room(saved, task, max(split.encoded.lengths))
    return found


def _check_room(saved: SavedRun, task: Any, longest: int) -> None:
    """Refuse what would not fit the model's positions, which would otherwise fail a batch with others in it."""
    config: Any = saved.model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    new = (task.generation or Generation()).max_new_tokens
    if positions and not config.is_encoder_decoder and longest + new > positions:
        raise TooMuch(
            "positions", f"{longest:,} tokens and {new:,} new ones are more than the model's {positions:,} positions"
        )


def _sure(text: str, stops: Sequence[str]) -> str:
    whole = text.rstrip("�")
    begun = (size for stop in stops for size in range(1, len(stop)) if whole.endswith(stop[:size]))
    return whole[: len(whole) - max(begun, default=0)]
