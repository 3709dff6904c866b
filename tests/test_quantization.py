"""Backbones quantised by bitsandbytes: exact storage, faults of the stock layers on a CPU, whole runs and merges."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from architectures import CONFIGS, IDS, MASK, SEQUENCE, Place, save_checkpoint, tiny_config, wider
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

import peftkit
from peftkit.artifacts.store import load_run
from peftkit.backbones.layouts import layout_for
from peftkit.backbones.load import wrap
from peftkit.backbones.quantization import FP4, NF4, FourBit, Int8, Quantization
from peftkit.backbones.quantize import dequantize, packed, quantize
from peftkit.backbones.quantized_layers import FourBitLinear, pack
from peftkit.cli import main
from peftkit.errors import BackboneError

WriteConfig = Callable[..., Path]
CPU = torch.device("cpu")
# the quantiles of the normal distribution that QLoRA's appendix E prints, and the values that fp4's bits spell out
NF4_CODES = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4_CODES = [sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
CODES = {"nf4": NF4_CODES, "fp4": FP4_CODES}


def exact(weight: Tensor, codes: list[float], block: int) -> Tensor:
    """Each weight as the nearest code times its block's largest magnitude, in float64."""
    blocks = weight.double().view(-1, block)
    largest = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor(codes, dtype=torch.float64)
    return (table[((blocks / largest)[..., None] - table).abs().argmin(-1)] * largest).view_as(weight)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 128, 4096])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_weights_are_the_nearest_codes_times_the_largest_of_their_block(kind: Any, block: Any, storage: Any) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(4096 if block == 4096 else 256, 24)
    settings = FourBit(kind=kind, block_size=block, double=False, storage_dtype=storage, compute_dtype="float32")
    layer: Any = pack("one", plain, settings, CPU)
    expected = exact(plain.weight.data, CODES[kind], block)
    torch.testing.assert_close(layer.unpacked(torch.float32).double(), expected, rtol=1e-6, atol=1e-6)
    inputs = torch.randn(5, plain.in_features)
    reference = inputs.double() @ expected.T + plain.bias.double()
    torch.testing.assert_close(layer(inputs).double(), reference, rtol=1e-5, atol=1e-5)


def test_double_quantisation_moves_magnitudes_by_less_than_a_step_of_eight_bits() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(512, 256)
    once, twice = (
        pack("one", plain, NF4(double=double, compute_dtype="float32"), CPU).unpacked(torch.float32)  # type: ignore[operator]
        for double in (False, True)
    )
    largest = plain.weight.detach().view(-1, 64).abs().amax(1)
    assert 0 < float((once - twice).abs().max()) < float(largest.max() - largest.min()) / 64


def test_int8_rounds_to_a_127th_of_the_largest_of_a_row() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(48, 24)
    plain.weight.data[3] = 0
    layer: Any = pack("one", plain, Int8(compute_dtype="float32"), CPU)
    step = plain.weight.double().abs().amax(1, keepdim=True) / 127
    expected = (plain.weight.double() / step.clamp_min(1e-30)).round() * step
    torch.testing.assert_close(layer.unpacked(torch.float32).double(), expected, rtol=1e-6, atol=1e-7)
    stock, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(plain.weight.data[4:].half())
    # which rounds the weights to float16 first
    assert int((layer.weight.data[4:].int() - stock.int()).abs().max()) <= 1
    torch.testing.assert_close(layer.scales[4:], scales, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        # 4 bits a weight, and 32 for a block of 64; or 8 for a block and 32 for 256 blocks, as QLoRA counts
        (NF4(double=False), 4 + 32 / 64),
        (NF4(), 4 + 8 / 64 + 32 / (64 * 256)),
        (FP4(block_size=128), 4 + 8 / 128 + 32 / (128 * 256)),
        (Int8(), 8 + 32 / 512),
    ],
    ids=str,
)
def test_bytes_are_exact_on_the_meta_device_too(settings: Quantization, bits: float) -> None:
    for device in ("cpu", "meta"):
        plain = nn.Linear(512, 512, device=device)
        layer = pack("one", plain, settings, torch.device(device))
        held = packed(nn.ModuleList([layer]))
        assert held is not None
        assert held.bytes * 8 == 512 * 512 * bits
        assert held.weights == 512 * 512
        inputs = torch.ones(3, 512, device=device, requires_grad=True)
        layer(inputs).sum().backward()
        assert inputs.grad is not None
        assert inputs.grad.shape == (3, 512)


