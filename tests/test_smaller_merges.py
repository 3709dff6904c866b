"""Merged models that are less than the run: packed by bitsandbytes, or without their top blocks. Each beside what plain
transformers and bitsandbytes make of the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import CAUSAL, SEQUENCE, TASKS, Place, logits_of, save_checkpoint
from bitsandbytes import functional
from merging import LABELS, llama, made, rows
from safetensors.torch import load_file, save_file

from peftkit.artifacts import requantize
from peftkit.artifacts.fewer_blocks import check_blocks, drop_blocks
from peftkit.artifacts.merge import merge, write_merged
from peftkit.artifacts.settings import MergeSettings
from peftkit.artifacts.store import load_run
from peftkit.backbones.layouts import layout_for
from peftkit.cli import main
from peftkit.errors import ArtifactError, UsageError

LAYER = "model.layers.0.mlp.down_proj"
LOOPED = {"albert": "more than once", "t5": "has 2", "bart": "has 2"}
"""Architectures that have no plain list of blocks, and what is said of it."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("smaller")
    untied, tied = (llama(root / name, tied=name == "tied") for name in ("untied", "tied"))
    cells = {"classes": (untied, "classes"), "text": (tied, "text"), "bert": (tiny_bert, "classes")}
    return {name: made(backbone, task, "lora", root / f"{name}_run") for name, (backbone, task) in cells.items()}


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("smaller_rows") / "probe.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows("classes", 40).records))
    return file


@pytest.fixture(scope="module")
def whole(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a merge writes of these runs when it leaves everything as it is."""
    root = tmp_path_factory.mktemp("whole")
    for name in ("classes", "bert"):
        merge(load_run(runs[name]), root / name, rows("classes"))
    return {name: root / name for name in ("classes", "bert")}


def accuracy(folder: Path, probe: Path) -> float:
    """By plain transformers, one text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    records = [json.loads(line) for line in probe.read_text().splitlines()]
    with torch.no_grad():
        found = [int(model(**tokenizer(one["text"], return_tensors="pt")).logits.argmax()) for one in records]
    return sum(LABELS[one] == record["label"] for one, record in zip(found, records, strict=True)) / len(records)


# --- packed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_packed_weights_are_those_that_bitsandbytes_makes_of_the_merged_ones(
    kind: str, runs: dict[str, Path], whole: dict[str, Path], probe: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(runs["classes"]), str(out), "--data", str(probe), "--quantize", kind]) == 0
    plain, packed = (load_file(folder / "model.safetensors") for folder in (whole["classes"], out))
    weight, codes = plain[f"{LAYER}.weight"], packed[f"{LAYER}.weight"]
    if kind == "int8":
        scales = weight.abs().amax(1, keepdim=True)
        assert (codes * packed[f"{LAYER}.SCB"][:, None] / 127 - weight).abs().max() <= (scales * 0.6 / 127).max()
    else:
        wanted, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=kind)
        assert torch.equal(codes, wanted) and torch.equal(packed[f"{LAYER}.weight.absmax"], state.absmax)
    for name in ("score.weight", "model.embed_tokens.weight", "model.norm.weight", f"{LAYER}.bias"):
        assert torch.equal(packed[name], plain[name]), name
    report = json.loads((out / "peftkit_merge.json").read_text())
    assert report["bytes"] == (out / "model.safetensors").stat().st_size
    assert report["whole_bytes"] == sum(4 * one.numel() for one in plain.values())
    assert report["score"]["before"] == accuracy(whole["classes"], probe)
    assert report["score"]["after"] == accuracy(out, probe)
    assert report["settings"]["packing"].startswith(kind) and not report["settings"]["limited"]
    told = capsys.readouterr().out
    assert f"packed in {kind}" in told and "measured, and not limited" in told and "accuracy" in told
    assert f"{report['bytes'] / 2**20:,.1f} MiB" in told


def test_packed_models_that_write_have_their_output_whole(runs: dict[str, Path], tmp_path: Path) -> None:
    settings = MergeSettings(dtype="bfloat16", pack="nf4")
    report = merge(load_run(runs["text"]), tmp_path / "out", rows("text"), settings)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.bfloat16
    assert type(model.get_submodule(LAYER)).__name__ == "Linear4bit"
    assert report.score and report.score["name"] == "loss" and report.relative > 0


