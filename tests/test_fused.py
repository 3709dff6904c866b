"""One role of a fused projection, adapted alone, on the architectures that fuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

import peftkit
from peftkit.api import attach
from peftkit.backbones.fused import SplitProjection, fuse, split_fused
from peftkit.backbones.layouts import layout_for
from peftkit.backbones.targets import find_targets
from peftkit.errors import MethodError
from peftkit.methods import LoRA

_SMALL = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL |= {"intermediate_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "initializer_range": 0.2}
_SMALL |= {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _SMALL | {"n_inner": 40},
    "gpt_neox": _SMALL,
    "phi3": _SMALL | {"num_key_value_heads": 2},
    "modernbert": _SMALL | {"cls_token_id": 1, "sep_token_id": 2},
    "deberta": _SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16},
}
IDS = torch.tensor([[3, 10, 11, 12, 13, 4], [4, 20, 21, 22, 23, 24]])


def tiny(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModel.from_config(AutoConfig.for_model(model_type, **CONFIGS[model_type]))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).last_hidden_state


def split(model: nn.Module, model_type: str, targets: str) -> None:
    layout = layout_for(model_type)
    split_fused(model, layout, find_targets(model, layout, targets))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_split_computes_the_same_and_fuses_back_to_the_same_bytes(model_type: str) -> None:
    model = tiny(model_type)
    before, state = outputs(model), copy.deepcopy(model.state_dict())
    split(model, model_type, "query")
    assert any(isinstance(part, SplitProjection) for part in model.modules())
    assert torch.allclose(outputs(model), before, atol=1e-5)
    fused = fuse(model).state_dict()
    assert fused.keys() == state.keys()
    assert all(torch.equal(fused[name], state[name]) for name in state)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("role", ["query", "key", "value"])
def test_the_part_of_a_role_is_what_the_attention_reads_as_that_role(model_type: str, role: str) -> None:
    """Zero queries (or keys) make attention uniform; zero values make it nothing."""
    model = tiny(model_type)
    split(model, model_type, role)
    for part in model.modules():
        if isinstance(part, SplitProjection) and role in part.roles:
            linear = part.get_submodule(role)
            for parameter in linear.parameters():
                parameter.data.zero_()
    for name, parameter in model.named_parameters():  # DeBERTa's biases and relative positions stand apart
        if name.endswith(("q_bias", "v_bias", "pos_proj.weight", "pos_q_proj.weight", "pos_q_proj.bias")):
            parameter.data.zero_()
    model.config._attn_implementation = "eager"  # type: ignore[union-attr]
    seen: list[Tensor] = []
    layout = layout_for(model_type)
    attending = [m for n, m in model.named_modules() if n.endswith(f".{layout.attention[0]}")]
    attending[0].register_forward_hook(lambda module, inputs, result: seen.extend(result[:2]))
    with torch.no_grad():
        model(input_ids=IDS, output_attentions=True)
    context, weights = seen
    if role == "value":
        out = model.get_submodule(_output_name(model, layout)).bias if model_type in ("gpt2", "gpt_neox") else None
        assert torch.allclose(context, torch.zeros(()) if out is None else out.expand_as(context), atol=1e-6)
    else:
        last = weights[:, :, -1]
        assert torch.allclose(last, torch.full_like(last, 1 / IDS.shape[1]), atol=1e-6)


def _output_name(model: nn.Module, layout: Any) -> str:
    return next(name for name, _ in model.named_modules() if name.endswith(f".{layout.roles['output'][0]}"))


def test_lora_on_a_part_is_lora_on_the_rows_of_the_fused_matrix() -> None:
    model = tiny("gpt2")
    whole = copy.deepcopy(model)
    adapted: Any = attach(model, LoRA(rank=4, alpha=4, targets="query+value"))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    parameters = dict(adapted.named_parameters())
    for block in range(2):
        update = torch.zeros(96, 32)
        for role, first in (("query", 0), ("value", 64)):
            path = f"base_model.model.h.{block}.attn.c_attn.{role}"
            b, a = (parameters[f"{path}.lora_{one}.default.weight"].detach() for one in "BA")
            update[first : first + 32] = b @ a
        whole.h[block].attn.c_attn.weight.data += update.T  # type: ignore[index,union-attr,operator,operator]
    expected = outputs(whole)
    assert torch.allclose(outputs(adapted), expected, atol=1e-4)
    merged = LoRA(rank=4, targets="query+value").merge(adapted)
    assert merged.state_dict().keys() == whole.state_dict().keys()
    assert torch.allclose(outputs(merged), expected, atol=1e-4)


def test_plain_peft_loads_an_adapter_of_parts_into_a_split_model(tmp_path: Path) -> None:
    method = LoRA(rank=4, targets="query+value")
    adapted: Any = attach(tiny("gpt2"), method)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2)
    method.save(adapted, tmp_path)
    loaded = PeftModel.from_pretrained(peftkit.split_fused(tiny("gpt2"), "query+value"), tmp_path)
    assert torch.equal(outputs(loaded.eval()), outputs(adapted.eval()))


def test_a_projection_that_is_not_plain_is_refused() -> None:
    model = tiny("gpt_neox")
    layout = layout_for("gpt_neox")
    targets = find_targets(model, layout, "query")

    class Quantised(nn.Linear):
        pass

    name = str(targets[0].fused_in)
    model.set_submodule(name, Quantised(32, 96))
    with pytest.raises(MethodError, match=f"'{name}' is a Quantised, which cannot be adapted in part"):
        split_fused(model, layout, targets)
