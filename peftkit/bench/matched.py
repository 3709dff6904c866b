"""Methods brought to one number of trainable parameters, so that a comparison is of methods and not of sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from peftkit.backbones.load import BackboneSettings, Head
from peftkit.errors import PeftkitError, UsageError
from peftkit.methods import AnyMethod, Method
from peftkit.tasks import AnyTask, PlainText

_METHOD: TypeAdapter[Method] = TypeAdapter(AnyMethod)


@dataclass(frozen=True)
class Matched:
    """The size at which a method comes closest to a number of parameters."""

    name: str
    """Of the hyperparameter, such as `rank`."""
    size: int
    reached: int
    """Parameters."""
    asked: int

    def __str__(self) -> str:
        apart = round(100 * (self.reached - self.asked) / self.asked, 1) or 0.0
        return f"{self.name}={self.size} trains {self.reached:,} parameters, of {self.asked:,} asked for ({apart:+g} %)"


def matched(method: Method, backbone: BackboneSettings, task: AnyTask, parameters: int) -> Matched:
    """The size at which a method trains as nearly so many parameters as it can on a backbone.

    What is counted is what `peftkit params --budget` counts: what trains without the task's head, at the start of
    training. Needs the backbone's configuration, and no weights.

    Raises:
        UsageError: the method has one size only, or reaches the number at none.
    """
    settings, model_class = backbone.model_dump_json(), _model_class(task)
    found = _matched(method.model_dump_json(), settings, model_class, parameters)
    taken = method.model_copy(update={found.name: found.size}).virtual_tokens()
    limit = getattr(_shapes(settings, model_class).config, "max_position_embeddings", None)
    if taken and limit and task.longest_input + taken > limit:
        raise UsageError(
            f"parameters: for {parameters:,} method '{method.kind}' needs {found.name}={found.size}, and with "
            f"task.max_length {task.max_length} that is more than the {limit} tokens that {backbone.name} takes; lower "
            "one of the two"
        )
    return found


@cache
def _matched(written: str, settings: str, model_class: str, parameters: int) -> Matched:
    from peftkit.planning.budget import budgeted, fit

    method = _METHOD.validate_json(written)
    if method.size is None:
        raise UsageError(
            f"parameters: method '{method.kind}' has no size to set; leave parameters out, and it stands beside the "
            "others with the number that it has"
        )
    try:
        model = _shapes(settings, model_class)
        found = fit(method, model, parameters)
    except PeftkitError as error:
        raise UsageError(f"parameters: {error}") from error
    size, reached = getattr(found.method, method.size), budgeted(found.method, model)
    if found.note:
        end = "least" if found.note == "smallest" else "most"
        raise UsageError(
            f"parameters: {parameters:,} cannot be met: the {end} that method '{method.kind}' can train here is "
            f"{reached:,}, with {method.size}={size}; set another number, or leave it out"
        )
    return Matched(method.size, size, reached, parameters)


def _model_class(task: AnyTask) -> str:
    from peftkit.planning.parameters import MODEL_CLASSES

    if isinstance(task, PlainText):
        return "AutoModelForCausalLM" if task.objective == "causal" else "AutoModelForMaskedLM"
    return MODEL_CLASSES.get(task.kind, "AutoModelForSequenceClassification")


@cache
def _shapes(settings: str, model_class: str) -> Any:
    from peftkit.backbones.load import chosen_config, meta_model, resolve_config

    backbone = BackboneSettings.model_validate_json(settings)
    return meta_model(chosen_config(backbone, resolve_config(backbone)), Head(model_class))
