"""LoRA as one autograd function against peft's own path: outputs, gradients, whole trainings."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from architectures import CAUSAL, SEQ2SEQ, SEQUENCE, TASKS, logits_of, tiny_config, wider
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from peftkit.backbones.layouts import block_modules, layout_for
from peftkit.backbones.quantization import FP4, NF4, Int8, Quantization
from peftkit.backbones.quantize import dequantize, quantize
from peftkit.backbones.targets import target_modules
from peftkit.engine.compiled import why_not
from peftkit.engine.dropout import drawn_seed, is_seed, keep_mask, masked
from peftkit.engine.engage import engaged
from peftkit.engine.lora import CACHED, Projection, project
from peftkit.engine.lora_groups import lora_groups
from peftkit.engine.settings import Engine
from peftkit.training.activations import recompute_activations

CPU = torch.device("cpu")
SLOW = Engine(fused_lora=False, fast_dropout=False, attention="sdpa")
FUSED = Engine(fused_lora=True, fast_dropout=False, attention="sdpa")


@functools.cache
def _plain(architecture: str, model_class: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, model_class).from_config(tiny_config(architecture, **changes))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def adapted(
    architecture: str,
    model_class: str = SEQUENCE,
    dtype: Any = torch.float64,
    blocks: int = 2,
    quantization: Quantization | None = None,
    unpacked: bool = False,
    **lora: Any,
) -> Any:
    """LoRA on all projections of the blocks, whose B is not zero; nothing drops but LoRA."""
    changes: dict[str, Any] = {} if blocks == 2 else {"num_hidden_layers": blocks}
    if quantization is not None:
        changes |= wider(architecture)
    plain = copy.deepcopy(_plain(architecture, model_class, **changes))
    layout = layout_for(architecture)
    targets = target_modules(plain, layout, "all")
    if quantization is not None:
        quantize(plain, layout, quantization)
    if unpacked:
        dequantize(plain)
    plain = plain.to(dtype)
    transposed = architecture == "gpt2" and (unpacked or quantization is None)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": targets, "fan_in_fan_out": transposed} | lora
    model = get_peft_model(plain, LoraConfig(**settings), autocast_adapter_dtype=False)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_A" in name or ".lora_B" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64).to(parameter.dtype) * 0.3
    model.model_class = model_class
    return model.train()


def layers_of(model: nn.Module) -> list[Any]:
    return [part for part in model.modules() if type(part) in (Linear, Linear4bit, Linear8bitLt)]


def outcome(model: Any, engine: Engine) -> dict[str, Tensor]:
    """The logits and every gradient of their squares' sum."""
    model.zero_grad()
    with engaged(model, engine, CPU):
        torch.manual_seed(5)
        logits = logits_of(model, model.model_class)
        logits.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"logits": logits.detach()}


def compared(model: nn.Module, tolerance: float, reference: nn.Module | None = None) -> None:
    slow, fused = outcome(reference or model, SLOW), outcome(model, FUSED)
    assert slow.keys() == fused.keys()
    assert sum(".lora_" in name for name in slow) >= 2 * len(layers_of(model))
    for name, expected in slow.items():
        scale = float(expected.abs().max())
        found = fused[name].to(expected.dtype)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


