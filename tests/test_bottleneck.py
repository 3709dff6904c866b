"""Bottleneck adapters against the papers' formulas in float64 and against the `adapters` package on equal weights."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    CAUSAL,
    IDS,
    SEQ2SEQ,
    SEQUENCE,
    TASKS,
    Place,
    backbone_of,
    evaluated,
    loss_of,
    on_meta,
    save_checkpoint,
)
from pydantic import ValidationError
from safetensors.torch import load_file
from test_layouts import ENCODER_DECODERS, MODEL_TYPES
from test_layouts import tiny_config as config_of
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import peftkit.api
from peftkit.backbones.layouts import block_modules, layout_for
from peftkit.backbones.load import wrap
from peftkit.backbones.modules import head_modules
from peftkit.errors import MethodError, NotMergeable
from peftkit.methods import METHODS, Bottleneck
from peftkit.methods.base import module_parameters, trained_parameters

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "tests" / "data" / "adapters_reference.json"
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
ARCHITECTURES = tuple(TASKS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def attached(method: Bottleneck, place: Place, root: Path) -> Any:
    return method.attach(backbone_of(save_checkpoint(place, root), place.model_class, head_seed=1), 1)


def disturb(model: nn.Module) -> Any:
    """Adapters as training might leave them: nothing is zero."""
    chance = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=chance).to(parameter)
    return model.eval()


def close(one: Tensor, two: Tensor, tolerance: float) -> bool:
    return one.shape == two.shape and float((one - two).abs().max()) <= tolerance * max(1.0, float(two.abs().max()))


# --- where the layout table says that sublayers end ---------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_results_of_the_layout_are_what_is_added_to_the_residual(model_type: str) -> None:
    """In float64: block output = input + results where norms come first, norm(…) of such sums where they come last."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config_of(model_type)).double().eval()
    layout = layout_for(model_type)
    for block in block_modules(model, layout).values():
        given, made = _watch(block)
        ids = torch.arange(3, 9)[None]
        inputs = {"decoder_input_ids": ids} if model_type in ENCODER_DECODERS else {}
        with torch.no_grad():
            model(input_ids=ids, **inputs)
        attention = [made[path] for path in layout.attention_result or layout.roles["output"] if path in made]
        feed_forward = next(made[p] for p in layout.feed_forward_result or layout.roles["down"] if p in made)
        if not layout.feed_forward_norm:
            end = made[layout.feed_forward_sum[0]]
            total = given[""] + sum(attention) + feed_forward
            # T5's and Gemma's normalisations, and what they are given, are rounded to float32
            assert close(end[0] if isinstance(end, tuple) else end, total, 1e-6)
            continue
        norms = {path: part for path, part in block.named_modules() if type(part).__name__.endswith("Norm")}
        state = given[""]
        for result in attention:
            (norm,) = (path for path in norms if path in given and close(given[path], state + result, 1e-12))
            state = made[norm]
        end = layout.feed_forward_norm[0]
        assert close(given[end], state + feed_forward, 1e-12)
        assert torch.equal(made[""][0] if isinstance(made[""], tuple) else made[""], made[end])