def test_a_code_that_changed_on_the_disk_is_caught(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 4,096, which no logit would tell from what packing costs."""

    def faulty(merged: Any, saved: Any, folder: Path, settings: MergeSettings) -> Any:
        expected = write_merged(merged, saved, folder, settings)
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{LAYER}.weight"][0] ^= 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return expected

    monkeypatch.setattr("peftkit.artifacts.merge.write_merged", faulty)
    with pytest.raises(ArtifactError, match=rf"cast once or packed, such as '{LAYER}.weight'"):
        merge(load_run(runs["classes"]), tmp_path / "out", rows("classes"), MergeSettings(pack="nf4"))
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_is_packed_too_is_caught(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = requantize._how
    monkeypatch.setattr(requantize, "_how", lambda settings, kept: how(settings, ["nothing"]))
    with pytest.raises(ArtifactError, match=r"packs 'score\.weight' in another way"):
        merge(load_run(runs["classes"]), tmp_path / "out", rows("classes"), MergeSettings(pack="nf4"))
    assert list(tmp_path.iterdir()) == []


def test_codes_that_are_not_those_of_the_weights_are_caught(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where something was computed before they are saved, for which bitsandbytes puts them in another order."""
    refuse = requantize._refuse_other

    def reordered(model: Any, loaded: Any, packed: Any, settings: Any) -> None:
        layer = loaded.get_submodule(LAYER)
        layer.weight.data = layer.weight.data.flip(0)
        refuse(model, loaded, packed, settings)

    monkeypatch.setattr(requantize, "_refuse_other", reordered)
    with pytest.raises(ArtifactError, match=f"packs '{LAYER}.weight' in another way"):
        merge(load_run(runs["classes"]), tmp_path / "out", rows("classes"), MergeSettings(pack="fp4"))


# --- without top blocks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["classes", "bert"])
def test_the_rest_computes_what_transformers_makes_of_fewer_layers(
    name: str, runs: dict[str, Path], whole: dict[str, Path], probe: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(runs[name]), str(out), "--data", str(probe), "--drop-layers", "1"]) == 0
    fewer = transformers.AutoModelForSequenceClassification.from_pretrained(whole[name], num_hidden_layers=1).eval()
    found = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert found.config.num_hidden_layers == 1
    assert not any(".1." in one for one in load_file(out / "model.safetensors"))
    ids = torch.tensor([[2, 9, 8, 7, 3]])
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=ids).logits, fewer(input_ids=ids).logits, rtol=0, atol=1e-6)
    report = json.loads((out / "peftkit_merge.json").read_text())
    assert report["score"]["before"] == accuracy(whole[name], probe)
    assert report["score"]["after"] == accuracy(out, probe)
    assert "the top block left out" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", TASKS)
def test_blocks_are_left_out_of_every_architecture_that_has_a_list_of_them(architecture: str, tmp_path: Path) -> None:
    model_class = CAUSAL if CAUSAL in TASKS[architecture] else SEQUENCE
    folder = save_checkpoint(Place(architecture, model_class), tmp_path)
    auto: Any = getattr(transformers, model_class)
    model = auto.from_pretrained(folder).eval()
    layout = layout_for(architecture, model)
    if architecture in LOOPED:
        with pytest.raises(UsageError, match=LOOPED[architecture]):
            check_blocks(model, layout, 1)
        return
    drop_blocks(model, layout, 1)
    model.save_pretrained(tmp_path / "fewer")
    before = auto.from_pretrained(folder, **{layers_of(model): 1}).eval()
    after, info = auto.from_pretrained(tmp_path / "fewer", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        wanted = logits_of(before, model_class)
        assert torch.equal(logits_of(model, model_class), wanted)
        assert torch.equal(logits_of(after.eval(), model_class), wanted)
        assert not torch.equal(logits_of(auto.from_pretrained(folder).eval(), model_class), wanted)


def layers_of(model: Any) -> str:
    """What the number of blocks is called in a configuration."""
    return str(model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers"))


def test_packed_and_shorter_at_once_with_a_card(
    small_run: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = small_run("sentiment"), tmp_path / "out"
    settings = MergeSettings(dtype="bfloat16", pack="int8", drop_layers=1)
    report = merge(load_run(run), out, rows("classes"), settings)
    assert report.bytes < report.whole_bytes
    assert main(["card", str(run), "--merged", str(out)]) == 0
    text = capsys.readouterr().out
    assert "linear layers of the blocks packed in int8 and the top block left out" in text
    assert "measured, and not limited" in text and " allowed)" not in text
    assert f"{report.bytes / 2**20:,.1f} MiB" in text


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "options", "said"),
    [
        ("classes", ["--drop-layers", "2"], "the model has 2 blocks, of which one at least has to stay"),
        ("classes", ["--drop-layers", "0"], "--drop-layers"),
        ("bert", ["--quantize", "nf4"], "do not fit the 32 inputs of 'bert.encoder.layer.0.attention.self.query'"),
        ("classes", ["--quantize", "int4"], "int4"),
        ("classes", ["--quantize", "nf4", "--streaming"], "--quantize packs a whole model"),
        ("classes", ["--drop-layers", "1", "--streaming"], "--drop-layers shortens a whole model"),
        ("classes", ["--quantize", "nf4", "--requantize"], "leave one out"),
    ],
)
def test_what_cannot_be_is_refused(
    run: str, options: list[str], said: str, runs: dict[str, Path], probe: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["merge", str(runs[run]), str(tmp_path / "out"), "--data", str(probe), *options]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_methods_that_do_not_merge_are_not_shortened(
    small_run: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(small_run("prefix")), str(tmp_path / "out"), "--drop-layers", "1"]) == 1
    assert "bundle" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
