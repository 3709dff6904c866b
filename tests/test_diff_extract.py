"""Two runs side by side, and adapters from full fine-tunings, beside numpy and plain peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import save_word_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from test_combine import _deltas, _train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peftkit.artifacts.diff import diff
from peftkit.artifacts.extract import extract
from peftkit.cli import main
from peftkit.errors import UsageError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, toy_data: Path) -> Path:
    root = tmp_path_factory.mktemp("pair")
    for name, method in {
        "lora": {"kind": "lora", "rank": 4},
        "dora": {"kind": "lora", "rank": 2, "variant": "dora"},
    }.items():
        _train(root / name, tiny_bert, toy_data, method, 3)
    _train(root / "full", tiny_bert, toy_data, {"kind": "full"}, 3)
    return root


def test_diff_tells_norms_angles_heads_and_settings(
    runs: Path, tiny_bert: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report = diff(runs / "lora", runs / "dora")
    ours, theirs = (_deltas(runs / name, tiny_bert) for name in ("lora", "dora"))
    assert {pair.name for pair in report.parameters} == ours.keys() | theirs.keys()
    for pair in report.parameters:
        one, other = ours[pair.name].flatten().numpy(), theirs[pair.name].flatten().numpy()
        assert pair.norms == pytest.approx((numpy.linalg.norm(one), numpy.linalg.norm(other)), rel=1e-6)
        assert pair.cosine == pytest.approx(one @ other / numpy.linalg.norm(one) / numpy.linalg.norm(other), abs=1e-6)
    assert report.whole.norms[0] == pytest.approx(sum(float((one**2).sum()) for one in ours.values()) ** 0.5, rel=1e-6)
    assert report.heads == "other values of classifier.weight"
    assert report.settings == {"method.rank": (4, 2), "method.variant": ("plain", "dora")}
    itself = diff(runs / "lora", Path(str(runs / "lora") + "/../full"))
    assert itself.settings.keys() >= {"method.kind"}
    assert any(pair.cosine is None and pair.norms[0] == 0 for pair in itself.parameters)
    capfd.readouterr()
    assert main(["diff", str(runs / "lora"), str(runs / "dora"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["settings"]["method.rank"] == [4, 2]
    assert main(["diff", str(runs / "lora"), str(runs / "dora")]) == 0
    told = capfd.readouterr().out
    assert "settings  method.rank: 4 and 2" in told and "scores    accuracy:" in told
    assert main(["diff", str(runs / "lora"), str(runs / "lora")]) == 2


def _loaded_by_peft(base: Path, adapter: Path) -> Any:
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    return PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload().eval()


@pytest.mark.parametrize("rank", [3, 32])
def test_an_extracted_adapter_is_the_nearest_of_its_rank(
    rank: int, runs: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    report = extract(str(tiny_bert), str(runs / "full" / "model"), tmp_path / "out", rank)
    exact = _deltas(runs / "full", tiny_bert)
    tuned = AutoModelForSequenceClassification.from_pretrained(runs / "full" / "model").eval()
    found = dict(_loaded_by_peft(tiny_bert, tmp_path / "out").named_parameters())
    base = {f"bert.{name}": one for name, one in load_file(tiny_bert / "model.safetensors").items()}
    lost = total = 0.0
    for name, parameter in tuned.named_parameters():
        if name not in exact:
            assert torch.equal(found[name], parameter), name
            continue
        off = float((found[name].detach().double() - base[name].double() - exact[name]).norm())
        values = numpy.linalg.svd(exact[name].numpy(), compute_uv=False) if exact[name].ndim == 2 else numpy.zeros(1)
        whole = exact[name].ndim == 2 and "embeddings" not in name
        assert off == pytest.approx(float(numpy.sqrt((values[rank:] ** 2).sum())) if whole else 0.0, rel=1e-3, abs=1e-6)
        lost, total = lost + off**2, total + float((exact[name] ** 2).sum())
    assert report.truncation == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-6)
    assert {"classifier", "bert.embeddings.LayerNorm", "bert.embeddings.word_embeddings"} <= set(report.kept)
    assert report.left_out == ()
    if rank == 32:
        batch = {"input_ids": torch.arange(5, 25).view(2, 10)}
        with torch.no_grad():
            assert torch.allclose(
                _loaded_by_peft(tiny_bert, tmp_path / "out")(**batch).logits, tuned(**batch).logits, atol=1e-5
            )


def test_a_finished_run_is_a_tuned_model_too(runs: Path, tiny_bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["extract", str(tiny_bert), str(runs / "dora"), str(out), "--rank", "32"]) == 0
    assert json.loads((out / "extraction.json").read_text())["truncation"] <= 1e-6
    found = dict(_loaded_by_peft(tiny_bert, out).named_parameters())
    base = {f"bert.{name}": one.double() for name, one in load_file(tiny_bert / "model.safetensors").items()}
    for name, change in _deltas(runs / "dora", tiny_bert).items():
        assert (found[name].detach().double() - base[name] - change).abs().max() <= 2e-6


def test_tied_embeddings_are_refused_or_left_out_aloud(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = LlamaConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    model = LlamaForCausalLM(settings)
    folders = {name: tmp_path / name for name in ("base", "tuned")}
    model.save_pretrained(folders["base"])
    save_word_tokenizer(folders["base"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(folders["tuned"])
    with pytest.raises(UsageError, match=r"model.embed_tokens.weight .embeddings that are tied.*--leave-out"):
        extract(str(folders["base"]), str(folders["tuned"]), tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
    report = extract(str(folders["base"]), str(folders["tuned"]), tmp_path / "out", 2, leave_out=True)
    assert report.left_out == ("model.embed_tokens.weight",)
    assert report.truncated["model.embed_tokens.weight"] == pytest.approx(1)
    plain = AutoModelForCausalLM.from_pretrained(folders["base"])
    merged = PeftModel.from_pretrained(plain, str(tmp_path / "out")).merge_and_unload()
    assert torch.equal(merged.model.norm.weight, model.model.norm.weight)


def test_models_that_cannot_be_compared_are_refused(
    runs: Path, tiny_bert: Path, tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    full = str(runs / "full" / "model")
    larger = AutoModelForSequenceClassification.from_pretrained(full)
    larger.resize_token_embeddings(60, mean_resizing=False)
    larger.save_pretrained(tmp_path / "larger")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "larger")
    refused = {
        "is no model of a task": (str(tiny_bert), str(tiny_bert)),
        "have the same weights": (str(tiny_llama), str(tiny_llama)),
        "where the backbone has": (str(tiny_bert), str(tmp_path / "larger")),
        "no folder": (str(tiny_bert), str(tmp_path / "nowhere")),
    }
    for message, (base, tuned) in refused.items():
        assert main(["extract", base, tuned, str(tmp_path / "out"), "--rank", "2"]) == 2
        assert message in capfd.readouterr().err
    assert main(["extract", str(tiny_bert), full, str(runs / "full" / "model" / "x"), "--rank", "2"]) == 2
    assert not (tmp_path / "out").exists()
