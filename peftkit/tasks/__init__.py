"""Tasks. `AnyTask` is the registry: add a class to the union and it is known everywhere."""

from typing import Annotated

from pydantic import Field

from peftkit.tasks.chat import Chat
from peftkit.tasks.completion import Completion
from peftkit.tasks.label_words import LabelWords
from peftkit.tasks.plain_text import PlainText
from peftkit.tasks.question_answering import QuestionAnswering
from peftkit.tasks.relation_extraction import RelationExtraction
from peftkit.tasks.seq2seq import Seq2Seq
from peftkit.tasks.sequence_classification import SequenceClassification
from peftkit.tasks.token_classification import TokenClassification

AnyTask = Annotated[
    Chat
    | Completion
    | LabelWords
    | PlainText
    | QuestionAnswering
    | Seq2Seq
    | SequenceClassification
    | RelationExtraction
    | TokenClassification,
    Field(discriminator="kind"),
]

__all__ = [
    "AnyTask",
    "Chat",
    "Completion",
    "LabelWords",
    "PlainText",
    "QuestionAnswering",
    "RelationExtraction",
    "Seq2Seq",
    "SequenceClassification",
    "TokenClassification",
]
