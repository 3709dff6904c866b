"""LoRA, full and head-only fine-tuning against plain peft, plain transformers and the papers' formulas."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel

import peftkit.api
from peftkit.backbones.load import Backbone, BackboneSettings, Head, load, wrap
from peftkit.errors import BackboneError, MethodError
from peftkit.methods import Full, HeadOnly, LoRA
from peftkit.methods.base import Method, trained_parameters

SEQUENCE, TOKEN = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
MODELS = [("tiny_bert", SEQUENCE), ("tiny_bert", TOKEN), ("tiny_llama", SEQUENCE)]
EXACT = ("default", "gaussian", "mica")  # B or A is zero, so the update is exactly nothing
ROUNDED = ("orthogonal", "pissa", "pissa_niter_4", "olora")
VARIANTS = ("plain", "rslora", "dora", "rslora_dora")
COMBINATIONS = [
    (variant, initialization)
    for variant in VARIANTS
    for initialization in EXACT + ROUNDED
    if not (initialization == "mica" and "dora" in variant)
]
IDS = torch.tensor([[2, 10, 11, 12, 13, 3], [4, 20, 21, 22, 23, 24]])


def on(folder: Path, model_class: str = SEQUENCE, labels: int = 2, **settings: Any) -> Backbone:
    torch.manual_seed(0)
    head = Head(model_class, tuple("abcdef"[:labels]))
    return load(BackboneSettings(name=str(folder), **settings), head)


@pytest.fixture(params=MODELS, ids=lambda one: f"{one[0]}-{one[1][12:17]}")
def place(request: pytest.FixtureRequest) -> tuple[Path, str]:
    name, model_class = request.param
    return request.getfixturevalue(name), model_class


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def loss_of(model: nn.Module) -> Tensor:
    scores = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float()
    return cross_entropy(scores.reshape(-1, scores.shape[-1]), torch.arange(scores[..., 0].numel()) % 2)


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.05)
    model.train()
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def hashes(model: nn.Module) -> dict[str, str]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def close(one: Tensor, two: Tensor, tolerance: float) -> bool:
    return float((one - two).abs().max()) <= tolerance * max(1.0, float(two.abs().max()))


def block_matrices(folder: Path) -> list[tuple[int, int]]:
    """(out, in) of every matrix in the blocks, read off the checkpoint's tensors and not off a layout."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return [shape for name, shape in shapes.items() if ("layer." in name or "layers." in name) and len(shape) == 2]


class TestStart:
    @pytest.mark.parametrize(("variant", "initialization"), COMBINATIONS)
    def test_adapted_model_is_the_untouched_one(
        self, place: tuple[Path, str], initialization: str, variant: Any
    ) -> None:
        before = logits(on(*place).model)
        method = LoRA(rank=4, alpha=8, variant=variant, initialization=initialization)
        after = logits(method.attach(on(*place), 10))
        if initialization in EXACT:
            assert torch.equal(after, before)
        else:
            assert close(after, before, 1e-5)

    @pytest.mark.parametrize("method", [Full(), HeadOnly()], ids=lambda one: one.kind)
    def test_full_and_head_start_from_the_untouched_model(self, place: tuple[Path, str], method: Method) -> None:
        assert torch.equal(logits(method.attach(on(*place), 10)), logits(on(*place).model))


