"""Models that processes share out among themselves by torch's `fully_shard` (FSDP2), on CPUs (gloo) as on GPUs.

Accelerate runs DistributedDataParallel on CPU processes even where its launcher was told to shard, so peftkit reads
what the launcher says and shards by itself, in the same way on every device. Each block of the backbone is a unit:
gathered where it computes, and given back behind it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peftkit.backbones.layouts import block_modules, layout_for
from peftkit.config import Run
from peftkit.errors import TrainingError, UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

USE = "ACCELERATE_USE_FSDP"


@dataclass(frozen=True)
class Sharding:
    """What of a model is shared out, and when it is together."""

    reshard_after_forward: bool = True
    """Blocks are given back after the forward pass and gathered again for the backward pass."""
    offload: bool = False
    """Shares wait in the memory of the CPU."""
    of_trained: bool = False
    """What trains is shared out too, with its gradients and the optimizer's state; else each process holds it whole."""


def asked_for(environment: Mapping[str, str]) -> Sharding | None:
    """What `accelerate launch` says about sharding; None where it says nothing."""
    if environment.get(USE, "false").lower() != "true":
        return None
    return Sharding(
        environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false",
        environment.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true",
    )


def sharding_of(run: Run) -> Sharding | None:
    """What the launcher asks for, as it is for this run.

    Raises:
        UsageError: a run whose optimizer or precision cannot be shared out.
    """
    found = asked_for(os.environ)
    if found is None or not run.method.trains_backbone:
        return found
    for setting, name in (
        ("optimizer", "adamw_8bit"),
        ("optimizer", "paged_adamw"),
        ("optimizer", "adafactor"),
        ("precision", "fp16"),
    ):
        if getattr(run.training, setting) == name:
            raise UsageError(
                f"training.{setting}: {name} does not work on what method '{run.method.kind}' trains once it is shared "
                "out between processes; set another, or start without FSDP"
            )
    return replace(found, of_trained=True)


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Hide from Accelerate that it should shard: it would do so on GPUs alone, and with rules of its own."""
    # with it transformers would load weights in the first process only, for Accelerate to hand out
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    asked = os.environ.pop(USE, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[USE] = asked


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold shares of the model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def place(model: nn.Module, accelerator: Accelerator) -> None:
    """Put a model where it computes: whole, or this process's share of it. A model that is there stays as it is."""
    sharding: Sharding | None = getattr(accelerator, "sharding", None)
    if sharding is None:
        model.to(accelerator.device)
    elif not is_sharded(model):
        _refuse_differing(model, accelerator)
        _shard(model, sharding, accelerator)


def _shard(model: nn.Module, sharding: Sharding, accelerator: Accelerator) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    device, processes = accelerator.device, accelerator.num_processes
    whole = {name: p for name, p in model.named_parameters() if _stays_whole(p, sharding, processes)}
    ignored = set(whole.values()) | set(_of_adapters(model) if not sharding.of_trained else ())
    packed = {name: p.quant_state for name, p in model.named_parameters() if hasattr(p, "quant_state")}
    offload = CPUOffloadPolicy(pin_memory=device.type != "cpu") if sharding.offload else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (processes,)),
        "reshard_after_forward": sharding.reshard_after_forward,
        "offload_policy": offload,
        "ignored_params": ignored,
    }
    config: Any = model.config
    blocks = list(block_modules(model, layout_for(config.model_type, model)).values())
    for unit in [*blocks, model]:
        fully_shard(unit, **options)
    for parameter in ignored:
        parameter.data = parameter.data.to(device)
    for name, parameter in model.named_parameters():
        if name in packed:  # how many numbers a packed parameter stands for
            parameter.quant_state = packed[name]  # type: ignore[attr-defined]
    _order_backward(model, blocks)
    _begin(model)
    accelerator.print(_note(model, processes))


def _stays_whole(parameter: nn.Parameter, sharding: Sharding, processes: int) -> bool:
    """Trained parameters, unless they are shared out too, and what is too small, or laid out so that it cannot be."""
    if parameter.requires_grad:
        if sharding.of_trained and parameter.ndim == 0:
            raise UsageError("a single number trains, which cannot be shared out; start without FSDP")
        return not sharding.of_trained
    return parameter.ndim == 0 or parameter.numel() < processes or not parameter.is_contiguous()


def _of_adapters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What peft put into the model, frozen or not: its files and checkpoints hold it."""
    from torch import nn

    for module in model.modules():
        names = [*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ())]
        for part in (getattr(module, name, None) for name in names):
            if isinstance(part, nn.Module):
                yield from part.parameters()


def _order_backward(model: Any, blocks: list[Any]) -> None:
    """Gather the block before while the backward pass is in one; said outright, because the order of the last forward
    pass, which torch would take, may differ between processes after an evaluation."""
    for unit, before in zip([*blocks, model], [model, *blocks], strict=True):
        unit.set_modules_to_backward_prefetch([before])


def _begin(model: Any) -> None:
    """Let blocks know whose they are, which torch does in the first forward pass: one that computes nothing, because
    text is written by what is inside a wrapped model."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(model, "extra_repr")
    model.extra_repr()
    del model.extra_repr


def _refuse_differing(model: nn.Module, accelerator: Accelerator) -> None:
    """Refuse to put a model together from shares of different ones."""
    import torch
    from torch.distributed import ReduceOp, all_reduce

    named = list(model.named_parameters())
    with torch.no_grad():
        sums = [torch.nan_to_num(p.detach().sum(dtype=torch.float64)).cpu() for _, p in named]
    least = torch.stack(sums).to(accelerator.device)
    most = least.clone()
    all_reduce(least, ReduceOp.MIN)
    all_reduce(most, ReduceOp.MAX)
    differing = [name for (name, _), same in zip(named, (least == most).tolist(), strict=True) if not same]
    if differing:
        raise TrainingError(
            f"the processes did not start with the same weights: they differ in {', '.join(differing[:3])}; "
            "give every machine the same files of the backbone"
        )


def _note(model: nn.Module, processes: int) -> str:
    from torch.distributed.tensor import DTensor

    shared = whole = 0
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            shared += parameter.nbytes
        else:
            whole += parameter.nbytes
    return (
        f"sharded   {shared / 2**20:,.1f} MiB of weights over {processes} processes; "
        f"{whole / 2**20:,.1f} MiB whole in each"
    )
