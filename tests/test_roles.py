"""Roles of the layout table against what each architecture does with the projection's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_layouts import MODEL_TYPES, tiny_config
from torch import Tensor, nn
from transformers import AutoModel

from peftkit.backbones.fused import split_fused
from peftkit.backbones.layouts import block_modules, layout_for
from peftkit.backbones.targets import find_targets
from peftkit.errors import MethodError

IDS = torch.tensor([[3, 10, 11, 12, 13, 14, 2]])
PLACE = 2
"""The position whose projection is disturbed."""
Change = Callable[[Tensor], Tensor]


class Traced:
    """A tiny model whose fused projections are split into one module a role."""

    def __init__(self, model_type: str, **changes: Any) -> None:
        torch.manual_seed(0)
        config = tiny_config(model_type, **{"decoder_start_token_id": 0, "pad_token_id": 0} | changes)
        self.model: Any = AutoModel.from_config(config).eval()
        for name, parameter in self.model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                nn.init.normal_(parameter, std=0.3)
        layout = layout_for(model_type)
        self.targets = {}
        for role in ("query", "key", "value", "output", "gate", "up", "down"):
            try:
                self.targets[role] = find_targets(self.model, layout, role)
            except MethodError:
                assert role == "gate"
        split_fused(self.model, layout, [target for found in self.targets.values() for target in found])
        self.blocks = list(block_modules(self.model, layout))

    def in_block(self, role: str, block: str) -> list[str]:
        """The role's modules in a block: of self-attention, and of cross attention where there is one."""
        return [target.name for target in self.targets.get(role, ()) if target.name.startswith(f"{block}.")]

    def given_to(self, name: str, changed: str = "", change: Change | None = None) -> Tensor:
        """What a module is given, (positions, width), when the output of another is changed."""
        given: list[Tensor] = []
        hooks = [self.model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))]
        if change is not None:
            hooks.append(self.model.get_submodule(changed).register_forward_hook(lambda _, __, output: change(output)))
        decoder = {"decoder_input_ids": IDS} if self.model.config.is_encoder_decoder else {}
        with torch.no_grad():
            self.model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **decoder)
        for hook in hooks:
            hook.remove()
        return given[0].reshape(-1, IDS.shape[1], given[0].shape[-1])[0]  # BART flattens what it gives to fc2


def zero(output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def disturbed(output: Tensor) -> Tensor:
    output = output.clone()
    output.reshape(-1, IDS.shape[1], output.shape[-1])[:, PLACE] += 1 + torch.arange(output.shape[-1]) % 3
    return output


def moved(one: Tensor, two: Tensor) -> list[int]:
    """Positions at which they differ."""
    return [place for place in range(len(one)) if not torch.allclose(one[place], two[place], atol=1e-5)]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_queries_ask_keys_are_compared_and_values_are_averaged(model_type: str) -> None:
    traced = Traced(model_type)
    for block in traced.blocks:
        attentions = [traced.in_block(role, block) for role in ("query", "key", "value", "output")]
        assert 1 <= len(attentions[0]) <= 2
        for query, key, value, output in zip(*attentions, strict=True):
            plain = traced.given_to(output)
            assert traced.given_to(output, value, zero).abs().max() == 0
            assert traced.given_to(output, key, zero).abs().max() > 0.01
            # a query is asked at its own position; keys and values reach the positions after it
            assert moved(plain, traced.given_to(output, query, disturbed)) == [PLACE]
            assert {PLACE + 1, PLACE + 2} <= set(moved(plain, traced.given_to(output, key, disturbed)))
            assert {PLACE + 1, PLACE + 2} <= set(moved(plain, traced.given_to(output, value, disturbed)))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [*((model_type, {}) for model_type in MODEL_TYPES), ("t5", {"feed_forward_proj": "gated-gelu"})],
)
def test_the_gate_goes_through_the_activation_and_up_beside_it_does_not(
    model_type: str, changes: dict[str, Any]
) -> None:
    traced = Traced(model_type, **changes)
    for block in traced.blocks:
        ups, downs, gates = (traced.in_block(role, block) for role in ("up", "down", "gate"))
        assert len(ups) == len(downs) == 1
        plain = traced.given_to(downs[0])
        assert traced.given_to(downs[0], ups[0], zero).abs().max() < 1e-6
        assert moved(plain, traced.given_to(downs[0], ups[0], disturbed)) == [PLACE]
        twice = traced.given_to(downs[0], ups[0], lambda output: 2 * output)
        is_linear = bool(gates) or getattr(traced.model.config, "dense_act_fn", "") == "relu"
        assert torch.allclose(twice, 2 * plain, atol=1e-5) == is_linear
        for gate in gates:
            assert traced.given_to(downs[0], gate, zero).abs().max() < 1e-6
            assert not torch.allclose(traced.given_to(downs[0], gate, lambda output: 2 * output), 2 * plain, atol=1e-3)