@contextmanager
def calls_of_peft() -> Iterator[list[int]]:
    """Counts how often peft computes a layer itself."""
    calls: list[int] = []

    def counting(forward: Any) -> Any:
        def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return forward(layer, *args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for kind in (Linear, Linear4bit, Linear8bitLt):
            patch.setattr(kind, "forward", counting(kind.forward))
        yield calls


CELLS = [*((name, tasks[0]) for name, tasks in TASKS.items()), ("llama", CAUSAL), ("t5", SEQ2SEQ)]


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_outputs_and_gradients_are_those_of_peft(cell: tuple[str, str]) -> None:
    model = adapted(*cell)
    compared(model, 1e-10)
    with calls_of_peft() as calls:
        outcome(model, FUSED)
    assert not calls


QUANTIZED = {
    "NF4": (("bert", SEQUENCE), NF4(block_size=32, compute_dtype="float32")),
    "NF4, gate and up": (("llama", CAUSAL), NF4(block_size=32, double=False, compute_dtype="float32")),
    "FP4, transposed": (("gpt2", SEQUENCE), FP4(block_size=32, compute_dtype="float32")),
    "int8": (("t5", SEQ2SEQ), Int8(compute_dtype="float32")),
}


@pytest.mark.parametrize(("cell", "quantization"), QUANTIZED.values(), ids=QUANTIZED)
def test_packed_weights_are_unpacked_for_each_product(cell: tuple[str, str], quantization: Quantization) -> None:
    """As plain layers with their values compute in float64; evaluations in between change nothing, and no unpacked
    matrix is kept from the forward to the backward pass."""
    model = adapted(*cell, dtype=torch.float32, quantization=quantization)
    reference = adapted(*cell, quantization=quantization, unpacked=True)
    compared(model, 1e-4, reference)
    with torch.no_grad():
        assert torch.isfinite(logits_of(model.eval(), cell[1])).all()
    compared(model.train(), 1e-4, reference)
    held = {parameter.data_ptr() for parameter in model.parameters()}
    kept: list[tuple[int, ...]] = []

    def keep(one: Tensor) -> Tensor:
        if one.data_ptr() not in held:
            kept.append(tuple(one.shape))
        return one

    with calls_of_peft() as calls, torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        outcome(model, FUSED)
    assert not calls
    assert kept and not {(layer.out_features, layer.in_features) for layer in layers_of(model)} & set(kept)


def test_products_in_another_dtype_than_the_input_stay_with_peft() -> None:
    model = adapted("bert", dtype=torch.float32, quantization=NF4(block_size=32, compute_dtype="bfloat16"))
    with calls_of_peft() as calls:
        compared(model, 1e-5)
    assert len(calls) == 2 * len(layers_of(model))


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "some targets": {"target_modules": ["query", "value", "intermediate.dense"]},
    "dora": {"use_dora": True},
    "dora, ranks of their own": {"use_dora": True, "rank_pattern": {"query": 2}, "use_rslora": True},
    "ranks of their own": {"rank_pattern": {"query": 2, "value": 7}, "alpha_pattern": {"key": 11}},
}


@pytest.mark.parametrize("lora", VARIANTS.values(), ids=VARIANTS)
def test_scales_targets_ranks_and_magnitudes(lora: dict[str, Any]) -> None:
    model = adapted("bert", **lora)
    compared(model, 1e-10)
    with calls_of_peft() as calls:
        outcome(model, FUSED)
    assert not calls


def test_magnitudes_of_any_architecture_whose_layers_are_linear() -> None:
    for cell in (("llama", CAUSAL), ("t5", SEQ2SEQ)):
        compared(adapted(*cell, use_dora=True), 1e-10)


def test_float32_differs_in_rounding_only() -> None:
    compared(adapted("bert", dtype=torch.float32), 1e-5)


GROUPS = {
    ("bert", SEQUENCE): {"query+key+value": 2, "dense": 6},
    ("llama", CAUSAL): {"q_proj+k_proj+v_proj": 2, "gate_proj+up_proj": 2, "o_proj": 2, "down_proj": 2},
    ("bart", SEQ2SEQ): {"k_proj+v_proj+q_proj": 4, "k_proj+v_proj": 2, "q_proj": 2, "out_proj": 6, "fc1": 4, "fc2": 4},
    ("gpt2", SEQUENCE): {"c_attn": 2, "c_proj": 4, "c_fc": 2},
}


@pytest.mark.parametrize("cell", GROUPS, ids="-".join)
def test_what_shares_an_input_is_computed_together(cell: tuple[str, str]) -> None:
    model = adapted(*cell)
    names = {part: name.rpartition(".")[2] for name, part in model.named_modules()}
    found = ["+".join(names[layer] for layer in layers) for _, layers in lora_groups(model, layout_for(cell[0]))]
    assert {name: found.count(name) for name in found} == GROUPS[cell]


