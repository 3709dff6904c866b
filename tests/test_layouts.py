"""Every row of the layout table against the architectures of the installed transformers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from peftkit.backbones.layouts import (
    LAYOUTS,
    ROLES,
    Layout,
    block_modules,
    layout_for,
    propose_layout,
)
from peftkit.backbones.modules import base_model, head_modules
from peftkit.backbones.targets import block_linears, target_modules
from peftkit.errors import BackboneError, MethodError

MODEL_TYPES = tuple(model_type for row in LAYOUTS for model_type in row.model_types)
ENCODER_DECODERS = ("t5", "mt5", "bart", "mbart", "marian", "pegasus")
TASKS = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForMultipleChoice,
    AutoModelForMaskedLM,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)

_COMMON = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BART = {
    "vocab_size": 48,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": 2,
    "eos_token_id": 2,
}
_T5 = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
_GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
_OPTIONS = {
    "distilbert": {"vocab_size": 48, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "electra": _COMMON | {"embedding_size": 8},
    "albert": _COMMON | {"embedding_size": 8, "num_hidden_groups": 2, "inner_group_num": 2},
    "gpt2": {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "llama": _COMMON | _GROUPED,
    "mistral": _COMMON | _GROUPED,
    "qwen2": _COMMON | {"num_key_value_heads": 1},
    "qwen3": _COMMON | _GROUPED,
    "gemma": _COMMON | _GROUPED,
    "gemma2": _COMMON | _GROUPED,
    "gemma3_text": _COMMON | _GROUPED,
    "t5": _T5,
    "mt5": _T5,
    "bart": _BART,
    "mbart": _BART,
    "marian": _BART,
    "pegasus": _BART,
}


def tiny_config(model_type: str, **changes: object) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **_OPTIONS.get(model_type, _COMMON) | changes)


def on_meta(model_type: str, kind: type = AutoModel, **changes: object) -> PreTrainedModel:
    with torch.device("meta"):
        return kind.from_config(tiny_config(model_type, **changes))


def task_models(model_type: str) -> Iterator[PreTrainedModel]:
    config_class = type(tiny_config(model_type))
    for kind in TASKS:
        if config_class in kind._model_mapping:
            yield on_meta(model_type, kind)


def every_linear(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def paths_by_block(model: PreTrainedModel, layout: Layout) -> dict[str, set[str]]:
    """Block -> paths of its linears, found by walking the module tree and not by the row's regex."""
    found: dict[str, set[str]] = {}
    for pattern in layout.blocks:
        for name, module in base_model(model).named_modules():
            if re.sub(r"\d+", "*", name) == pattern:
                found[name] = every_linear(module)
    return found


def role_paths(layout: Layout) -> set[str]:
    return {path for paths in layout.roles.values() for path in paths} | set(layout.fused)


# The parts of an architecture that only some of its checkpoints have.
VARIANTS = [
    *((model_type, {}) for model_type in MODEL_TYPES),
    ("t5", {"feed_forward_proj": "gated-gelu"}),
    ("mt5", {"feed_forward_proj": "relu"}),
]


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_row_covers_exactly_the_linears_of_the_blocks(model_type: str, changes: dict[str, object]) -> None:
    layout, model = layout_for(model_type), on_meta(model_type, **changes)
    blocks = paths_by_block(model, layout)
    expected_blocks = 4 if model_type in (*ENCODER_DECODERS, "albert") else 2
    assert len(blocks) == expected_blocks
    for paths in blocks.values():
        assert paths <= role_paths(layout)
        if model_type not in ENCODER_DECODERS:
            assert paths == role_paths(layout)
    assert set(block_linears(model, layout)) == {f"{block}.{path}" for block in blocks for path in blocks[block]}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.model_types[0])