class TestWhatTrains:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("rank", [1, 4])
    def test_lora_count(self, place: tuple[Path, str], rank: int, variant: Any) -> None:
        backbone = on(*place, labels=3)
        method = LoRA(rank=rank, variant=variant)
        claimed = method.added_parameters(backbone.model, backbone.layout)
        head = sum(p.numel() for n, p in backbone.model.named_parameters() if n.startswith(("classifier", "score")))
        per_matrix = [
            rank * (rows + columns) + rows * ("dora" in variant) for rows, columns in block_matrices(place[0])
        ]
        trained = trained_parameters(method.attach(backbone, 10))
        assert claimed == sum(per_matrix)
        assert sum(p.numel() for p in trained.values()) == sum(per_matrix) + head
        assert peftkit.api.trainable_parameters(nn.ParameterList(trained.values())) == sum(per_matrix) + head
        assert all(".lora_" in name or ".modules_to_save." in name for name in trained)

    def test_query_value_of_grouped_queries(self, tiny_llama: Path) -> None:
        backbone = on(tiny_llama)
        # 4 query heads and 2 key-value heads of 8: query is 32 × 32, value 16 × 32, in each of 2 layers
        assert LoRA(rank=4, targets="query_value").added_parameters(backbone.model, backbone.layout) == 2 * 4 * (
            64 + 48
        )

    @pytest.mark.parametrize(
        "method",
        [
            *(LoRA(rank=4, variant=variant) for variant in ("plain", "rslora", "dora", "rslora_dora")),
            *(LoRA(rank=4, initialization=one, targets="query_value") for one in ("gaussian", "mica", *ROUNDED)),
            LoRA(rank=4, dropout=0.2, targets="attention"),
            HeadOnly(),
            Full(),
        ],
        ids=lambda one: "-".join(
            str(v) for v in one.model_dump(include={"kind", "variant", "initialization"}).values()
        ),
    )
    def test_only_what_is_named_changes(self, place: tuple[Path, str], method: Method) -> None:
        model = method.attach(on(*place), 10)
        trained = set(trained_parameters(model))
        before = hashes(model)
        train(model)
        after = hashes(model)
        changed = {name for name in before if before[name] != after[name]}
        # the rows of unused words get no gradient, but weight decay moves the matrix that holds them
        assert changed == trained
        if isinstance(method, HeadOnly):
            assert all(name.startswith(("classifier.", "score.")) for name in trained)

    def test_dtype_of_what_trains_is_float32(self, place: tuple[Path, str], tmp_path: Path) -> None:
        for method in (LoRA(rank=4, alpha=8), HeadOnly()):
            model = method.attach(on(*place, dtype="bfloat16"), 10)
            assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
            assert torch.bfloat16 in {p.dtype for p in model.parameters()}
            train(model)
            folder = tmp_path / method.kind
            folder.mkdir()
            method.save(model, folder)
            loaded = method.load(on(*place, dtype="bfloat16"), folder)
            assert torch.equal(logits(loaded), logits(model))
            merged = method.merge(model).to(torch.bfloat16)
            assert close(logits(merged).float(), logits(loaded).float(), 0.1)

    def test_full_fine_tuning_of_half_precision_weights_is_refused(self, tiny_bert: Path) -> None:
        with pytest.raises(MethodError, match=r"bfloat16 it loses every step .* backbone\.dtype: float32"):
            Full().attach(on(tiny_bert, dtype="bfloat16"), 10)


class TestFormula:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("initialization", ["default", "pissa", "olora"])
    def test_adapted_layer_in_float64(self, tiny_bert: Path, variant: Any, initialization: str) -> None:
        method = LoRA(rank=4, alpha=6, targets="query", variant=variant, initialization=initialization)
        model: Any = method.attach(on(tiny_bert), 10)
        train(model)
        layer = model.base_model.model.bert.encoder.layer[1].attention.self.query
        a, b = (m.default.weight.double() for m in (layer.lora_A, layer.lora_B))
        weight, bias = layer.base_layer.weight.double(), layer.base_layer.bias.double()
        update = 6 / (4**0.5 if variant.startswith("rslora") else 4) * b @ a
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        adapted = weight + update
        if "dora" in variant:  # Liu et al. 2024, equation 5
            length = layer.lora_magnitude_vector.default.weight.double()
            adapted = length[:, None] * adapted / adapted.norm(dim=1, keepdim=True)
        expected = x.double() @ adapted.T + bias
        assert float(update.detach().norm()) > 0.01
        assert torch.allclose(layer(x).double(), expected, atol=1e-5, rtol=1e-5)

    def test_transposed_weights_of_gpt2(self) -> None:
        from transformers import GPT2Config, GPT2ForTokenClassification

        torch.manual_seed(0)
        config = GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=16)
        model: Any = peftkit.api.attach(GPT2ForTokenClassification(config), LoRA(rank=4, alpha=8))
        train(model)
        layer = model.base_model.model.transformer.h[0].attn.c_attn
        a, b = (m.default.weight.double() for m in (layer.lora_A, layer.lora_B))
        x = torch.randn(5, 32)
        expected = x.double() @ (layer.base_layer.weight.double() + 2 * (b @ a).T) + layer.base_layer.bias.double()
        assert torch.allclose(layer(x).double(), expected, atol=1e-5)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 32 + 2 + 4 * (
            (32 + 96) + (32 + 32) + 2 * (32 + 128)
        )


