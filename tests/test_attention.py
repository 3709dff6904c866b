"""The seam into attention, against softmax written out in float64 and against models whose seam is closed."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import CAUSAL, CONFIGS, IDS, MASK, SEQ2SEQ, SEQUENCE, TOKEN, evaluated, tiny_config
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, T5Config
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.t5.modeling_t5 import T5Attention

from peftkit.backbones.attention import attend, attention_modules, open_seam
from peftkit.backbones.attention_inputs import Attention, BeforeAttention
from peftkit.backbones.layouts import layout_for
from peftkit.errors import MethodError

GROUPED = CONFIGS["llama"]
STACKS = CONFIGS["bart"] | {"num_hidden_layers": 2}
MORE: dict[str, dict[str, Any]] = {
    "xlm-roberta": CONFIGS["roberta"],
    "camembert": CONFIGS["roberta"],
    "gemma2": GROUPED | {"sliding_window": 4},
    "gemma3_text": GROUPED | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo2": GROUPED,
    "phi3": {name: value for name, value in GROUPED.items() if name != "head_dim"},
    "mt5": CONFIGS["t5"],
    "marian": STACKS,
    "mbart": STACKS,
    "pegasus": STACKS,
}
HEADS = {
    "olmo2": CAUSAL,
    "gpt2": CAUSAL,
    "llama": CAUSAL,
    "gemma2": CAUSAL,
    "gemma3_text": CAUSAL,
    "t5": SEQ2SEQ,
    "bart": SEQ2SEQ,
}
HEADS |= dict.fromkeys(("marian", "mbart", "pegasus", "mt5"), SEQ2SEQ)
BY_HAND = ("deberta", "deberta-v2", "mpnet")
EVERY = [*CONFIGS, *MORE]
SEAMED = [name for name in EVERY if name not in BY_HAND]


def config_of(architecture: str) -> Any:
    if architecture in CONFIGS:
        return tiny_config(architecture)
    config = AutoConfig.for_model(architecture, **MORE[architecture])
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def model_of(architecture: str, implementation: str = "sdpa") -> tuple[Any, str]:
    torch.manual_seed(0)
    head = HEADS.get(architecture, SEQUENCE if architecture == "bert" else TOKEN)
    # softcapped scores need the plain function, as does what computes its scores by hand
    implementation = "eager" if architecture in ("gemma2", *BY_HAND) else implementation
    model = getattr(transformers, head).from_config(config_of(architecture), attn_implementation=implementation)
    return model.eval(), head


@functools.cache
def calls_registry(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith("transformers.models") and "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(kind)


class Marker(BeforeAttention):
    """Prepends given keys and values, (heads, n, width)."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key, self.value = key, value

    def forward(self, attention: Attention) -> Attention:
        batch = attention.key.shape[0]
        return attention.prepended(*(one.expand(batch, -1, -1, -1) for one in (self.key, self.value)))


class TestWhereItIs:
    @pytest.mark.parametrize("architecture", EVERY)
    def test_layouts_name_what_calls_the_attention_function(self, architecture: str) -> None:
        model, _ = model_of(architecture)
        callers = {name for name, part in model.named_modules() if calls_registry(type(part))}
        names = [module.name for module in attention_modules(model, layout_for(architecture))]
        if architecture in BY_HAND:
            assert not callers
            callers = {name for name, part in model.named_modules() if type(part).__name__.endswith("SelfAttention")}
        assert len(names) == len(callers) > 0
        assert set(names) == callers

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"talking_head": True},
                r"^deberta \(\w+\) .*'deberta\.encoder\.layer\.0\.attention\.self' mixes its heads",
            ),
            (
                {},
                r"^deberta .* functions: '.*self' computes its scores by itself, .* choose another method or backbone",
            ),
        ],
    )
    def test_other_ways_to_attend(self, changes: dict[str, bool], message: str) -> None:
        model = transformers.AutoModelForTokenClassification.from_config(tiny_config("deberta", **changes))
        if not changes:
            model.deberta.encoder.layer[0].attention.self = nn.Linear(2, 2)
        with pytest.raises(MethodError, match=message):
            attention_modules(model, layout_for("deberta"))

    def test_kinds_and_widths(self) -> None:
        def found(architecture: str) -> list[tuple[str, int, int]]:
            modules = attention_modules(model_of(architecture)[0], layout_for(architecture))
            return [(module.kind, module.key_width, module.value_width) for module in modules]

        # 4 query heads of 8 and 2 key heads
        assert found("llama") == [("model.layers.*.self_attn", 16, 16)] * 2
        assert found("phi3") == [("model.layers.*.self_attn", 16, 16)] * 2
        assert found("gpt2") == [("transformer.h.*.attn", 32, 32)] * 2
        assert found("albert") == [("albert.encoder.albert_layer_groups.*.albert_layers.*.attention", 32, 32)]
        kinds = ("encoder.layers.*.self_attn", "decoder.layers.*.self_attn", "decoder.layers.*.encoder_attn")
        encoder, decoder, cross = ((f"model.{kind}", 32, 32) for kind in kinds)
        assert found("bart") == [encoder, encoder, decoder, cross, decoder, cross]

    def test_a_decoder_alone_has_no_cross_attention(self) -> None:
        model = transformers.BartForCausalLM(tiny_config("bart"))
        names = [module.name for module in attention_modules(model, layout_for("bart"))]
        assert names == [f"model.decoder.layers.{index}.self_attn" for index in range(2)]

    def test_a_layout_without_attention(self) -> None:
        from dataclasses import replace

        with pytest.raises(MethodError, match=r"bert \(Bert\w+\) has no attention modules that its row in .*layouts"):
            attention_modules(model_of("bert")[0], replace(layout_for("bert"), attention=("attention.elsewhere",)))


