"""One frozen, typed description of a fine-tuning run, read from YAML and the command line."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from peftkit.backbones.load import BackboneSettings
from peftkit.config_file import Document, KeyPath, read_document
from peftkit.errors import ConfigError, UsageError
from peftkit.methods import AnyMethod
from peftkit.methods.base import Method
from peftkit.schema import Section, did_you_mean, nearest
from peftkit.tasks import AnyTask

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class TrainingSettings(Section):
    """How the trained parameters are optimised. One step is one optimizer step over `batch_size` examples."""

    learning_rate: Annotated[float, Field(gt=0)]
    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 32
    """Examples per optimizer step, over all processes."""
    micro_batch_size: PositiveInt | None = None
    """Most examples in one forward pass of one process; smaller means more accumulation, the same loss."""
    evaluation_batch_size: PositiveInt = 64
    optimizer: Literal["adamw", "sgd", "adafactor", "adamw_8bit"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["linear", "cosine", "constant", "polynomial"] = "linear"
    warmup_ratio: Fraction = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    max_gradient_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    group_by_length: bool = True
    """Draw batches from examples of similar length, so that less padding is computed."""
    evaluate_every: Literal["epoch"] | PositiveInt = "epoch"
    early_stopping_patience: PositiveInt | None = None
    keep_best: bool = True
    """End with the weights that scored best on dev rather than the last ones."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainingSettings:
        if self.warmup_steps is not None and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio are both set; keep one")
        if self.early_stopping_patience and not self.keep_best:
            raise ValueError("early_stopping_patience without keep_best would keep the worse weights")
        return self

    def steps_per_epoch(self, examples: int) -> int:
        """Optimizer steps in one pass over `examples`; the last batch may be smaller."""
        return -(-examples // self.batch_size)

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole run over `examples` training examples."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, round(self.epochs * self.steps_per_epoch(examples)))

    def warmup(self, total_steps: int) -> int:
        """Steps over which the learning rate rises."""
        return self.warmup_steps if self.warmup_steps is not None else round(self.warmup_ratio * total_steps)


class OutputSettings(Section):
    """Where the run is written and who else is told."""

    folder: str | None = None
    """Default: runs/<name of the configuration>-<run id>."""
    overwrite: bool = False
    trackers: tuple[str, ...] = ()
    """Accelerate's trackers by name, such as tensorboard."""


class Run(Section):
    """A fine-tuning run: what is tuned, on what, how, and where it goes."""

    backbone: BackboneSettings
    task: AnyTask
    method: AnyMethod
    training: TrainingSettings
    output: OutputSettings = OutputSettings()

    @model_validator(mode="after")
    def _no_conflicts(self) -> Run:
        conflicts = self.method.conflicts(
            task=self.task, quantization=None, checkpointing=self.training.gradient_checkpointing
        )
        if conflicts:
            raise ValueError("; ".join(conflicts))
        return self


def run_id(run: Run) -> str:
    """Sixteen hex digits that name the run: what it computes, not where it is written."""
    settings = run.model_dump(mode="json", exclude={"output"})
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def load_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """The run that a file and overrides describe, with its output folder filled in.

    Raises:
        UsageError: the file cannot be read or an override is malformed.
        ConfigError: every problem at once, each with file and line.
    """
    run = validate(read_document(path, overrides))
    if run.output.folder is None:
        output = run.output.model_copy(update={"folder": f"runs/{path.stem}-{run_id(run)[:8]}"})
        run = run.model_copy(update={"output": output})
    return run


def read_run(expect: type[Method] | None = None, arguments: Sequence[str] | None = None) -> Run:
    """The run named on a recipe's command line: `--config FILE [section.key=value …]`."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    run = load_run(options.config, options.overrides)
    if expect is not None and not isinstance(run.method, expect):
        wanted = expect.model_fields["kind"].default
        raise UsageError(f"{options.config}: this recipe trains '{wanted}', not '{run.method.kind}'")
    return run


def validate(document: Document) -> Run:
    """The typed run, or a ConfigError that lists every problem."""
    try:
        # JSON mode is strict about numbers in quotes and booleans, yet takes lists for tuples.
        return Run.model_validate_json(json.dumps(document.tree), strict=True)
    except ValidationError as error:
        raise ConfigError(_problems(document, error.errors())) from None


def _problems(document: Document, errors: Sequence[ErrorDetails]) -> list[str]:
    found: dict[str, None] = {}
    misspelt: set[KeyPath] = set()
    for error in errors:
        if error["type"] in ("extra_forbidden", "union_tag_not_found"):
            path = _tree_path(document.tree, error["loc"])
            message, meant = _unknown_key(document, error, path)
            found[message] = None
            misspelt.add(meant)
    for error in errors:
        path = _tree_path(document.tree, error["loc"])
        if error["type"] in ("extra_forbidden", "union_tag_not_found") or path in misspelt:
            continue
        found[_describe(document, error, path)] = None
    return list(found)


def _unknown_key(document: Document, error: ErrorDetails, path: KeyPath) -> tuple[str, KeyPath]:
    """The message for a key nobody knows, and the path of the key that was meant."""
    if error["type"] == "union_tag_not_found":
        section, tag = path, str((error.get("ctx") or {}).get("discriminator", "'kind'")).strip("'")
        written = _value_at(document.tree, section)
        near = nearest(tag, [str(key) for key in written]) if isinstance(written, dict) else None
        if near is None:
            kinds = ", ".join(_tags(section))
            return f"{document.where(section)}: {_dotted(section)}: '{tag}' is missing ({kinds})", (
                *section,
                tag,
            )
        at = (*section, near)
        return f"{document.where(at)}: {_dotted(at)}: unknown key; did you mean '{tag}'?", (*section, tag)
    names = _field_names(error["loc"][:-1])
    name = str(path[-1])
    message = f"{document.where(path)}: {_dotted(path)}: unknown key{did_you_mean(name, names)}"
    return message, (*path[:-1], nearest(name, names) or name)


def _describe(document: Document, error: ErrorDetails, path: KeyPath) -> str:
    start = f"{document.where(path)}: {_dotted(path)}: " if path else f"{document.where(path)}: "
    context = error.get("ctx") or {}
    match error["type"]:
        case "missing":
            return f"{start}missing"
        case "union_tag_invalid":
            tag = str(context["tag"])
            at = (*path, str(context["discriminator"]).strip("'"))
            hint = did_you_mean(tag, _tags(path))
            return f"{document.where(at)}: {_dotted(at)}: no kind '{tag}'{hint}"
        case "literal_error":
            return f"{start}'{error['input']}' is not a choice{_choice_hint(error)}"
        case "value_error":
            return f"{start}{context.get('error', error['msg'])!s}"
        case _:
            return f"{start}{error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _choice_hint(error: ErrorDetails) -> str:
    expected = str((error.get("ctx") or {}).get("expected", ""))
    return did_you_mean(str(error["input"]), [c.strip(" '") for c in expected.replace(" or ", ",").split(",")])


def _tree_path(tree: Any, location: Sequence[str | int]) -> KeyPath:
    """A pydantic location without the names of union members, which the file does not have."""
    path: list[str | int] = []
    node = tree
    for position, part in enumerate(location):
        is_last = position == len(location) - 1
        known = (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int))
        if known:
            path.append(part)
            node = node[part]  # type: ignore[index]
        elif is_last and isinstance(node, dict):
            path.append(part)
    return tuple(path)


def _value_at(tree: Any, path: KeyPath) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _section_tag(section: type[Section]) -> str | None:
    for name in ("kind", "name"):
        if name in section.model_fields and get_args(section.model_fields[name].annotation):
            return str(section.model_fields[name].default)
    return None


def _field_names(location: Sequence[str | int]) -> list[str]:
    """The keys that are valid at a pydantic location."""
    candidates: list[type[Section]] = [Run]
    for part in location:
        tagged = [section for section in candidates if len(candidates) > 1 and _section_tag(section) == part]
        if tagged:
            candidates = tagged
            continue
        fields = [section.model_fields[str(part)] for section in candidates if str(part) in section.model_fields]
        # metadata carries nothing of interest; the annotation holds the members of a union
        candidates = [inner for f in fields for inner in _sections_in(f.annotation)]
    return sorted({name for section in candidates for name in section.model_fields})


def _tags(path: KeyPath) -> list[str]:
    candidates: list[type[Section]] = [Run]
    for part in path:
        fields = [section.model_fields[str(part)] for section in candidates if str(part) in section.model_fields]
        candidates = [inner for f in fields for inner in _sections_in(f.annotation)]
    return [tag for section in candidates if (tag := _section_tag(section)) is not None]


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
