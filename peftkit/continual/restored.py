"""The finished model of a task of a sequence, read back from disk and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftkit.artifacts.continued import start_from
from peftkit.artifacts.manifest import read_manifest
from peftkit.backbones.load import Backbone, load
from peftkit.continual.course import Seal, Stage
from peftkit.continual.heads import digest, head_of, shared_part
from peftkit.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor, nn


def restored(stage: Stage) -> tuple[nn.Module, Backbone]:
    """The model as a finished task left it, ready to train on, its own head included.

    Raises:
        ArtifactError: its weights are not those that the training ended with, or it began with others than the task
            before it ended with.
    """
    import torch

    check_chain(stage)
    own = {"start_from": str(stage.folder), "fresh_head": False}
    run = stage.run.model_copy(update={"method": stage.run.method.model_copy(update=own)})
    data = stage.prepare()
    # the head and the adapter are drawn before they are replaced, which must not change what a training draws
    with torch.random.fork_rng():
        backbone = load(run.backbone, data.head)
        model = run.method.attach(backbone, total_steps=run.training.total_steps(len(data.train.encoded)))
    start_from(run, data, backbone, model)
    found, expected = seal_of(model, backbone.head_modules), stage.seal()
    for part in ("shared", "head"):
        if getattr(found, part) != getattr(expected, part):
            what = "the head" if part == "head" else "the shared part"
            raise ArtifactError(
                f"{stage.folder}: {what} is not what the training of task '{stage.name}' ended with; remove it and the "
                "folders of later tasks, and they are trained again"
            )
    return model, backbone


def restored_head(stage: Stage) -> dict[str, Tensor]:
    """The head of a finished task. Raises as `restored` does."""
    model, backbone = restored(stage)
    return head_of(model, backbone.head_modules)


def check_chain(stage: Stage) -> None:
    """Make sure that a finished task went on from the run that lies in the folder of the task before.

    Raises:
        ArtifactError: it went on from another one.
    """
    if stage.before is None:
        return
    started = read_manifest(stage.folder).get("started_from") or {}
    if started.get("manifest_sha256") != stage.before.manifest_sha256:
        raise ArtifactError(
            f"{stage.folder} went on from another run of task '{stage.before.name}' than the one in "
            f"{stage.before.folder}; remove it and the folders of later tasks, and they are trained again"
        )


def seal_of(model: nn.Module, heads: tuple[str, ...]) -> Seal:
    """Hashes of the weights that train, shared and own."""
    return Seal(shared=digest(shared_part(model, heads)), head=digest(head_of(model, heads)))
