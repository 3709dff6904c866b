"""The whole path in one call, for the command line and for Python."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.continued import start_from
from peftkit.artifacts.loading import merge_backbone
from peftkit.artifacts.store import save
from peftkit.audit.examine import audit
from peftkit.backbones.load import load
from peftkit.config import Run, in_folder, run_id
from peftkit.data.sources import Splits
from peftkit.demonstrations import lacking, with_demonstrations
from peftkit.errors import UsageError
from peftkit.evaluation import Evaluation, baselines, evaluate
from peftkit.prepare import prepare
from peftkit.report import announce, report
from peftkit.session import start
from peftkit.training.loop import train as train_model
from peftkit.training.record import TrainRecord

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Result:
    """A finished run."""

    folder: Path
    model: nn.Module
    record: TrainRecord
    evaluations: dict[str, Evaluation]
    """`majority`, `before` and `after` training; without training, `after` alone."""

    @property
    def score(self) -> float:
        """The task's headline figure after training."""
        return self.evaluations["after"].scores.value


def train(run: Run, splits: Splits | None = None, metrics: Sequence[Any] = ()) -> Result:
    """Train, evaluate and save a run: what a recipe does, step by step.

    Args:
        splits: rows to use instead of those that `run.task.data` names.
        metrics: `evaluate` modules to compute beside the task's own.
    """
    if splits is not None and not isinstance(splits, Splits):
        raise UsageError("splits must come from peftkit.splits_from(train=…, dev=…, test=…)")
    rows = splits
    if lacking(run):
        rows = splits or run.task.splits()
        run = with_demonstrations(run, rows)
    if run.output.folder is None:
        run = in_folder(run, _default_folder(run, splits))
    accelerator = start(run, needs_data=splits is None)
    merge_backbone(run)
    data = prepare(run, rows)
    audit(run, data)
    backbone = load(run.backbone, data.head)
    model = run.method.attach(backbone, total_steps=run.training.total_steps(len(data.train.encoded)))
    start_from(run, data, backbone, model)
    announce(run, data, model, accelerator)
    evaluations = baselines(run.task, data.train, data.test)
    if run.method.trains:
        evaluations["before"] = evaluate(model, run.task, data.test, accelerator, metrics)
    record = train_model(model, run, data, accelerator, metrics)
    evaluations["after"] = evaluate(model, run.task, data.test, accelerator, metrics)
    folder = save(run, data, backbone, model, record, evaluations, accelerator)
    report(run, record, evaluations)
    return Result(folder, model, record, evaluations)


def _default_folder(run: Run, splits: Splits | None) -> str:
    """Rows that were handed over are part of the name, because the run's id does not know them."""
    folder = f"runs/{run.method.kind}-{run_id(run)[:8]}"
    if splits is not None:
        rows = [one.records for one in (splits.train, splits.dev, splits.test) if one is not None]
        folder += "-" + hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()[:8]
    return folder
