"""A prompt and the text that is to follow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from peftkit.backbones.load import Head
from peftkit.data.collate import IGNORED
from peftkit.data.continuations import continued_ids
from peftkit.data.files import Rows
from peftkit.data.prompts import bare_ids, leading_tokens
from peftkit.data.templates import Template, columns, render, render_rows
from peftkit.errors import UsageError
from peftkit.schema import changed
from peftkit.tasks.base import Encoded, Example, Prediction, refuse_rows
from peftkit.tasks.generation import Generation
from peftkit.tasks.language_model import ENDS, PROMPT, CausalLanguageModel
from peftkit.tasks.prompted import Prompted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Completion(CausalLanguageModel, Prompted):
    """Question and answer, table and sentence, source and target: rows of a prompt and its completion.

    A row longer than `max_length` loses the beginning of its prompt first, and the end of its completion only where
    the completion alone is too long.
    """

    kind: Literal["completion"] = "completion"
    prompt: str = "prompt"
    completion: str = "completion"
    """Columns. A completion may be a list of texts: the loss is of the first, generated text is compared with all."""
    prompt_template: Template | None = None
    """Such as `Question: {question}\\nAnswer:`, in place of the column. It should not end in a space: most tokenizers
    count that to the word behind it."""
    completion_template: Template | None = None
    """Such as ` {answer}`."""
    separator: str = "\n\n"
    """What stands after each demonstration."""
    loss_on: Literal["completion", "all"] = "completion"
    end_token: bool = True
    """The tokenizer's end token stands behind every completion, and is learnt like the rest of it."""
    reference_columns: tuple[str, ...] = ()
    """Columns of further texts that generated text is compared with, in the rows that have them."""
    grouped_references: bool = False
    """Rows with the same prompt are references of one another: text is generated once for all of them."""

    @model_validator(mode="after")
    def _column_or_template(self) -> Self:
        for name in ("prompt", "completion"):
            if changed(self, name) and getattr(self, f"{name}_template") is not None:
                raise ValueError(f"{name} and {name}_template say the same thing; give one of them")
        return self

    def demonstration_columns(self) -> tuple[str, ...]:
        prompt = columns(self.prompt_template) if self.prompt_template else (self.prompt,)
        completion = columns(self.completion_template) if self.completion_template else (self.completion,)
        return tuple(dict.fromkeys((*prompt, *completion)))

    def head(self, train: Rows) -> Head:
        return Head("AutoModelForCausalLM")

    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], supervised: bool = True
    ) -> Encoded:
        if not supervised:
            return self._encoded_prompts(self._prompts(rows), tokenizer)
        prompts, leading, end = self._prompts(rows), leading_tokens(tokenizer), self._end(tokenizer)
        pairs = continued_ids(tokenizer, prompts, [texts[0] for texts in self._completions(rows)])
        nothing = [index for index, (_, completion) in enumerate(pairs) if not completion + end]
        refuse_rows(rows, nothing, "the completion has no tokens", "remove the row or set end_token: true")
        examples = [self._example(leading, prompt, [*completion, *end]) for prompt, completion in pairs]
        whole = [len(leading) + len(prompt) + len(completion) + len(end) for prompt, completion in pairs]
        room = self.max_length - (len(leading) or 1)
        shortened = sum(len(completion) + len(end) > room for _, completion in pairs)
        notes = (f"{shortened:,} of {len(rows):,} completions lose their ends",) if shortened else ()
        if self.generation:
            self._add_prompts(examples, prompts, tokenizer, self.generation)
        return Encoded(examples, sum(size > self.max_length for size in whole), notes=notes)

    def rows_from_text(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Rows:
        """Texts are prompts; where a template has a single column, texts are what it takes."""
        if pairs is not None:
            raise UsageError("this model completes single texts, not pairs")
        names = columns(self.prompt_template) if self.prompt_template else (self.prompt,)
        if len(names) != 1:
            wanted = ", ".join(names) or "none"
            raise UsageError(f"task.prompt_template takes {len(names)} columns ({wanted}); give a file that has them")
        return Rows("input", [{names[0]: text} for text in texts], range(1, len(texts) + 1))

    def describe(self, prediction: Prediction, record: dict[str, Any]) -> dict[str, Any]:
        prompt = render(self.prompt_template, record) if self.prompt_template else record[self.prompt]
        return {"prompt": prompt, "completion": prediction["text"]}

    def references(self, rows: Rows, labels: Sequence[str]) -> list[list[str]]:
        """The texts that each row's completion may be."""
        completions = [
            [*texts, *(str(record[column]) for column in self.reference_columns if record.get(column))]
            for texts, record in zip(self._completions(rows), rows.records, strict=True)
        ]
        if not self.grouped_references:
            return completions
        prompts, groups = self._prompts(rows), dict[str, dict[str, None]]()
        for prompt, texts in zip(prompts, completions, strict=True):
            groups.setdefault(prompt, {}).update(dict.fromkeys(texts))
        return [list(groups[prompt]) for prompt in prompts]

    def _example(self, leading: list[int], prompt: list[int], completion: list[int]) -> Example:
        room = self.max_length - len(leading)
        # the first token must have something in front that it can be predicted from
        completion = completion[: room - (0 if leading else 1)]
        kept = prompt[max(0, len(prompt) - (room - len(completion))) :]
        ids = [*leading, *kept, *completion]
        before = 0 if self.loss_on == "all" else len(ids) - len(completion)
        return {"input_ids": ids, "labels": [IGNORED] * before + ids[before:]}

    def _add_prompts(
        self, examples: list[Example], prompts: list[str], tokenizer: PreTrainedTokenizerBase, settings: Generation
    ) -> None:
        """What text is generated after, for as many rows as there is a limit; for each prompt once, if grouped."""
        ends, ids = settings.end_tokens(tokenizer), self._prompt_ids(prompts, tokenizer)
        first = dict(zip(reversed(prompts), reversed(range(len(prompts))), strict=True))
        chosen = sorted(first.values()) if self.grouped_references else range(len(prompts))
        wanted = set(chosen[: settings.limit])
        for index, example in enumerate(examples):
            example |= {PROMPT: ids[index] if index in wanted else None, ENDS: ends}

    def _encoded_prompts(self, prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> Encoded:
        ends = (self.generation or Generation()).end_tokens(tokenizer)
        whole = [len(ids) for ids in bare_ids(tokenizer, prompts)]
        found = self._prompt_ids(prompts, tokenizer)
        examples = [{"input_ids": ids, PROMPT: ids, ENDS: ends} for ids in found]
        room = self.max_length - len(leading_tokens(tokenizer))
        return Encoded(examples, sum(size > room for size in whole))

    def _prompt_ids(self, prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Prompts alone, without the beginning of those that are too long."""
        leading = leading_tokens(tokenizer)
        room = self.max_length - len(leading)
        return [[*leading, *ids[max(0, len(ids) - room) :]] for ids in bare_ids(tokenizer, prompts)]

    def _end(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        if not self.end_token:
            return []
        if tokenizer.eos_token_id is None:
            raise UsageError("task.end_token: the backbone's tokenizer has no end token; set end_token: false")
        return [int(tokenizer.eos_token_id)]

    def _prompts(self, rows: Rows) -> list[str]:
        """What stands in front of each completion, the demonstrations first."""
        shown = self.demonstration_rows()
        pairs = zip(self._own_prompts(shown), self._completions(shown), strict=True)
        preamble = "".join(prompt + texts[0] + self.separator for prompt, texts in pairs)
        return [preamble + prompt for prompt in self._own_prompts(rows)]

    def _own_prompts(self, rows: Rows) -> list[str]:
        if self.prompt_template:
            return render_rows(self.prompt_template, rows)
        return [texts[0] for texts in _texts(rows, self.prompt, several=False)]

    def _completions(self, rows: Rows) -> list[list[str]]:
        if self.completion_template:
            return [[text] for text in render_rows(self.completion_template, rows)]
        return _texts(rows, self.completion, several=True)


def _texts(rows: Rows, column: str, several: bool) -> list[list[str]]:
    """The text, or the texts, in a column of each row.

    Raises:
        DataError: a row has none there.
    """
    rows.require(column)
    values = [record[column] for record in rows.records]
    found = [value if several and isinstance(value, list) else [value] for value in values]
    wrong = [i for i, texts in enumerate(found) if not texts or not all(isinstance(one, str) for one in texts)]
    refuse_rows(rows, wrong, f"no text in '{column}'", "fill it in, or write it with a template")
    blank = [i for i, texts in enumerate(found) if not all(text.strip() for text in texts)]
    refuse_rows(rows, blank, f"no text in '{column}'", "remove the row or fill it in")
    return found