class TestMiCA:
    def test_only_a_trains_and_b_holds_the_last_left_singular_vectors(self, tiny_bert: Path) -> None:
        backbone = on(tiny_bert)
        method = LoRA(rank=4, initialization="mica", targets="all")
        matrices = block_matrices(tiny_bert)
        assert method.added_parameters(backbone.model, backbone.layout) == sum(4 * columns for _, columns in matrices)
        stored = sum(4 * (rows + columns) for rows, columns in matrices)
        assert method.stored_parameters(backbone.model, backbone.layout) == stored
        model: Any = train(method.attach(backbone, 10))
        trained = [name for name in trained_parameters(model) if ".modules_to_save." not in name]
        assert trained
        assert all(".lora_A." in name for name in trained)
        layer = model.base_model.model.bert.encoder.layer[0].output.dense
        left, _, _ = torch.linalg.svd(layer.base_layer.weight.double(), full_matrices=False)
        assert torch.allclose(
            (left[:, -4:].T @ layer.lora_B.default.weight.double()).abs(), torch.eye(4).double(), atol=1e-5
        )

    def test_a_resumed_run_gets_the_matrices_of_the_one_that_began(self, tiny_bert: Path) -> None:
        method = LoRA(rank=2, initialization="mica", targets="query")
        begun, resumed = (method.attach(on(tiny_bert), 10) for _ in range(2))
        for name, parameter in begun.named_parameters():
            if ".lora_B." in name:
                parameter.data.neg_()  # singular vectors are known up to their sign
        method.load_state(resumed, method.state(begun))
        theirs = dict(begun.named_parameters())
        assert all(torch.equal(p, theirs[name]) for name, p in resumed.named_parameters() if ".lora_B." in name)


class TestEmbeddings:
    @pytest.mark.parametrize(
        "method", [LoRA(rank=4), LoRA(rank=4, variant="dora"), LoRA(rank=4, initialization="mica")], ids=str
    )
    def test_word_embeddings(self, tiny_bert: Path, tmp_path: Path, method: LoRA) -> None:
        method = method.model_copy(update={"targets": "query+word_embeddings"})
        model = train(method.attach(on(tiny_bert), 10))
        method.save(model, tmp_path)
        torch.manual_seed(9)
        assert torch.equal(logits(method.load(on(tiny_bert), tmp_path)), logits(model))


