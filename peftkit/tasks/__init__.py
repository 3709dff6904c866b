"""Tasks. `AnyTask` is the registry: add a class to the union and it is known everywhere."""

from typing import Annotated

from pydantic import Field

from peftkit.tasks.sequence_classification import SequenceClassification
from peftkit.tasks.token_classification import TokenClassification

AnyTask = Annotated[SequenceClassification | TokenClassification, Field(discriminator="kind")]

__all__ = ["AnyTask", "SequenceClassification", "TokenClassification"]
