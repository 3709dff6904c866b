"""A conversation as token ids, and which of them the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.data.conversations import Message
from peftkit.data.prompts import bare_ids
from peftkit.errors import DataError, UsageError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = list[Any] | None
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "peftkit"


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it."""

    ids: list[int]
    turns: list[tuple[int, int]]
    """(first token, one past the last) of what the assistant wrote, the end of its turn included; in order."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the tokenizer it is for."""

    tokenizer: PreTrainedTokenizerBase
    source: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, own: str | None, with_tools: bool) -> ChatTemplate:
        """`own`, or the one that the tokenizer came with.

        Raises:
            UsageError: there is none, or it does not know tools.
        """
        source = own or tokenizer.chat_template
        if not source:
            raise UsageError(
                "the backbone's tokenizer has no chat template; name one as task.template, such as chatml or plain"
            )
        text = tokenizer.get_chat_template(source, tools=[{}] if with_tools else None)
        if with_tools and "tools" not in text:
            raise UsageError(
                "task.tools: the chat template does not write tools; leave them out or use another template"
            )
        return cls(tokenizer, text)

    def text(self, messages: Sequence[Message], tools: Tools = None, prompt: bool = False) -> str:
        """What the model reads; with `prompt` up to where the assistant begins to write.

        Raises:
            DataError: the template refuses the conversation.
        """
        from jinja2 import TemplateError

        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, chat_template=self.source, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:  # a template is a program
            raise DataError(f"the chat template refuses it: {first_line(error)}") from error
        return str(rendered)

    def ids(self, messages: Sequence[Message], tools: Tools = None, prompt: bool = False) -> list[int]:
        """The tokens of `text`."""
        return bare_ids(self.tokenizer, [self.text(messages, tools, prompt)])[0]

    def rendered(self, messages: Sequence[Message], tools: Tools = None) -> Rendered:
        """The whole conversation, as `apply_chat_template` writes it, with the assistant's turns.

        Raises:
            DataError: the template refuses it, or writes turns in a way that does not tell who wrote what.
        """
        if MARKED.search(self.source):
            return self._marked(messages, tools)
        text = self.text(messages, tools)
        encoding = self.tokenizer(text, add_special_tokens=False)
        places = [self._place(messages, turn, text, tools) for turn, one in enumerate(messages) if _answers(one)]
        return Rendered(encoding.input_ids, [_tokens(encoding, start, end) for start, end in places])

    def ending(self) -> str:
        """What the template writes behind an assistant turn, without the line break that some put after that; empty
        if nothing."""
        text = self.text([{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}])
        tail = text.rpartition(PROBE)[2]
        return tail.strip() or tail

    def end_token(self) -> int | None:
        """The token that ends an assistant turn, where a token of its own does."""
        ids = bare_ids(self.tokenizer, [self.ending()])[0]
        return ids[0] if len(ids) == 1 and ids[0] in self.tokenizer.added_tokens_decoder else None

    def _marked(self, messages: Sequence[Message], tools: Tools) -> Rendered:
        """By the template's own `{% generation %}` marks."""
        self.text(messages, tools)  # tells best why a template refuses
        encoding: Any = self.tokenizer.apply_chat_template(
            list(messages), tools=tools, chat_template=self.source, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = [0, *encoding["assistant_masks"], 0]
        starts = [at for at in range(1, len(mask)) if mask[at] > mask[at - 1]]
        ends = [at for at in range(1, len(mask)) if mask[at] < mask[at - 1]]
        return Rendered(list(encoding["input_ids"]), [(s - 1, e - 1) for s, e in zip(starts, ends, strict=True)])

    def _place(self, messages: Sequence[Message], turn: int, whole: str, tools: Tools) -> tuple[int, int]:
        """(start, end) in characters: from where the generation prompt ends to where the turn does."""
        before, bare = self.text(messages[:turn], tools, prompt=True), self.text(messages[:turn], tools)
        upto = whole if turn + 1 == len(messages) else self.text(messages[: turn + 1], tools)
        if not (upto.startswith(before) and whole.startswith(upto)):
            raise DataError(
                "the chat template writes earlier turns otherwise once others follow (it may drop their reasoning), so "
                "what the assistant wrote cannot be found; use a template with generation marks, "
                "or keep one answer a conversation"
            )
        said, content = upto[len(before) :], (messages[turn].get("content") or "").strip()
        if before == bare and content and not said.lstrip().startswith(content):
            raise DataError(
                "the chat template has no generation prompt, so its header of an assistant turn would be learnt as "
                "text; use another as task.template"
            )
        return len(before), len(before) + len(self._without_break(said))

    def _without_break(self, said: str) -> str:
        """A turn without the line break behind the token that ends it, which the model never has to write."""
        stripped = said.rstrip()
        tokens = (str(token) for token in self.tokenizer.added_tokens_decoder.values())
        return stripped if stripped.endswith(tuple(tokens)) else said


def _answers(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _tokens(encoding: Any, start: int, end: int) -> tuple[int, int]:
    """The tokens of a stretch of characters; some characters, such as spaces, belong to none."""
    found = [token for at in range(start, end) if (token := encoding.char_to_token(at)) is not None]
    return (found[0], found[-1] + 1) if found else (0, 0)