class TestOpened:
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("architecture", SEAMED)
    def test_alone_it_changes_nothing(self, architecture: str, implementation: str) -> None:
        model, head = model_of(architecture, implementation)
        before = evaluated(model, head)
        for module in attention_modules(model, layout_for(architecture)):
            open_seam(model.get_submodule(module.name))
        assert torch.equal(evaluated(model, head), before)

    @pytest.mark.parametrize("architecture", BY_HAND)
    @pytest.mark.parametrize("changes", [{}, {"pos_att_type": ["c2p"]}, {"relative_attention": False}])
    def test_alone_it_computes_what_is_done_by_hand(self, architecture: str, changes: dict[str, Any]) -> None:
        torch.manual_seed(0)
        model: Any = transformers.AutoModel.from_config(tiny_config(architecture, **changes)).eval()
        inputs = {"input_ids": IDS, "attention_mask": MASK, "output_attentions": True}
        with torch.no_grad():
            before = model(**inputs)
            for module in attention_modules(model, layout_for(architecture)):
                open_seam(model.get_submodule(module.name))
                open_seam(model.get_submodule(module.name))
            after = model(**inputs)
        for one, two in zip((*after.attentions, after[0]), (*before.attentions, before[0]), strict=True):
            assert torch.allclose(one, two, atol=1e-6)

    @pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5", *BY_HAND])
    def test_everything_goes_through_it(self, architecture: str) -> None:
        model, head = model_of(architecture)
        key = torch.zeros(1, 4, 3, 8)
        before = evaluated(model, head)
        for module in attention_modules(model, layout_for(architecture)):
            attention = model.get_submodule(module.name)
            open_seam(attention)
            attention.add_module("marker", Marker(key, key))
        assert float((evaluated(model, head) - before).abs().max()) > 1e-2

    def test_the_configuration_is_left_alone(self, tmp_path: Path) -> None:
        model, _ = model_of("t5")
        before = [stack.config.to_json_string() for stack in (model, model.encoder, model.decoder)]
        modules = [model.get_submodule(module.name) for module in attention_modules(model, layout_for("t5"))]
        for module in modules:
            open_seam(module)
            open_seam(module)
        assert [stack.config.to_json_string() for stack in (model, model.encoder, model.decoder)] == before
        assert {stack.config._attn_implementation for stack in (model, model.encoder, model.decoder)} == {"sdpa"}
        model.save_pretrained(tmp_path)
        assert "peftkit" not in (tmp_path / "config.json").read_text()
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "t5"
        again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
        assert torch.equal(evaluated(again, SEQ2SEQ), evaluated(model, SEQ2SEQ))

    def test_the_model_can_be_switched_and_copied(self) -> None:
        model, head = model_of("bert")
        for module in attention_modules(model, layout_for("bert")):
            attention = model.get_submodule(module.name)
            open_seam(attention)
            attention.add_module("marker", Marker(torch.ones(1, 4, 3, 8), torch.ones(1, 4, 3, 8)))
        before = evaluated(model, head)
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("eager")
        attentions = twin(torch.tensor([[2, 5, 6]]), output_attentions=True).attentions
        assert [one.shape for one in attentions] == [(1, 4, 3, 6)] * 2
        assert torch.allclose(evaluated(twin, head), before, atol=1e-6)
        assert model.config._attn_implementation == "sdpa"
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(MethodError, match=r"BertSelfAttention attends by 'flash_attention_2', .*'sdpa'"):
            model.bert.encoder(torch.zeros(1, 3, 32))


