"""Several runs of one backbone as one: what they add to it, combined, written, read back and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.combination import HOWS, Recipe, combined
from peftkit.artifacts.combined_heads import chosen_heads
from peftkit.artifacts.combined_run import write_adapter, write_model
from peftkit.artifacts.loading import load_run
from peftkit.artifacts.lora_writer import not_held, of_rank
from peftkit.artifacts.low_rank import Change, LowRank
from peftkit.artifacts.reread import compared
from peftkit.artifacts.target import check_new_folder
from peftkit.artifacts.updates import Origin, differences, parameters_of, plain_backbone, update_of
from peftkit.artifacts.vetting import vetted
from peftkit.disk import whole_folder, write_text
from peftkit.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

REPORT = "combination.json"


@dataclass(frozen=True)
class CombineReport:
    """What was combined, and how far the result, read back from disk, is from ΔW in float64."""

    how: str
    weights: dict[str, float]
    """By the folder of the run."""
    density: float
    seed: int
    head: str
    """Whose head it is: a folder, `average`, `equal`, or `none`."""
    result: str
    """`adapter`, in peft's format, or `model`, plain transformers."""
    ranks: dict[str, int]
    """Of an adapter, by the weight that it changes."""
    truncation: float
    """‖ΔW − what was written‖ / ‖ΔW‖ over everything, in the Frobenius norm; of `--rank`, and else of rounding."""
    truncated: dict[str, float]
    """The same of each parameter."""
    rounding: float
    """Largest difference that storing in float32 made, relative to the numbers that it is summed from."""


def combine(
    folders: Sequence[Path], target: Path, recipe: Recipe, rank: int | None = None, head: str | None = None
) -> CombineReport:
    """Write the combination of runs as a run; nothing is left at `target` unless it is what it should be.

    Args:
        rank: re-compress to the nearest adapter of at most this rank.
        head: where the runs' heads differ, the number of the run whose head it gets (from 1), or `average`.

    Raises:
        UsageError: other backbones, a wrong number of weights, heads that need a choice, or a target that exists.
        NotMergeable: a run whose method changes no weights.
        ArtifactError: a run's files changed, or what was read back is not ΔW.
    """
    check_recipe(folders, recipe)
    check_new_folder(target, folders, "a combination")
    check_same_backbone(folders)
    updates = [update_of(load_run(folder)) for folder in folders]
    heads, like, whose = chosen_heads(updates, recipe.weights, head)
    contents = [str(one.origin.manifest["files"]) for one in updates]
    exact = combined(updates, contents, recipe)
    if not exact:
        raise UsageError("the runs change nothing of the backbone but their heads; there is nothing to combine")
    base = plain_backbone(like).model
    changes = of_rank(exact, rank, base) if rank is not None else exact
    lost = not_held(changes)
    if lost and rank is not None:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UsageError(
            f"--rank: no adapter can hold the change of '{lost[0]}'{more}; leave --rank out for a plain model with all "
            "of it"
        )
    if lost and "new_tokens" in like.trained_heads:
        raise UsageError("the task added tokens, which only an adapter holds; give --rank to make one")
    record: dict[str, Any] = {
        "how": recipe.how,
        "weights": {str(folder): weight for folder, weight in zip(folders, recipe.weights, strict=True)},
        "density": recipe.density,
        "seed": recipe.seed,
        "head": whose,
        "result": "model" if lost else "adapter",
        "ranks": {name: one.rank for name, one in changes.items() if isinstance(one, LowRank)},
    }
    origins = dict(zip(map(str, folders), contents, strict=True))
    with whole_folder(target) as partial:
        write = write_model if lost else write_adapter
        write(partial, like, changes, heads, record | {"files": origins})
        read, read_heads = _reread(partial, base, like) if lost else _as_run(partial)
        _refuse_other_heads(heads, read_heads)
        # factors are stored by themselves; all else within the weights
        within = {name for name, _ in base.named_parameters() if lost or not isinstance(changes.get(name), LowRank)}
        beside = {name: float(one.detach().abs().max()) for name, one in base.named_parameters() if name in within}
        report = CombineReport(**record, **compared(exact, changes, read, beside))
        write_text(partial / REPORT, json.dumps(asdict(report), indent=2) + "\n")
    return report


def check_recipe(folders: Sequence[Path], recipe: Recipe) -> None:
    """Refuse weights and settings that mean nothing, before anything is loaded."""
    if len(recipe.weights) != len(folders):
        raise UsageError(
            f"{len(folders)} run{'s' * (len(folders) != 1)} and {len(recipe.weights)} weights; give --weights one "
            "number for each run, in their order"
        )
    if not all(map(math.isfinite, recipe.weights)) or not any(recipe.weights):
        raise UsageError("--weights must be numbers, and not all 0: nothing of the runs would be left")
    if recipe.how not in HOWS:
        raise UsageError(f"--how {recipe.how} is unknown; it can be {', '.join(HOWS)}")
    if not 0 < recipe.density <= 1:
        raise UsageError(
            f"--density {recipe.density:g} must be above 0 and at most 1: the share of numbers that is kept"
        )


def check_same_backbone(folders: Sequence[Path]) -> None:
    """Refuse runs whose changes are not of one backbone's weights, and a run that is given twice.

    Raises:
        UsageError: names both runs and what differs.
    """
    first, twice = folders[0], {folder.resolve() for folder in folders}
    if len(twice) < len(folders):
        again = next(
            one for index, one in enumerate(folders) if one.resolve() in {x.resolve() for x in folders[:index]}
        )
        raise UsageError(f"{again} is given twice; give it once, with the sum of its weights")
    manifest, run = vetted(first)
    for folder in folders[1:]:
        other, its_run = vetted(folder)
        for what, ours, theirs in _differing(manifest["backbone"], other["backbone"]):
            raise UsageError(
                f"{first} and {folder} are of different backbones ({what}: {ours} and {theirs}); what they add cannot "
                "be compared or combined"
            )
        if run.backbone.quantization != its_run.backbone.quantization:
            raise UsageError(
                f"{first} and {folder} have other backbone.quantization, so their changes are of other weights; use "
                "runs with the same"
            )


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What tells two backbones apart. A folder may lie elsewhere; its weights tell whether it is the same."""
    names = ["weights_sha256", "revision"]
    if not (one["folder"] and other["folder"]):
        names.insert(0, "name")
    return [(name, one[name], other[name]) for name in names if one[name] != other[name]]


def _as_run(folder: Path) -> tuple[dict[str, Change], dict[str, Tensor]]:
    """What an adapter adds, and its head, read as those of any run."""
    found = update_of(load_run(folder))
    return found.changes, found.heads


def _reread(folder: Path, base: nn.Module, like: Origin) -> tuple[dict[str, Change], dict[str, Tensor]]:
    """The same of a plain model, by its difference from the weights that were changed, as training saw them."""
    before, _ = parameters_of(base, like.trained_heads)
    after, heads = parameters_of(load_run(folder).model, like.trained_heads)
    return dict(differences(before, after, str(folder))), heads


def _refuse_other_heads(heads: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    import torch

    for name in heads.keys() | read.keys():
        if name not in heads or name not in read or not torch.equal(heads[name], read[name]):
            raise ArtifactError(f"'{name}' of the head was read back with other values; nothing was written")
