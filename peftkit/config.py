"""One frozen, typed description of a fine-tuning run, read from YAML and the command line."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from peftkit.audit.settings import AuditSettings
from peftkit.backbones.load import BackboneSettings
from peftkit.changes import unknown_names
from peftkit.config_file import Document, read_document
from peftkit.config_problems import problems
from peftkit.console import Parser
from peftkit.engine.settings import Engine
from peftkit.errors import ConfigError, UsageError
from peftkit.methods import METHODS, AnyMethod
from peftkit.methods.base import Method
from peftkit.schema import Section
from peftkit.tasks import AnyTask

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class TrainingSettings(Section):
    """How the trained parameters are optimised. One step is one optimizer step over `batch_size` examples."""

    # what a method that trains nothing may leave out is not required in the schema
    model_config = ConfigDict(json_schema_extra=lambda schema: schema.pop("required"))

    learning_rate: Annotated[float, Field(gt=0)] | None
    """null only where the method trains nothing; there a configuration file may leave it out."""
    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 32
    """Examples per optimizer step, over all processes."""
    micro_batch_size: PositiveInt | None = None
    """Most examples in one forward pass of one process; smaller means more accumulation, the same loss."""
    micro_batch_tokens: PositiveInt | None = None
    """Most tokens in one forward pass of one process, padding included: few long examples, many short ones. What is
    longer by itself goes alone; the loss is the same."""
    evaluation_batch_size: PositiveInt = 64
    optimizer: Literal["adamw", "sgd", "adafactor", "adamw_8bit", "paged_adamw"] = "adamw"
    """`adamw_8bit` and `paged_adamw` are bitsandbytes' for GPUs. The latter moves its state out of a GPU's memory when
    that is short (QLoRA); without a GPU it is `adamw`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["linear", "cosine", "constant", "polynomial"] = "linear"
    warmup_ratio: Fraction = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    max_gradient_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    allocator: Literal["system", "tight"] = "system"
    """`tight`: on Linux CPUs, every block of a MiB and more gets pages of its own, which go back when it is freed. The
    peak is then that of the tensors, without the holes of glibc's heap, and each step takes longer."""
    on_out_of_memory: Literal["stop", "split"] = "stop"
    """`split`: take the step again with half as many examples in a micro-batch, which gives the same loss and gradient
    and holds from then on; with one process only."""
    group_by_length: bool = False
    """Draw batches from examples of similar length, so that less padding is computed."""
    evaluate_every: Literal["epoch"] | PositiveInt = "epoch"
    checkpoint_every: Literal["evaluation"] | PositiveInt = "evaluation"
    """Steps between checkpoints, besides those that every evaluation ends with."""
    early_stopping_patience: PositiveInt | None = None
    r_drop: Annotated[float, Field(gt=0)] | None = None
    """α of R-Drop (Wu et al. 2021): two passes with different dropout should agree; doubles the cost."""
    adversarial: Annotated[float, Field(gt=0)] | None = None
    """ε of adversarial training (FGM, Miyato et al. 2017): the length of the step that embedded inputs are moved by,
    to where the loss is greater; doubles the cost."""
    keep_best: bool = True
    """End with the weights that scored best on dev rather than the last ones."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainingSettings:
        if self.warmup_steps is not None and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio are both set; keep one")
        if self.r_drop and self.adversarial:
            raise ValueError("r_drop and adversarial are both set; keep one")
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
    allow_changes: tuple[str, ...] = ()
    """What may differ from the run that is continued, by dotted name: a setting (training.learning_rate), a section,
    `data`, `backbone.weights` or `processes`."""
    trackers: tuple[str, ...] = ()
    """Accelerate's trackers by name, such as tensorboard."""
    keep_tokens: bool = True
    """Keep the tokens of splits of 20,000 rows and more in the cache folder, for the next run over them."""


