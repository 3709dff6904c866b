"""Whole tensors from the shares of several processes, and back: every file that is written holds whole ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """The tensor that processes hold shares of. All of them must call this; one that each holds is returned as is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def whole_parameters(model: nn.Module, keep: bool) -> Iterator[None]:
    """Let a model hold its trained parameters whole, on the CPU, to be saved. For all processes to enter.

    Args:
        keep: this process is to have them; in the others the model stays as it is.
    """
    from torch.distributed.tensor import DTensor

    shares: dict[tuple[nn.Module, str], Any] = {
        (module, name): p
        for module in model.modules()
        for name, p in module._parameters.items()
        if isinstance(p, DTensor) and p.requires_grad
    }
    gathered = {share: _gathered(share, keep) for share in dict.fromkeys(shares.values())}
    for (module, name), share in shares.items() if keep else ():
        module._parameters[name] = gathered[share]
    try:
        yield
    finally:
        for (module, name), share in shares.items():
            module._parameters[name] = share


def put(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Give a parameter a value, or its share of the whole value."""
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        local: Any = parameter.detach()
        local.to_local().copy_(_share(tensor, parameter))
    else:
        parameter.data.copy_(tensor)


def whole_state(state: Any, keep: bool) -> Any:
    """A state dictionary with whole tensors on the CPU where it has shares. For all processes to call.

    Args:
        keep: this process is to have them; the others get None in their place.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        full = whole(state)
        return full.cpu() if keep else None
    if isinstance(state, dict):
        return {name: whole_state(value, keep) for name, value in state.items()}
    if isinstance(state, list):
        return [whole_state(value, keep) for value in state]
    return state


def shared_out(state: dict[str, Any], holder: Any) -> dict[str, Any]:
    """What of a state dictionary is this process's: an optimizer's tensors are shared out as its parameters are.

    Args:
        holder: what the state will be loaded into.
    """
    from torch.distributed.tensor import DTensor

    if not hasattr(holder, "param_groups"):
        return state
    found = dict(state["state"])
    for group, saved in zip(holder.param_groups, state["param_groups"], strict=True):
        for parameter, number in zip(group["params"], saved["params"], strict=True):
            if isinstance(parameter, DTensor) and number in found:
                found[number] = {name: _as_shared(value, parameter) for name, value in found[number].items()}
    return state | {"state": found}


def _as_shared(value: Any, like: Any) -> Any:
    from torch.distributed.tensor import DTensor

    if getattr(value, "shape", None) != like.shape:
        return value
    local = _share(value, like).to(like.to_local().device)
    return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def _share(tensor: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor that every process has."""
    from torch.distributed.tensor import distribute_tensor

    shared: Any = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    local: Tensor = shared.to_local()
    return local


def _gathered(share: Tensor, keep: bool) -> nn.Parameter | None:
    from torch import nn

    full = whole(share.detach())
    return nn.Parameter(full.cpu()) if keep else None
