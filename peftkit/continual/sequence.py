"""Which tasks are learnt one after the other, and how, as its configuration has it. Imports nothing heavy."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from peftkit.backbones.load import BackboneSettings
from peftkit.config import Run, TrainingSettings, validate
from peftkit.config_file import Document, KeyPath, read_document
from peftkit.config_problems import problems
from peftkit.console import Parser
from peftkit.data.mix import missing_files
from peftkit.engine.settings import Engine
from peftkit.errors import ConfigError, UsageError
from peftkit.methods import AnyMethod
from peftkit.methods.base import Method
from peftkit.schema import Section
from peftkit.tasks import AnyTask
from peftkit.tasks.sequence_classification import SequenceClassification

Strategy = Literal["shared", "per_task", "full", "replay"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
CARRIED = ("shared", "full", "replay")
"""Strategies in which a task begins with what the one before it left."""


class SequenceTask(Section):
    """One task of a sequence."""

    name: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[\w-]+$")]
    """What tables and folders call it."""
    task: AnyTask


class Replay(Section):
    """How many rows of earlier tasks are mixed into those of a task."""

    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of all rows that are then trained on; the earlier tasks get equal parts of it."""
    rows_per_task: Annotated[int, Field(gt=0)] | None = None
    """Rows that are remembered of each earlier task."""

    @model_validator(mode="after")
    def _one_size(self) -> Replay:
        if (self.share is None) == (self.rows_per_task is None):
            raise ValueError("give one of share (such as 0.2) and rows_per_task (such as 100)")
        return self


class SequenceOutput(Section):
    """Where the sequence is written."""

    folder: str | None = None
    """Default: runs/<name of the configuration>-<id>."""


class TaskSequence(Section):
    """Tasks that are learnt one after the other, each with a head of its own, and how."""

    backbone: BackboneSettings
    method: AnyMethod
    strategy: Strategy
    """`shared`: one adapter, trained on and on. `per_task`: an adapter for each task, chosen by it. `full`: the whole
    backbone, trained on and on. `replay`: as `shared` or `full`, with rows of earlier tasks mixed in."""
    tasks: tuple[SequenceTask, ...]
    training: TrainingSettings
    """Of each task; optimizer and schedule begin anew with each."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (1,)
    """The sequence is learnt once with each."""
    replay: Replay | None = None
    engine: Engine = Engine()
    output: SequenceOutput = SequenceOutput()

    @property
    def carries(self) -> bool:
        """Whether a task begins with what the one before it left."""
        return self.strategy in CARRIED


def read_sequence(arguments: Sequence[str] | None = None) -> TaskSequence:
    """The sequence named on a recipe's command line: `--config FILE [section.key=value …]`.

    Raises:
        UsageError: the file cannot be read, or there are several processes.
        ConfigError: every problem at once.
    """
    parser = Parser(description=sys.modules["__main__"].__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a sequence of tasks is learnt in one process; leave --num_processes out, and give other seeds to other "
            "processes instead: seeds=[1] here, seeds=[2] there"
        )
    return load_sequence(options.config, options.overrides)


def load_sequence(path: Path, overrides: Sequence[str] = ()) -> TaskSequence:
    """The sequence that a file and overrides describe, with its output folder filled in; every task of it can be run.

    Raises:
        UsageError: the file cannot be read.
        ConfigError: every problem at once, with file and line.
    """
    document = read_document(path, overrides)
    try:
        sequence = TaskSequence.model_validate_json(json.dumps(document.tree), strict=True)
    except ValidationError:
        raise ConfigError(problems(document, TaskSequence)) from None
    told = [(at, f"{_dotted(at)}: {message}") for at, message in _conflicts(sequence)]
    if told := told or list(_impossible(sequence, document)):
        told.sort(key=lambda one: document.order(one[0]))
        raise ConfigError([f"{document.where(at)}: {message}" for at, message in told])
    if sequence.output.folder is None:
        output = SequenceOutput(folder=f"runs/{path.stem}-{sequence_id(sequence)[:8]}")
        sequence = sequence.model_copy(update={"output": output})
    return sequence


def sequence_id(sequence: TaskSequence) -> str:
    """Sixteen hex digits that name what is learnt and how; more seeds and other folders are of the same sequence."""
    return hashlib.sha256(json.dumps(settings_of(sequence), sort_keys=True).encode()).hexdigest()[:16]


def settings_of(sequence: TaskSequence) -> dict[str, Any]:
    """What decides the result of each seed."""
    return sequence.model_dump(mode="json", exclude={"seeds", "output"})


def run_of(sequence: TaskSequence, number: int, seed: int, before: Path | None, source: str = "sequence") -> Run:
    """The training of one task.

    Args:
        number: the task's, from 0.
        before: the folder of the run that it begins with.

    Raises:
        ConfigError: backbone, method, task and training do not go together.
    """
    method = _as_written(sequence.method)
    if before is not None:
        method |= {"start_from": str(before), "fresh_head": True}
    tree = {
        "backbone": _as_written(sequence.backbone),
        "task": _as_written(sequence.tasks[number].task),
        "method": method,
        "training": _as_written(sequence.training) | {"seed": seed},
        "engine": sequence.engine.model_dump(mode="json"),
    }
    return validate(Document(f"{source} (task '{sequence.tasks[number].name}')", tree))


def why_not_carried(method: Method) -> str:
    """Why one adapter of this method cannot be trained on and on; empty where it can."""
    if method.kind == "adalora":
        return (
            "its rank budget is spent when a task ends: to train on would give back what was pruned, and the adapter "
            "would not be the one that was carried"
        )
    if method.kind == "head":
        return "it trains heads alone, and each task has its own, so nothing is carried"
    if method.kind == "p_tuning":
        return "its network is left behind when it is saved; use method 'prompt', which goes on"
    if getattr(method, "reparametrization_size", None):
        return "the MLP of reparametrization_size is left behind when it is saved; leave that out"
    try:
        type(method).model_validate(method.model_dump() | {"start_from": "the task before", "fresh_head": True})
    except ValidationError as error:
        return str(error.errors(include_url=False)[0]["msg"]).removeprefix("Value error, ")
    return ""


def _conflicts(sequence: TaskSequence) -> Iterator[tuple[KeyPath, str]]:
    """What contradicts what, and the key to change."""
    yield from _conflicts_of_tasks(sequence)
    yield from _conflicts_of_method(sequence)
    if len(set(sequence.seeds)) < len(sequence.seeds):
        yield ("seeds",), "one seed is there twice"
    if "seed" in sequence.training.model_fields_set:
        yield ("training", "seed"), "a sequence has a list of seeds; leave this out and set seeds"
    if (sequence.strategy == "replay") != (sequence.replay is not None):
        missing = "is missing, and strategy 'replay' needs it: say how much, such as {share: 0.2}"
        idle = f"does nothing with strategy '{sequence.strategy}'; leave it out (replay=null)"
        yield ("replay",), missing if sequence.replay is None else idle
    for name in ("r_drop", "adversarial"):
        if sequence.strategy == "replay" and getattr(sequence.training, name) is not None:
            yield ("training", name), "not with replay, whose batches go through several heads; leave one of them out"


def _conflicts_of_tasks(sequence: TaskSequence) -> Iterator[tuple[KeyPath, str]]:
    tasks = sequence.tasks
    if len(tasks) < 2:
        yield ("tasks",), f"a sequence has two tasks or more, and here is {len(tasks)}"
    names = [one.name for one in tasks]
    for number, (name, task) in enumerate((one.name, one.task) for one in tasks):
        if name in names[:number]:
            yield ("tasks", number, "name"), f"another task is called '{name}' too; give it a name of its own"
        if not isinstance(task, SequenceClassification) or task.problem == "regression":
            kind = f"'{task.kind}'" if not isinstance(task, SequenceClassification) else "a regression"
            yield ("tasks", number, "task"), f"a sequence is of classifications of texts, and this is {kind}"
        for setting in ("pooling", "problem"):
            first, own = getattr(tasks[0].task, setting, None), getattr(task, setting, None)
            if None not in (first, own) and first != own:
                yield (
                    ("tasks", number, "task", setting),
                    f"'{own}', and the first task's is '{first}'; all need the same",
                )


def _conflicts_of_method(sequence: TaskSequence) -> Iterator[tuple[KeyPath, str]]:
    method, strategy = sequence.method, sequence.strategy
    at: KeyPath = ("method", "kind")
    for name in ("start_from", "fresh_head"):
        if getattr(method, name):
            yield ("method", name), "a sequence sets this by itself; leave it out"
            return
    if not method.trains:
        yield at, f"method '{method.kind}' trains nothing, so nothing is learnt or forgotten"
    elif (strategy == "full") and method.kind != "full":
        yield at, f"strategy 'full' is for method 'full', not '{method.kind}'; set strategy: shared, or the method"
    elif strategy == "shared" and method.kind == "full":
        yield ("strategy",), "method 'full' has no adapter to share; set strategy: full"
    elif sequence.carries and (reason := why_not_carried(method)):
        yield at, f"method '{method.kind}' cannot be carried from task to task: {reason}; or set strategy: per_task"


def _impossible(sequence: TaskSequence, document: Document) -> Iterator[tuple[KeyPath, str]]:
    """Tasks that cannot be run, or whose files are not here."""
    known: set[str] = set()
    for number, one in enumerate(sequence.tasks):
        at: KeyPath = ("tasks", number, "task", "data")
        yield from ((at, f"tasks.{number}.task.data: {problem}") for problem in missing_files(one.task.data))
        try:
            run_of(sequence, number, sequence.seeds[0], None, document.source)
        except ConfigError as error:
            # what backbone, method and training have against each other is of all tasks alike
            for reason in (problem.partition(": ")[2] for problem in error.problems):
                if reason not in known:
                    yield ("tasks", number), f"tasks.{number}: {reason}"
                    known.add(reason)


def _as_written(section: Section) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude_unset=True)


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
