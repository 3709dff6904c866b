"""What requests and answers look like; the OpenAPI document is made from these."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _encodable(value: Any) -> Any:
    """Refuse halves of surrogate pairs, which JSON can escape and no text holds, and numbers that are none."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (UnicodeEncodeError, ValueError):
        raise ValueError("holds what is no text: half of a surrogate pair, NaN or infinity") from None
    return value


Text = Annotated[str, Field(min_length=1, pattern=r"\S"), AfterValidator(_encodable)]
Scalar = str | int | float | bool | None
Value = Scalar | list[Scalar | dict[str, Scalar]] | dict[str, Scalar | list[Scalar]]
"""What a column may hold: a text, a list of words, a list of messages."""
Row = Annotated[dict[str, Value], Field(min_length=1), AfterValidator(_encodable)]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Question(Message):
    """What to predict: texts, or rows with the columns that the run was trained on."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"texts": ["a lovely film"]}, {"texts": ["Who sings?"], "pairs": ["Alice sings."]}],
            "oneOf": [{"required": ["texts"]}, {"required": ["rows"], "not": {"required": ["pairs"]}}],
        }
    )

    texts: list[Text] = Field(default=[], min_length=1)
    """As a person types them."""
    pairs: list[Text] = Field(default=[], min_length=1)
    """The second text of each, where the task takes two: for a question its context."""
    rows: list[Row] = Field(default=[], min_length=1)

    @model_validator(mode="after")
    def _texts_or_rows(self) -> Question:
        given = self.model_fields_set
        if ("texts" in given) == ("rows" in given) or {"pairs", "rows"} <= given:
            raise ValueError("give texts (with pairs, where the task takes two), or rows")
        return self

    @property
    def size(self) -> int:
        """Texts, or rows."""
        return len(self.texts) or len(self.rows)


class WritingQuestion(Message):
    """What to write after."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "Once upon a time", "max_new_tokens": 32}]})

    text: Text
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Default: as many as the run's own setting, at most what the service allows."""


class Answer(Message):
    adapter: str
    predictions: list[dict[str, Any]]
    """What `peftkit predict` shows, one a text."""
    tokens: int
    """Read, over all texts."""
    cut: int
    """Texts that were longer than the run's `task.max_length` and lost a part."""


class Event(Message):
    """A server-sent event: pieces of text as they are written, then what `peftkit predict` shows, or what went
    wrong."""

    event: Literal["message", "done", "error"] = "message"
    data: str = Field(json_schema_extra={"contentMediaType": "application/json"})
    """`{"text": piece}`, a whole prediction, or `{"error": what is wrong}`."""


class AdapterInfo(Message):
    name: str
    task: str
    method: str
    labels: list[str]
    takes_pairs: bool
    writes: bool
    """Whether it can be asked at `/stream`."""
    mixes: bool
    """Whether its texts can share a forward pass with those of other adapters."""
    alone_because: str
    own_bytes: int
    """Memory beside the shared backbone."""
    run_id: str


class Adapters(Message):
    backbone: str
    weights_sha256: str
    backbone_bytes: int
    adapters: list[AdapterInfo]


class State(Message):
    status: str


class Reloaded(Message):
    loaded: list[str]
    """Whose folders had changed."""
    kept: dict[str, str]
    """What stays as it was because its folder cannot be loaded, and why."""


class Failure(Message):
    error: str
