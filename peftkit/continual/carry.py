"""From one task of a sequence to the next: what it begins with, and hashes of what it ended with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftkit.artifacts.continued import start_from
from peftkit.backbones.load import Backbone
from peftkit.config import Run
from peftkit.continual.course import Stage
from peftkit.continual.heads import digest, shared_part
from peftkit.continual.rehearsal import Rehearsal
from peftkit.continual.restored import seal_of
from peftkit.errors import TrainingError
from peftkit.evaluation import Evaluation, evaluate

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from peftkit.prepare import Prepared


def carry_on(
    stage: Stage, data: Prepared, backbone: Backbone, model: nn.Module, accelerator: Accelerator
) -> dict[str, Evaluation]:
    """Give an attached model what the task before left, and score the fresh head on it.

    Returns:
        Scores on the task's test: `untuned` of the untouched backbone; where there was a task before, `before` of what
        it left, under the same head.

    Raises:
        TrainingError: these are not the weights that the task before ended with.
    """
    run, before = stage.run, stage.before
    scores = {"untuned": evaluate(model, run.task, data.test, accelerator)}
    if before is None:
        return scores
    start_from(run, data, backbone, model)
    if digest(shared_part(model, backbone.head_modules)) != before.seal().shared:
        raise TrainingError(
            f"what task '{stage.name}' begins with is not what task '{before.name}' ended with, byte for byte; remove "
            f"{before.folder} and those of later tasks, and they are trained again"
        )
    scores["before"] = evaluate(model, run.task, data.test, accelerator)
    return scores


def seal(stage: Stage, run: Run, backbone: Backbone, model: nn.Module) -> None:
    """Keep hashes of what a training ended with; heads of earlier tasks must be what they were.

    Raises:
        TrainingError: one of them changed.
    """
    if isinstance(run.task, Rehearsal):
        run.task.check_heads()
    stage.keep_seal(seal_of(model, backbone.head_modules))