# --- three faults of the stock layers on a CPU --------------------------------------------------------------------


class Frozen(nn.Module):
    """What LoRA is around: a frozen 4-bit layer, and something before it that trains."""

    def __init__(self, ours: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trained, plain = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.packed: Any = bitsandbytes.nn.Linear4bit(64, 64, False, torch.float32, quant_type="nf4")
        self.packed.load_state_dict(plain.state_dict())
        self.packed.to("cpu")
        if ours:
            self.packed = pack("one", plain, NF4(compute_dtype="float32"), CPU)
        self.packed.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.packed(self.trained(x))
        return found

    def step(self) -> Tensor:
        """One step of training; the trained weights after it."""
        self.train()
        self(torch.ones(2, 64)).square().sum().backward()
        if self.trained.weight.grad is not None:
            self.trained.weight.data -= 0.1 * self.trained.weight.grad
        self.zero_grad()
        return self.trained.weight.detach().clone()

    def evaluate(self) -> None:
        self.eval()
        with torch.no_grad():
            self(torch.ones(2, 64))


needs_repacking = pytest.mark.skipif(
    not bitsandbytes.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu,
    reason="bitsandbytes packs 4-bit weights anew only on processors with AVX512-BF16",
)


@needs_repacking
@pytest.mark.filterwarnings("ignore")
def test_training_after_an_evaluation_stock_fails_peftkit_passes() -> None:
    stock = Frozen(ours=False)
    stock.evaluate()
    before = stock.trained.weight.detach().clone()
    try:
        assert torch.equal(stock.step(), before), "bitsandbytes was mended: this test may go"
    except RuntimeError as error:
        assert "does not require grad" in str(error)

    evaluated, straight = Frozen(ours=True), Frozen(ours=True)
    first = evaluated.step()
    evaluated.evaluate()
    second = evaluated.step()
    assert torch.equal(straight.step(), first)
    assert torch.equal(straight.step(), second)
    assert not torch.equal(first, second)


@needs_repacking
def test_unpacking_after_an_evaluation_stock_fails_peftkit_passes() -> None:
    stock, ours = Frozen(ours=False), Frozen(ours=True)
    whole = ours.packed.unpacked(torch.float32)
    for model in (stock, ours):
        model.evaluate()
    weight = stock.packed.weight
    read = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)  # as peft's merge does
    assert read.shape != whole.shape or float((read - whole).abs().max()) > 0.1, "bitsandbytes was mended"
    assert torch.equal(ours.packed.unpacked(torch.float32), whole)


@needs_repacking
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_merging_after_an_evaluation_stock_fails_peftkit_passes() -> None:
    """peft merges into the codes as the evaluation left them; peftkit puts plain weights there first."""
    from peft import LoraConfig, get_peft_model

    def adapted(model: Any) -> Any:
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(r=2, target_modules=["value"], init_lora_weights=False))

    def lost(evaluated: bool) -> float:
        """How far peft's merged weights are from what they should be, beside how large they are."""
        model = adapted(stock_bert(width=64))
        if evaluated:
            with torch.no_grad():
                model.eval()(input_ids=IDS, attention_mask=MASK)
        merged = model.merge_and_unload().bert.encoder.layer[0].attention.self.value.weight
        read = bitsandbytes.functional.dequantize_4bit(merged.data, merged.quant_state).view(64, 64)
        return float((read - expected).norm() / expected.norm())

    ours = adapted(dequantize(wrap(stock_bert(width=64)).model))
    value = ours.base_model.model.bert.encoder.layer[0].attention.self.value
    expected = (value.base_layer.weight + value.get_delta_weight("default")).detach()
    assert lost(evaluated=False) < 0.2  # rounded to four bits
    assert lost(evaluated=True) > 0.3, "peft or bitsandbytes was mended: this test may go"
    merged = ours.merge_and_unload().bert.encoder.layer[0].attention.self.value.weight
    torch.testing.assert_close(merged.detach(), expected)


