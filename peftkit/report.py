"""What a run says: what it is about to do, and what came of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from peftkit.config import Run
from peftkit.console import say
from peftkit.evaluation import Evaluation
from peftkit.methods.base import trained_parameters
from peftkit.tasks.base import Scores

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from peftkit.prepare import Prepared
    from peftkit.training.loop import TrainRecord


def announce(run: Run, data: Prepared, model: nn.Module, accelerator: Accelerator) -> None:
    """Say what is about to be trained, exactly, before it starts."""
    trained = sum(p.numel() for p in trained_parameters(model).values())
    total = sum(p.numel() for p in model.parameters())
    steps = run.training.total_steps(len(data.train))
    say(f"backbone  {run.backbone.name} ({run.backbone.dtype})")
    say(f"method    {run.method.kind}: {trained:,} of {total:,} parameters train ({100 * trained / total:.2f} %)")
    names = ", ".join(data.head.labels[:8]) + (", …" if len(data.head.labels) > 8 else "")
    say(f"task      {run.task.kind}: {len(data.head.labels)} labels ({names})")
    say(f"data      {len(data.train):,} train, {len(data.dev):,} dev, {len(data.test):,} {data.test.name} rows")
    for note in data.notes:
        say(f"          {note}")
    processes = f"{accelerator.num_processes} processes" if accelerator.num_processes > 1 else "1 process"
    say(
        f"training  {steps:,} steps of {run.training.batch_size} examples, {run.training.precision}, "
        f"{processes} on {_device(accelerator)}, seed {run.training.seed}"
    )


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
    say()
    say(per_class_table(after.scores))
    say()
    say(
        f"{record.steps:,} steps (best: {record.best_step:,}) in {record.seconds:.1f} s, "
        f"{record.tokens_per_second:,.0f} tokens/s, peak memory {record.peak_memory_bytes / 2**30:.2f} GiB"
    )
    say(f"saved to {run.output.folder}")


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


def table(rows: Sequence[Sequence[str]]) -> str:
    """Plain aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
