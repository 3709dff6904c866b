"""A trained AdaLoRA as the plain LoRA that computes the same.

peft's own AdaLoRA files are not written: what peft loads from them fails as soon as it is given labels, warns about
every matrix of rank 0 and about their own rank pattern, and no other tool reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import MethodError
from peftkit.methods.adalora_allocation import svd_layers
from peftkit.methods.base import check_fit, inside
from peftkit.methods.peft_files import ADAPTER, LEFT_OUT, adapter_state, put_in, read_saved, saved_config

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor, nn

    from peftkit.methods.adalora_allocation import Allocation


def as_lora(model: nn.Module, allocation: Allocation) -> tuple[LoraConfig, dict[str, Tensor]]:
    """LoRA's A = ΛQ, of shape (rank, in), and B = P, (out, rank), of the kept triplets; the heads as they are.

    A matrix that has no triplet left is no target.
    """
    state = {name: tensor for name, tensor in adapter_state(model).items() if ".lora_" not in name}
    ranks = {}
    for (name, layer), kept in zip(svd_layers(model).items(), allocation.kept, strict=True):
        p, singular, q = layer.lora_B[ADAPTER].data, layer.lora_E[ADAPTER].data, layer.lora_A[ADAPTER].data
        mask = kept.to(singular.device)
        if mask.any():
            ranks[name] = int(mask.sum())
            state[f"base_model.model.{name}.lora_A.weight"] = (singular * q)[mask]
            state[f"base_model.model.{name}.lora_B.weight"] = p[:, mask]
    return _config(model, ranks), state


def restore_lora(model: Any, folder: Path, dropped: Sequence[str], kept: Sequence[str]) -> None:
    """Put a plain LoRA, as `as_lora` made it, into an attached AdaLoRA: Λᵢ = ‖aᵢ‖ and qᵢ = aᵢ / ‖aᵢ‖ for row i of A.

    Raises:
        MethodError: other targets or heads, or more rank than a matrix starts with.
    """
    notes, tensors = read_saved(folder)
    saved = {name: tensor for name, tensor in tensors.items() if not inside(name, dropped)}
    config: Any = saved_config(folder)
    layers = svd_layers(model)
    adapted = {*config.target_modules, *notes.get(LEFT_OUT, "").split()}
    if other := sorted(adapted ^ layers.keys()):
        raise MethodError(f"its targets were others: they differ in '{other[0]}'; set method.targets to what they were")
    heads = {name: tensor for name, tensor in adapter_state(model).items() if ".lora_" not in name}
    parts = {f"base_model.model.{name}.lora_{part}.weight" for name in layers for part in "AB"}
    staying = {name: tensor for name, tensor in heads.items() if inside(name, kept)}
    check_fit(
        {name: tensor for name, tensor in heads.items() if name not in staying},
        {name: tensor for name, tensor in saved.items() if name not in parts},
    )
    own = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    put_in(model, own | {name: saved[name] for name in heads if name not in staying})
    for name, layer in layers.items():
        a, b = (saved.get(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
        if a is not None and b is not None:
            scale = config.lora_alpha / config.r
            _fill(layer, a * (scale / _scale(layer)), b, name)


def _fill(layer: Any, a: Tensor, b: Tensor, name: str) -> None:
    rank, p, singular, q = len(a), layer.lora_B[ADAPTER].data, layer.lora_E[ADAPTER].data, layer.lora_A[ADAPTER].data
    if rank > len(q):
        raise MethodError(f"'{name}' kept {rank} triplets, and starts with {len(q)} here; raise method.initial_rank")
    lengths = a.norm(dim=1, keepdim=True)
    singular[:rank] = lengths.to(singular)
    q[:rank] = (a / lengths.clamp(min=1e-12)).to(q)
    p[:, :rank] = b.to(p)


def _config(model: Any, ranks: dict[str, int]) -> LoraConfig:
    from peft import LoraConfig

    trained, largest, layers = model.peft_config[ADAPTER], max(ranks.values()), svd_layers(model)
    smaller = {name: rank for name, rank in ranks.items() if rank < largest}
    # alpha / rank is the same for every matrix, so that tools which know no patterns compute the same
    scale = _scale(next(iter(layers.values())))
    return LoraConfig(
        r=largest,
        lora_alpha=scale * largest,  # type: ignore[arg-type]
        rank_pattern=smaller,
        alpha_pattern={name: scale * rank for name, rank in smaller.items()},
        lora_dropout=trained.lora_dropout,
        target_modules=list(ranks),
        fan_in_fan_out=all(getattr(layers[name], "fan_in_fan_out", False) for name in ranks),
        modules_to_save=trained.modules_to_save,
        task_type=trained.task_type,
        base_model_name_or_path=trained.base_model_name_or_path,
        revision=trained.revision,
    )


def _scale(layer: Any) -> float:
    """What peft multiplies P Λ Q by: alike for all matrices, and the same before and after pruning."""
    return float(layer.scaling[ADAPTER]) / float(layer.ranknum[ADAPTER] + 1e-5)