class TestLoRAPlus:
    def rates(self, groups: list[dict[str, Any]], model: nn.Module) -> dict[str, float]:
        found = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        return {name: found[id(parameter)] for name, parameter in trained_parameters(model).items()}

    @pytest.mark.parametrize("variant", ["plain", "rslora"])
    def test_rates_are_those_of_peft(self, tiny_llama: Path, variant: Any) -> None:
        from peft.optimizers import create_loraplus_optimizer
        from transformers import LlamaForCausalLM

        from peftkit.config import TrainingSettings
        from peftkit.training.optimizer import make_optimizer

        method = LoRA(rank=2, variant=variant, b_learning_rate_factor=16.0)
        model: Any = peftkit.api.attach(LlamaForCausalLM.from_pretrained(tiny_llama), method)
        theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=16.0)
        ours = make_optimizer(model, TrainingSettings(learning_rate=2e-3, epochs=1), method)
        expected = self.rates(theirs.param_groups, model)
        assert self.rates(ours.param_groups, model) == pytest.approx(expected)
        assert set(expected.values()) == {2e-3, 16 * 2e-3}

    def test_the_head_and_the_lengths_learn_at_the_common_rate(self, tiny_bert: Path) -> None:
        from peftkit.config import TrainingSettings
        from peftkit.training.optimizer import make_optimizer

        method = LoRA(rank=2, variant="dora", b_learning_rate_factor=16.0)
        model = method.attach(on(tiny_bert), 10)
        optimizer = make_optimizer(model, TrainingSettings(learning_rate=1e-3, epochs=1), method)
        rates = self.rates(optimizer.param_groups, model)
        assert {name for name, rate in rates.items() if rate != 1e-3} == {n for n in rates if ".lora_B." in n}
        assert {rates[name] for name in rates if ".lora_B." in name} == {16e-3}
        assert LoRA().learning_rate_factor("x.lora_B.default.weight") == 1

    def test_the_first_step_moves_b_by_its_rate(self, tiny_bert: Path) -> None:
        """Adam's first step is the learning rate, in the direction of the gradient's sign."""
        from peftkit.config import TrainingSettings
        from peftkit.training.optimizer import make_optimizer

        method = LoRA(rank=2, b_learning_rate_factor=16.0, targets="query")
        model = method.attach(on(tiny_bert), 10)
        optimizer = make_optimizer(model, TrainingSettings(learning_rate=1e-3, epochs=1, weight_decay=0.0), method)
        loss_of(model.train()).backward()
        optimizer.step()
        moved = {name: p.detach().abs().max() for name, p in model.named_parameters() if ".lora_B." in name}
        assert moved
        assert all(float(one) == pytest.approx(16e-3, rel=1e-2) for one in moved.values())


CELLS = [
    ("plain", "default"),
    ("rslora", "default"),
    ("dora", "default"),
    ("rslora_dora", "default"),
    ("plain", "orthogonal"),
    ("plain", "pissa"),
    ("plain", "pissa_niter_4"),
    ("plain", "olora"),
    ("rslora", "pissa"),
    ("dora", "pissa"),
    ("rslora", "olora"),
    ("dora", "olora"),
    ("rslora_dora", "pissa"),
    ("plain", "mica"),
    ("rslora", "mica"),
]
FRESH = """
import json, sys, torch, transformers, warnings
from pathlib import Path
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
from peft import PeftModel
from peftkit.backbones.load import BackboneSettings, Head, load
from peftkit.methods import LoRA
transformers.logging.set_verbosity_error()
found = {}
for cell in json.load(sys.stdin):
    ids = torch.tensor(cell["ids"])
    def run(model):
        with torch.no_grad():
            one = [model.eval()(input_ids=row[None], attention_mask=torch.ones_like(row[None])).logits for row in ids]
            return torch.cat(one).tolist()
    torch.manual_seed(123)
    auto = getattr(transformers, cell["model_class"])
    plain = PeftModel.from_pretrained(auto.from_pretrained(cell["base"], num_labels=2), cell["folder"])
    backbone = load(BackboneSettings(name=cell["base"]), Head(cell["model_class"], ("a", "b")))
    own = LoRA.model_validate(cell["method"]).load(backbone, Path(cell["folder"]))
    assert not any(p.requires_grad for p in own.parameters())
    found[cell["folder"]] = {"plain": run(plain), "own": run(own)}
print(json.dumps(found))
"""


@dataclass
class Cell:
    model: nn.Module
    method: LoRA
    folder: Path
    base: Path
    model_class: str
    fresh: dict[str, Any]


