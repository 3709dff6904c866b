"""Exact parameter counts from a configuration alone: shapes on the meta device, closed forms for what is added."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from peftkit.backbones.layouts import layout_for
from peftkit.backbones.load import BackboneSettings, Head, meta_model, read_config, resolve_config
from peftkit.backbones.modules import head_modules
from peftkit.config_file import parse_document
from peftkit.errors import ConfigError, MethodError, UsageError
from peftkit.methods import METHODS, AnyMethod
from peftkit.methods.base import Method, module_parameters
from peftkit.schema import did_you_mean

if TYPE_CHECKING:
    from torch import nn

MODEL_CLASSES = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
}
SUFFIXES = {"k": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class Counts:
    """What one method trains and saves on one backbone; every figure is exact."""

    method: str
    adapter_parameters: int
    """Added by the method."""
    head_parameters: int
    """The task's head: trained and saved with every method."""
    trainable_parameters: int
    saved_parameters: int
    """In the saved files; more than train where an initialization rewrote the base."""
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
    """
    methods = [(spec, parse_method(spec)) for spec in specs]
    if labels < 1:
        raise UsageError(f"--labels: a head has at least one output, not {labels}")
    model = meta_model(read_config(resolve_config(BackboneSettings(name=backbone))), _head(task, labels))
    return [_count_asked(spec, method, model) for spec, method in methods]


def count(spec: str, method: Method, model: nn.Module) -> Counts:
    """Counts of one method on a model, which may be on the meta device."""
    config: Any = model.config
    layout = layout_for(config.model_type, model)
    heads = head_modules(model)
    added = method.added_parameters(model, layout)
    head = module_parameters(model, heads)
    trained = added + head + method.tuned_parameters(model, heads)
    return Counts(
        method=spec,
        adapter_parameters=added,
        head_parameters=head,
        trainable_parameters=trained,
        saved_parameters=trained - added + method.stored_parameters(model, layout),
        backbone_parameters=sum(p.numel() for p in model.parameters()) - head,
    )


def parse_method(spec: str) -> Method:
    """`lora:rank=8,targets=query+value` as a method.

    Raises:
        UsageError: no such kind or key, or a value that does not fit.
    """
    kind, _, rest = spec.partition(":")
    values: dict[str, Any] = {"kind": kind}
    for item in filter(None, rest.split(",")):
        key, equals, text = item.partition("=")
        if not equals:
            raise UsageError(f"--method {spec}: '{item}' is not key=value")
        if key in values:
            raise UsageError(f"--method {spec}: '{key}' is given twice; keep one")
        values[key] = _value(text, spec)
    try:
        method: Method = TypeAdapter(AnyMethod).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UsageError(f"--method {spec}: {_reason(error, kind)}") from None
    return method


def _count_asked(spec: str, method: Method, model: nn.Module) -> Counts:
    try:
        return count(spec, method, model)
    except MethodError as error:
        raise UsageError(f"--method {spec}: {error}") from error


def _head(task: str | None, labels: int) -> Head | None:
    if task is None:
        return None
    if task not in MODEL_CLASSES:
        raise UsageError(f"--task: no task '{task}'{did_you_mean(task, MODEL_CLASSES)}")
    return Head(MODEL_CLASSES[task], tuple(map(str, range(labels))))


def _value(text: str, spec: str) -> Any:
    """A YAML scalar; 0.3M is 300,000."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)([kMB])", text)
    if match:
        return round(float(match[1]) * SUFFIXES[match[2]])
    try:
        return parse_document(f"value: {text}", spec).tree["value"]
    except ConfigError:
        raise UsageError(f"--method {spec}: cannot read the value '{text}'") from None


def _reason(error: ValidationError, kind: str) -> str:
    first = error.errors()[0]
    if first["type"] == "union_tag_invalid":
        kinds = str((first.get("ctx") or {}).get("expected_tags", "")).replace("'", "").split(", ")
        return f"no method '{kind}'{did_you_mean(kind, kinds)}"
    name = str(first["loc"][1]) if len(first["loc"]) > 1 else kind
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", str((first.get("ctx") or {}).get("expected", "")))
        return f"{name}: no '{first['input']}'{did_you_mean(str(first['input']), choices)}"
    if first["type"] == "extra_forbidden":
        return f"'{kind}' has no '{name}'{did_you_mean(name, set(METHODS[kind].model_fields) - {'kind'})}"
    return f"{name}: {first['msg'].removeprefix('Value error, ')}"
