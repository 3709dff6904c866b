"""Methods as they are written on the command line, and every published method at its paper's setting."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from peftkit.config_file import parse_document
from peftkit.errors import ConfigError, UsageError
from peftkit.methods import METHODS, AnyMethod
from peftkit.methods.base import Method
from peftkit.schema import did_you_mean

SUFFIXES = {"k": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class Spec:
    """A method in the words of the command line, and what people call it."""

    text: str
    """`KIND` or `KIND:key=value,…`; lists are joined by `+`."""
    label: str


# Settings are those of the papers' main experiments; where a paper varies them, its usual one.
PUBLISHED = (
    Spec("lora:rank=8,targets=query_value", "LoRA, query+value (Hu et al. 2021)"),
    Spec("lora:rank=8,targets=all", "LoRA, all linear layers"),
    Spec("lora:rank=8,targets=all,variant=dora", "DoRA, all linear layers (Liu et al. 2024)"),
    Spec("adalora:target_rank=8,targets=all", "AdaLoRA, all linear layers (Zhang et al. 2023)"),
    Spec("vera:rank=256,targets=all", "VeRA, all linear layers (Kopiczko et al. 2024)"),
    Spec("ia3", "(IA)³ (Liu et al. 2022)"),
    Spec("bottleneck:placement=houlsby,bottleneck_size=64,train_layernorm=true", "adapters (Houlsby et al. 2019)"),
    Spec("bottleneck:placement=pfeiffer", "adapters (Pfeiffer et al. 2021)"),
    Spec("bottleneck:placement=parallel,bottleneck_size=512", "parallel adapters (He et al. 2022)"),
    Spec("prefix:length=20", "prefix tuning"),
    Spec("prefix:length=20,reparametrization_size=512", "prefix tuning with an MLP (Li & Liang 2021)"),
    Spec("prompt:length=20", "prompt tuning (Lester et al. 2021)"),
    Spec("prompt:length=100", "prompt tuning (Lester et al. 2021)"),
    Spec("p_tuning", "P-tuning (Liu et al. 2021)"),
    Spec("bitfit", "BitFit (Ben Zaken et al. 2022)"),
    Spec("layernorm", "normalisations alone"),
    Spec("top_layers:layers=2", "top layers"),
    Spec("head", "head alone"),
    Spec("full", "full fine-tuning"),
)


def published() -> list[Spec]:
    """The specs of the kinds that are registered."""
    return [spec for spec in PUBLISHED if spec.text.partition(":")[0] in METHODS]


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


def with_value(spec: str, key: str, value: int) -> str:
    """The same spec with another value of one key."""
    kind, _, rest = spec.partition(":")
    others = [item for item in rest.split(",") if item and item.partition("=")[0] != key]
    return f"{kind}:{','.join([f'{key}={value}', *others])}"


def parse_number(text: str) -> int | None:
    """300000, 0.3M, 2k or 1B as a whole number; None for anything else."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)([kMB]?)", text)
    if match is None or (not match[2] and not text.isdecimal()):
        return None
    return round(float(match[1]) * SUFFIXES[match[2]]) if match[2] else int(text)


def _value(text: str, spec: str) -> Any:
    """A YAML scalar; 0.3M is 300,000."""
    if text[-1:] in SUFFIXES and (number := parse_number(text)) is not None:
        return number
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