def test_every_path_of_a_row_exists_in_some_variant(layout: Layout) -> None:
    seen: set[str] = set()
    for model_type, changes in VARIANTS:
        if model_type in layout.model_types:
            seen = seen.union(*paths_by_block(on_meta(model_type, **changes), layout).values())
    assert seen == role_paths(layout)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_role_has_one_path_in_each_attention_and_feed_forward(model_type: str) -> None:
    layout, model = layout_for(model_type), on_meta(model_type)
    for block, paths in paths_by_block(model, layout).items():
        decoder = model_type in ENCODER_DECODERS and block.startswith("decoder")
        for role in ("query", "key", "value", "output", "up", "down"):
            held = paths.intersection(layout.roles.get(role, ()))
            held |= {path for path in paths if path in layout.fused and role in layout.fused[path].roles}
            attention = role in ("query", "key", "value", "output")
            assert len(held) == (2 if decoder and attention else 1), (block, role)


def test_rows_are_well_formed() -> None:
    assert len(set(MODEL_TYPES)) == len(MODEL_TYPES)
    for row in LAYOUTS:
        assert set(row.roles) | {role for held in row.fused.values() for role in held.roles} <= set(ROLES)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_attention_and_sublayers_of_a_row_exist(model_type: str) -> None:
    layout, model = layout_for(model_type), on_meta(model_type)
    for block, module in block_modules(model, layout).items():
        inside = {name for name, _ in module.named_modules()}
        attending = [path for path in layout.attention if path in inside]
        decoder = model_type in ENCODER_DECODERS and block.startswith("decoder")
        assert len(attending) == (2 if decoder else 1)
        assert len([path for path in layout.attention_result if path in inside]) == (
            len(attending) if layout.attention_result else 0
        )
        for one in (layout.feed_forward_result, layout.feed_forward_norm):
            assert len([path for path in one if path in inside]) == (1 if one else 0)


@pytest.mark.parametrize(
    ("model_type", "changes", "roleless"),
    [
        # Projections of relative positions and of mixed heads are no query, key, value or output.
        (
            "deberta",
            {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "talking_head": True},
            {"pos_proj", "pos_q_proj", "head_logits_proj", "head_weights_proj"},
        ),
        (
            "deberta-v2",
            {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": False},
            {"pos_key_proj", "pos_query_proj"},
        ),
    ],
)
def test_roleless_linears_are_in_all_but_not_in_attention(
    model_type: str, changes: dict[str, object], roleless: set[str]
) -> None:
    layout, model = layout_for(model_type), on_meta(model_type, **changes)
    missing = set(target_modules(model, layout, "all")) - set(target_modules(model, layout, "attention+up+down"))
    assert {name.rpartition(".")[2] for name in missing} == roleless


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_all_names_the_same_linears_in_every_task_model_and_nothing_of_the_head(model_type: str) -> None:
    layout = layout_for(model_type)
    outside = {"pooler", "pooler.dense", "encoder.embedding_hidden_mapping_in", "embeddings_project"}
    expected = every_linear(on_meta(model_type)) - outside
    models = list(task_models(model_type))
    assert len(models) >= 2
    for model in models:
        found = target_modules(model, layout, "all")
        inside_base = {name.removeprefix(f"{model.base_model_prefix}.") for name in found}
        assert len(inside_base) == len(found)
        # BartForCausalLM keeps only the decoder, T5ForTokenClassification only the encoder.
        whole = {"encoder", "decoder"} <= {name for name, _ in base_model(model).named_children()}
        if whole or model_type not in ENCODER_DECODERS:
            assert inside_base == expected
        else:
            stack = next(iter(inside_base)).partition(".")[0]
            assert inside_base == {name for name in expected if name.startswith(f"{stack}.")}
        assert not [name for name in found if name.startswith(head_modules(model) or "\0")]


@pytest.mark.parametrize("model_type", ENCODER_DECODERS)
def test_all_contains_cross_attention(model_type: str) -> None:
    model = on_meta(model_type, AutoModelForSeq2SeqLM)
    for targets in ("all", "attention", "query_value"):
        found = target_modules(model, layout_for(model_type), targets)
        assert any("EncDecAttention" in name or "encoder_attn" in name for name in found)


def test_roberta_base_query_value_count() -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model("roberta", vocab_size=50265, max_position_embeddings=514)
        model = AutoModelForSequenceClassification.from_config(config)
    linears = block_linears(model, layout_for("roberta"))
    chosen = [linears[name] for name in target_modules(model, layout_for("roberta"), "query_value")]
    assert sum(8 * (linear.in_features + linear.out_features) for linear in chosen) == 294_912


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_peft_wraps_exactly_the_targets(model_type: str, targets: str) -> None:
    kind = AutoModelForSeq2SeqLM if model_type == "t5" else AutoModelForSequenceClassification
    model = kind.from_config(tiny_config(model_type))
    names = target_modules(model, layout_for(model_type), targets)
    config = LoraConfig(r=2, target_modules=names, fan_in_fan_out=model_type == "gpt2")
    wrapped = get_peft_model(model, config).base_model.model
    assert [name for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)] == names


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_peft_defaults_are_a_subset(model_type: str) -> None:
    defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, [])
    layout, model = layout_for(model_type), on_meta(model_type)
    expected = {n for n in every_linear(model) if any(f".{n}".endswith(f".{d}") for d in defaults)}
    assert bool(expected) == bool(defaults)
    assert expected <= set(target_modules(model, layout, "attention"))
    if expected and "query" in layout.roles:
        assert expected == set(target_modules(model, layout, "query_value"))


