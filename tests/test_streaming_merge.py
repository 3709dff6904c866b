"""Merges tensor by tensor: the bytes of a merge in memory, going on where one was stopped, and their proof."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, save_word_tokenizer
from merging import METHODS, llama, made, rows
from safetensors.torch import load_file, save_file

from peftkit.artifacts import streamed, streaming
from peftkit.artifacts.checkpoints import Checkpoint, write_file
from peftkit.artifacts.merge import merge
from peftkit.artifacts.settings import MergeSettings
from peftkit.artifacts.store import load_run
from peftkit.artifacts.streamed import merge_streamed
from peftkit.cli import main
from peftkit.errors import ArtifactError, BackboneError, NotMergeable, UsageError

NF4, INT8 = ({"quantization": {"kind": kind}} for kind in ("nf4", "int8"))
SMALL = MergeSettings(shard_bytes=40_000)
LAYER = "model.layers.1.mlp.down_proj.weight"
CELLS: dict[str, tuple[str, str, str, dict[str, Any], MergeSettings]] = {
    "lora": ("untied", "text", "lora", {}, SMALL),
    "rsLoRA, tied, bfloat16 backbone": ("tied", "text", "rslora", {"dtype": "bfloat16"}, SMALL),
    "DoRA, new tokens and a head": ("bert", "relations", "dora", {}, MergeSettings()),
    "PiSSA in float64": ("untied", "classes", "pissa", {}, MergeSettings(precision="float64", dtype="bfloat16")),
    "LoRA with biases": ("tied", "text", "lora_bias", {}, MergeSettings(dtype="float16", shard_bytes=40_000)),
    "AdaLoRA on NF4": ("untied", "classes", "adalora", NF4, SMALL),
    "LoRA on int8": ("tied", "text", "lora", INT8, MergeSettings(dtype="float32")),
    "NF4 onto full precision": ("untied", "classes", "lora", NF4, MergeSettings(onto="full-precision")),
    "(IA)³": ("untied", "text", "ia3", {}, SMALL),
    "LoRA on transposed weights": ("gpt2", "text", "lora", {}, MergeSettings()),
    "T5, three tied matrices": ("t5", "target", "lora", {}, MergeSettings(dtype="float16", shard_bytes=40_000)),
    "BART, a buffer": ("bart", "target", "dora", {}, SMALL),
    "VeRA": ("untied", "text", "vera", {}, MergeSettings(dtype="bfloat16")),
    "full, new tokens": ("bert", "relations", "full", {}, SMALL),
    "full, tied": ("tied", "text", "full", {}, SMALL),
    "BitFit": ("untied", "text", "bitfit", {}, SMALL),
    "layernorm, new tokens": ("bert", "relations", "layernorm", {}, MergeSettings(dtype="float16")),
    "top layers": ("tied", "text", "top_layers", {}, MergeSettings(dtype="bfloat16")),
    "head": ("untied", "classes", "head", {"dtype": "bfloat16"}, SMALL),
    "word embeddings, untied": ("untied", "text", "embeddings", {}, SMALL),
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("streamed")
    found = {"bert": tiny_bert} | {name: llama(root / name, tied=name == "tied") for name in ("tied", "untied")}
    return found | {"gpt2": gpt2(root / "gpt2"), "t5": t5(root / "t5"), "bart": bart(root / "bart")}


def gpt2(folder: Path) -> Path:
    """A random GPT-2, whose weights are (in, out), whose output is tied, and whose checkpoint has no prefix."""
    from transformers import GPT2Config, GPT2Model

    folder.mkdir()
    save_word_tokenizer(folder)
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1}
    GPT2Model(GPT2Config(vocab_size=len(WORDS) + 2, **shape)).save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    """A random T5, which transformers holds in float32 in part where the rest is float16."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder.mkdir()
    save_word_tokenizer(folder)
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    special = {"decoder_start_token_id": 0, "pad_token_id": 1, "eos_token_id": 1}
    model: Any = T5ForConditionalGeneration(T5Config(vocab_size=len(WORDS) + 2, **shape, **special))
    model.save_pretrained(folder)
    return folder


