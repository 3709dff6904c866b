"""Bottleneck adapters as child modules of the modules whose output they change, called by forward hooks.

Hooks are functions of this module and reach the adapter through its parent, so that a model with adapters can be
copied, pickled and wrapped like any other, and the names of the backbone's own parameters stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import MethodError

ADAPTER = "adapter"
NONLINEARITIES = {"relu": nn.ReLU, "gelu": nn.GELU, "swish": nn.SiLU, "tanh": nn.Tanh}


class BottleneckAdapter(nn.Module):
    """x ↦ s · (U f(D x + c) + b) in the dtype of its own weights, shape (..., width); no residual connection.

    D starts from a normal distribution of standard deviation 0.01, cut off at two of them (Houlsby et al. 2019,
    section 3.6); U, b and c start from zero, so that at first nothing is added. Dropout falls on the bottleneck.
    """

    def __init__(self, width: int, size: int, nonlinearity: str, scaling: float, dropout: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.down = nn.Linear(width, size, dtype=torch.float32)
        self.activation = NONLINEARITIES[nonlinearity]()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(size, width, dtype=torch.float32)
        nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.down.weight.dtype)  # the backbone may be held in half precision
        update: Tensor = self.up(self.dropout(self.activation(self.down(inputs))))
        return self.scaling * update


class Held:
    """Carries the input of a feed-forward network to where its output is adapted, within one forward pass."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        """What is held, once."""
        value, self.value = self.value, None
        if value is None:
            raise MethodError("a parallel adapter saw no input: its feed-forward network was run without its hooks")
        return value


def add_adapter(module: Any, adapter: BottleneckAdapter, given: Any = None, is_norm: bool = False) -> None:
    """Make `adapter` a child of `module` and change what that returns.

    z becomes z + adapter(z); where the module is a normalisation, LN(s) becomes LN(s + adapter(LN(s))) (MAD-X).

    Args:
        given: the module whose input x the adapter reads instead: z becomes z + adapter(x) (He et al. 2022).
        is_norm: the module is the normalisation of the sum of input and result.

    Raises:
        MethodError: the module has an adapter.
    """
    if hasattr(module, ADAPTER):
        raise MethodError("this model has an adapter already; attach to a model as transformers loads it")
    module.add_module(ADAPTER, adapter)
    hook = _normalise_again if is_norm else _add_update
    if given is not None:
        hook = _add_held_update
        given.adapter_input = module.adapter_input = Held()
        given.register_forward_pre_hook(_hold_input)
    module.register_forward_hook(hook, prepend=True)  # before transformers' own, which record hidden states


def train_norm(norm: nn.Module) -> None:
    """Let the parameters of a normalisation train, held in float32; what it returns has the dtype it was given."""
    if any(parameter.dtype != torch.float32 for parameter in norm.parameters(recurse=False)):
        norm.float()
        norm.register_forward_pre_hook(_to_own_dtype)
        norm.register_forward_hook(_to_given_dtype)
    for parameter in norm.parameters(recurse=False):
        parameter.requires_grad_(True)


def _add_update(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output  # some blocks return more than hidden states
    changed = first + module.adapter(first).to(first.dtype)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _normalise_again(norm: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
    summed = inputs[0]
    return norm.forward(summed + norm.adapter(output).to(summed.dtype))  # not by calling it: that would run this hook


def _hold_input(module: Any, inputs: tuple[Tensor, ...]) -> None:
    module.adapter_input.value = inputs[0]


def _add_held_update(module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    update: Tensor = module.adapter(module.adapter_input.take())
    return output + update.to(output.dtype)


def _to_own_dtype(norm: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    norm.given_dtype = inputs[0].dtype
    return (inputs[0].to(next(norm.parameters()).dtype), *inputs[1:])


def _to_given_dtype(norm: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(norm.given_dtype)