def test_targets_come_in_model_order_and_once() -> None:
    model, layout = on_meta("bert", num_hidden_layers=1), layout_for("bert")
    block = "encoder.layer.0"
    expected = [f"{block}.attention.self.query", f"{block}.attention.self.value", f"{block}.output.dense"]
    assert target_modules(model, layout, "down + value+query_value") == expected
    assert target_modules(model, layout, ["value", "down", "query", "query"]) == expected
    assert target_modules(model, layout, f"{block}.output.dense") == expected[2:]


def test_an_explicit_name_reaches_head_and_embeddings() -> None:
    model, layout = on_meta("bert", AutoModelForSequenceClassification), layout_for("bert")
    assert target_modules(model, layout, "classifier") == ["classifier"]
    assert target_modules(model, layout, "word_embeddings") == ["bert.embeddings.word_embeddings"]
    assert target_modules(model, layout, "pooler.dense") == ["bert.pooler.dense"]
    assert len(target_modules(model, layout, "attention.self.query")) == 2


def test_a_fused_projection_can_be_named() -> None:
    model, layout = on_meta("gpt2", AutoModelForCausalLM), layout_for("gpt2")
    expected = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert target_modules(model, layout, "attn.c_attn") == expected
    assert set(expected) < set(target_modules(model, layout, "attention"))


BERT, GPT2, MODERN = "bert (BertModel)", "gpt2 (GPT2Model)", "modernbert (ModernBertModel)"


@pytest.mark.parametrize(
    ("model_type", "targets", "phrases"),
    [
        (
            "bert",
            "gate",
            [f"target 'gate': {BERT} has no gate projection; it has query, key, value, output, up"],
        ),
        ("bert", "query+querry", [f"target 'querry' matches no module of {BERT}; did you mean 'query'"]),
        ("bert", ["attention.self.qury"], ["did you mean 'attention.self.query'"]),
        ("bert", "all_linear+zzz", ["target 'all_linear' matches no module"]),
        (
            "bert",
            "zzz",
            ["target 'zzz' matches no module", "it can be: query_value, attention, all, query, key, value"],
        ),
        (
            "bert",
            "intermediate",
            ["that can be adapted; 'intermediate' holds others: name 'intermediate.dense'"],
        ),
        ("bert", "query+", ["target '' matches no module"]),
        ("bert", [], ["no targets; name at least one of query_value, attention, all, query"]),
        ("gpt2", "query+attn.c_attn", ["'h.0.attn.c_attn.query' is a part of 'h.0.attn.c_attn', which is named too"]),
        ("gpt2", "c_attn.qeury", ["did you mean 'c_attn.query'"]),
        ("gpt2", "gate", [f"{GPT2} has no gate projection"]),
        ("t5", "gate", ["t5 (T5Model) has no gate projection"]),
    ],
)
def test_refused_targets(model_type: str, targets: str | list[str], phrases: list[str]) -> None:
    with pytest.raises(MethodError) as caught:
        target_modules(on_meta(model_type), layout_for(model_type), targets)
    for phrase in phrases:
        assert phrase in str(caught.value)