def test_a_projection_that_nobody_uses_gets_no_gradient_and_costs_the_others_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    parts = []
    for out, rank in ((6, 2), (4, 3)):
        down, up = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((rank, 8), (out, rank)))
        parts.append(Projection(torch.randn(out, 8, dtype=torch.float64), None, down, up, 0.5))
    one, _ = project(x, parts)
    one.square().sum().backward()
    (found,) = (x.grad,)
    assert parts[1].up.grad is None
    y = x.detach().clone().requires_grad_()
    weight = parts[0].weight + 0.5 * parts[0].up.detach() @ parts[0].down.detach()
    (y @ weight.T).square().sum().backward()
    torch.testing.assert_close(found, y.grad, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences_under_one_mask() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 6), (2, 6), (5, 2)))
    weight, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def under_one_mask(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(1)
        return project(x, [Projection(weight, bias, a, b, 1.5)], dropout=0.4)[0]

    assert torch.autograd.gradcheck(under_one_mask, (x, a, b))
    torch.manual_seed(1)

    mask = keep_mask(x, 0.4).double()
    expected = x @ weight.T + bias + 1.5 / 0.6 * (x * mask) @ a.T @ b.T
    torch.testing.assert_close(under_one_mask(x, a, b), expected, rtol=1e-12, atol=1e-12)
    assert 0 < mask.sum() < 24


@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_seed_drops_is_dropped_from_outputs_and_gradients(dtype: torch.dtype) -> None:
    """Of more rows than are taken at once, in a width that no block of draws is a multiple of."""
    torch.manual_seed(0)
    rows, wide = 1500, 300
    x, a, b, weight = (torch.randn(*shape) for shape in ((rows, wide), (4, wide), (20, 4), (20, wide)))
    assert rows * wide > CACHED
    drawn: list[Tensor] = []

    def draw(values: Tensor, rate: float) -> Tensor:
        drawn.append(drawn_seed(values, rate))
        return drawn[-1]

    given = [x.to(dtype).requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    found = project(given[0], [Projection(weight.to(dtype), None, *given[1:], 1.5)], dropout=0.4, draw=draw)[0]
    found.square().sum().backward()
    assert [is_seed(one) for one in drawn] == [True]
    mask = masked(torch.ones(rows, wide), drawn[0]).double()
    exact = [one.detach().double().requires_grad_() for one in given]
    expected = exact[0] @ weight.to(dtype).double().T + 1.5 / 0.6 * (exact[0] * mask) @ exact[1].T @ exact[2].T
    expected.square().sum().backward()
    close = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in [(found, expected), *((one.grad, other.grad) for one, other in zip(given, exact, strict=True))]:
        assert one is not None and other is not None
        assert (one.double() - other).abs().max() < close * other.abs().max()


@pytest.mark.parametrize("engine", [FUSED, Engine()], ids=["torch's masks", "fast masks"])
def test_dropout_of_lora_has_the_mean_and_spread_of_pefts(engine: Engine) -> None:
    model = adapted("bert", lora_dropout=0.3)
    layer, count = layers_of(model)[0], 20_000
    x = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).expand(count, 32)
    draws = []
    for one in (SLOW, engine):
        with engaged(model, one, CPU):
            torch.manual_seed(7)
            draws.append(layer(x)[:, 0].detach())
    slow, fused = draws
    assert abs(fused.mean() - slow.mean()) < 5 * slow.std() * (2 / count) ** 0.5
    assert abs(fused.std() / slow.std() - 1) < 0.05


FALLBACKS: dict[str, dict[str, Any]] = {
    "dora with dropout": {"use_dora": True, "lora_dropout": 0.1},
    "a bias": {"lora_bias": True},
    "biases of the base": {"bias": "all"},
}


@pytest.mark.parametrize("lora", FALLBACKS.values(), ids=FALLBACKS)
def test_what_is_not_plain_stays_with_peft(lora: dict[str, Any]) -> None:
    model = adapted("bert", **lora)
    with calls_of_peft() as calls:
        compared(model, 1e-12)
    assert len(calls) == 2 * len(layers_of(model))


def test_half_precision_and_autocast_stay_with_peft() -> None:
    for dtype in (torch.float16, torch.float32):
        model = adapted("bert", dtype=dtype)
        layer = layers_of(model)[0]
        values = torch.randn(2, 3, 32, dtype=dtype)
        with (
            engaged(model, FUSED, CPU),
            calls_of_peft() as calls,
            torch.autocast("cpu", enabled=dtype == torch.float32),
        ):
            layer(values)
        assert calls == [1]


def test_several_adapters_stay_with_peft() -> None:
    model = adapted("bert")
    layer = layers_of(model)[0]
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with engaged(model, FUSED, CPU), calls_of_peft() as calls:
        layer(torch.randn(2, 3, 32, dtype=torch.float64))
    assert calls == [1]


def test_disabled_merged_and_afterwards_it_is_pefts_model() -> None:
    model = adapted("bert", dtype=torch.float32).eval()
    names = model.state_dict().keys()

    def logits() -> Tensor:
        return logits_of(model, SEQUENCE)

    with torch.no_grad():
        plain = logits()
        with model.disable_adapter():
            base = logits()
        with engaged(model, FUSED, CPU):
            torch.testing.assert_close(logits(), plain, rtol=1e-5, atol=1e-5)
            with model.disable_adapter():
                assert torch.equal(logits(), base)
            model.merge_adapter()
            torch.testing.assert_close(logits(), plain, rtol=1e-4, atol=1e-4)
            model.unmerge_adapter()
            assert model.state_dict().keys() == names
    assert not any("forward" in vars(part) or part._forward_hooks for part in model.modules())


def test_a_layer_called_alone_or_twice_or_in_another_mode_is_computed_for_itself() -> None:
    model = adapted("bert")
    query, key = (
        model.get_submodule(f"base_model.model.bert.encoder.layer.0.attention.self.{n}") for n in ("query", "key")
    )
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    expected = query(x), key(x), key(2 * x)
    with engaged(model, FUSED, CPU):
        with torch.no_grad():
            found = [query(x), query(x)]
        changed = x.clone()
        found += [key(x), query(changed)]
        changed *= 2
        found += [key(changed), key(x)]
        assert found[2].requires_grad
    for one, other in zip(found, [*[expected[0]] * 2, expected[1], expected[0], expected[2], expected[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", [("bert", SEQUENCE), ("llama", CAUSAL)], ids="-".join)
def test_no_input_outlives_a_forward_pass_without_gradients(cell: tuple[str, str]) -> None:
    model = adapted(*cell)
    inputs: list[weakref.ref[Tensor]] = []
    for layer in layers_of(model):
        layer.register_forward_pre_hook(lambda _, given: inputs.append(weakref.ref(given[0])))
    with engaged(model, Engine(), CPU), torch.no_grad():
        logits_of(model, model.model_class)
        assert len(inputs) >= len(layers_of(model))
        assert not any(one() is not None for one in inputs)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_recomputed_activations_give_the_same_gradients(dropout: float) -> None:
    model = adapted("llama", CAUSAL, lora_dropout=dropout)
    once = outcome(model, Engine())
    recompute_activations(model)
    again = outcome(model, Engine())
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_computed_backwards_below_the_lowest_adapter(checkpointing: bool) -> None:
    model = adapted("bert", target_modules=r".*layer\.1\.output\.dense")
    if checkpointing:
        recompute_activations(model)
    needs: list[bool] = []
    lowest = model.get_submodule("base_model.model.bert.encoder.layer.1.output.dense")
    for block in block_modules(model, layout_for("bert")).values():
        block.register_forward_hook(lambda *call: needs.append(call[2].requires_grad))
    lowest.register_forward_pre_hook(lambda *call: needs.append(call[1][0].requires_grad))
    outcome(model, FUSED)
    assert needs[:3] == [False, False, True]


def trained(model: nn.Module, engine: Engine, steps: int) -> tuple[list[float], list[Tensor]]:
    """Losses, and the gradients of the first and the last step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    chance = torch.Generator().manual_seed(0)
    losses, gradients = [], []
    with engaged(model, engine, CPU):
        for step in range(steps):
            ids = torch.randint(5, 17, (8, 6), generator=chance)
            loss = nn.functional.cross_entropy(model(input_ids=ids).logits, ids[:, 0] % 3)
            loss.backward()
            if step in (0, steps - 1):
                gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses, gradients


def test_two_hundred_steps_go_as_they_go_with_peft() -> None:
    start = adapted("bert", dtype=torch.float32, blocks=1)
    for layer in layers_of(start):
        layer.reset_lora_parameters("default", True)
    (slow, slow_gradients), (fused, gradients) = (trained(copy.deepcopy(start), e, 200) for e in (SLOW, FUSED))
    assert max(abs(a - b) for a, b in zip(slow, fused, strict=True)) < 1e-5
    assert sum(slow[-20:]) < 0.8 * sum(slow[:20])
    for one, other in zip(slow_gradients, gradients, strict=True):
        assert nn.functional.cosine_similarity(one, other, dim=0) > 0.99999


@pytest.mark.parametrize("is_dora", [False, True], ids=["lora", "dora"])
def test_bfloat16_stays_as_near_to_float32_as_pefts_path(is_dora: bool) -> None:
    """Both round activations to 8 bits; the fused function also A, B and A x, of which peft holds 24."""
    exact = outcome(adapted("bert", dtype=torch.float32, use_dora=is_dora), SLOW)
    model = adapted("bert", dtype=torch.bfloat16, use_dora=is_dora)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    distances = []
    for engine in (SLOW, FUSED):
        found = outcome(model, engine)
        names = [name for name in exact if ".lora_" in name]
        assert all(found[name].dtype == torch.float32 for name in names)
        one, other = (torch.cat([part[name].flatten() for name in names]) for part in (exact, found))
        distances.append(float((one - other).norm() / one.norm()))
    assert distances[0] < 0.1
    assert distances[1] < 1.5 * distances[0]