@pytest.fixture(scope="module")
def saved(
    tiny_bert: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, str, str], Cell]:
    """Trained adapters and what a fresh process computes with each of them."""
    root = tmp_path_factory.mktemp("adapters")
    cells = {}
    for base_name, model_class in MODELS:
        base = {"tiny_bert": tiny_bert, "tiny_llama": tiny_llama}[base_name]
        for variant, initialization in CELLS:
            method = LoRA(rank=4, alpha=6, variant=variant, initialization=initialization)  # type: ignore[arg-type]
            model = train(method.attach(on(base, model_class), 10))
            folder = root / f"{base_name}-{model_class}-{variant}-{initialization}"
            folder.mkdir()
            method.save(model, folder)
            cells[base_name, model_class, variant, initialization] = Cell(model, method, folder, base, model_class, {})
    asked = [
        {"ids": IDS.tolist(), "folder": str(c.folder), "base": str(c.base), "model_class": c.model_class}
        | {"method": c.method.model_dump()}
        for c in cells.values()
    ]
    done = subprocess.run(
        [sys.executable, "-c", FRESH], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    fresh = json.loads(done.stdout)
    for cell in cells.values():
        cell.fresh = fresh[str(cell.folder)]
    return cells


@pytest.mark.parametrize(("base", "model_class"), MODELS)
@pytest.mark.parametrize(("variant", "initialization"), CELLS)
class TestSaved:
    def test_fresh_process_computes_the_same(
        self, saved: dict[Any, Cell], base: str, model_class: str, variant: str, initialization: str
    ) -> None:
        cell = saved[base, model_class, variant, initialization]
        expected = logits(cell.model)
        assert close(torch.tensor(cell.fresh["plain"]), expected, 1e-6)
        assert close(torch.tensor(cell.fresh["own"]), expected, 1e-6)
        assert not close(logits(on(cell.base, model_class).model), expected, 1e-2)  # training did something

    def test_file_holds_what_is_counted(
        self, saved: dict[Any, Cell], base: str, model_class: str, variant: str, initialization: str
    ) -> None:
        cell = saved[base, model_class, variant, initialization]
        tensors = load_file(cell.folder / "adapter_model.safetensors")
        rank = 8 if initialization.startswith(("pissa", "olora")) else 4
        added = sum(rank * (r + c) + r * ("dora" in variant) for r, c in block_matrices(cell.base))
        found = {name: t.numel() for name, t in tensors.items()}
        assert sum(n for name, n in found.items() if "lora_" in name) == added
        backbone = on(cell.base, model_class)
        assert cell.method.stored_parameters(backbone.model, backbone.layout) == added
        assert all("lora_" in name or ".classifier." in name or ".score." in name for name in found)
        config = json.loads((cell.folder / "adapter_config.json").read_text())
        assert config["inference_mode"] is True
        assert config["r"] == rank

    def test_merged_is_plain_and_computes_the_same(
        self, saved: dict[Any, Cell], base: str, model_class: str, variant: str, initialization: str
    ) -> None:
        cell = saved[base, model_class, variant, initialization]
        merged = cell.method.merge(copy.deepcopy(cell.model))
        assert type(merged) is type(on(cell.base, model_class).model)
        assert not any(type(m).__module__.startswith("peft") for m in merged.modules())
        assert set(merged.state_dict()) == set(on(cell.base, model_class).model.state_dict())
        assert close(logits(merged), logits(cell.model), 1e-5)


class TestFullAndHead:
    @pytest.mark.parametrize("method", [Full(), HeadOnly()], ids=lambda one: one.kind)
    def test_round_trip_and_merge(self, place: tuple[Path, str], method: Method, tmp_path: Path) -> None:
        model = train(method.attach(on(*place), 10))
        method.save(model, tmp_path)
        torch.manual_seed(9)
        loaded = method.load(on(*place), tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        assert not any(p.requires_grad for p in loaded.parameters())
        assert method.merge(model) is model

    def test_full_is_a_transformers_model(self, tiny_bert: Path, tmp_path: Path) -> None:
        model = train(Full().attach(on(tiny_bert), 10))
        Full().save(model, tmp_path)
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(logits(plain), logits(model))
        assert plain.config.id2label == {0: "a", 1: "b"}

    def test_full_in_shards(self, tiny_bert: Path, tmp_path: Path) -> None:
        model: Any = train(Full().attach(on(tiny_bert), 10))
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        assert torch.equal(logits(Full().load(on(tiny_bert), tmp_path)), logits(model))

    def test_head_file_of_another_model_is_refused(self, tiny_bert: Path, tmp_path: Path) -> None:
        from peftkit.errors import ArtifactError

        HeadOnly().save(HeadOnly().attach(on(tiny_bert, labels=3), 1), tmp_path)
        with pytest.raises(ArtifactError, match=r"classifier\.\w+' has shape \(3,"):
            HeadOnly().load(on(tiny_bert, labels=2), tmp_path)


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
@pytest.mark.parametrize("method", [LoRA(rank=2), Full(), HeadOnly()], ids=lambda one: one.kind)
def test_file_modes_follow_the_umask(tiny_bert: Path, tmp_path: Path, method: Method) -> None:
    method.save(method.attach(on(tiny_bert), 1), tmp_path)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert set(modes.values()) == {0o640}, modes


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 33}, r"rank 33 exceeds 'bert\.encoder\.layer\.0\.attention\.self\.query', which is 32 × 32"),
            ({"targets": "querry"}, r"target 'querry' matches no module .*'query'"),
            ({"targets": ("query", "qkv_proj")}, r"target 'qkv_proj' matches no module"),
            ({"targets": "query+gate"}, r"'gate': bert .* has no gate projection"),
            ({"targets": "all+classifier"}, r"target 'classifier' is in the head"),
            ({"targets": ()}, r"no targets"),
            ({"targets": "LayerNorm"}, r"target 'LayerNorm' matches no module"),
            (
                {"targets": "query+word_embeddings", "initialization": "pissa"},
                r"initialization 'pissa' is for linear layers, and 'bert\.embeddings\.word_embeddings' is an embedding",
            ),
        ],
    )
    def test_lora_on_a_model(self, tiny_bert: Path, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(MethodError, match=message):
            LoRA(**settings).attach(on(tiny_bert), 10)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 3, "initialization": "orthogonal"}, "orthogonal initialization needs an even rank, not 3"),
            ({"initialization": "pisa"}, "'pisa' is not an initialization; it can be: default"),
            (
                {"initialization": "eva"},
                "'eva' is computed from batches of data, which a method does not see; use one of",
            ),
            ({"initialization": "corda"}, "'corda' is computed from batches of data"),
            ({"initialization": "lora_ga"}, "'lora_ga' is computed from batches of data"),
            ({"initialization": "loftq"}, "'loftq' quantises the backbone itself"),
            (
                {"initialization": "mica", "variant": "dora"},
                "mica keeps B fixed, which peft does not combine with DoRA",
            ),
            ({"initialization": "mica", "b_learning_rate_factor": 16}, "with initialization mica, B does not train"),
            ({"b_learning_rate_factor": 0}, "greater than 0"),
            ({"initialization": "pissa_niter_x"}, "'pissa_niter_x' is not an initialization"),
            ({"rank": 0}, "greater than 0"),
            ({"alpha": float("nan")}, "finite"),
            ({"dropout": 1.0}, "less than 1"),
            ({"ranks": 4}, "ranks"),
        ],
    )
    def test_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message) as caught:
            LoRA(**settings)
        assert caught.value.error_count() == 1

    def test_head_without_a_head(self, tiny_bert: Path) -> None:
        with pytest.raises(MethodError, match="method 'head' needs a model with a task head"):
            HeadOnly().attach(wrap(BertModel.from_pretrained(tiny_bert)), 10)

    def test_attaching_twice(self, tiny_bert: Path) -> None:
        model = peftkit.api.attach(on(tiny_bert).model, LoRA(rank=2))
        with pytest.raises(MethodError, match="has an adapter already"):
            peftkit.api.attach(model, LoRA(rank=2))

    def test_resuming_a_rewritten_base_needs_the_same_matrices(self, tiny_bert: Path) -> None:
        method = LoRA(rank=2, initialization="pissa", targets="query")
        model = method.attach(on(tiny_bert), 10)
        state = {name: tensor.clone() for name, tensor in method.state(model).items()}
        method.load_state(train(model), state)
        next(iter(state.values())).add_(1e-7)
        with pytest.raises(MethodError, match=r"'pissa' gave other initial matrices .*lora_[AB]"):
            method.load_state(model, state)


