"""A trained AdaLoRA as the plain LoRA that computes the same.

peft's own AdaLoRA files are not written: what peft loads from them fails as soon as it is given labels, warns about
every matrix of rank 0 and about their own rank pattern, and no other tool reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftkit.methods.adalora_allocation import svd_layers
from peftkit.methods.from_peft import ADAPTER, adapter_state

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
