"""Exact parameter counts from a configuration alone: shapes on the meta device, closed forms for what is added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.backbones.layouts import layout_for
from peftkit.backbones.load import BackboneSettings, Head, meta_model, read_config, resolve_config
from peftkit.backbones.modules import head_modules
from peftkit.errors import MethodError, UsageError
from peftkit.methods.base import Method, module_parameters, numel
from peftkit.planning.specs import parse_method
from peftkit.schema import did_you_mean

if TYPE_CHECKING:
    from torch import nn

MODEL_CLASSES = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "label_words": "AutoModelForCausalLM",
    "completion": "AutoModelForCausalLM",
    "chat": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class Counts:
    """What one method trains and saves on one backbone; every figure is exact."""

    method: str
    adapter_parameters: int
    """Added by the method."""
    tuned_parameters: int
    """The backbone's own that the method trains."""
    head_parameters: int
    """The task's head: trained and saved with every method."""
    trainable_parameters: int
    """Adapter, tuned and head together."""
    saved_parameters: int
    """In the saved files, the most there can be; more than train where an initialization rewrote the base."""
    saved_parameters_lowest: int
    """The least there can be: less than the most where training decides what is kept."""
    backbone_parameters: int
    """The pretrained model without any head."""

    @property
    def trainable_percent(self) -> float:
        """Of backbone + adapter + head."""
        total = self.backbone_parameters + self.adapter_parameters + self.head_parameters
        return 100 * self.trainable_parameters / total

    def as_dict(self) -> dict[str, Any]:
        """The fields and the percentage."""
        return vars(self) | {"trainable_percent": self.trainable_percent}


def count_methods(backbone: str, specs: Sequence[str], task: str | None, labels: int) -> list[Counts]:
    """Counts of each method spec on a backbone (a name, or a folder with config.json).

    Args:
        specs: `KIND` or `KIND:key=value,…`; lists are joined by `+`.
        task: a task's kind, or None for the bare backbone without a head.
        labels: outputs of the head.

    Raises:
        UsageError: a spec that cannot be read, or a method that cannot be on this backbone.
    """
    methods = [(spec, parse_method(spec)) for spec in specs]
    model = planned_model(backbone, task, labels)
    return [count_asked(spec, method, model) for spec, method in methods]


def planned_model(backbone: str, task: str | None, labels: int) -> nn.Module:
    """The shapes of a backbone with the task's head, on the meta device."""
    if labels < 1:
        raise UsageError(f"--labels: a head has at least one output, not {labels}")
    return meta_model(read_config(resolve_config(BackboneSettings(name=backbone))), _head(task, labels))


def count(spec: str, method: Method, model: nn.Module) -> Counts:
    """Counts of one method on a model, which may be on the meta device.

    Raises:
        MethodError: the method cannot be on this model.
    """
    config: Any = model.config
    layout = layout_for(config.model_type, model)
    heads = head_modules(model)
    added, tuned = method.added_parameters(model, layout), method.tuned_parameters(model, heads)
    head = module_parameters(model, heads)
    lowest, highest = method.stored_bounds(model, layout)
    return Counts(
        method=spec,
        adapter_parameters=added,
        tuned_parameters=tuned,
        head_parameters=head,
        trainable_parameters=added + tuned + head,
        saved_parameters=highest + tuned + head,
        saved_parameters_lowest=lowest + tuned + head,
        backbone_parameters=sum(map(numel, model.parameters())) - head,
    )


def count_asked(spec: str, method: Method, model: nn.Module) -> Counts:
    """The same for a method that somebody named, who is told that it cannot be."""
    try:
        return count(spec, method, model)
    except MethodError as error:
        raise UsageError(f"--method {spec}: {error}") from error


def _head(task: str | None, labels: int) -> Head | None:
    if task is None:
        return None
    if task not in MODEL_CLASSES:
        raise UsageError(f"--task: no task '{task}'{did_you_mean(task, MODEL_CLASSES)}")
    outputs = 2 if task == "question_answering" else None  # start and end
    return Head(MODEL_CLASSES[task], tuple(map(str, range(labels))), outputs=outputs)