def test_a_row_that_fits_no_block_is_refused() -> None:
    with pytest.raises(MethodError, match="target 'all' matches no module of bert"):
        target_modules(on_meta("bert"), layout_for("gpt2"), "all")


def test_unknown_type_names_the_nearest_and_shows_a_row() -> None:
    with pytest.raises(BackboneError, match="no layout for model type 'qwen4'; did you mean 'qwen") as caught:
        layout_for("qwen4")
    code = str(caught.value).partition("\n\n")[2]
    assert eval(code).model_types == ("qwen4",)
    assert "mlp.gate_proj" in code


def test_unknown_type_with_model_shows_the_row_that_works() -> None:
    config = AutoConfig.for_model("opt", **_COMMON | {"ffn_dim": 24, "word_embed_proj_dim": 16})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(BackboneError, match=r"linears in its blocks are self_attn\.k_proj") as caught:
        layout_for("opt", model)
    row = eval(str(caught.value).partition("\n\n")[2])
    assert row == propose_layout("opt", model)
    assert row.blocks == ("decoder.layers.*",)
    assert row.roles["up"] == ("fc1",)
    assert len(target_modules(model, row, "query_value")) == 4
    assert len(target_modules(model, row, "all")) == 12


def test_a_proposed_row_gives_fused_projections_all_their_roles() -> None:
    row = propose_layout("codegen2", on_meta("modernbert"))
    assert row.fused == layout_for("modernbert").fused
    assert row.attention == layout_for("modernbert").attention
    assert row.roles == layout_for("modernbert").roles


HEADS = {
    AutoModelForSequenceClassification: {
        "distilbert": ("pre_classifier", "classifier"),
        "deberta": ("pooler", "classifier"),
        "deberta-v2": ("pooler", "classifier"),
        "modernbert": ("head", "classifier"),
        **dict.fromkeys(("t5", "mt5", "bart", "mbart"), ("classification_head",)),
        **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), ("classifier",)),
        **dict.fromkeys(("electra", "albert", "mpnet"), ("classifier",)),
        **dict.fromkeys(("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"), ("score",)),
        **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "phi3", "olmo2"), ("score",)),
    },
    AutoModelForQuestionAnswering: {
        "modernbert": ("head", "classifier"),
        **dict.fromkeys(("bert", "electra", "gpt2", "llama", "mistral", "t5", "mt5", "bart"), ("qa_outputs",)),
    },
    AutoModelForTokenClassification: {
        "deberta-v2": ("classifier",),
        "t5": ("classifier",),
        "llama": ("score",),
    },
    AutoModelForMultipleChoice: {"electra": ("sequence_summary", "classifier")},
}


@pytest.mark.parametrize(
    ("kind", "model_type", "head"),
    [(kind, model_type, head) for kind, heads in HEADS.items() for model_type, head in heads.items()],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_head_modules(kind: type, model_type: str, head: tuple[str, ...]) -> None:
    assert head_modules(on_meta(model_type, kind)) == head


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bare_and_language_models_have_no_head(model_type: str) -> None:
    assert head_modules(on_meta(model_type)) == ()
    for model in task_models(model_type):
        if model.get_output_embeddings() is not None:
            assert head_modules(model) == ()


def test_base_model() -> None:
    model = on_meta("bert", AutoModelForSequenceClassification)
    assert base_model(model) is model.bert
    assert base_model(model.bert) is model.bert


def test_layouts_import_nothing_heavy() -> None:
    probe = "import sys, peftkit.backbones.layouts; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