def edited_copy(source: Path, target: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


class TestCheckpoints:
    def without_pooler(self, tiny_bert: Path, tmp_path: Path) -> Path:
        shutil.copytree(tiny_bert, tmp_path / "no_pooler")
        BertModel.from_pretrained(tiny_bert, add_pooling_layer=False).save_pretrained(tmp_path / "no_pooler")
        return tmp_path / "no_pooler"

    @pytest.mark.parametrize("method", [LoRA(rank=4), HeadOnly()], ids=lambda one: one.kind)
    def test_a_fresh_pooler_is_trained_and_saved(self, tiny_bert: Path, tmp_path: Path, method: Method) -> None:
        folder, out = self.without_pooler(tiny_bert, tmp_path), tmp_path / "out"
        out.mkdir()
        backbone = on(folder)
        assert backbone.head_modules == ("classifier", "bert.pooler")
        model = method.attach(backbone, 10)
        assert sum("pooler" in name for name in trained_parameters(model)) == 2
        train(model)
        method.save(model, out)
        torch.manual_seed(99)
        other = load(BackboneSettings(name=str(folder)), Head(SEQUENCE, ("a", "b")))
        assert torch.equal(logits(method.load(other, out)), logits(model))

    def test_a_token_classifier_needs_no_pooler(self, tiny_bert: Path, tmp_path: Path) -> None:
        assert on(self.without_pooler(tiny_bert, tmp_path), TOKEN).head_modules == ("classifier",)

    def test_a_missing_block_weight_is_named(self, tiny_bert: Path, tmp_path: Path) -> None:
        name = "encoder.layer.1.attention.self.key.weight"
        folder = edited_copy(tiny_bert, tmp_path / "x", lambda tensors: tensors.pop(name))
        with pytest.raises(BackboneError, match=rf"lacks 'bert\.{name}'"):
            on(folder)

    def test_a_block_weight_of_another_shape_is_named(self, tiny_bert: Path, tmp_path: Path) -> None:
        name = "encoder.layer.0.output.dense.weight"
        folder = edited_copy(tiny_bert, tmp_path / "x", lambda tensors: tensors.update({name: torch.zeros(32, 60)}))
        with pytest.raises(BackboneError, match=rf"'bert\.{name}'"):
            on(folder)

    def test_another_number_of_labels_gets_a_new_head(self, tiny_bert: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_bert, tmp_path / "three")
        BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=3).save_pretrained(tmp_path / "three")
        backbone: Any = on(tmp_path / "three", labels=2)
        assert backbone.model.classifier.out_features == 2
        assert backbone.model.config.id2label == {0: "a", 1: "b"}
        assert backbone.head_modules == ("classifier",)
        assert logits(train(LoRA(rank=2).attach(backbone, 3))).shape == (2, 2)

    def test_no_weights(self, tiny_bert: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_bert, tmp_path / "x")
        (folder / "model.safetensors").unlink()
        with pytest.raises(BackboneError, match=r"no weights in .*; it needs model\.safetensors"):
            on(folder)
        torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
        with pytest.raises(BackboneError, match=r"pytorch_model\.bin is a pickle, which can run code"):
            on(folder)

    @pytest.mark.parametrize("kept", [0, 4, 100, 20_000])
    def test_truncated_weights(self, tiny_bert: Path, tmp_path: Path, kept: int) -> None:
        folder = shutil.copytree(tiny_bert, tmp_path / "x")
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        one_clear_line(folder, r"cannot load .*x as AutoModelForSequenceClassification: .+")

    def test_garbage_for_weights(self, tiny_bert: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_bert, tmp_path / "x")
        (folder / "model.safetensors").write_bytes(b"not safetensors at all" * 9)
        one_clear_line(folder, r"cannot load .*x as AutoModelForSequenceClassification: .+")

    def test_config_missing_or_broken(self, tiny_bert: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_bert, tmp_path / "x")
        (folder / "config.json").write_text('{"model_type": "bert",')
        one_clear_line(folder, r"config\.json is not a configuration transformers knows: .+")
        (folder / "config.json").unlink()
        one_clear_line(folder, r"x has no config\.json; name the folder that holds the model")

    def test_no_tokenizer(self, tiny_bert: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_bert, tmp_path / "x")
        for file in folder.glob("*token*"):
            file.unlink()
        (folder / "vocab.txt").unlink()
        one_clear_line(folder, r"the tokenizer in .*x has no vocabulary; add tokenizer\.json")

    @pytest.mark.parametrize("model_type", ["bert", "strange"])
    def test_code_that_comes_with_a_model_never_runs(self, tiny_bert: Path, tmp_path: Path, model_type: str) -> None:
        folder = shutil.copytree(tiny_bert, tmp_path / "x")
        ran = tmp_path / "ran"
        (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
        config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
        config["auto_map"] = {"AutoConfig": "evil.Config", SEQUENCE: "evil.Model"}
        (folder / "config.json").write_text(json.dumps(config))
        if model_type == "bert":  # transformers' own class serves; every weight it needs is there
            assert isinstance(on(folder).model, BertForSequenceClassification)
        else:
            one_clear_line(folder, r"not a configuration transformers knows: .*custom code")
        assert not ran.exists()


def one_clear_line(folder: Path, message: str) -> None:
    with pytest.raises(BackboneError, match=message) as caught:
        on(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400, str(caught.value)


class TestPadding:
    @pytest.mark.parametrize("pad_in_config", [None, 5])
    def test_a_tokenizer_without_padding_token(
        self, tiny_llama: Path, tmp_path: Path, pad_in_config: int | None
    ) -> None:
        folder = shutil.copytree(tiny_llama, tmp_path / "x")
        config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": pad_in_config}
        (folder / "config.json").write_text(json.dumps(config))
        backbone: Any = on(folder)
        assert backbone.tokenizer.pad_token_id == backbone.tokenizer.eos_token_id == 1
        model = LoRA(rank=2).attach(backbone, 1).eval()
        texts = ["good film", "the very dark story was sad .", "a"]
        from peftkit.data.collate import collate

        examples = [{"input_ids": ids} for ids in backbone.tokenizer(texts)["input_ids"]]
        with torch.no_grad():
            together = model(**collate(examples, 1)).logits
            alone = torch.cat([model(**collate([one], 1)).logits for one in examples])
            by_hand = torch.cat(  # the score of the last token of each, without anything that could be padding
                [
                    backbone.model.score(backbone.model.model(torch.tensor([e["input_ids"]])).last_hidden_state[:, -1])
                    for e in examples
                ]
            )
        assert torch.allclose(together, alone, atol=1e-6)
        assert torch.allclose(together, by_hand, atol=1e-6)

    def test_neither_padding_nor_end_token(self, tiny_llama: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_llama, tmp_path / "x")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("eos_token")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
        one_clear_line(folder, "neither a padding nor an end token")


@pytest.mark.parametrize("method", [LoRA(rank=4), LoRA(rank=4, variant="dora", targets="attention")], ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(place: tuple[Path, str], method: LoRA) -> None:
    found = []
    for checkpointing in (False, True):
        model: Any = train(method.attach(on(*place), 10), steps=1)
        if checkpointing:
            # its name from transformers 5.23 on, and before
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        loss_of(model.train()).backward()
        found.append({name: p.grad for name, p in trained_parameters(model).items()})
    without, with_ = found
    assert without.keys() == with_.keys()
    for name, gradient in without.items():
        assert gradient.abs().sum() > 0, name
        assert close(with_[name], gradient, 1e-6), name
