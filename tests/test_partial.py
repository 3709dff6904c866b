"""Biases, normalisations and top layers against plain transformers models that are trained by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from pydantic import ValidationError
from safetensors import safe_open
from test_layouts import MODEL_TYPES, tiny_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    BertModel,
)

from peftkit.api import attach
from peftkit.backbones.layouts import block_modules, layout_for
from peftkit.backbones.load import BackboneSettings, Head, load, wrap
from peftkit.backbones.modules import head_modules
from peftkit.backbones.quantization import Int8
from peftkit.backbones.quantize import quantize
from peftkit.cli import main
from peftkit.errors import MethodError
from peftkit.methods import BitFit, LayerNorm, TopLayers
from peftkit.methods.base import Method, module_parameters, numel, trained_parameters

TASKS = (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForMaskedLM,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)
# Other heads leave out a pooler, or an encoder-decoder's decoder.
OTHER_HEADS = {
    "bert": (AutoModelForTokenClassification,),
    "albert": (AutoModelForTokenClassification,),
    "t5": (AutoModelForTokenClassification, AutoModelForQuestionAnswering),
}
NO_BIAS = ("modernbert", "llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3", "t5", "mt5")
METHODS: tuple[Method, ...] = (BitFit(), LayerNorm(), TopLayers(layers=1))
IDS = torch.tensor([[3, 10, 11, 12, 13, 2], [4, 20, 21, 22, 23, 2]])
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in MODEL_TYPES),
    ("deberta", RELATIVE),
    ("deberta-v2", RELATIVE | {"norm_rel_ebd": "layer_norm", "position_buckets": 8, "conv_kernel_size": 3}),
    ("deberta-v2", RELATIVE | {"norm_rel_ebd": "layer_norm", "share_att_key": True}),
    ("t5", {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3}),
    ("modernbert", {"norm_bias": True, "attention_bias": True}),
    ("gemma", {"attention_bias": True}),
]


def made(model_type: str, kind: Any = AutoModelForSequenceClassification, **changes: Any) -> Any:
    """A tiny random model, in which biases and normalisations are not at their usual start."""
    torch.manual_seed(0)
    settings = {"decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0} | changes
    model = kind.from_config(tiny_config(model_type, **settings))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5) if name.endswith("weight") else nn.init.normal_(parameter, std=0.1)
    return model.eval()


def outputs(model: Any) -> Tensor:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    name = type(model).__name__
    if model.config.is_encoder_decoder and not name.endswith(("SequenceClassification", "TokenClassification")):
        inputs |= {"decoder_input_ids": IDS.flip(1)}
    found = model(**inputs)
    if "start_logits" in found:
        return torch.stack([found.start_logits, found.end_logits], dim=-1)
    return found.logits if "logits" in found else found.last_hidden_state


def backward(model: nn.Module) -> None:
    scores = outputs(model)
    scores = scores.reshape(-1, scores.shape[-1])
    cross_entropy(scores, torch.arange(len(scores)) % scores.shape[-1]).backward()


def learnable(model: Any) -> set[str]:
    """Names of the backbone's parameters that get a gradient when everything trains."""
    backward(model)
    bare = {name for name, _ in AutoModel.from_config(model.config).named_parameters()}
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return {name for name in found if name.removeprefix(f"{model.base_model_prefix}.") in bare}


def beside_norm_weight(names: set[str], vectors: set[str]) -> set[str]:
    """The vectors of modules whose weight is a vector: nothing but a normalisation has one."""
    owners = {name.rpartition(".")[0] for name in vectors if name.endswith(".weight")}
    return {name for name in vectors & names if name.rpartition(".")[0] in owners}


def called_last(model: Any, names: set[str]) -> set[str]:
    """What is inside the last block that runs in each stack, and what runs after it without being a head."""
    stacks: dict[str, list[str]] = {}
    blocks = {id(part): name for name, part in block_modules(model, layout_for(model.config.model_type)).items()}
    own = {
        id(part): name for name, part in model.named_modules() if next(part.parameters(recurse=False), None) is not None
    }
    order: list[str] = []

    def note(module: nn.Module, *_: Any) -> None:
        name = blocks.get(id(module)) or own.get(id(module))
        order.append(name or "")
        if id(module) in blocks:
            stacks.setdefault("decoder" if ".decoder." in f".{name}" else "encoder", []).append(str(name))

    hooks = [part.register_forward_pre_hook(note) for part in model.modules()]
    outputs(model)
    for hook in hooks:
        hook.remove()
    found: set[str] = set()
    for stack, ran in stacks.items():
        start = len(order) - 1 - order[::-1].index(ran[-1])
        after = [name for name in order[start:] if name and ("decoder" in name) == (stack == "decoder")]
        inside = tuple(f"{name}." for name in [ran[-1], *after])
        found |= {name for name in names if name.startswith(inside)}
    return found


