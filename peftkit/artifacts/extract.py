"""The adapter that is nearest to what a full fine-tuning did to a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.loading import in_full_precision, load_run
from peftkit.artifacts.lora_writer import is_matrix, lora_model, of_rank
from peftkit.artifacts.low_rank import Change, LowRank
from peftkit.artifacts.plain_model import load_plain
from peftkit.artifacts.reread import compared
from peftkit.artifacts.target import check_new_folder
from peftkit.artifacts.updates import differences, is_held_transposed, parameters_of
from peftkit.backbones.load import Backbone, BackboneSettings, Head, load
from peftkit.backbones.runs import is_run
from peftkit.disk import whole_folder, write_text
from peftkit.errors import UsageError
from peftkit.methods.base import inside
from peftkit.methods.peft_files import quiet_peft
from peftkit.quiet import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor, nn

REPORT = "extraction.json"


@dataclass(frozen=True)
class ExtractReport:
    """How far base and adapter, read back from disk, are from the tuned model."""

    base: str
    tuned: str
    rank: int
    adapted: int
    """Matrices that got a product of two thin ones."""
    kept: tuple[str, ...]
    """Modules that are saved whole, the head among them, because no product holds what changed in them."""
    left_out: tuple[str, ...]
    """Parameters that changed and that the adapter does not change."""
    truncation: float
    """‖ΔW − what was written‖ / ‖ΔW‖ over the backbone, in the Frobenius norm."""
    truncated: dict[str, float]
    """The same of each parameter."""
    rounding: float
    """Largest difference that storing in float32 made, relative to the numbers that it is summed from."""


def extract(base: str, tuned: str, target: Path, rank: int, leave_out: bool = False) -> ExtractReport:
    """Write the adapter over `base` that is nearest to `tuned`, in peft's format.

    Args:
        base: a model, as for `backbone.name`.
        tuned: the same model after training: another such name, or a finished run.
        leave_out: go on without the changes that no adapter of peft holds.

    Raises:
        UsageError: they are not of one architecture and vocabulary, differ in what no adapter holds, or not at all.
        ArtifactError: what was read back is not what was computed.
    """
    check_new_folder(target, [one for one in map(Path, (base, tuned)) if one.is_dir()], "an extraction")
    model, head = _tuned(tuned)
    backbone = load(BackboneSettings(name=base), head)
    before, _ = parameters_of(backbone.model, backbone.head_modules)
    after, heads = parameters_of(model, backbone.head_modules)
    changes = differences(before, after, tuned)
    if not changes:
        raise UsageError(f"{base} and {tuned} have the same weights; there is nothing to extract")
    products, modules, lost = _sorted_out(changes, backbone.model)
    if lost and not leave_out:
        raise UsageError(
            f"no adapter of peft can hold the change of {', '.join(lost[:3])}{' …' if len(lost) > 3 else ''} "
            f"({_why(lost[0], backbone.model)}); --leave-out goes on without it, and ships another model than {tuned}"
        )
    meant = of_rank(products, rank, backbone.model)
    beside = {name: float(one.abs().max()) for name, one in before.items() if not isinstance(meant.get(name), LowRank)}
    whole = {name: after[name] for name in before if inside(name, modules)}
    written = meant | {name: changes[name] for name in whole if name in changes}
    holding = dataclasses.replace(backbone, head_modules=(*backbone.head_modules, *modules))
    with whole_folder(target) as partial:
        method, adapted = lora_model(holding, meant, heads | whole)
        method.save(adapted, partial)
        found = _reread(base, head, partial, before)
        report = ExtractReport(
            base=base,
            tuned=tuned,
            rank=rank,
            adapted=sum(isinstance(one, LowRank) for one in meant.values()),
            kept=holding.head_modules,
            left_out=tuple(lost),
            **compared(changes, written, found, beside),
        )
        write_text(partial / REPORT, json.dumps(asdict(report), indent=2) + "\n")
    return report


def _tuned(name: str) -> tuple[nn.Module, Head]:
    """The tuned model in float32, and what its task put on it."""
    if is_run(Path(name).expanduser()):
        saved = load_run(Path(name).expanduser())
        return saved.run.method.merge(in_full_precision(saved)), saved.head
    return load_plain(name)


def _sorted_out(
    changes: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Change], tuple[str, ...], list[str]]:
    """(products and the biases beside them, modules to be saved whole, parameters that neither can hold)."""
    from torch import nn

    products: dict[str, Change] = {}
    modules: dict[str, None] = {}
    lost = []
    for name, change in changes.items():
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        if is_matrix(name, model) and not isinstance(module, nn.Embedding):
            products[name] = change
        elif kind == "bias" and is_matrix(f"{owner}.weight", model):
            products[name] = change
            products.setdefault(f"{owner}.weight", changes.get(f"{owner}.weight", _nothing(module)))
        elif not list(module.children()) and not _is_tied(module, model):
            modules[owner] = None
        else:
            lost.append(name)
    return products, tuple(modules), lost


def _nothing(module: Any) -> LowRank:
    """A product of 0, for a layer of which only the bias changed."""
    shape = module.weight.T.shape if is_held_transposed(module) else module.weight.shape
    return LowRank(module.weight.new_zeros(shape[0], 1).double(), module.weight.new_zeros(1, shape[1]).double())


def _is_tied(module: nn.Module, model: nn.Module) -> bool:
    """Whether another module holds the same weight: what takes the place of one would leave the other behind."""
    weight = getattr(module, "weight", None)
    return sum(getattr(part, "weight", None) is weight for part in model.modules()) > 1


def _why(name: str, model: nn.Module) -> str:
    module = model.get_submodule(name.rpartition(".")[0])
    return "embeddings that are tied to the output" if _is_tied(module, model) else "a parameter outside of any layer"


def _reread(base: str, head: Head, folder: Path, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the adapter changes, as plain peft loads and merges it over an untouched base."""
    from peft import PeftModel

    fresh: Backbone = load(BackboneSettings(name=base), head)
    with quiet_libraries(), quiet_peft():
        merged: Any = PeftModel.from_pretrained(fresh.model, str(folder)).double().merge_and_unload(safe_merge=True)
    after, _ = parameters_of(merged, fresh.head_modules)
    return differences(before, after, str(folder))
