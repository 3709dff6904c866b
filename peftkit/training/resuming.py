"""Where a run goes on, and what is said of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftkit.changes import told
from peftkit.config import Run
from peftkit.errors import ArtifactError
from peftkit.training.checkpoint import Checkpoints, Progress

if TYPE_CHECKING:
    from accelerate import Accelerator


def resumed(
    checkpoints: Checkpoints, fresh: Progress, run: Run, accelerator: Accelerator, total_steps: int
) -> Progress:
    """The progress of the newest checkpoint that is whole, which is restored; `fresh` when there is none.

    Raises:
        ArtifactError: none is whole, it is of another run or further than this one goes, or processes see other files.
    """
    from accelerate.utils import gather_object

    found = checkpoints.load(fresh, accelerator.process_index, run.output.allow_changes)
    progress = found or fresh
    steps = gather_object([progress.step])
    if len(set(steps)) > 1:
        raise ArtifactError(
            f"the processes see different checkpoints in {checkpoints.folder} (of steps {', '.join(map(str, steps))}); "
            "give every machine the same folder"
        )
    for reason in checkpoints.passed_over:
        accelerator.print(f"passed over: {reason}")
    if found:
        _check_length(found, total_steps)
        accelerator.print(f"continuing from step {found.step:,} of {total_steps:,}{_changed(found)}")
    return progress


def _changed(progress: Progress) -> str:
    changes = {one["name"]: (one["before"], one["after"]) for one in progress.changes if one["step"] == progress.step}
    return f" with changes: {told(changes)}" if changes else ""


def _check_length(progress: Progress, total_steps: int) -> None:
    """A run that is over without having been scored at its end would not be one of this configuration."""
    scored = progress.evaluations[-1]["step"] if progress.evaluations else 0
    if progress.step > total_steps or (progress.step == total_steps != scored):
        raise ArtifactError(
            f"the checkpoint is of step {progress.step:,}, and the run has {total_steps:,} now; give it more steps, or "
            "start again with output.overwrite=true"
        )