def expected(method: Method, model: Any) -> set[str]:
    """What should train beside the head, read off what the model does and the shapes it has."""
    names = learnable(model)
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    if isinstance(method, BitFit):
        return {name for name in names & vectors if not name.endswith("weight")}
    return beside_norm_weight(names, vectors) if isinstance(method, LayerNorm) else called_last(model, names)


def cells() -> Iterator[tuple[str, dict[str, Any], Any]]:
    for model_type, changes in VARIANTS:
        config = tiny_config(model_type)
        for kind in (*TASKS, *OTHER_HEADS.get(model_type, ())):
            if type(config) in kind._model_mapping:
                yield model_type, changes, kind


@pytest.mark.parametrize(("model_type", "changes", "kind"), cells(), ids=lambda one: getattr(one, "__name__", None))
def test_what_trains_is_what_is_named_and_gets_a_gradient(model_type: str, changes: dict[str, Any], kind: Any) -> None:
    plain = made(model_type, kind, **changes)
    heads = tuple(f"{name}." for name in head_modules(plain))
    for method in METHODS:
        named = expected(method, plain)
        if not named:
            assert isinstance(method, BitFit)
            assert model_type in NO_BIAS
            with pytest.raises(MethodError, match=rf"'bitfit': {model_type} \(\w+\) has no biases in its backbone"):
                attach(copy.deepcopy(plain), method)
            continue
        model = attach(copy.deepcopy(plain), method)
        trained = trained_parameters(model)
        assert {name for name in trained if not name.startswith(heads or ("?",))} == named
        assert all(name in trained for name, _ in plain.named_parameters() if name.startswith(heads or ("?",)))
        backward(model)
        assert [name for name, parameter in trained.items() if parameter.grad is None] == []
        with torch.no_grad():
            assert torch.equal(outputs(model), outputs(plain))
        with torch.device("meta"):
            shapes = kind.from_config(plain.config)
        counted = method.tuned_parameters(shapes, head_modules(shapes))
        assert counted == sum(trained[name].numel() for name in named)
        assert method.added_parameters(shapes, layout_for(model_type)) == 0


@pytest.mark.parametrize(
    ("model_type", "layers", "trained"),
    [
        ("bert", 2, r"bert.encoder.layer.1 bert.encoder.layer.2 bert.pooler"),
        ("gpt2", 1, r"transformer.h.2 transformer.ln_f"),
        ("deberta-v2", 3, r"deberta.encoder.layer.0 deberta.encoder.layer.1 deberta.encoder.layer.2"),
        (
            "t5",
            2,
            "transformer.encoder.block.1 transformer.encoder.block.2 transformer.encoder.final_layer_norm "
            "transformer.decoder.block.1 transformer.decoder.block.2 transformer.decoder.final_layer_norm",
        ),
        (
            "mbart",
            1,
            "model.encoder.layers.2 model.encoder.layer_norm model.decoder.layers.2 model.decoder.layer_norm",
        ),
    ],
)
def test_top_layers_are_the_last_and_what_follows(model_type: str, layers: int, trained: str) -> None:
    depth = {"num_hidden_layers": 3, "n_layer": 3, "num_layers": 3, "encoder_layers": 3, "decoder_layers": 3}
    known = set(tiny_config(model_type).attribute_map.values()) | set(tiny_config(model_type).to_dict())
    changes = (
        {name: value for name, value in depth.items() if name in known} | RELATIVE | {"norm_rel_ebd": "layer_norm"}
    )
    model = made(model_type, **changes)
    modules = trained.split()
    count = sum(p.numel() for name in modules for p in model.get_submodule(name).parameters())
    heads = head_modules(model)
    found = set(trained_parameters(attach(model, TopLayers(layers=layers))))
    prefixes = tuple(f"{name}." for name in (*modules, *heads))
    assert found == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    assert TopLayers(layers=layers).tuned_parameters(model, heads) == count


