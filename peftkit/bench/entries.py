"""The data sets and the methods of a grid. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from peftkit.bench.probes import Name
from peftkit.data.mix import AnyData
from peftkit.methods import AnyMethod, Prompting
from peftkit.planning.specs import parse_number
from peftkit.schema import Section, did_you_mean
from peftkit.tasks import AnyTask
from peftkit.tasks.language_model import LanguageModel
from peftkit.tasks.prompted import Prompted


def _number(value: Any) -> Any:
    """Text such as 300k as a number; anything else as it is."""
    number = parse_number(value) if isinstance(value, str) else None
    return value if number is None else number


Rate = Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(gt=0), BeforeValidator(_number)]
"""A number of parameters, such as 300000, 300k or 0.3M."""
Partial = dict[str, Any]
"""Some settings of a section; they are checked in every run that they become part of."""


class GridData(Section):
    """A task, and how long it is trained on: the same for every method."""

    task: AnyTask
    training: Partial = Field(default_factory=dict)
    score: str | None = None
    """The figure of the task that is compared on test, such as `bleu`; its headline unless named."""
    backbones: tuple[Name, ...] = ()
    """Only these; all unless named."""
    elsewhere: dict[Name, AnyData] = Field(default_factory=dict)
    """Other data with the same columns and labels, on whose test rows the tuned model is scored too."""

    @model_validator(mode="after")
    def _has_the_score(self) -> GridData:
        if self.score is not None and self.score not in self.task.figures:
            near = did_you_mean(self.score, self.task.figures)
            raise ValueError(f"score: task '{self.task.kind}' has no '{self.score}'{near}")
        return self

    @property
    def always(self) -> tuple[str, ...]:
        """Kinds of method without which a comparison says little: what the cheap ones stand in for, and the least that
        can be done: the head alone, or a prompt where the backbone has all that the task needs."""
        if isinstance(self.task, Prompted):
            return ("full", "prompting")
        return ("full",) if isinstance(self.task, LanguageModel) else ("full", "head")


class GridMethod(Section):
    """A method, and the learning rates that are tried for it."""

    method: AnyMethod
    learning_rates: tuple[Rate, ...] = ()
    """Ascending. Where the best on dev is the first or the last, one more beyond it is tried."""
    training: Partial = Field(default_factory=dict)
    backbone: Partial = Field(default_factory=dict)
    """What of the backbone is otherwise for this method, such as the quantization of QLoRA."""
    parameters: Size | None = None
    """The method's size is set so that it trains as nearly so many parameters as it can, beside the task's head."""
    max_length: Annotated[int, Field(gt=2)] | None = None
    """Tokens of an input in place of the task's, for prompts that show solved rows; only where nothing is trained."""
    data: tuple[Name, ...] = ()
    """Only these data sets; all unless named."""

    @model_validator(mode="after")
    def _fits_together(self) -> GridMethod:
        given = self.method.model_fields_set
        if self.parameters is not None and self.method.size in given:
            raise ValueError(f"method.{self.method.size} and parameters say the same thing; give one of them")
        if isinstance(self.method, Prompting) and "seed" in given:
            raise ValueError("method.seed: each of the grid's seeds draws solved rows of its own; leave it out")
        if self.max_length is not None and self.method.trains:
            raise ValueError("max_length: methods that train read inputs of one length; set it in the task, for all")
        return self

    @model_validator(mode="after")
    def _has_rates(self) -> GridMethod:
        if self.method.trains != bool(self.learning_rates):
            raise ValueError(
                "learning_rates are missing: give those to try, such as [1e-4, 2e-4, 4e-4, 8e-4]"
                if self.method.trains
                else f"learning_rates: method '{self.method.kind}' trains nothing; leave them out"
            )
        if list(self.learning_rates) != sorted(set(self.learning_rates)):
            raise ValueError("learning_rates must ascend")
        return self