class Run(Section):
    """A fine-tuning run: what is tuned, on what, how, and where it goes."""

    backbone: BackboneSettings
    task: AnyTask
    method: AnyMethod
    training: TrainingSettings
    engine: Engine = Engine()
    audit: AuditSettings = AuditSettings()
    output: OutputSettings = OutputSettings()

    @classmethod
    def completed(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """A method that trains nothing needs no learning rate."""
        method, training = tree.get("method"), tree.get("training", {})
        kind = method.get("kind") if isinstance(method, dict) else None
        trains = not isinstance(kind, str) or kind not in METHODS or METHODS[kind].trains
        if trains or not isinstance(training, dict):
            return tree
        return tree | {"training": {"learning_rate": None} | training}

    @model_validator(mode="after")
    def _has_a_learning_rate(self) -> Run:
        if self.method.trains and self.training.learning_rate is None:
            raise ValueError(f"method '{self.method.kind}' trains, so training.learning_rate must be a number")
        return self

    @model_validator(mode="after")
    def _allows_what_there_is(self) -> Run:
        if problems := unknown_names(self.output.allow_changes, settings_of(self)):
            raise ValueError(f"output.allow_changes: {'; '.join(problems)}")
        return self

    @model_validator(mode="after")
    def _no_conflicts(self) -> Run:
        conflicts = self.method.conflicts(
            task=self.task,
            dtype=self.backbone.dtype,
            quantization=self.backbone.quantization,
            checkpointing=self.training.gradient_checkpointing,
        )
        if conflicts:
            raise ValueError("; ".join(conflicts))
        return self


def settings_of(run: Run) -> dict[str, Any]:
    """The settings that decide what a run computes, not where and how often that is written."""
    return run.model_dump(mode="json", exclude={"audit": True, "output": True, "training": {"checkpoint_every"}})


def run_id(run: Run) -> str:
    """Sixteen hex digits that name the run: what it computes."""
    return hashlib.sha256(json.dumps(settings_of(run), sort_keys=True).encode()).hexdigest()[:16]


def load_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """The run that a file and overrides describe, with its output folder filled in.

    Raises:
        UsageError: the file cannot be read or an override is malformed.
        ConfigError: every problem at once, each with file and line.
    """
    run = validate(read_document(path, overrides))
    if run.output.folder is None:
        run = in_folder(run, f"runs/{path.stem}-{run_id(run)[:8]}")
    return run


def in_folder(run: Run, folder: str) -> Run:
    """The same run, written to `folder`."""
    return run.model_copy(update={"output": run.output.model_copy(update={"folder": folder})})


def read_run(
    expect: type[Method] | None = None, arguments: Sequence[str] | None = None, quantized: bool = False
) -> Run:
    """The run named on a recipe's command line: `--config FILE [section.key=value …]`.

    Args:
        expect: the method that the recipe trains.
        quantized: the recipe is for quantised backbones.

    Raises:
        UsageError: the configuration has another method, or a backbone in full precision.
    """
    parser = Parser(description=sys.modules["__main__"].__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    run = load_run(options.config, options.overrides)
    if expect is not None and not isinstance(run.method, expect):
        wanted = "' or '".join(kind for kind, method in METHODS.items() if issubclass(method, expect))
        raise UsageError(f"{options.config}: this recipe trains '{wanted}', not '{run.method.kind}'")
    if quantized and run.backbone.quantization is None:
        raise UsageError(
            f"{options.config}: this recipe trains on a quantised backbone; set backbone.quantization.kind=nf4, or use "
            "recipes/lora.py"
        )
    return run


def validate(document: Document) -> Run:
    """The typed run, or a ConfigError that lists every problem."""
    try:
        # JSON mode is strict about numbers in quotes and booleans, yet takes lists for tuples.
        return Run.model_validate_json(json.dumps(Run.completed(document.tree)), strict=True)
    except ValidationError:
        raise ConfigError(problems(document, Run)) from None