@pytest.mark.parametrize("method", METHODS, ids=lambda one: one.kind)
@pytest.mark.parametrize("model_type", ["bert", "albert", "gpt2", "bart"])
def test_training_is_that_of_a_plain_model_with_the_rest_frozen(
    model_type: str, method: Method, tmp_path: Path
) -> None:
    plain = made(model_type)
    named = expected(method, plain)
    heads = tuple(f"{name}." for name in head_modules(plain))
    start = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model = attach(copy.deepcopy(plain), method)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in named or name.startswith(heads))
    for one in (plain, model):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            backward(one)
            optimizer.step()
            optimizer.zero_grad()
    ours, theirs = model.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    changed = {name for name in start if not torch.equal(ours[name], start[name])}
    assert changed == named | {name for name in start if name.startswith(heads)}

    method.save(model, tmp_path)
    (file,) = tmp_path.iterdir()
    with safe_open(file, "pt") as saved:
        assert set(saved.keys()) == changed
        assert saved.metadata() == {"method": method.kind}
    assert file.stat().st_size <= 1.02 * sum(start[name].nbytes for name in changed) + 2**16
    torch.manual_seed(7)
    fresh = type(plain)(plain.config)
    fresh.load_state_dict({name: t for name, t in start.items() if not name.startswith(heads)}, strict=False)
    loaded = method.load(wrap(fresh.eval()), tmp_path)
    with torch.no_grad():
        assert torch.equal(outputs(loaded), outputs(plain))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert method.merge(model) is model


class TestRefused:
    @pytest.mark.parametrize("method", METHODS, ids=lambda one: one.kind)
    def test_weights_in_half_precision(self, method: Method) -> None:
        model = made("bert").to(torch.bfloat16)
        message = rf"'{method.kind}' trains weights .* in bfloat16 it loses every step .* backbone\.dtype: float32"
        with pytest.raises(MethodError, match=message):
            attach(model, method)

    def test_a_head_in_half_precision_is_held_in_float32(self) -> None:
        model = made("bert")
        model.classifier.to(torch.bfloat16)
        attach(model, BitFit())
        assert model.classifier.weight.dtype == torch.float32

    def test_in_a_configuration(self, write_config: Callable[..., Path], tiny_bert: Path, capsys: Any) -> None:
        backbone = {"name": str(tiny_bert), "dtype": "bfloat16"}
        assert main(["validate", str(write_config(method={"kind": "bitfit"}, backbone=backbone))]) == 2
        assert "method 'bitfit' trains weights of the backbone itself; in bfloat16" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("model_type", "changes", "layers", "message"),
        [
            ("bert", {}, 3, r"layers is 3, but bert \(Bert\w+\) has 2 blocks in 'bert\.encoder\.layer\.\*'; lower"),
            ("t5", {"num_decoder_layers": 1}, 2, r"has 1 block in 'transformer\.decoder\.block\.\*'; lower"),
            (
                "albert",
                {"num_hidden_groups": 1, "inner_group_num": 1, "num_hidden_layers": 12},
                2,
                r"has 1 block in 'albert\.encoder.*', which its 12 layers share; lower method\.layers",
            ),
        ],
    )
    def test_more_layers_than_there_are(
        self, model_type: str, changes: dict[str, Any], layers: int, message: str
    ) -> None:
        model = made(model_type, **changes)
        with pytest.raises(MethodError, match=message):
            TopLayers(layers=layers).added_parameters(model, layout_for(model_type))
        attach(model, TopLayers(layers=layers - 1))

    def test_no_layers(self) -> None:
        with pytest.raises(ValidationError, match="greater than 0"):
            TopLayers(layers=0)

    def test_a_model_without_normalisations(self) -> None:
        model = made("distilbert")
        for name, part in list(model.named_modules()):
            if isinstance(part, nn.LayerNorm):
                model.set_submodule(name, nn.Identity())
        with pytest.raises(MethodError, match=r"'layernorm': distilbert \(\w+\) has no normalisation with parameters"):
            attach(model, LayerNorm())

    def test_what_is_inside_quantised_layers(self) -> None:
        model = made("bert")
        quantize(model, layout_for("bert"), Int8())
        with pytest.raises(MethodError, match=r"'top_layers' cannot train '.*query\.weight', which is quantised"):
            attach(copy.deepcopy(model), TopLayers(layers=1))
        for method in (BitFit(), LayerNorm()):
            trained = trained_parameters(attach(attached := copy.deepcopy(model), method))
            backward(attached)
            assert all(parameter.grad is not None for parameter in trained.values())