def test_rows_that_blocks_do_not_fit_stock_fails_peftkit_refuses() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 48)
    codes, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=32, quant_type="nf4")
    wrong = bitsandbytes.functional.dequantize_4bit(codes, state)
    assert float((wrong - weight).abs().mean()) > 2 * float((exact(weight, NF4_CODES, 32) - weight).abs().mean())
    plain = nn.Linear(48, 96)
    with pytest.raises(BackboneError, match=r"blocks of 32 weights do not fit the 48 inputs of 'one'.*use int8"):
        pack("one", plain, NF4(block_size=32), CPU)
    wide = nn.Linear(192, 4)
    with pytest.raises(BackboneError, match="use 64 or less"):
        pack("one", wide, NF4(block_size=128), CPU)


@needs_repacking
def test_stock_layers_of_a_callers_model_are_mended() -> None:
    """Even where an evaluation has already packed them anew."""
    model = stock_bert(width=64)
    model.eval()
    with torch.no_grad():
        before = model(input_ids=IDS, attention_mask=MASK).logits
    adapted: Any = peftkit.attach(model, peftkit.LoRA(rank=2, targets="query"))
    layers = [part for part in adapted.modules() if isinstance(part, bitsandbytes.nn.Linear4bit)]
    assert {type(layer) for layer in layers} == {FourBitLinear}
    with torch.no_grad():
        # bitsandbytes' packed product computes in bfloat16
        torch.testing.assert_close(adapted(input_ids=IDS, attention_mask=MASK).logits, before, rtol=0.05, atol=0.05)
    adapted.train()(input_ids=IDS, attention_mask=MASK).logits.square().sum().backward()
    grads = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert grads and all(grad is not None and bool(grad.any()) for grad in grads)


