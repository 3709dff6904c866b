"""Conversations: the assistant's turns are learnt, everything else is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from peftkit.backbones.load import Head
from peftkit.data.chat_rendering import ChatTemplate, Rendered, Tools
from peftkit.data.chat_templates import TEMPLATES
from peftkit.data.collate import IGNORED
from peftkit.data.conversations import (
    Message,
    fault,
    from_alpaca,
    from_messages,
    from_sharegpt,
    with_system,
    with_turns_first,
)
from peftkit.data.files import Rows
from peftkit.errors import DataError, UsageError
from peftkit.tasks.base import Encoded, Example, Prediction
from peftkit.tasks.generation import Generation
from peftkit.tasks.language_model import ENDS, PROMPT, CausalLanguageModel
from peftkit.tasks.prompted import Prompted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = {"messages": "messages", "sharegpt": "conversations"}


class Chat(CausalLanguageModel, Prompted):
    """Instruction tuning and dialogue: token ids are those of the chat template, the loss is of what the assistant
    writes, the end of its turn included.

    A conversation longer than `max_length` loses whole turns from its end, so that it ends in an answer; only where the
    first answer alone is too long does that lose its end.
    """

    kind: Literal["chat"] = "chat"
    format: Literal["messages", "sharegpt", "alpaca"] = "messages"
    """`messages`: a list of {role, content}. `sharegpt`: a list of {from, value}. `alpaca`: columns of instruction,
    input (may be empty) and output."""
    messages: str | None = None
    """Column of the conversation. Default: messages, or conversations in ShareGPT's format."""
    instruction: str = "instruction"
    input: str | None = "input"
    """Column of what the instruction is about; null where the data has none."""
    output: str = "output"
    tools: str | None = None
    """Column of the tools that the template is given: a list of JSON schemas, or that list as text."""
    system: str | None = None
    """The system text of conversations that have none."""
    template: Literal["chatml", "llama3", "gemma", "zephyr", "mistral", "plain"] | None = None
    """A chat template of ours in place of the backbone's own; `plain` suits base models, for it needs no tokens but
    the end token."""
    loss_on: Literal["assistant", "last_assistant", "all"] = "assistant"

    @model_validator(mode="after")
    def _columns_of_the_format(self) -> Self:
        listed = self.format != "alpaca"
        foreign = {"instruction", "input", "output"} if listed else {"messages"}
        defaults = type(self).model_fields
        if given := [name for name in sorted(foreign) if getattr(self, name) != defaults[name].default]:
            raise ValueError(f"format '{self.format}' has no column {', '.join(given)}; leave it out")
        return self

    def head(self, train: Rows) -> Head:
        return Head("AutoModelForCausalLM", chat_template=self._own_template)

    def demonstration_columns(self) -> tuple[str, ...]:
        return self._columns

    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], supervised: bool = True
    ) -> Encoded:
        return _Encoder(self, rows, tokenizer).encoded(supervised)

    def join(
        self, found: Sequence[Prediction], encoded: Encoded, rows: Rows, tokenizer: PreTrainedTokenizerBase
    ) -> list[Prediction]:
        """Generated tokens become text, up to the end of the answer where that is no token of its own."""
        joined = super().join(found, encoded, rows, tokenizer)
        template = ChatTemplate.of(tokenizer, self._own_template, with_tools=self.tools is not None)
        ending = template.ending().strip() if template.end_token() is None else ""
        for prediction in joined:
            if "text" in prediction:
                text = prediction["text"]
                prediction["text"] = (text.partition(ending)[0] if ending else text).strip()
        return joined

    def rows_from_text(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Rows:
        """Each text is what a user says first."""
        if pairs is not None:
            raise UsageError("this model answers single texts, not pairs")
        if self.tools:
            raise UsageError(f"this model's conversations have '{self.tools}'; give the rows as --file FILE")
        records: list[dict[str, Any]] = [{self.instruction: text} for text in texts]
        if self.format == "messages":
            records = [{self._columns[0]: [{"role": "user", "content": text}]} for text in texts]
        elif self.format == "sharegpt":
            records = [{self._columns[0]: [{"from": "human", "value": text}]} for text in texts]
        return Rows("input", records, range(1, len(texts) + 1))

    def describe(self, prediction: Prediction, record: dict[str, Any]) -> dict[str, Any]:
        return {"messages": _asked(self.conversation(record)), "reply": prediction["text"]}

    def references(self, rows: Rows, labels: Sequence[str]) -> list[list[str]]:
        """The last thing that the assistant says in each conversation; nothing where it calls a tool."""
        chats = (self.conversation(record) for record in rows.records)
        answers = ([one for one in chat if one["role"] == "assistant"] for chat in chats)
        return [[said[-1].get("content") or ""] if said else [""] for said in answers]

    def conversation(self, record: dict[str, Any]) -> Any:
        """The messages of a row, opened by the default system text."""
        if self.format == "alpaca":
            context = record.get(self.input) if self.input else None
            messages: Any = from_alpaca(record.get(self.instruction), context, record.get(self.output))
        else:
            read = from_sharegpt if self.format == "sharegpt" else from_messages
            messages = read(record.get(self._columns[0]))
        return messages if fault(messages, answered=False) else with_system(messages, self.system)

    @property
    def _own_template(self) -> str | None:
        return TEMPLATES[self.template] if self.template else None

    @property
    def _columns(self) -> tuple[str, ...]:
        own: tuple[str | None, ...] = (self.instruction, self.input, self.output)
        if self.format != "alpaca":
            own = (self.messages or COLUMNS[self.format],)
        return tuple(column for column in (*own, self.tools) if column)


class _Encoder:
    """One pass over the rows of a split."""

    def __init__(self, task: Chat, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
        self.task, self.rows = task, rows
        self.template = ChatTemplate.of(tokenizer, task._own_template, with_tools=task.tools is not None)
        self.settings = task.generation or Generation()
        end = self.template.end_token()
        self.ends = [*([] if end is None else [end]), *self.settings.end_tokens(tokenizer)]
        shown = [task.conversation(record) for record in task.demonstrations]
        self.shown = [message for chat in shown for message in chat if message["role"] != "system"]
        self.answers_shown = sum(message["role"] == "assistant" for message in self.shown)

    def encoded(self, supervised: bool) -> Encoded:
        required = self.task._columns if supervised or self.task.format != "alpaca" else (self.task.instruction,)
        self.rows.require(*required)
        examples: list[Example] = []
        owners: list[int] = []
        dropped: dict[int, str] = {}
        truncated = 0
        for index, record in enumerate(self.rows.records):
            messages, tools = self.task.conversation(record), self._tools(index)
            reason = fault(messages, answered=supervised)
            try:
                if reason is None:
                    messages = with_turns_first(messages, self.shown)
                    example, cut = self._example(messages, tools) if supervised else self._question(messages, tools)
            except DataError as error:
                reason = str(error)
            if reason is not None:
                dropped[index] = reason
                continue
            if supervised and self.task.generation:
                wanted = self.settings.limit is None or len(examples) < self.settings.limit
                asked = _before_last_answer(messages)
                example |= {PROMPT: self._fitted(asked, tools)[0] if wanted else None, ENDS: self.ends}
            examples.append(example)
            owners.append(index)
            truncated += cut
        return Encoded(examples, truncated, owners if dropped else None, dropped, self._notes(supervised))

    def _example(self, messages: list[Message], tools: Tools) -> tuple[Example, bool]:
        """Token ids with labels, and whether turns were left out."""
        length = self.task.max_length
        whole = self.template.rendered(messages, tools)
        rendered = whole
        for size in reversed(range(1, len(messages))):
            if len(rendered.ids) <= length:
                break
            if messages[size - 1]["role"] == "assistant":
                rendered = self.template.rendered(messages[:size], tools)
        return {"input_ids": rendered.ids[:length], "labels": self._labels(rendered)[:length]}, len(whole.ids) > length

    def _labels(self, rendered: Rendered) -> list[int]:
        shown, turns = rendered.turns[: self.answers_shown], rendered.turns[self.answers_shown :]
        if not turns or turns[0][0] >= self.task.max_length:
            raise DataError(f"an answer that begins beyond {self.task.max_length} tokens")
        if self.task.loss_on == "last_assistant":
            turns = turns[-1:]
        elif self.task.loss_on == "all":
            turns = [(shown[-1][1] if shown else 0, len(rendered.ids))]
        learnt = {at for first, end in turns for at in range(first, end)}
        return [token if at in learnt else IGNORED for at, token in enumerate(rendered.ids)]

    def _question(self, messages: list[Message], tools: Tools) -> tuple[Example, bool]:
        """What a reply is generated to, of a conversation without one."""
        prompt, cut = self._fitted(_asked(messages), tools)
        return {"input_ids": prompt, PROMPT: prompt, ENDS: self.ends}, cut

    def _fitted(self, messages: list[Message], tools: Tools) -> tuple[list[int], bool]:
        """The prompt, without the oldest turns of a conversation that is too long."""
        opening = 1 if messages[0]["role"] == "system" else 0
        ids = self.template.ids(messages, tools, prompt=True)
        starts = [at for at, one in enumerate(messages) if one["role"] == "user" and at > opening]
        for start in starts:
            if len(ids) <= self.task.max_length:
                return ids, start != starts[0]
            ids = self.template.ids([*messages[:opening], *messages[start:]], tools, prompt=True)
        if len(ids) > self.task.max_length:
            raise DataError(f"a question of more than {self.task.max_length} tokens")
        return ids, bool(starts)

    def _tools(self, index: int) -> Tools:
        """The tools of a row, which some files hold as JSON text."""
        if self.task.tools is None:
            return None
        value = self.rows.records[index].get(self.task.tools)
        try:
            tools = json.loads(value) if isinstance(value, str) and value.strip() else value or None
        except ValueError as error:
            raise DataError(f"{self.rows.where(index)}: '{self.task.tools}' is not JSON: {error}") from None
        if tools is not None and not (isinstance(tools, list) and all(isinstance(one, dict) for one in tools)):
            raise DataError(f"{self.rows.where(index)}: '{self.task.tools}' is not a list of JSON schemas")
        return tools

    def _notes(self, supervised: bool) -> tuple[str, ...]:
        ending = self.template.ending()
        if not supervised or self.template.end_token() is not None:
            return ()
        if not ending:
            return ("the chat template writes nothing behind an answer, so the model does not learn where to stop",)
        return (f"the tokenizer has no token for the end of an answer, {ending!r}, which is learnt as text",)


def _before_last_answer(messages: list[Message]) -> list[Message]:
    return messages[: max(at for at, one in enumerate(messages) if one["role"] == "assistant")]


def _asked(messages: list[Message]) -> list[Message]:
    """A conversation up to where the assistant speaks last; all of it, where others speak last."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages
