"""`peftkit plan`: what a run will hold and take, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftkit.backbones.load import Head, read_config, resolve_config
from peftkit.config import Run
from peftkit.data.files import Rows
from peftkit.data.mix import missing_files
from peftkit.errors import PeftkitError, UsageError, first_line
from peftkit.planning.advice import Change, cheapest, with_settings
from peftkit.planning.calibrate import this_machine
from peftkit.planning.estimate import SHARDING, Estimate, estimate
from peftkit.planning.machines import Machine, gpus, memory_size
from peftkit.planning.parameters import MODEL_CLASSES
from peftkit.planning.specs import parse_method
from peftkit.planning.workload import Weigh, Workload, from_data, longest_possible
from peftkit.prepare import Prepared, prepare
from peftkit.tasks.language_model import LanguageModel

PRESETS = {"qlora": ("lora", {"backbone.quantization.kind": "nf4"})}
"""Names in `--compare` that are a method with other settings beside it."""


@dataclass(frozen=True)
class Alternative:
    """The same run with another method."""

    name: str
    estimate: Estimate | None
    note: str = ""
    """Why there is no estimate."""


@dataclass(frozen=True)
class Plan:
    """The answer of `peftkit plan`."""

    run: Run
    estimate: Estimate
    checkpointed: Estimate | None
    """The same run with the other choice of `training.gradient_checkpointing`; None where it cannot be."""
    change: Change | None
    """The cheapest that makes it fit; None where it fits as it is, or where none was found."""
    alternatives: tuple[Alternative, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        other = "without" if self.run.training.gradient_checkpointing else "with"
        change = self.change and {
            "set": self.change.text,
            "peak_bytes": self.change.estimate.peak,
            "seconds": self.change.estimate.seconds,
        }
        return self.estimate.as_dict() | {
            f"peak_bytes_{other}_gradient_checkpointing": self.checkpointed.peak if self.checkpointed else None,
            "change": change,
            "compare": [
                {"method": one.name, "note": one.note} | (one.estimate.as_dict() if one.estimate else {})
                for one in self.alternatives
            ],
        }


@dataclass(frozen=True)
class Planner:
    """What stays the same between the variants of a run: the data, the machine, the limit."""

    run: Run
    data: Prepared | None
    missing: str
    """Why there are no data."""
    machine: Machine
    processes: int
    limit: int | None

    def estimate(self, run: Run, sharding: str) -> Estimate:
        """What a variant of the run comes to."""
        head = self.data.head if self.data else head_without_data(run)
        return estimate(run, head, self._work(run, head), self.machine, sharding, self.limit)

    def if_possible(self, run: Run, sharding: str) -> Estimate | None:
        """The same; None where the variant cannot be traced."""
        try:
            return self.estimate(run, sharding)
        except (PeftkitError, ValueError, RuntimeError, NotImplementedError):
            return None

    def _work(self, run: Run, head: Head) -> Workload:
        if self.data is None:
            return longest_possible(run, head, None, self.processes, self.missing)
        if run.task.max_length == self.run.task.max_length:
            resized = replace(
                self.data,
                **{
                    name: replace(getattr(self.data, name), batch_size=run.training.evaluation_batch_size)
                    for name in ("train", "dev", "test")
                },
            )
            return from_data(run, resized, self.processes, weigher(run))
        return from_data(run, prepare(run), self.processes, weigher(run))


def plan(
    run: Run,
    on: str | None = None,
    sharding: str | None = None,
    processes: int | None = None,
    memory: str | None = None,
    compare: Sequence[str] = (),
    alone: bool = False,
) -> Plan:
    """What `run` will hold and take, on this machine or on GPUs by name.

    Args:
        on: such as `4xA100-80GB`.
        sharding: `ddp` or `fsdp2`; default: `ddp` on several devices.
        processes: default: one a GPU, and one on a CPU.
        memory: the limit, such as `24GiB`; default: what the machine has.
        alone: leave the other choice of gradient checkpointing out.
        compare: methods in the words of `peftkit params`, or presets such as `qlora`.

    Raises:
        UsageError: a GPU, an amount or a method that cannot be read.
        BackboneError: a backbone without a configuration.
    """
    limit = memory_size(memory) if memory else None
    machine = gpus(on) if on else this_machine()
    if processes is not None and processes < 1:
        raise UsageError(f"--processes: {processes} is not a positive number")
    if processes:
        machine = replace(machine, count=processes)
    if sharding is not None and sharding not in SHARDING:
        raise UsageError(f"--accelerate: '{sharding}' is none of {', '.join(SHARDING[1:])}")
    how = sharding or ("ddp" if machine.count > 1 else "none")
    variants = [(name, _variant(run, name)) for name in compare]
    read_config(resolve_config(run.backbone))
    data, missing = _data(run)
    planner = Planner(run, data, missing, machine, machine.count, limit)
    now = planner.estimate(run, how)
    other = with_settings(run, {"training.gradient_checkpointing": not run.training.gradient_checkpointing})
    return Plan(
        run=run,
        estimate=now,
        checkpointed=planner.if_possible(other, how) if other and not alone else None,
        change=None if now.fits else cheapest(run, now, planner.if_possible, how),
        alternatives=tuple(_alternative(planner, name, variant, how) for name, variant in variants),
    )


def weigher(run: Run) -> Weigh:
    """About what a micro-batch of the run's backbone keeps: hidden states, attention, and logits of its own."""
    config: Any = read_config(resolve_config(run.backbone)).get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    vocabulary = config.vocab_size if isinstance(run.task, LanguageModel) else 0

    def weigh(rows: int, longest: int, supervised: int) -> float:
        return rows * longest * hidden * layers * 16 + supervised * vocabulary * 3

    return weigh


def _data(run: Run) -> tuple[Prepared | None, str]:
    """The encoded data, or why there are none."""
    if run.task.data is None:
        return None, "task.data names none"
    if missing := missing_files(run.task.data):
        return None, first_line(UsageError(missing[0]))
    try:
        return prepare(run), ""
    except (PeftkitError, OSError, ImportError) as error:
        if isinstance(error, UsageError):
            raise
        return None, first_line(error)


def head_without_data(run: Run) -> Head:
    """The task's head; of tasks whose labels only the data know, with those that the configuration names, or two."""
    try:
        return run.task.head(Rows("no data", [], range(0)))
    except (PeftkitError, ValueError):
        labels = getattr(run.task, "labels", None) or ("0", "1")
        outputs = 2 if run.task.kind == "question_answering" else None
        return Head(
            MODEL_CLASSES.get(run.task.kind, MODEL_CLASSES["sequence_classification"]), tuple(labels), outputs=outputs
        )


def _variant(run: Run, name: str) -> Run:
    kind, changes = PRESETS.get(name, (name, {}))
    method = parse_method(kind)
    if method.kind == run.method.kind and ":" not in kind:
        method = run.method  # as the configuration has it
    changed = with_settings(run, {"method": method.model_dump(mode="json")} | changes)
    if changed is None:
        raise UsageError(f"--compare: this run cannot have '{name}'")
    return changed


def _alternative(planner: Planner, name: str, run: Run, sharding: str) -> Alternative:
    try:
        return Alternative(name, planner.estimate(run, sharding))
    except PeftkitError as error:
        return Alternative(name, None, first_line(error))