def _watch(block: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """First inputs and outputs of all modules of a block, in its last call."""
    given: dict[str, Tensor] = {}
    made: dict[str, Any] = {}
    for path, part in block.named_modules():

        def watch(_: nn.Module, inputs: Any, keywords: Any, output: Any, path: str = path) -> None:
            first = [*inputs, keywords.get("hidden_states")][0]
            given[path], made[path] = first, output

        part.register_forward_hook(watch, with_kwargs=True)
    return given, made


# --- the papers' formulas, with blocks written by hand --------------------------------------------------------------


def linear(module: Any, x: Tensor) -> Tensor:
    transposed = type(module).__name__ == "Conv1D"
    y = x @ (module.weight if transposed else module.weight.T)
    return y if module.bias is None else y + module.bias


def norm(module: Any, x: Tensor, plus_one: bool = False) -> Tensor:
    if getattr(module, "bias", None) is None:
        epsilon = getattr(module, "variance_epsilon", None) or module.eps
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * (module.weight + plus_one)
    spread = x.var(-1, correction=0, keepdim=True) + module.eps
    return (x - x.mean(-1, keepdim=True)) / spread.sqrt() * module.weight + module.bias


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, bias: Any = 0.0, scale: float | None = None
) -> Tensor:
    """Softmax attention over (batch, heads, length, size), as (batch, length, heads · size)."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@dataclass(frozen=True)
class Sublayers:
    """A block taken apart: what it computes, and where its adapters are by name."""

    attention: Callable[[Tensor], Tensor]
    feed_forward: Callable[[Tensor], Tensor]
    norms: tuple[Callable[[Tensor], Tensor], ...]
    """Of attention, cross attention if there is any, and feed-forward network."""
    norm_first: bool
    sites: dict[str, str]
    cross: Callable[[Tensor], Tensor] | None = None
    beside: bool = False
    """Attention and feed-forward network are given the same (GPT-NeoX)."""


def adapted_block(x: Tensor, parts: Sublayers, placement: str, update: Callable[[str, Tensor], Tensor]) -> Tensor:
    """A block with adapters, from Houlsby et al. figure 2, MAD-X section 2.2.2 and He et al. table 1."""

    def attention(x: Tensor) -> Tensor:
        z = parts.attention(x)
        return z + update("attention", z) if placement == "houlsby" else z

    def feed_forward(x: Tensor) -> Tensor:
        z = parts.feed_forward(x)
        if placement == "houlsby":
            return z + update("result", z)
        return z + 4 * update("result", x) if placement == "parallel" else z

    sublayers = [attention, *([parts.cross] if parts.cross else []), feed_forward]
    start = x
    for number, (sublayer, normalise) in enumerate(zip(sublayers, parts.norms, strict=True)):
        if parts.norm_first:
            x = x + sublayer(normalise(start if parts.beside else x))
        elif placement == "pfeiffer" and number == len(sublayers) - 1:
            h = normalise(x + sublayer(x))
            x = normalise(x + sublayer(x) + update("end", h))
        else:
            x = normalise(x + sublayer(x))
    return x + update("end", x) if placement == "pfeiffer" and parts.norm_first else x


def bert_parts(block: Any, _: Any) -> Sublayers:
    self, out = block.attention.self, block.attention.output
    return Sublayers(
        lambda x: linear(out.dense, attend(*(split(linear(one, x), 2) for one in (self.query, self.key, self.value)))),
        lambda x: linear(block.output.dense, nn.functional.gelu(linear(block.intermediate.dense, x))),
        (lambda x: norm(out.LayerNorm, x), lambda x: norm(block.output.LayerNorm, x)),
        norm_first=False,
        sites={"attention": "attention.output.dropout", "result": "output.dropout", "end": "output.LayerNorm"},
    )


def albert_parts(block: Any, _: Any) -> Sublayers:
    inner = block.attention
    return Sublayers(
        lambda x: linear(inner.dense, attend(*(split(linear(p, x), 2) for p in (inner.query, inner.key, inner.value)))),
        lambda x: linear(block.ffn_output, nn.functional.gelu(linear(block.ffn, x), approximate="tanh")),
        (lambda x: norm(inner.LayerNorm, x), lambda x: norm(block.full_layer_layer_norm, x)),
        norm_first=False,
        sites={"attention": "attention.output_dropout", "result": "ffn_output", "end": "full_layer_layer_norm"},
    )


def gpt2_parts(block: Any, _: Any) -> Sublayers:
    def attention(x: Tensor) -> Tensor:
        q, k, v = linear(block.attn.c_attn, x).chunk(3, dim=-1)
        return linear(block.attn.c_proj, attend(split(q, 2), split(k, 2), split(v, 2), causal=True))

    return Sublayers(
        attention,
        lambda x: linear(block.mlp.c_proj, nn.functional.gelu(linear(block.mlp.c_fc, x), approximate="tanh")),
        (lambda x: norm(block.ln_1, x), lambda x: norm(block.ln_2, x)),
        norm_first=True,
        sites={"attention": "attn.resid_dropout", "result": "mlp.dropout", "end": ""},
    )


def gpt_neox_parts(block: Any, keywords: Any) -> Sublayers:
    def attention(x: Tensor) -> Tensor:
        q, k, v = split(linear(block.attention.query_key_value, x), 2).chunk(3, dim=-1)
        cos, sin = keywords["position_embeddings"]
        size = cos.shape[-1]
        turned = apply_rotary_pos_emb(q[..., :size], k[..., :size], cos, sin)
        q, k = (torch.cat([t, one[..., size:]], dim=-1) for t, one in zip(turned, (q, k), strict=True))
        return linear(block.attention.dense, attend(q, k, v, causal=True))

    return Sublayers(
        attention,
        lambda x: linear(block.mlp.dense_4h_to_h, nn.functional.gelu(linear(block.mlp.dense_h_to_4h, x))),
        (lambda x: norm(block.input_layernorm, x), lambda x: norm(block.post_attention_layernorm, x)),
        norm_first=True,
        sites={"attention": "post_attention_dropout", "result": "post_mlp_dropout", "end": ""},
        beside=True,
    )


def llama_parts(block: Any, keywords: Any) -> Sublayers:
    inner, mlp = block.self_attn, block.mlp

    def attention(x: Tensor) -> Tensor:
        q, k, v = (
            linear(p, x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (inner.q_proj, inner.k_proj, inner.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *keywords["position_embeddings"])
        return linear(inner.o_proj, attend(q, k, v, causal=True))

    return Sublayers(
        attention,
        lambda x: linear(mlp.down_proj, nn.functional.silu(linear(mlp.gate_proj, x)) * linear(mlp.up_proj, x)),
        (lambda x: norm(block.input_layernorm, x), lambda x: norm(block.post_attention_layernorm, x)),
        norm_first=True,
        sites={"attention": "self_attn.o_proj", "result": "mlp.down_proj", "end": ""},
    )


def olmo2_parts(block: Any, keywords: Any) -> Sublayers:
    """Results are normalised before they are added, and nothing before."""
    inner, mlp = block.self_attn, block.mlp

    def attention(x: Tensor) -> Tensor:
        q, k = norm(inner.q_norm, linear(inner.q_proj, x)), norm(inner.k_norm, linear(inner.k_proj, x))
        q, k = apply_rotary_pos_emb(split(q, 2), split(k, 2), *keywords["position_embeddings"])
        z = linear(inner.o_proj, attend(q, k, split(linear(inner.v_proj, x), 2), causal=True))
        return norm(block.post_attention_layernorm, z)

    def feed_forward(x: Tensor) -> Tensor:
        z = linear(mlp.down_proj, nn.functional.silu(linear(mlp.gate_proj, x)) * linear(mlp.up_proj, x))
        return norm(block.post_feedforward_layernorm, z)

    sites = {"attention": "post_attention_layernorm", "result": "post_feedforward_layernorm", "end": ""}
    return Sublayers(attention, feed_forward, (lambda x: x, lambda x: x), norm_first=True, sites=sites)


def t5_parts(block: Any, keywords: Any) -> Sublayers:
    first, second, third = block.layer
    inner, cross, wide = first.SelfAttention, second.EncDecAttention, third.DenseReluDense
    other = keywords["encoder_hidden_states"]

    def attention(x: Tensor) -> Tensor:
        q, k, v = (split(linear(one, x), 2) for one in (inner.q, inner.k, inner.v))
        return linear(inner.o, attend(q, k, v, causal=True, bias=keywords["position_bias"], scale=1.0))

    def across(x: Tensor) -> Tensor:
        q, k, v = (split(linear(one, y), 2) for one, y in ((cross.q, x), (cross.k, other), (cross.v, other)))
        return linear(cross.o, attend(q, k, v, scale=1.0))

    return Sublayers(
        attention,
        lambda x: linear(wide.wo, torch.relu(linear(wide.wi, x))),
        tuple(lambda x, one=one: norm(one.layer_norm, x) for one in block.layer),
        norm_first=True,
        sites={"attention": "layer.0.SelfAttention.o", "result": "layer.2.DenseReluDense", "end": ""},
        cross=across,
    )


def bart_parts(block: Any, keywords: Any) -> Sublayers:
    inner, cross, other = block.self_attn, block.encoder_attn, keywords["encoder_hidden_states"]

    def attention(one: Any, x: Tensor, y: Tensor, causal: bool) -> Tensor:
        parts = (
            split(linear(projection, t), 2) for projection, t in ((one.q_proj, x), (one.k_proj, y), (one.v_proj, y))
        )
        return linear(one.out_proj, attend(*parts, causal=causal))

    norms = (block.self_attn_layer_norm, block.encoder_attn_layer_norm, block.final_layer_norm)
    return Sublayers(
        lambda x: attention(inner, x, x, causal=True),
        lambda x: linear(block.fc2, nn.functional.gelu(linear(block.fc1, x))),
        tuple(lambda x, one=one: norm(one, x) for one in norms),
        norm_first=False,
        sites={"attention": "self_attn.out_proj", "result": "fc2", "end": "final_layer_norm"},
        cross=lambda x: attention(cross, x, other, causal=False),
    )


# (block, how it is taken apart, tolerance: those of 1e-5 round normalisations or rotations to float32)
BLOCKS = {
    "bert": ("encoder.layer.1", bert_parts, 1e-10),
    "albert": ("encoder.albert_layer_groups.1.albert_layers.1", albert_parts, 1e-10),
    "gpt2": ("h.1", gpt2_parts, 1e-10),
    "gpt_neox": ("layers.1", gpt_neox_parts, 1e-10),
    "llama": ("layers.1", llama_parts, 1e-5),
    "olmo2": ("layers.1", olmo2_parts, 1e-5),
    "t5": ("decoder.block.1", t5_parts, 1e-5),
    "bart": ("decoder.layers.1", bart_parts, 1e-10),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("model_type", BLOCKS)
def test_block_in_float64(model_type: str, placement: Any) -> None:
    name, take_apart, tolerance = BLOCKS[model_type]
    torch.manual_seed(0)
    model: Any = AutoModel.from_config(config_of(model_type))
    disturb(peftkit.api.attach(model, Bottleneck(placement=placement, bottleneck_size=5))).double()
    block, seen = model.get_submodule(name), {}

    def see(_: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
        arguments = inspect.signature(block.forward).bind(*inputs, **keywords).arguments
        seen["x"], seen["keywords"] = arguments["hidden_states"], arguments | arguments.get("kwargs", {})
        seen["y"] = output[0] if isinstance(output, tuple) else output

    block.register_forward_hook(see, with_kwargs=True)
    ids = torch.tensor([[3, 7, 5, 11, 4], [9, 4, 6, 8, 10]])
    decoder = {"decoder_input_ids": ids[:, :4]} if model_type in ENCODER_DECODERS else {}
    with torch.no_grad():
        model(input_ids=ids, **decoder)
    state = dict(model.named_parameters())
    parts = take_apart(block, seen["keywords"])

    def update(site: str, x: Tensor) -> Tensor:
        at = ".".join(filter(None, (name, parts.sites[site], "adapter")))
        weights = (state[f"{at}.{part}.{kind}"] for part in ("down", "up") for kind in ("weight", "bias"))
        down, c, up, b = weights
        return torch.relu(x @ down.T + c) @ up.T + b

    with torch.no_grad():
        expected = adapted_block(seen["x"], parts, placement, update)
        untouched = adapted_block(seen["x"], parts, placement, lambda _, x: torch.zeros_like(x))
    assert close(seen["y"], expected, tolerance)
    assert not close(seen["y"], untouched, 0.05)
    adapters = {key.partition(".adapter.")[0] for key in state if key.startswith(f"{name}.") and ".adapter." in key}
    used = {"houlsby": ("attention", "result"), "pfeiffer": ("end",), "parallel": ("result",)}[placement]
    assert adapters == {".".join(filter(None, (name, parts.sites[site]))) for site in used}


@pytest.mark.parametrize(
    ("nonlinearity", "function"),
    [("relu", torch.relu), ("gelu", nn.functional.gelu), ("swish", nn.functional.silu), ("tanh", torch.tanh)],
)
def test_adapter_formula(nonlinearity: Any, function: Callable[[Tensor], Tensor]) -> None:
    from peftkit.methods.bottleneck_layers import BottleneckAdapter

    adapter = BottleneckAdapter(6, 3, nonlinearity, scaling=2.5, dropout=0.0).double().requires_grad_(False)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 6, dtype=torch.float64)
    inner = function(x @ adapter.down.weight.T + adapter.down.bias)
    assert close(adapter(x), 2.5 * (inner @ adapter.up.weight.T + adapter.up.bias), 1e-12)


def test_start_of_an_adapter() -> None:
    from peftkit.methods.bottleneck_layers import BottleneckAdapter

    torch.manual_seed(0)
    adapter = BottleneckAdapter(768, 64, "relu", 1.0, 0.0)
    down = adapter.down.weight.detach()
    # a normal distribution cut off at two standard deviations has 0.8796 of the spread
    assert float(down.std()) == pytest.approx(0.008796, rel=0.02)
    assert float(down.abs().max()) <= 0.02
    assert not any(p.any() for p in (adapter.down.bias, adapter.up.weight, adapter.up.bias))


def test_albert_uses_its_one_adapter_in_every_layer() -> None:
    torch.manual_seed(0)
    config = config_of("albert", num_hidden_layers=3, num_hidden_groups=1, inner_group_num=1)
    model: Any = disturb(peftkit.api.attach(AutoModel.from_config(config), Bottleneck(bottleneck_size=4))).double()
    (block,) = model.encoder.albert_layer_groups[0].albert_layers
    adapter, parts = block.full_layer_layer_norm.adapter, albert_parts(block, None)
    assert [name for name in trained_parameters(model) if name.endswith("up.bias")] == [
        "encoder.albert_layer_groups.0.albert_layers.0.full_layer_layer_norm.adapter.up.bias"
    ]
    with torch.no_grad():
        output = model(input_ids=IDS[:1], output_hidden_states=True)
        expected = output.hidden_states[0]
        for _ in range(3):
            expected = adapted_block(
                expected, parts, "pfeiffer", lambda _, x: linear(adapter.up, torch.relu(linear(adapter.down, x)))
            )
    assert close(output.last_hidden_state, expected, 1e-10)


# --- the `adapters` package on the same weights ---------------------------------------------------------------------

REFERENCES = json.loads(REFERENCE.read_text())


def fill(parameter: nn.Parameter, name: str) -> None:
    """The formula of the script in the reference file."""
    phase = sum(map(ord, name)) % 31
    wave = torch.tensor([math.sin(0.013 * i * i + phase) for i in range(parameter.numel())], dtype=torch.float64)
    one = parameter.ndim == 1 and name.endswith("weight")
    wave = 1 + 0.2 * wave if one else (0.1 if parameter.ndim == 1 else 0.3) * wave
    parameter.data = wave.view(parameter.shape).float()


def block_number(name: str, blocks: int) -> int:
    """Counted through encoder and decoder."""
    number = re.search(r"\.(\d+)\.", f".{name}.")
    assert number
    return int(number[1]) + (blocks if "decoder." in name else 0)


@pytest.mark.parametrize(
    ("model_type", "placement"),
    [(model_type, placement) for model_type, outputs in REFERENCES["outputs"].items() for placement in outputs],
)
def test_same_outputs_as_the_adapters_package(model_type: str, placement: Any) -> None:
    model: Any = AutoModel.from_config(AutoConfig.for_model(model_type, **REFERENCES["configs"][model_type])).eval()
    for name, parameter in model.named_parameters():
        fill(parameter, name)
    method = Bottleneck(
        placement=placement, reduction_factor=2, nonlinearity="swish" if placement == "houlsby" else "relu"
    )
    peftkit.api.attach(model, method)
    blocks = len(getattr(model, "encoder", model).layers if model_type == "bart" else range(2))
    for name, parameter in trained_parameters(model).items():
        attention = re.search(r"attention\.output|attn|SelfAttention", name)
        site = f"{block_number(name, blocks)}.{'attention' if attention else 'feed_forward'}"
        part = ".".join(name.split(".")[-2:]).replace("weight", "weights")
        fill(parameter, f"{site}.{part}")
    ids, mask = torch.tensor(REFERENCES["ids"]), torch.tensor(REFERENCES["mask"])
    inputs, real = {"input_ids": ids, "attention_mask": mask}, mask.bool()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor(REFERENCES["decoder_ids"])
        real = torch.ones_like(inputs["decoder_input_ids"]).bool()
    with torch.no_grad():
        found = model(**inputs).last_hidden_state[real]
    assert close(found, torch.tensor(REFERENCES["outputs"][model_type][placement]), 1e-5)


def test_there_are_references_for_every_placement() -> None:
    found = {placement for outputs in REFERENCES["outputs"].values() for placement in outputs}
    assert found == set(PLACEMENTS)
    assert len(REFERENCES["outputs"]) == 5


# --- on every architecture ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_start_counts_and_gradients(architecture: str, placement: Any, root: Path) -> None:
    place = Place(architecture, TASKS[architecture][PLACEMENTS.index(placement) % len(TASKS[architecture])])
    method = Bottleneck(placement=placement, bottleneck_size=4, nonlinearity="tanh")
    plain = backbone_of(save_checkpoint(place, root), place.model_class, head_seed=1).model
    keys, before = set(plain.state_dict()), evaluated(plain, place.model_class)
    model = attached(method, place, root)
    assert torch.equal(evaluated(model, place.model_class), before)
    assert {key for key in model.state_dict() if ".adapter." not in key} == keys

    blocks = 4 if place.model_class in (SEQUENCE, SEQ2SEQ) and architecture in ENCODER_DECODERS else 2
    blocks = 1 if architecture == "albert" else blocks
    added = (2 if placement == "houlsby" else 1) * blocks * (2 * 32 * 4 + 4 + 32)
    meta = on_meta(place)
    assert method.added_parameters(meta, layout_for(architecture)) == added
    heads = head_modules(meta)
    assert method.tuned_parameters(meta, heads) == 0
    trained = trained_parameters(model)
    assert sum(p.numel() for p in trained.values()) == added + module_parameters(meta, heads)
    assert {name for name in trained if ".adapter." not in name} == {
        name for name, _ in plain.named_parameters() if name.startswith(tuple(f"{head}." for head in heads))
    }
    loss_of(disturb(model).train(), place.model_class).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trained)
    assert all(p.grad.abs().sum() > 0 for name, p in trained.items() if ".adapter." in name and p.grad is not None)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2", "llama", "t5", "bart"])
def test_gradient_checkpointing_gives_the_same_gradients(architecture: str, placement: Any, root: Path) -> None:
    place = Place(architecture, SEQUENCE)
    model = disturb(attached(Bottleneck(placement=placement, bottleneck_size=4), place, root)).train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        loss_of(model, SEQUENCE).backward()
        return {name: p.grad.clone() for name, p in trained_parameters(model).items()}

    kept = gradients()
    # its name from transformers 5.23 on, and before
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    calls: list[None] = []
    first = next(p for name, p in model.named_modules() if name.endswith(".adapter.down"))
    first.register_forward_hook(lambda *_: calls.append(None))
    for name, gradient in gradients().items():
        assert close(gradient, kept[name], 1e-6), name
    copy.deepcopy(model)  # nothing of the recomputation is left behind
    assert calls


@pytest.mark.parametrize("train_layernorm", [False, True])
@pytest.mark.parametrize(
    ("architecture", "norms"),
    # numbers in the normalisations of one block: LayerNorms have a bias; Qwen3 has two for a head of 8 as well
    [("bert", 2 * 64), ("gpt2", 2 * 64), ("llama", 2 * 32), ("qwen3", 2 * 32 + 2 * 8)],
)
def test_trained_normalisations(
    architecture: str, norms: int, train_layernorm: bool, root: Path, tmp_path: Path
) -> None:
    place = Place(architecture, SEQUENCE)
    method = Bottleneck(bottleneck_size=4, train_layernorm=train_layernorm, layers=(1,))
    meta = on_meta(place)
    assert method.tuned_parameters(meta, head_modules(meta)) == (norms if train_layernorm else 0)
    model = attached(method, place, root)
    trained = {name: p for name, p in trained_parameters(model).items() if not name.startswith(head_modules(meta))}
    own = {name: p for name, p in trained.items() if ".adapter." not in name}
    assert sum(p.numel() for p in own.values()) == (norms if train_layernorm else 0)
    assert all(re.search(r"\.1\.", name) for name in trained)  # block 0 stays as it was, for AdapterDrop
    loss_of(disturb(model).train(), SEQUENCE).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.values())
    with torch.no_grad():
        for parameter in own.values():
            parameter += 0.1
    method.save(model, tmp_path)
    assert load_file(tmp_path / "trained.safetensors").keys() == trained_parameters(model).keys()
    loaded = method.load(backbone_of(save_checkpoint(place, root), SEQUENCE, head_seed=2), tmp_path)
    assert torch.equal(evaluated(loaded, SEQUENCE), evaluated(model, SEQUENCE))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_norms_of_a_skipped_cross_attention_do_not_train() -> None:
    model = BartForCausalLM(config_of("bart"))
    peftkit.api.attach(model, Bottleneck(bottleneck_size=4, train_layernorm=True))
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = trained_parameters(model)
    assert all(p.grad is not None for p in trained.values())
    assert sum("layer_norm.weight" in name for name in trained) == 2 * 2


# --- counts, as published -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "published"),
    [
        (Bottleneck(placement="houlsby", bottleneck_size=8), 835_968),
        (Bottleneck(placement="pfeiffer", bottleneck_size=16), 811_392),
        (Bottleneck(placement="parallel", bottleneck_size=16), 811_392),
        (Bottleneck(), 24 * (2 * 1024 * 64 + 64 + 1024)),
        (Bottleneck(reduction_factor=5000), 24 * (2 * 1024 + 1 + 1024)),
        (Bottleneck(bottleneck_size=8, layers=tuple(range(5, 24))), 19 * (2 * 1024 * 8 + 8 + 1024)),
    ],
)
def test_counts_on_roberta_large(method: Bottleneck, published: int) -> None:
    config = AutoConfig.for_model(
        "roberta", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert method.added_parameters(model, layout_for("roberta")) == published
    with_norms = method.model_copy(update={"train_layernorm": True})
    blocks = 24 if method.layers is None else len(method.layers)
    assert with_norms.tuned_parameters(model, ("classifier",)) == blocks * 2 * 2 * 1024
    attached = with_norms.attach(wrap(model), 1)
    assert {p.device.type for p in attached.parameters()} == {"meta"}


# --- which blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "model_class", "layers", "blocks"),
    [
        ("bert", SEQUENCE, (1,), ["bert.encoder.layer.1"]),
        ("t5", SEQ2SEQ, (0, 3), ["encoder.block.0", "decoder.block.1"]),
        ("bart", SEQ2SEQ, (1, 2), ["model.encoder.layers.1", "model.decoder.layers.0"]),
        ("llama", CAUSAL, (1, 1), ["model.layers.1"]),
    ],
)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_only_the_layers_named_are_adapted(
    architecture: str, model_class: str, layers: tuple[int, ...], blocks: list[str], placement: Any, root: Path
) -> None:
    method = Bottleneck(placement=placement, bottleneck_size=4, layers=layers)
    model = attached(method, Place(architecture, model_class), root)
    sites = [name.removesuffix(".adapter.up.bias") for name in trained_parameters(model) if name.endswith("up.bias")]
    held = list(dict.fromkeys(next(b for b in blocks if f"{site}.".startswith(f"{b}.")) for site in sites))
    assert held == blocks


@pytest.mark.parametrize(("written", "read"), [("4+5", (4, 5)), ("3", (3,)), (7, (7,)), ([0, 2], (0, 2))])
def test_layers_as_they_may_be_written(written: Any, read: tuple[int, ...]) -> None:
    method = Bottleneck.model_validate_json(json.dumps({"kind": "bottleneck", "layers": written}), strict=True)
    assert method.layers == read
    assert Bottleneck.model_validate(method.model_dump()) == method


# --- how the model is used ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5"])
def test_copies_and_pickles_are_whole(architecture: str, placement: Any, root: Path) -> None:
    model = disturb(attached(Bottleneck(placement=placement, bottleneck_size=4), Place(architecture, SEQUENCE), root))
    expected = evaluated(model, SEQUENCE)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            parameter.data.zero_()
    assert not close(evaluated(model, SEQUENCE), expected, 1e-2)
    for twin in twins:
        assert torch.equal(evaluated(twin, SEQUENCE), expected)


@pytest.mark.parametrize(
    ("architecture", "placement"), [("bert", "pfeiffer"), ("gpt2", "houlsby"), ("llama", "parallel")]
)
def test_compiled(architecture: str, placement: Any, root: Path) -> None:
    method = Bottleneck(placement=placement, bottleneck_size=4, train_layernorm=True)
    model = disturb(attached(method, Place(architecture, SEQUENCE), root))
    expected = evaluated(model, SEQUENCE)
    torch._dynamo.reset()
    assert close(evaluated(torch.compile(model, backend="eager"), SEQUENCE), expected, 1e-6)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    ("architecture", "model_class"),
    [("gpt2", CAUSAL), ("gpt_neox", CAUSAL), ("llama", CAUSAL), ("t5", SEQ2SEQ), ("bart", SEQ2SEQ)],
)
def test_generation_with_and_without_cache(architecture: str, model_class: str, placement: Any, root: Path) -> None:
    model = disturb(
        attached(Bottleneck(placement=placement, bottleneck_size=4), Place(architecture, model_class), root)
    )
    free = {"eos_token_id": None, "forced_eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        cached, plain = (model.generate(IDS[:1], use_cache=use, max_new_tokens=8, **free) for use in (True, False))
        other = attached(Bottleneck(bottleneck_size=4), Place(architecture, model_class), root).eval()
        untouched = other.generate(IDS[:1], use_cache=False, max_new_tokens=8, **free)
    assert torch.equal(cached.sequences, plain.sequences)
    assert len(plain.logits) == 8
    assert close(torch.cat(cached.logits), torch.cat(plain.logits), 1e-5)
    assert not close(torch.cat(untouched.logits), torch.cat(plain.logits), 0.1)


@pytest.mark.parametrize(
    ("architecture", "placement", "train_layernorm"),
    [
        ("bert", "pfeiffer", True),
        ("bert", "parallel", False),
        ("gpt2", "houlsby", True),
        ("llama", "pfeiffer", False),
        ("llama", "parallel", True),
        ("t5", "parallel", True),
        ("t5", "houlsby", False),
    ],
)
def test_in_float32_on_a_bfloat16_backbone(
    architecture: str, placement: Any, train_layernorm: bool, root: Path, tmp_path: Path
) -> None:
    place = Place(architecture, SEQUENCE)

    def backbone() -> Any:
        found = backbone_of(save_checkpoint(place, root), SEQUENCE, head_seed=1)
        return replace(found, model=found.model.to(torch.bfloat16))

    before = evaluated(backbone().model, SEQUENCE)
    method = Bottleneck(placement=placement, bottleneck_size=4, train_layernorm=train_layernorm)
    model = method.attach(backbone(), 1)
    # the head is held in float32 now, and so are normalisations that train: as near as bfloat16 tells apart
    assert close(evaluated(model, SEQUENCE).float(), before.float(), 5e-2)
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    loss_of(disturb(model).train(), SEQUENCE).backward()
    assert all(p.grad.isfinite().all() for p in trained_parameters(model).values())
    whole = copy.deepcopy(model).float()  # what the backbone's rounding is judged by
    assert close(evaluated(model, SEQUENCE).float(), evaluated(whole, SEQUENCE), 0.1)
    method.save(model, tmp_path)
    loaded = method.load(backbone(), tmp_path)
    assert torch.equal(evaluated(loaded, SEQUENCE), evaluated(model, SEQUENCE))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_hidden_states_are_those_after_the_adapters(placement: Any, root: Path) -> None:
    backbone = backbone_of(save_checkpoint(Place("llama", SEQUENCE), root), SEQUENCE, head_seed=1)
    model: Any = backbone.model
    model(input_ids=IDS, output_hidden_states=True)  # transformers hooks its blocks at the first call
    disturb(Bottleneck(placement=placement, bottleneck_size=4).attach(backbone, 1))
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], seen[0])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "albert"])
def test_feed_forward_in_chunks(architecture: str, placement: Any, root: Path) -> None:
    place = Place(architecture, SEQUENCE)
    whole = disturb(attached(Bottleneck(placement=placement, bottleneck_size=4), place, root)).double()
    expected = evaluated(whole, SEQUENCE)
    for part in whole.modules():
        if hasattr(part, "chunk_size_feed_forward"):
            part.chunk_size_feed_forward = 1
    assert close(evaluated(whole, SEQUENCE), expected, 1e-12)


def test_dropout_falls_on_the_bottleneck_in_training_only(root: Path) -> None:
    method = Bottleneck(bottleneck_size=8, dropout=0.5, nonlinearity="gelu")
    model = disturb(attached(method, Place("bert", SEQUENCE), root))
    assert torch.equal(evaluated(model, SEQUENCE), evaluated(model, SEQUENCE))
    adapter = model.get_submodule("bert.encoder.layer.0.output.LayerNorm.adapter").train().requires_grad_(False)
    adapter.up.weight.data, adapter.up.bias.data = torch.eye(32)[:, :8], torch.zeros(32)
    x = torch.randn(1, 32)
    found = torch.stack([adapter(x)[:, :8] for _ in range(400)])
    whole = nn.functional.gelu(linear(adapter.down, x))
    assert torch.allclose(found, torch.where(found == 0, 0.0, 2 * whole), rtol=1e-4)
    assert float((found != 0).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_scaling_multiplies_the_update(root: Path) -> None:
    place, found = Place("gpt2", CAUSAL), []
    for scaling in (None, 1.0, 4.0):
        method = Bottleneck(placement="parallel", bottleneck_size=4, scaling=scaling)
        found.append(evaluated(disturb(attached(method, place, root)), CAUSAL))
    assert torch.equal(found[0], found[2])
    assert not close(found[0], found[1], 1e-2)
    method = Bottleneck(placement="houlsby", bottleneck_size=4)
    one = evaluated(disturb(attached(method, place, root)), CAUSAL)
    two = evaluated(disturb(attached(method.model_copy(update={"scaling": 1.0}), place, root)), CAUSAL)
    assert torch.equal(one, two)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_over_quantised_weights(placement: Any) -> None:
    """Linear layers of bitsandbytes, which round their weights but are called like others."""
    from bitsandbytes.nn import Linear8bitLt

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config_of("llama"))
    for name, part in [*model.model.layers.named_modules()]:
        if isinstance(part, nn.Linear):
            quantised = Linear8bitLt(part.in_features, part.out_features, bias=False, has_fp16_weights=False)
            quantised.load_state_dict(part.state_dict())
            model.model.layers.set_submodule(name, quantised.to("cpu"))
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        peftkit.api.attach(model, Bottleneck(placement=placement, bottleneck_size=4, nonlinearity="tanh"))
        assert torch.equal(model(input_ids=IDS).logits, before)
    disturb(model).train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in trained_parameters(model).values())


# --- refusals -------------------------------------------------------------------------------------------------------


def test_merging_is_refused_with_what_to_ship_instead(root: Path) -> None:
    method = Bottleneck(bottleneck_size=4)
    with pytest.raises(NotMergeable, match=r"nonlinearity stands between .* ship the run folder, .*`peftkit predict`"):
        method.merge(attached(method, Place("bert", SEQUENCE), root))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck_size": 0}, "greater than 0"),
        ({"bottleneck_size": 8, "reduction_factor": 2}, "say the same thing; give one of them"),
        ({"reduction_factor": 0.5}, "greater than or equal to 1"),
        ({"placement": "pfeifer"}, "'houlsby', 'pfeiffer' or 'parallel'"),
        ({"nonlinearity": "rely"}, "'relu', 'gelu', 'swish' or 'tanh'"),
        ({"layers": ()}, "no layers, so nothing would be adapted"),
        ({"scaling": 0}, "greater than 0"),
        ({"dropout": 1}, "less than 1"),
        ({"size": 8}, "size"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        Bottleneck(**settings)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("bert", {"bottleneck_size": 33}, r"a bottleneck wider than the layer: 33 units where bert .* has 32"),
        ("bert", {"layers": (0, 2)}, r"bert .* has no block 2; its blocks are 0 to 1"),
        ("bert", {"layers": (-1,)}, r"no block -1; its blocks are 0 to 1"),
        ("t5", {"layers": (4,)}, r"no block 4; its blocks are 0 to 3"),
        ("albert", {"layers": (1,)}, r"no block 1; its blocks are 0 to 0"),
    ],
)
def test_what_an_architecture_cannot_have(architecture: str, settings: dict[str, Any], message: str) -> None:
    model = on_meta(Place(architecture, SEQUENCE))
    with pytest.raises(MethodError, match=message):
        Bottleneck(**settings).added_parameters(model, layout_for(architecture))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_layout_that_lacks_what_a_placement_needs(placement: Any) -> None:
    layout = replace(
        layout_for("llama"), roles={}, feed_forward_result=(), attention_result=("no.such",), feed_forward_sum=()
    )
    model = on_meta(Place("llama", SEQUENCE))
    with pytest.raises(MethodError, match=rf"placement '{placement}': 'model\.layers\.0' has no .*complete the layout"):
        Bottleneck(placement=placement).added_parameters(model, layout)
    with pytest.raises(MethodError, match=r"has no blocks where its layout says: no\.\*"):
        Bottleneck(placement=placement, layers=(0,)).added_parameters(model, replace(layout, blocks=("no.*",)))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_attaching_twice_is_refused(placement: Any, root: Path) -> None:
    method = Bottleneck(placement=placement, bottleneck_size=4)
    model = attached(method, Place("bert", SEQUENCE), root)
    with pytest.raises(MethodError, match="has an adapter already"):
        peftkit.api.attach(model, method)


def test_a_parallel_adapter_without_the_input_of_its_network(root: Path) -> None:
    model = attached(Bottleneck(placement="parallel", bottleneck_size=4), Place("gpt2", CAUSAL), root)
    with pytest.raises(MethodError, match="saw no input: its feed-forward network was run without its hooks"):
        model.transformer.h[0].mlp.dropout(torch.zeros(1, 32))


def test_it_is_registered() -> None:
    assert METHODS["bottleneck"] is Bottleneck
    assert Bottleneck.size in Bottleneck.model_fields


# --- a whole run ----------------------------------------------------------------------------------------------------
