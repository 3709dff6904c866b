"""Questions with their contexts as windows of tokens, and answers as tokens of a window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.data.collate import IGNORED
from peftkit.data.files import Rows
from peftkit.tasks.answer_spans import NULL
from peftkit.tasks.base import Encoded, Example, refuse_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Answer = tuple[int, int]
"""Characters of the context: [start, end)."""
OUTSIDE = [-1, -1]
"""The offsets of tokens that are no part of the context."""


@dataclass(frozen=True)
class Windows:
    """How contexts are cut: `length` tokens in all, of which `stride` of the context are in the next window too."""

    length: int
    stride: int

    def encoded(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        answers: Sequence[Answer | None] | None,
    ) -> Encoded:
        """Every window of every row. An example holds `offsets`, those of each token in the context.

        Args:
            answers: of each row, None where the question has none; None altogether where nothing is supervised.
        """
        pairs = _pairs(questions, contexts, tokenizer)
        self._refuse_long_questions(pairs, rows)
        examples: list[Example] = []
        owners: list[int] = []
        cut = 0
        spans = _spans(pairs, answers, rows) if answers is not None else [None] * len(pairs)
        for index, (pair, span) in enumerate(zip(pairs, spans, strict=True)):
            windows = list(pair.windows(self.length, self.stride))
            if answers is not None:
                cut += not _label(windows, span, pair.first)
            examples += [example for _, example in windows]
            owners += [index] * len(windows)
        lost = f"{cut:,} answers are whole in no window of {self.length} tokens, and are not learnt"
        return Encoded(examples, 0, owners, notes=(lost,) if cut else ())

    def _refuse_long_questions(self, pairs: Sequence[_Pair], rows: Rows) -> None:
        lost = [i for i, pair in enumerate(pairs) if all(one == OUTSIDE for one in pair.offsets)]
        refuse_rows(rows, lost, "the context has no token that the tokenizer knows", "remove the row")
        long = [i for i, pair in enumerate(pairs) if pair.room(self.length) <= self.stride < pair.stop - pair.first]
        refuse_rows(
            rows,
            long,
            f"the question leaves no more of {self.length} tokens to its context than the stride of {self.stride}",
            "raise task.max_length, lower task.stride, or shorten the question",
        )


class _Pair:
    """A question and its context as one sequence of tokens, of which [first, stop) are the context's."""

    def __init__(self, columns: dict[str, list[int]], encoding: Any) -> None:
        context = [position for position, part in enumerate(encoding.sequence_ids) if part == 1]
        self.first, self.stop = (context[0], context[-1] + 1) if context else (0, 0)
        self.columns, self.size = columns, len(encoding.ids)
        self.offsets = [list(one) if one[0] < one[1] else OUTSIDE for one in encoding.offsets[self.first : self.stop]]

    def room(self, length: int) -> int:
        """Tokens of the context in one window."""
        return length - (self.size - (self.stop - self.first))

    def windows(self, length: int, stride: int) -> Iterator[tuple[range, Example]]:
        """(which tokens of the context, the example)"""
        room, count = self.room(length), self.stop - self.first
        start = 0
        while True:
            end = min(start + room, count)
            yield range(start, end), self._window(start, end)
            if end == count:
                return
            start += room - stride

    def tokens_of(self, answer: Answer) -> tuple[int, int] | None:
        """The first and the last token of the answer, counted in the context; None where it has no token."""
        start, end = answer
        inside = [i for i, (begin, stop) in enumerate(self.offsets) if begin >= 0 and begin < end and stop > start]
        return (inside[0], inside[-1]) if inside else None

    def _window(self, start: int, end: int) -> Example:
        example: Example = {
            key: [*ids[: self.first], *ids[self.first + start : self.first + end], *ids[self.stop :]]
            for key, ids in self.columns.items()
        }
        behind = self.size - self.stop
        example["offsets"] = [OUTSIDE] * self.first + self.offsets[start:end] + [OUTSIDE] * behind
        return example


def _pairs(questions: Sequence[str], contexts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[_Pair]:
    if tokenizer.num_special_tokens_to_add(pair=True) == tokenizer.num_special_tokens_to_add(pair=False):
        # nothing would stand between them
        questions = [f"{question}\n" for question in questions]
    encoding = tokenizer(list(questions), list(contexts), truncation=False, verbose=False)
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoding]
    return [_Pair({key: encoding[key][i] for key in keys}, encoding.encodings[i]) for i in range(len(questions))]


def _spans(pairs: Sequence[_Pair], answers: Sequence[Answer | None], rows: Rows) -> list[tuple[int, int] | None]:
    """The tokens of each answer; None where there is none."""
    spans = [answer and pair.tokens_of(answer) for pair, answer in zip(pairs, answers, strict=True)]
    lost = [i for i, (span, answer) in enumerate(zip(spans, answers, strict=True)) if answer and not span]
    refuse_rows(rows, lost, "the answer has no token that the tokenizer knows", "remove the row")
    return spans


def _label(windows: Sequence[tuple[range, Example]], span: tuple[int, int] | None, shift: int) -> bool:
    """Start and end of the answer where a window holds it whole, `NULL` elsewhere.

    Returns:
        False where no window does; then nothing is supervised, for `NULL` in all would teach that there is no answer.
    """
    held = [span is not None and span[0] in tokens and span[1] in tokens for tokens, _ in windows]
    for (tokens, example), holds in zip(windows, held, strict=True):
        if span is not None and holds:
            example["labels"] = [shift + position - tokens.start for position in span]
        else:
            example["labels"] = [NULL, NULL] if span is None or any(held) else [IGNORED, IGNORED]
    return span is None or any(held)
