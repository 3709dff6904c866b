"""What a run says: what it is about to do, and what came of it."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from peftkit.artifacts.store import saved_parameters
from peftkit.backbones.quantize import packed
from peftkit.config import Run
from peftkit.console import say
from peftkit.engine.engage import fallbacks
from peftkit.evaluation import Evaluation
from peftkit.methods.base import numel, trained_parameters
from peftkit.planning.announced import expect_memory
from peftkit.planning.estimate import in_gib
from peftkit.session import run_folder
from peftkit.tables import table
from peftkit.tasks.base import Scores
from peftkit.training.optimizer import is_unpaged

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from peftkit.planning.parameters import Counts
    from peftkit.planning.survey import Answer
    from peftkit.prepare import Prepared
    from peftkit.training.record import TrainRecord


def announce(run: Run, data: Prepared, model: nn.Module, accelerator: Accelerator) -> None:
    """Say what is about to be trained, exactly, before it starts."""
    trained = sum(map(numel, trained_parameters(model).values()))
    total = sum(map(numel, model.parameters()))
    steps = run.training.total_steps(len(data.train.encoded))
    say(f"backbone  {run.backbone.name} ({run.backbone.dtype})")
    if held := packed(model):
        say(
            f"          {len(held.modules)} linear layers of the blocks in {held.how}: {held.weights:,} weights in "
            f"{_mib(held.bytes)}, where float32 takes {_mib(4 * held.weights)}; all else is in full precision"
        )
    say(f"method    {run.method.kind}: {trained:,} of {total:,} parameters train ({100 * trained / total:.2f} %)")
    say(f"task      {run.task.kind}{_labels(data.head.labels)}")
    say(f"data      {len(data.train):,} train, {len(data.dev):,} dev, {len(data.test):,} {data.test.name} rows")
    for note in data.notes:
        say(f"          {note}")
    if not run.method.trains:
        say(f"training  none; on {_device(accelerator)}, seed {run.training.seed}")
        return
    processes = f"{accelerator.num_processes} processes" if accelerator.num_processes > 1 else "1 process"
    say(
        f"training  {steps:,} steps of {run.training.batch_size} examples, {run.training.precision}, "
        f"{processes} on {_device(accelerator)}, seed {run.training.seed}"
    )
    for name, reason in fallbacks(model, run.engine).items():
        say(f"          without engine.{name}: {reason}")
    say(f"memory    {expect_memory(run, data, model, accelerator)}")
    if is_unpaged(run.training.optimizer):
        say("          optimizer paged_adamw is adamw here: there is no GPU memory to page")


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _labels(labels: Sequence[str]) -> str:
    names = ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")
    return f": {len(labels)} labels ({names})" if labels else ""


def _device(accelerator: Accelerator) -> str:
    """The device; on CPUs with the threads in use, because launchers lower them to one without a word."""
    if accelerator.device.type != "cpu":
        return accelerator.device.type
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    return f"cpu ({threads} of {cores} cores each)" if threads < cores else "cpu"


def report(run: Run, record: TrainRecord, evaluations: Mapping[str, Evaluation]) -> None:
    """Before beside after, the per-class table, and what it cost."""
    after = evaluations["after"]
    say()
    say(scores_table({name: one.scores for name, one in evaluations.items()}, after.split.name))
    if after.scores.per_class:
        say()
        say(per_class_table(after.scores))
    say()
    if not run.method.trains:
        say(f"nothing was trained; saved to {run.output.folder}")
        return
    say(
        f"{record.steps:,} steps (best: {record.best_step:,}) in {record.seconds:.1f} s, "
        f"{record.tokens_per_second:,.0f} tokens/s, peak memory {record.peak_memory_bytes / 2**30:.2f} GiB"
    )
    if record.memory_growth_bytes is not None and record.expected_memory_bytes is not None:
        expected, took = record.expected_memory_bytes, record.memory_growth_bytes
        say(f"memory of model, training and evaluation: {in_gib(took)}, where {in_gib(expected)} were expected")
    saved = saved_parameters(run_folder(run) / run.method.artifact)
    fewer = f" of the {record.trainable_parameters:,} that trained" if saved < record.trainable_parameters else ""
    say(f"saved to {run.output.folder}: {saved:,} parameters{fewer}")


def per_class_table(scores: Scores) -> str:
    """Precision, recall, F1 and support of each class or entity type."""
    rows = [
        [row["name"], *(f"{row[key]:.4f}" for key in ("precision", "recall", "f1")), f"{row['support']:,}"]
        for row in scores.per_class
    ]
    return table([["", "precision", "recall", "f1", "support"], *rows])


def scores_table(evaluations: Mapping[str, Scores], title: str) -> str:
    """Every figure of every evaluation: one row each, one column a figure."""
    names = list(dict.fromkeys(name for scores in evaluations.values() for name in scores.values))
    rows = [
        [label, *(f"{scores.values[name]:.4f}" if name in scores.values else "" for name in names)]
        for label, scores in evaluations.items()
    ]
    return table([[title, *names], *rows])


def counts_table(answers: Sequence[Answer]) -> str:
    """Parameters of each method, one row each; below, what they are of, and which methods cannot be on the backbone."""
    counted = [(answer, answer.counts) for answer in answers if answer.counts]
    budget = counted[0][0].budget if counted else None
    columns = {
        "size": [answer.size for answer, _ in counted],
        "adapter": [f"{counts.adapter_parameters:,}" for _, counts in counted],
        "tuned": [f"{counts.tuned_parameters:,}" for _, counts in counted],
        f"from {budget or 0:,}": [_deviation(answer) for answer, _ in counted] if budget else [],
        "head": [f"{counts.head_parameters:,}" for _, counts in counted],
        "trainable": [f"{counts.trainable_parameters:,}" for _, counts in counted],
        "saved": [_saved(counts) for _, counts in counted],
        "share": [f"{counts.trainable_percent:.4f} %" for _, counts in counted],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    rows = [[answer.label, *cells] for (answer, _), *cells in zip(counted, *shown.values(), strict=True)]
    lines = [table([["method", *shown], *rows]), ""]
    if counted:
        lines.append(f"backbone {counted[0][1].backbone_parameters:,}; share is of backbone + adapter + head")
    if budget:
        lines.append(f"budget {budget:,} is of adapter + tuned, without the head")
    refused = dict.fromkeys((answer.label, answer.note) for answer in answers if not answer.counts)
    return "\n".join([*lines, *(f"not on this backbone: {label}: {note}" for label, note in refused)])


def _saved(counts: Counts) -> str:
    lowest, highest = counts.saved_parameters_lowest, counts.saved_parameters
    return f"{highest:,}" if lowest == highest else f"{lowest:,}–{highest:,}"


def _deviation(answer: Answer) -> str:
    note = f" ({answer.note})" if answer.note else ""
    return f"{answer.deviation_percent or 0:+,.2f} %{note}"


def counts_csv(answers: Sequence[Answer]) -> str:
    """The same figures, and all others, as comma-separated values with a header."""
    rows = [answer.as_dict() for answer in answers]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
