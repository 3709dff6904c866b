"""`peftkit params` against counts that papers and documentation print, and others that are worked out here by hand.

Configurations are the real models', written out; no weights and no network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoConfig

from peftkit.cli import main
from peftkit.methods import METHODS


class Row(NamedTuple):
    """One count: `figure` of the method is `expected`."""

    method: str
    expected: int
    figure: str = "adapter_parameters"


class Model(NamedTuple):
    """A configuration, the rows that hold for it, and a task whose head counts where a row is about one."""

    model_type: str
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    task: str | None = None


def llama(hidden: int, feed_forward: int, layers: int, heads: int, of_keys: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": of_keys,
        **more,
    }


def t5(width: int, feed_forward: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"d_model": width, "d_ff": feed_forward, "num_layers": layers, "num_heads": heads, **more}


ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
DEBERTA_V3 = {
    "vocab_size": 128100,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "max_relative_positions": -1,
}
BART_LARGE = {
    "d_model": 1024,
    **{f"{stack}_layers": 12 for stack in ("encoder", "decoder")},
    **{f"{stack}_ffn_dim": 4096 for stack in ("encoder", "decoder")},
    **{f"{stack}_attention_heads": 16 for stack in ("encoder", "decoder")},
}
GATED = {"feed_forward_proj": "gated-gelu", "vocab_size": 250112}
EACH = "query+key+value+output+gate+up+down"
ENCODER = "query+key+value+output+up+down"
QV = "lora:rank={},targets=query_value"

MODELS = {
    "RoBERTa-base": Model(
        "roberta",
        ROBERTA,
        (
            Row(QV.format(8), 294_912),  # Hu et al. 2021, table 2: 0.3M
            Row("bitfit", 102_144, "tuned_parameters"),  # Ben Zaken et al. 2022, without pooler and head
            Row("vera:rank=1024,targets=query_value", 43_008),  # Kopiczko et al. 2024: 0.043M
            Row("top_layers:layers=2", 2 * 7_087_872, "tuned_parameters"),  # a block of BERT-base has 7,087,872
            Row("full", 124_645_632, "tuned_parameters"),
        ),
    ),
    "RoBERTa-large": Model(
        "roberta",
        ROBERTA | LARGE,
        (
            Row(QV.format(8), 786_432),  # Hu et al. 2021, table 2: 0.8M
            # there too: AdapterP 0.8M and 3.0M, AdapterH 0.8M and 6.0M, where M is 2^20
            Row("bottleneck:placement=pfeiffer,bottleneck_size=16", 811_392),
            Row("bottleneck:placement=pfeiffer,bottleneck_size=64", 3_171_840),
            Row("bottleneck:placement=houlsby,bottleneck_size=8", 835_968),
            Row("bottleneck:placement=houlsby,bottleneck_size=64", 6_343_680),
            Row("vera:rank=256,targets=query_value", 61_440),  # Kopiczko et al. 2024: 0.061M
            Row("bitfit", 24 * (4 + 1 + 4 + 1 + 1) * 1024 + 1024, "tuned_parameters"),
            Row("full", 355_359_744, "tuned_parameters"),
        ),
    ),
    "RoBERTa-large with two classes": Model(
        "roberta",
        ROBERTA | LARGE,
        # peft's guide to P-tuning prints 1351938, head included
        (Row("p_tuning:length=20,encoder=mlp,encoder_hidden_size=128", 1_351_938, "trainable_parameters"),),
        "sequence_classification",
    ),
    "BERT-base": Model(
        "bert",
        {},
        (
            Row("layernorm", 38_400, "tuned_parameters"),  # 25 of them
            Row("full", 109_482_240, "tuned_parameters"),
            Row("bottleneck:placement=houlsby,bottleneck_size=64", 12 * 2 * (2 * 768 * 64 + 64 + 768)),
            Row(
                "bottleneck:placement=houlsby,bottleneck_size=64,train_layernorm=true", 24 * 2 * 768, "tuned_parameters"
            ),
            Row("prefix:length=20", 12 * 2 * 20 * 768),
            # Li & Liang 2021, section 4.3: 20 vectors and two layers while it trains, keys and values in the file
            Row("prefix:length=20,reparametrization_size=512", 20 * 768 + 769 * 512 + 513 * 2 * 12 * 768),
            Row("prefix:length=20,reparametrization_size=512", 12 * 2 * 20 * 768, "saved_parameters"),
            Row("prompt:length=20", 20 * 768),
            Row("ia3", 12 * (768 + 768 + 3072)),
        ),
    ),
    "BERT-base with two classes": Model(
        "bert",
        {},
        (
            Row("full", 109_483_778, "trainable_parameters"),
            Row("bitfit", 102_144 + 768, "tuned_parameters"),  # the pooler's too, which this head reads
            Row("head", 2 * 768 + 2, "trainable_parameters"),
        ),
        "sequence_classification",
    ),
    "DeBERTa-v3-base": Model(
        "deberta-v2",
        DEBERTA_V3,
        (
            Row(f"lora:rank=8,targets={ENCODER}", 1_327_104),  # Zhang et al. 2023, table 1: 1.33M
            Row("bitfit", 102_144 + 768, "tuned_parameters"),  # there: 0.1M; the relative positions have a LayerNorm
            # 12 triplets at first in each of 72 matrices; of the 576 that are left, 0 to 288 can be of 768 × 3072, and
            # their singular values are saved inside the vectors
            Row("adalora:target_rank=8,initial_rank=12", 12 * 12 * (4 * 1537 + 2 * 3841)),
            Row("adalora:target_rank=8,initial_rank=12", 576 * 1536, "saved_parameters_lowest"),
            Row("adalora:target_rank=8,initial_rank=12", 288 * 3840 + 288 * 1536, "saved_parameters"),
        ),
    ),
    "GPT-2 medium": Model(
        "gpt2",
        {"n_embd": 1024, "n_layer": 24, "n_head": 16},
        (
            Row(QV.format(4), 393_216),
            # Hu et al. 2021, table 3: the top two layers are 25.19M; here with the last LayerNorm
            Row("top_layers:layers=2", 2 * 12_596_224 + 2 * 1024, "tuned_parameters"),
            Row("lora:rank=4,targets=attn.c_attn", 24 * 4 * (1024 + 3 * 1024)),
            Row("bottleneck:placement=pfeiffer,bottleneck_size=64", 24 * (2 * 1024 * 64 + 64 + 1024)),
            Row("full", 354_823_168, "tuned_parameters"),
        ),
    ),
    "GPT-3 175B": Model(
        "gpt2",
        {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048},
        # Hu et al. 2021, table 4: 4.7M and 37.7M
        (Row(QV.format(1), 4_718_592), Row(QV.format(4), 18_874_368), Row(QV.format(8), 37_748_736)),
    ),
    "GPT-NeoX-20B": Model(
        "gpt_neox",
        {"hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64, "intermediate_size": 24576},
        (Row("lora:rank=8,targets=query_key_value", 8_650_752),),  # QLoRA's notebook prints 8650752
    ),
    "Llama-7B": Model(
        "llama",
        {},
        (
            Row(QV.format(8), 4_194_304),  # alpaca-lora prints 4194304
            Row("lora:rank=16", 39_976_960),
            Row("lora:rank=64", 159_907_840),  # Kopiczko et al. 2024: 159.9M
            Row("lora:rank=32,targets=query+key+value+up+down", 56_098_816),  # Liu et al. 2024, table 1: 0.83 %
            Row("lora:rank=32,targets=query+key+value+up+down,variant=dora", 56_975_360),  # there: 0.84 %
            Row("vera:rank=256", 32 * (7 * 256 + 5 * 4096 + 2 * 11008)),
        ),
    ),
    "Llama-13B": Model("llama", llama(5120, 13824, 40, 40, 40), (Row("lora:rank=64", 250_347_520),)),  # there: 250.3M
    "Llama-3-8B": Model(
        "llama",
        llama(4096, 14336, 32, 32, 8, vocab_size=128256),
        (
            Row("lora:rank=32,targets=query+key+value+up+down,variant=dora", 57_409_536),  # Liu et al. 2024: 0.71 %
            Row("lora:rank=16", 41_943_040),
            Row("prefix:length=10", 32 * 2 * 10 * 1024),  # keys and values have 8 heads of 128
        ),
    ),
    "Llama-3.2-1B": Model(
        "llama", llama(2048, 8192, 16, 32, 8, head_dim=64, vocab_size=128256), (Row("lora:rank=16", 11_272_192),)
    ),
    "Llama-3.2-3B": Model(
        "llama", llama(3072, 8192, 28, 24, 8, head_dim=128, vocab_size=128256), (Row("lora:rank=16", 24_313_856),)
    ),
    "Mistral-7B": Model(
        "mistral",
        llama(4096, 14336, 32, 32, 8),
        (Row(QV.format(8), 3_407_872), Row("lora:rank=16", 41_943_040)),
    ),
    "Qwen2.5-3B": Model(
        "qwen2",
        llama(2048, 11008, 36, 16, 2, vocab_size=151936),
        (Row(QV.format(16), 3_686_400), Row("bitfit", 36 * (2048 + 2 * 256), "tuned_parameters")),  # peft's README
    ),
    "Qwen2.5-7B": Model("qwen2", llama(3584, 18944, 28, 28, 4, vocab_size=152064), (Row("lora:rank=8", 20_185_088),)),
    "Qwen3-8B": Model(
        "qwen3",
        llama(4096, 12288, 36, 32, 8, head_dim=128, vocab_size=151936),
        (
            Row("lora:rank=16", 43_646_976),
            Row("layernorm", 36 * (2 * 4096 + 2 * 128) + 4096, "tuned_parameters"),  # of queries and keys too
        ),
    ),
    "Gemma-2B": Model("gemma", llama(2048, 16384, 18, 8, 1, head_dim=256), (Row("lora:rank=16", 19_611_648),)),
    "Gemma-2-9B": Model("gemma2", llama(3584, 14336, 42, 16, 8, head_dim=256), (Row("lora:rank=16", 54_018_048),)),
    "Gemma-3-1B": Model("gemma3_text", llama(1152, 6912, 26, 4, 1, head_dim=256), (Row("lora:rank=16", 13_045_760),)),
    "OLMo-2-7B": Model("olmo2", llama(4096, 11008, 32, 32, 32), (Row("lora:rank=16", 39_976_960),)),
    "Phi-3-mini": Model(
        "phi3",
        llama(3072, 8192, 32, 32, 32),
        (
            Row("lora:rank=16", 25_165_824),  # whole fused projections
            Row(f"lora:rank=16,targets={EACH}", 29_884_416),  # and each of their parts
        ),
    ),
    "ModernBERT-base": Model(
        "modernbert",
        {"hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": 12},
        (
            Row("lora:rank=8", 22 * 8 * (4 * 768 + 2 * 768 + 3072 + 1920)),
            Row(QV.format(8), 22 * 2 * 8 * (768 + 768)),
            Row("layernorm", (2 * 22 - 1 + 2) * 768, "tuned_parameters"),  # the first layer has one less
        ),
    ),
    "ALBERT-base": Model(
        "albert",
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
        (Row(QV.format(8), 2 * 8 * (768 + 768)), Row("full", 11_683_584, "tuned_parameters")),  # one shared block
    ),
    "T5-small": Model("t5", t5(512, 2048, 6, 8), (Row(QV.format(8), 294_912),)),
    "T5-base": Model(
        "t5",
        t5(768, 3072, 12, 12),
        (
            Row(QV.format(8), 884_736),
            Row("ia3", 129_024),
            Row("prompt:length=100", 76_800),  # Lester et al. 2021, table 4
            Row("prefix:length=20", 36 * 2 * 20 * 768),
            Row("layernorm", (12 * 2 + 12 * 3 + 2) * 768, "tuned_parameters"),
        ),
    ),
    "mT0-large": Model(
        "mt5",
        t5(1024, 2816, 24, 16, **GATED),
        # peft's README and its guide to IA3 print these
        (Row(QV.format(8), 2_359_296), Row("ia3", 282_624)),
    ),
    "BART-large": Model(
        "bart",
        BART_LARGE,
        (
            Row("prefix:length=200", 14_745_600),
            Row("full", 406_291_456, "tuned_parameters"),
        ),
    ),
    "Pegasus-large": Model(
        "pegasus", BART_LARGE | {"encoder_layers": 16, "decoder_layers": 16}, (Row(QV.format(8), 48 * 2 * 8 * 2048),)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_count(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MODELS[name]
    AutoConfig.for_model(model.model_type, **model.settings).save_pretrained(tmp_path)
    arguments = ["params", "--backbone", str(tmp_path), "--json"] + (["--task", model.task] if model.task else [])
    assert main([*arguments, *(word for row in model.rows for word in ("--method", row.method))]) == 0
    counted = json.loads(capsys.readouterr().out)
    found = [(one["method"], row.figure, one[row.figure]) for one, row in zip(counted, model.rows, strict=True)]
    assert found == [(row.method, row.figure, row.expected) for row in model.rows]


def test_every_kind_has_a_count_from_elsewhere() -> None:
    counted = {row.method.partition(":")[0] for model in MODELS.values() for row in model.rows}
    assert counted >= METHODS.keys() - {"peft", "prompting"}