@pytest.mark.parametrize("outputs", [7, 64])  # an odd number of weights, and whole blocks of 64
def test_storage_in_4_bits_does_not_change_the_count(outputs: int) -> None:
    plain = nn.Linear(9 if outputs == 7 else 64, outputs)
    packed = Linear4bit(plain.in_features, outputs, compute_dtype=torch.float32, quant_type="nf4")
    packed.load_state_dict(plain.state_dict())
    assert numel(packed.weight) == plain.weight.numel()
    packed.to("cpu")
    assert packed.weight.dtype == torch.uint8
    assert packed.weight.numel() < plain.weight.numel()
    assert module_parameters(nn.ModuleDict({"one": packed}), ["one"]) == plain.in_features * outputs + outputs
    if outputs % 32 == 0:
        with torch.no_grad():  # bitsandbytes packs otherwise for a CPU's first evaluation
            packed.eval()(torch.ones(1, plain.in_features))
    assert numel(packed.weight) == plain.weight.numel()
    assert numel(copy.deepcopy(packed).weight) == plain.weight.numel()


class TestCheckpoints:
    @pytest.mark.parametrize("method", METHODS, ids=lambda one: one.kind)
    def test_a_fresh_pooler_is_the_heads(self, tiny_bert: Path, tmp_path: Path, method: Method) -> None:
        folder = tmp_path / "no_pooler"
        for file in tiny_bert.iterdir():
            folder.mkdir(exist_ok=True)
            (folder / file.name).write_bytes(file.read_bytes())
        BertModel.from_pretrained(tiny_bert, add_pooling_layer=False).save_pretrained(folder)
        backbone = load(BackboneSettings(name=str(folder)), Head("AutoModelForSequenceClassification", ("a", "b")))
        assert backbone.head_modules == ("classifier", "bert.pooler")
        trained = trained_parameters(method.attach(backbone, 1))
        assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight"} <= trained.keys()
        (tmp_path / "out").mkdir()
        method.save(backbone.model, tmp_path / "out")
        torch.manual_seed(5)
        again = load(BackboneSettings(name=str(folder)), Head("AutoModelForSequenceClassification", ("a", "b")))
        assert torch.equal(outputs(method.load(again, tmp_path / "out").eval()), outputs(backbone.model.eval()))

    def test_a_pooler_that_is_used_keeps_its_weight_and_trains_its_bias(self) -> None:
        config = AutoConfig.for_model("bert", num_hidden_layers=1, hidden_size=8, num_attention_heads=1)
        model = BertForSequenceClassification(config)
        trained = trained_parameters(attach(model, BitFit()))
        assert "bert.pooler.dense.bias" in trained
        assert "bert.pooler.dense.weight" not in trained
        assert not [name for name in trained_parameters(attach(BertModel(config), BitFit())) if "pooler" in name]


@pytest.mark.parametrize(
    ("method", "learning_rate"), [({"kind": "layernorm"}, 0.03), ({"kind": "top_layers", "layers": 1}, 0.003)]
)
def test_a_run_from_configuration_to_predictions(
    method: dict[str, Any],
    learning_rate: float,
    write_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training = {"learning_rate": learning_rate, "max_steps": 40, "batch_size": 16, "seed": 1}
    assert main(["train", str(write_config(method=method, training=training))]) == 0
    tuned = {"layernorm": 5 * 2 * 32, "top_layers": 4 * 33 * 32 + 33 * 64 + 65 * 32 + 4 * 32 + 33 * 32}[method["kind"]]
    assert f"method    {method['kind']}: {tuned + 66:,} of" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["training"]["trainable_parameters"] == tuned + 66
    scores = manifest["scores"]
    assert scores["after"]["accuracy"] > scores["majority"]["accuracy"]
    assert (tmp_path / "run" / "trained").is_dir()
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["scores"]
    assert again["accuracy"] == pytest.approx(scores["after"]["accuracy"], abs=1e-12)
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