def bart(folder: Path) -> Path:
    """A random BART, which has a buffer beside its parts."""
    from transformers import BartConfig, BartForConditionalGeneration

    folder.mkdir()
    save_word_tokenizer(folder)
    torch.manual_seed(0)
    shape: dict[str, int] = {"d_model": 32, "max_position_embeddings": 64}
    for side in ("encoder", "decoder"):
        shape |= {f"{side}_layers": 1, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 0}
    model: Any = BartForConditionalGeneration(BartConfig(vocab_size=len(WORDS) + 2, **shape, **special))
    model.generation_config.forced_eos_token_id = 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, backbones: dict[str, Path]) -> Path:
    return made(backbones["untied"], "text", "lora", tmp_path_factory.mktemp("streamed_run") / "run")


@pytest.fixture(autouse=True, scope="module")
def _embeddings() -> Any:
    METHODS["embeddings"] = METHODS["lora"] | {"targets": ["embed_tokens", "q_proj"]}
    yield
    del METHODS["embeddings"]


def held(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "peftkit_merge.json"}


@pytest.mark.parametrize("name", CELLS)
def test_the_bytes_are_those_of_a_merge_in_memory(name: str, backbones: dict[str, Path], tmp_path: Path) -> None:
    backbone, task, method, how, settings = CELLS[name]
    folder = made(backbones[backbone], task, method, tmp_path / "run", **how)
    report = merge_streamed(folder, tmp_path / "streamed", settings)
    merge(load_run(folder), tmp_path / "whole", rows(task, 2), settings)
    streamed_files, whole = held(tmp_path / "streamed"), held(tmp_path / "whole")
    assert streamed_files.keys() == whole.keys()
    assert [name for name in whole if whole[name] != streamed_files[name]] == []
    trains_in_place = method in ("full", "bitfit", "layernorm", "top_layers", "head")
    assert (report.layers == 0) == trains_in_place
    assert {one.name for one in tmp_path.iterdir()} == {"run", "streamed", "whole"}


