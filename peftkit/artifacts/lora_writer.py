"""Changes of weights as an adapter in peft's own files, which hold them exactly where their rank allows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.low_rank import Change, LowRank, nearest, nearest_to
from peftkit.artifacts.updates import is_held_transposed
from peftkit.errors import MethodError
from peftkit.methods.lora import LoRA
from peftkit.methods.peft_files import adapter_state, put_in, quiet_peft
from peftkit.quiet import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftkit.backbones.load import Backbone

PREFIX = "base_model.model."


def not_held(changes: Mapping[str, Change]) -> list[str]:
    """The parameters whose changes LoRA cannot hold: all but products, and biases of the layers that have one."""
    adapted = {name.rpartition(".")[0] for name, change in changes.items() if isinstance(change, LowRank)}
    return [
        name
        for name, change in changes.items()
        if not isinstance(change, LowRank) and not (name.endswith(".bias") and name.rpartition(".")[0] in adapted)
    ]


def is_matrix(name: str, model: nn.Module) -> bool:
    """Whether a parameter is the weight of a layer that LoRA adapts: a linear one, or an embedding."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    module, _, kind = name.rpartition(".")
    return kind == "weight" and isinstance(model.get_submodule(module), (nn.Linear, nn.Embedding, Conv1D))


def of_rank(changes: Mapping[str, Change], rank: int, model: nn.Module) -> dict[str, Change]:
    """The nearest changes whose matrices have at most this rank; what is no matrix stays as it is.

    Args:
        model: the plain one, whose modules tell what each parameter is.
    """
    found: dict[str, Change] = {}
    for name, change in changes.items():
        if isinstance(change, LowRank):
            found[name] = nearest(change, rank)
        elif is_matrix(name, model):
            found[name] = nearest_to(change, rank, is_held_transposed(model.get_submodule(name[: -len(".weight")])))
        else:
            found[name] = change
    return found


def lora_model(
    backbone: Backbone, changes: Mapping[str, Change], heads: Mapping[str, Tensor]
) -> tuple[LoRA, nn.Module]:
    """The backbone with an adapter that makes these changes, each at its own rank and with scale 1, and these heads.

    Args:
        changes: what `not_held` finds nothing in.

    Returns:
        The method, for `save`, and peft's model.

    Raises:
        MethodError: peft did not take it up as it was given.
    """
    with quiet_libraries():
        from peft import get_peft_model

    products = {name.removesuffix(".weight"): one for name, one in changes.items() if isinstance(one, LowRank)}
    biases = {name.removesuffix(".bias"): one for name, one in changes.items() if not isinstance(one, LowRank)}
    if not products:
        raise MethodError("nothing is left to adapt: no matrix of the backbone changes")
    ranks = {name: one.rank for name, one in products.items()}
    largest = max(ranks.values())
    method = LoRA(rank=largest, alpha=largest, targets=tuple(products))
    base: Any = backbone.model
    config: Any = method.peft_config(backbone, _targets(products), 1)
    smaller = {name: rank for name, rank in ranks.items() if rank < largest}
    config.rank_pattern, config.alpha_pattern = smaller, dict(smaller)
    beside = bool(biases) and all(_has_bias(base.get_submodule(name)) for name in products)
    config.lora_bias, config.bias = beside, "lora_only" if biases and not beside else "none"
    tensors = dict(_tensors(products, base)) | {f"{PREFIX}{name}": value.float() for name, value in heads.items()}
    for name in products if biases else ():
        module = base.get_submodule(name)
        if _has_bias(module):
            change = biases.get(name, 0 * module.bias.detach().double())
            key = f"{name}.lora_B.bias" if beside else f"{name}.base_layer.bias"
            tensors[f"{PREFIX}{key}"] = (change if beside else module.bias.detach().double() + change).float()
    with quiet_libraries(), quiet_peft():
        model: nn.Module = get_peft_model(base, config)
    if differing := sorted(adapter_state(model).keys() ^ tensors.keys()):
        raise MethodError(f"peft takes these changes up under other names: they differ in {', '.join(differing[:3])}")
    put_in(model, tensors)
    return method, model


def _targets(names: Iterable[str]) -> Any:
    from peftkit.backbones.targets import Target

    return [Target(name, 0, 0) for name in names]


def _has_bias(module: Any) -> bool:
    return getattr(module, "bias", None) is not None


def _tensors(products: Mapping[str, LowRank], base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """peft's names and values of the factors."""
    from torch import nn

    for name, one in products.items():
        is_embedding = isinstance(base.get_submodule(name), nn.Embedding)
        a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        yield f"{PREFIX}{name}.{a}", one.a.float()
        yield f"{PREFIX}{name}.{b}", one.b.float()