def stock_bert(width: int) -> Any:
    """A BERT whose query and value projections are bitsandbytes' own."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        tiny_config("bert", hidden_size=width, initializer_range=0.05)
    )
    for name, part in list(model.named_modules()):
        if name.endswith(("query", "value")):
            layer = bitsandbytes.nn.Linear4bit(width, width, compute_dtype=torch.float32, quant_type="nf4")
            layer.load_state_dict(part.state_dict())
            model.set_submodule(name, layer.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(
    "settings",
    [NF4(block_size=32, compute_dtype="float32"), Int8(compute_dtype="float32")],
    ids=lambda one: one.kind,
)
def test_every_architecture_computes_with_the_values_of_its_codes(architecture: str, settings: Quantization) -> None:
    """T5 reads the dtype of one of its weights, and would cast activations to whole numbers were that one packed."""
    torch.manual_seed(0)
    model: Any = AutoModel.from_config(tiny_config(architecture, **wider(architecture))).eval()
    names, layout = list(model.state_dict()), layout_for(architecture, model)
    chosen = quantize(model, layout, settings)
    whole = dequantize(copy.deepcopy(model))
    assert list(whole.state_dict()) == names
    embeddings = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    assert all(part.weight.dtype == torch.float32 for part in embeddings)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    inputs |= {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        ours, theirs = model(**inputs)[0], whole(**inputs)[0]
    assert chosen
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_heads_and_embeddings_stay_whole(architecture: str) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_config(tiny_config(architecture))
    quantize(model, layout_for(architecture, model), Int8())
    whole = {name for name, part in model.named_modules() if type(part) is nn.Linear}
    heads = {name for name in whole if not any(character.isdigit() for character in name)}
    assert heads
    if architecture == "t5":  # transformers keeps these in float32, for T5 reads their dtype
        assert {name.rsplit(".", 1)[-1] for name in whole - heads} == {"wo"}
    else:
        assert whole == heads


# --- whole runs -----------------------------------------------------------------------------------------------------

NF4_32 = {"kind": "nf4", "block_size": 32}


@pytest.fixture
def backbone(tiny_bert: Path) -> dict[str, Any]:
    return {"name": str(tiny_bert), "quantization": NF4_32}


def test_a_run_says_what_is_quantised_learns_and_is_read_back(
    write_config: WriteConfig, backbone: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write_config(backbone=backbone)), "training.epochs=12"]) == 0
    said = capsys.readouterr()
    # of two blocks: 4 · 32 · 32 + 2 · 32 · 64 weights each, in 4 bits and 8 for each 32
    assert "12 linear layers of the blocks in nf4 in blocks of 32, doubly quantised: 16,384 weights" in said.out
    folder = tmp_path / "run"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["after"]["values"]["accuracy"] > 0.9
    saved = load_run(folder)
    assert packed(saved.model) is not None
    head = saved.model.get_submodule("base_model.model.classifier.modules_to_save.default")
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}
    assert main(["evaluate", str(folder), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["scores"]
    assert again["accuracy"] == scores["after"]["values"]["accuracy"]


@needs_repacking
@pytest.mark.parametrize("every", ["epoch", "1"])
def test_evaluations_do_not_change_training(
    write_config: WriteConfig, backbone: dict[str, Any], tmp_path: Path, every: str
) -> None:
    """Train, evaluate, train gives the weights of training alone, bit for bit."""
    config = write_config(backbone=backbone)
    adapters = []
    for name, often in (("often", every), ("once", "40")):
        overrides = [f"training.evaluate_every={often}", "training.keep_best=false", f"output.folder={tmp_path / name}"]
        assert main(["train", str(config), *overrides]) == 0
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("quantization", "allowed"),
    [(NF4_32 | {"compute_dtype": "float32"}, 1e-5), (NF4_32, 5e-2), ({"kind": "int8"}, 5e-2)],
    ids=["nf4 float32", "nf4 bfloat16", "int8"],
)
def test_the_merged_model_computes_what_the_quantised_one_does(
    write_config: WriteConfig, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    quantization: dict[str, Any], allowed: float,
) -> None:  # fmt: skip
    """And it is plain: no weight of it is packed, and the training saw just these values."""
    config = write_config(backbone={"name": str(tiny_bert), "quantization": quantization})
    assert main(["train", str(config)]) == 0
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    report = json.loads((tmp_path / "merged" / "peftkit_merge.json").read_text())
    assert report["equal_predictions"] == report["rows"] == 40
    assert report["largest_difference"] <= allowed * max(1, report["largest_logit"])
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query"
    a, b = (adapter[f"base_model.model.{name}.lora_{one}.weight"] for one in "AB")
    original: Any = AutoModel.from_pretrained(tiny_bert).encoder.layer[0].attention.self.query
    settings = load_run(tmp_path / "run").run.backbone.quantization
    assert settings is not None
    layer: Any = pack("one", original, settings, CPU)
    seen = layer.unpacked(layer.compute_dtype).float()
    torch.testing.assert_close(weights[f"{name}.weight"], seen + 2 * b @ a, rtol=0, atol=1e-6)


def test_a_run_is_built_on_the_merged_model_of_a_quantised_one(
    write_config: WriteConfig, backbone: dict[str, Any], tmp_path: Path
) -> None:
    assert main(["train", str(write_config(backbone=backbone))]) == 0
    onto = write_config(backbone={"name": str(tmp_path / "run")}, output={"folder": str(tmp_path / "second")})
    assert main(["train", str(onto), "training.max_steps=2"]) == 0
    merged = load_run(tmp_path / "second").backbone.model
    assert packed(merged) is None


def test_going_on_from_another_quantisation_is_refused(
    write_config: WriteConfig, backbone: dict[str, Any], tiny_bert: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["train", str(write_config(backbone=backbone)), "training.max_steps=2"]) == 0
    method = {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all", "start_from": str(tmp_path / "run")}
    output = {"folder": str(tmp_path / "second")}
    assert main(["train", str(write_config(method=method, output=output))]) == 2
    error = capsys.readouterr().err
    assert "was trained with backbone.quantization {'kind': 'nf4'" in error and "and this run has null" in error
    assert main(["train", str(write_config(method=method, output=output, backbone=backbone))]) == 0


def test_from_python(tiny_bert: Path, toy_data: Path, tmp_path: Path) -> None:
    quantization = peftkit.NF4(block_size=32)
    rows = [json.loads(line) for line in (toy_data / "sentiment_train.jsonl").read_text().splitlines()]
    run = peftkit.Run(
        backbone=peftkit.Backbone(name=str(tiny_bert), quantization=quantization),
        task=peftkit.SequenceClassification(max_length=32),
        method=peftkit.Bottleneck(bottleneck_size=4),
        training=peftkit.Training(learning_rate=1e-2, max_steps=2),
        output=peftkit.Output(folder=str(tmp_path / "run")),
    )
    peftkit.train(run, splits=peftkit.splits_from(train=rows[:80], dev=rows[80:100], test=rows[100:120]))
    assert load_run(tmp_path / "run").run.backbone.quantization == quantization


# --- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method={kind: full}"], "method 'full' trains all weights of the backbone, which nf4 does not allow; leave"),
        (["method={kind: top_layers}"], "method 'top_layers' trains weights of the backbone, which nf4 does not allow"),
        (["method.initialization=pissa"], "initialization pissa takes the backbone's weights apart, which nf4"),
        (["method={kind: peft, type: loha}"], "type 'loha' reads the backbone's weights in peft, which nf4 does not"),
        (
            ["backbone.quantization.block_size=64"],
            "blocks of 64 weights do not fit the 32 inputs of 'bert.encoder",
        ),
        (["backbone.quantization.kind=nf3"], "nf3"),
        (["backbone.quantization.block_size=48"], "block_size"),
        (["backbone.quantization.doubel=true"], "did you mean 'double'"),
    ],
)
def test_one_error_before_weights_load(
    write_config: WriteConfig, backbone: dict[str, Any], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str,
) -> None:  # fmt: skip
    def refuse(*arguments: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("peftkit.backbones.load.load_model", refuse)
    assert main(["train", str(write_config(backbone=backbone)), *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_bitsandbytes_that_does_not_work_is_one_error(
    write_config: WriteConfig, backbone: dict[str, Any], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    assert main(["train", str(write_config(backbone=backbone))]) == 2
    error = capsys.readouterr().err
    assert "bitsandbytes, which does not work on cpu here (no kernel for this device); install a build of it" in error


def test_a_checkpoint_that_was_quantised_before_is_refused(
    write_config: WriteConfig, tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "packed"
    folder.mkdir()
    for file in tiny_bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["train", str(write_config(backbone={"name": str(folder)}))]) == 1
    assert "were quantised before; name the checkpoint that they were made from" in capsys.readouterr().err


def test_the_contracts_checkpoints_fit_blocks_of_32(tmp_path: Path) -> None:
    place = Place("llama", SEQUENCE, NF4(block_size=32))
    model = AutoModelForSequenceClassification.from_pretrained(save_checkpoint(place, tmp_path))
    assert quantize(model, wrap(model).layout, NF4(block_size=32))