def seamed(attention: nn.Module, implementation: str, key: Tensor, value: Tensor) -> nn.Module:
    attention.config._attn_implementation = implementation  # type: ignore[union-attr]
    open_seam(attention)
    attention.add_module("marker", Marker(key, value))
    return attention.eval()


def grouped(implementation: str, key: Tensor, value: Tensor) -> nn.Module:
    """Attention of 4 query heads over 2 key heads of 8."""
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    return seamed(LlamaAttention(config, layer_idx=0), implementation, key, value)


def relative(implementation: str, key: Tensor, value: Tensor, causal: bool) -> nn.Module:
    config = T5Config(d_model=32, num_heads=4, d_kv=8)
    return seamed(T5Attention(config, layer_idx=0, is_causal=causal), implementation, key, value)


def by_formula(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, scaling: float) -> Tensor:
    """softmax(s QKᵀ + scores) V in float64; `scores` is −∞ where a key is not seen."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (one.double() for one in (query, key, value))
    key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    weights = (scaling * query @ key.transpose(2, 3) + scores.double()).softmax(-1)
    return (weights @ value).transpose(1, 2)


def additive(seen: Tensor) -> Tensor:
    return torch.where(seen, 0.0, -torch.inf)


BATCH, QUERIES, KEYS, EXTRA = 3, 4, 6, 5
PADDED = torch.ones(BATCH, 1, 1, KEYS, dtype=torch.bool)
PADDED[1, ..., :2] = PADDED[2, ..., 4:] = False
DECODING = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES)[None, None] & PADDED
DECODING[1, :, 0, 2] = True
MASKS = {
    "columns": PADDED,
    "rows and columns": DECODING,
    "one for all": DECODING[:1],
    "without dimensions of one": DECODING[0, 0],
    "by head": DECODING & (torch.arange(KEYS) % 3 != torch.arange(4)[:, None, None]) | (torch.arange(KEYS) == 2),
}


class TestPrepended:
    @pytest.fixture(autouse=True)
    def states(self) -> None:
        chance = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=chance)

        self.query = normal(BATCH, 4, QUERIES, 8)
        self.key, self.value = normal(BATCH, 2, KEYS, 8), normal(BATCH, 2, KEYS, 8)
        self.first = normal(1, 2, EXTRA, 8), normal(1, 2, EXTRA, 8)
        self.bias = normal(1, 4, QUERIES, KEYS)

    def check(self, found: Tensor, seen: Tensor, query: Tensor | None = None) -> None:
        query = self.query if query is None else query
        ones = torch.ones(*seen.shape[:-1], EXTRA, dtype=torch.bool)
        key, value = (
            torch.cat([first.expand(BATCH, -1, -1, -1), held], dim=2)
            for first, held in zip(self.first, (self.key, self.value), strict=True)
        )
        expected = by_formula(query, key, value, additive(torch.cat([ones, seen], dim=-1)), 0.3)
        assert torch.allclose(found.double(), expected, atol=1e-6)

    @pytest.mark.parametrize(
        ("implementation", "kind"),
        [("sdpa", "bool"), ("sdpa", "float"), ("sdpa", "lowest"), ("eager", "float"), ("eager", "lowest")],
    )
    @pytest.mark.parametrize("name", MASKS)
    def test_masks(self, implementation: str, kind: str, name: str) -> None:
        seen = MASKS[name]
        lowest = torch.finfo(torch.float32).min
        mask = {"bool": seen, "float": additive(seen), "lowest": torch.where(seen, 0.0, lowest)}[kind]
        module = grouped(implementation, *self.first)
        found, _ = attend(module, self.query, self.key, self.value, mask, scaling=0.3)
        self.check(found, seen)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_a_mask_that_is_one_column_wide(self, implementation: str) -> None:
        module = grouped(implementation, *self.first)
        column = torch.tensor([0.0, -1.5, 3.0, 0.5]).view(1, 1, QUERIES, 1)
        found, _ = attend(module, self.query, self.key, self.value, column, scaling=0.3)
        # added to every score but the new ones
        key, value = (
            torch.cat([first.expand(BATCH, -1, -1, -1), held], dim=2)
            for first, held in zip(self.first, (self.key, self.value), strict=True)
        )
        scores = torch.cat([torch.zeros(1, 1, QUERIES, EXTRA), column.expand(-1, -1, -1, KEYS)], dim=-1)
        assert torch.allclose(found.double(), by_formula(self.query, key, value, scores, 0.3), atol=1e-6)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("told_by", ["module", "option"])
    def test_no_mask_and_no_order(self, implementation: str, told_by: str) -> None:
        module = grouped(implementation, *self.first)
        module.is_causal = told_by == "option"  # type: ignore[assignment]
        options = {"is_causal": False} if told_by == "option" else {}
        found, _ = attend(module, self.query, self.key, self.value, None, scaling=0.3, **options)
        self.check(found, torch.ones(1, 1, QUERIES, KEYS, dtype=torch.bool))

    @pytest.mark.parametrize("told_by", ["module", "option"])
    def test_no_mask_because_the_function_hides_the_future(self, told_by: str) -> None:
        module = grouped("sdpa", *self.first)
        module.is_causal = told_by == "module"  # type: ignore[assignment]
        options = {"is_causal": True} if told_by == "option" else {}
        self.key, self.value = self.key[:, :, :QUERIES], self.value[:, :, :QUERIES]
        found, _ = attend(module, self.query, self.key, self.value, None, scaling=0.3, **options)
        self.check(found, torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril()[None, None])

    def test_no_mask_while_a_static_cache_fills(self) -> None:
        """transformers makes none then: the keys behind the queries are places still empty."""
        module = grouped("sdpa", *self.first)
        found, _ = attend(module, self.query, self.key, self.value, None, scaling=0.3)
        self.check(found, torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()[None, None])

    @pytest.mark.parametrize("mask", [None, PADDED])
    def test_a_single_query_sees_all_that_is_cached(self, mask: Tensor | None) -> None:
        module, query = grouped("sdpa", *self.first), self.query[:, :, :1]
        found, _ = attend(module, query, self.key, self.value, mask, scaling=0.3)
        self.check(found, torch.ones(1, 1, 1, KEYS, dtype=torch.bool) if mask is None else mask, query)

    @pytest.mark.parametrize(
        ("implementation", "mask"),
        [("sdpa", "none"), ("sdpa", "hidden future"), ("sdpa", "padding"), ("eager", "none"), ("eager", "padding")],
    )
    def test_a_position_bias_leaves_them_out(self, implementation: str, mask: str) -> None:
        first = tuple(one.repeat_interleave(2, dim=1) for one in self.first)
        key, value = (one.repeat_interleave(2, dim=1) for one in (self.key, self.value))
        module = relative(implementation, *first, causal=mask == "hidden future")
        given = PADDED if mask == "padding" else None
        if given is not None and implementation == "eager":
            given = torch.where(given, 0.0, torch.finfo(torch.float32).min)
        found, _ = attend(module, self.query, key, value, given, scaling=1.0, position_bias=self.bias)
        seen = {
            "none": torch.ones(1, 1, QUERIES, KEYS, dtype=torch.bool),
            "hidden future": torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()[None, None],
            "padding": PADDED.expand(-1, -1, QUERIES, -1),
        }[mask]
        scores = additive(seen) + self.bias
        scores = torch.cat([torch.zeros(*scores.shape[:-1], EXTRA), scores], dim=-1)
        key, value = (
            torch.cat([one.expand(BATCH, -1, -1, -1), held], 2) for one, held in zip(first, (key, value), strict=True)
        )
        assert torch.allclose(found.double(), by_formula(self.query, key, value, scores, 1.0), atol=1e-6)

    def test_weights_are_returned_by_the_plain_function(self) -> None:
        module = grouped("eager", *self.first)
        _, weights = attend(module, self.query, self.key, self.value, None, scaling=0.3)
        assert weights is not None
        assert weights.shape == (BATCH, 4, QUERIES, EXTRA + KEYS)
        assert torch.allclose(weights.sum(-1), torch.ones(()))