def test_a_file_is_written_as_safetensors_writes_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float16, torch.bool, torch.float64)
    tensors = {f"{place}.ö{kind}": (torch.randn(3, place + 1) * 9).to(kind) for place, kind in enumerate(kinds)}
    tensors |= {"b": torch.ones(()), "a": torch.zeros(0, 4), "B": torch.ones(2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_file(tmp_path / "ours", shapes, lambda name: [tensors[name]])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    found = Checkpoint([tmp_path / "theirs"])
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())


def test_one_that_was_stopped_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def stopped(file: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        write_file(file, *rest)

    target = tmp_path / "out"
    monkeypatch.setattr(streaming, "write_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge_streamed(run, target, SMALL)
    assert not target.exists() and (tmp_path / ".out.streaming").is_dir()
    first = set(written)
    (tmp_path / ".out.streaming" / "model-00002-of-00009.safetensors").write_bytes(b"cut short")
    written.clear()

    def going_on(file: Path, *rest: Any) -> None:
        written.append(file.name)
        write_file(file, *rest)

    monkeypatch.setattr(streaming, "write_file", going_on)
    merge_streamed(run, target, SMALL)
    assert len(first) == 2 and len(first & set(written)) <= 1
    monkeypatch.undo()
    merge_streamed(run, tmp_path / "again", SMALL)
    assert held(target) == held(tmp_path / "again")
    assert {one.name for one in tmp_path.iterdir()} == {"out", "again"}


def test_what_was_stopped_of_another_merge_is_not_gone_on_with(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(streamed, "_proven", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge_streamed(run, tmp_path / "out", SMALL)
    monkeypatch.undo()
    merge_streamed(run, tmp_path / "out", MergeSettings(dtype="bfloat16"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def _scaled(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LAYER] *= 1.01


def _another_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] += 1e-6


def _left_out(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[LAYER]


@pytest.mark.parametrize(
    ("change", "message"),
    [(_scaled, "down_proj' of the merged model is not"), (_another_norm, "norm.weight' differs"), (_left_out, "whole")],
)
def test_a_fault_is_caught_layer_by_layer(
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def faulty(*arguments: Any) -> Path:
        working = streaming.write(*arguments)
        tensors = load_file(working / "model.safetensors")
        change(tensors)
        save_file(tensors, working / "model.safetensors", {"format": "pt"})
        return working

    monkeypatch.setattr(streamed, "write", faulty)
    with pytest.raises(ArtifactError, match=message):
        merge_streamed(run, tmp_path / "out", MergeSettings())
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit_is_streamed_unasked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "probe.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows("text").records))
    arguments = ["merge", str(run), str(tmp_path / "small"), "--data", str(file), "--dtype", "bfloat16"]
    assert main(arguments) == 0
    assert "streamed" not in capsys.readouterr().out
    monkeypatch.setattr(streamed, "available_bytes", lambda: 100_000)
    arguments[2] = str(tmp_path / "large")
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "streamed: 14 adapted layers compute the same after re-reading" in out
    assert "the whole model was not run: it does not fit into memory beside itself" in out
    assert held(tmp_path / "small") == held(tmp_path / "large")
    report = json.loads((tmp_path / "large" / "peftkit_merge.json").read_text())
    assert report["layers"] == 14 and 0 < report["layer_difference"] < 1e-2
    monkeypatch.undo()
    arguments[2] = str(tmp_path / "asked")
    assert main([*arguments, "--streaming"]) == 0
    out = capsys.readouterr().out
    assert "streamed: 14 adapted layers" in out and "12 of 12 predictions equal" in out


def test_methods_without_a_merged_form_say_why(backbones: dict[str, Path], tmp_path: Path) -> None:
    METHODS["bottleneck"] = {"kind": "bottleneck", "bottleneck_size": 4}
    try:
        folder = made(backbones["bert"], "classes", "bottleneck", tmp_path / "run")
    finally:
        del METHODS["bottleneck"]
    with pytest.raises(NotMergeable, match="nonlinearity"):
        merge_streamed(folder, tmp_path / "out", MergeSettings())
    assert not (tmp_path / "out").exists()


def test_what_is_merged_in_memory_alone_is_told(backbones: dict[str, Path], run: Path, tmp_path: Path) -> None:
    METHODS["norms"] = {"kind": "peft", "type": "ln_tuning"}
    try:
        folder = made(backbones["bert"], "classes", "norms", tmp_path / "run")
    finally:
        del METHODS["norms"]
    with pytest.raises(NotMergeable, match="--streaming: method 'ln_tuning' is merged in memory alone"):
        merge_streamed(folder, tmp_path / "out", MergeSettings())
    with pytest.raises(UsageError, match="is for runs over a quantised backbone"):
        merge_streamed(run, tmp_path / "out", MergeSettings(onto="full-precision"))
    packed = made(backbones["untied"], "classes", "lora", tmp_path / "packed", **NF4)
    with pytest.raises(UsageError, match="--requantize packs a whole model"):
        merge_streamed(packed, tmp_path / "out", MergeSettings(onto="requantized"))
    assert not (tmp_path / "out").exists()


def test_parts_of_fused_projections_are_merged_in_memory_alone(backbones: dict[str, Path], tmp_path: Path) -> None:
    METHODS["query"] = METHODS["lora"] | {"targets": "query"}
    try:
        folder = made(backbones["gpt2"], "text", "query", tmp_path / "run")
    finally:
        del METHODS["query"]
    with pytest.raises(NotMergeable, match="fused projection"):
        merge_streamed(folder, tmp_path / "out", MergeSettings())


def test_a_shard_of_the_backbone_that_is_missing_is_named(backbones: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded = Path(shutil.copytree(backbones["untied"], tmp_path / "sharded"))
    (sharded / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(backbones["untied"]).save_pretrained(sharded, max_shard_size=50_000)
    folder = made(sharded, "text", "lora", tmp_path / "run")
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(BackboneError, match=f"{lost.name} is missing"):
        merge_streamed(folder, tmp_path / "out", MergeSettings())
    with pytest.raises(BackboneError, match=f"{lost.name} is missing"):
        load_run(folder)
