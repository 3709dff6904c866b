"""A finished run as the backbone of another: its merged model, verified, with its tokenizer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import sentiment_rows, write_jsonl

from peftkit.artifacts.loading import merge_backbone
from peftkit.artifacts.store import load_run as load_saved
from peftkit.backbones.load import BackboneSettings, Head, load, load_tokenizer
from peftkit.backbones.runs import MERGED, ORIGIN
from peftkit.cli import main
from peftkit.config import load_run
from peftkit.errors import ArtifactError, NotMergeable, UsageError
from peftkit.experiment import train as train_run

TRAINING = {"learning_rate": 0.02, "max_steps": 8, "batch_size": 8, "seed": 1, "evaluate_every": 8}
LORA = {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the configuration of a classification of toy rows; the run goes beside it."""
    count = iter(range(1000))
    rows = list({row["text"]: row for row in sentiment_rows(80, 3)}.values())

    def write(backbone: Path | dict[str, Any], labels: str = "lower", **sections: Any) -> Path:
        folder = tmp_path_factory.mktemp(f"run{next(count)}")
        cut = {"train": rows[:24], "dev": rows[24:32], "test": rows[32:40]}
        files = {
            name: str(
                write_jsonl(
                    folder / f"{name}.jsonl", [one | {"label": getattr(one["label"], labels)()} for one in part]
                )
            )
            for name, part in cut.items()
        }
        whole = {
            "backbone": backbone if isinstance(backbone, dict) else {"name": str(backbone)},
            "task": {"kind": "sequence_classification", "data": files, "max_length": 32},
            "method": LORA,
            "training": TRAINING,
            "output": {"folder": str(folder / "run")},
        } | sections
        (folder / "config.yaml").write_text(yaml.safe_dump(whole))
        return folder / "config.yaml"

    return write


@pytest.fixture(scope="module")
def first(config: Callable[..., Path], tiny_bert: Path) -> Path:
    """A LoRA run, its backbone held with dropout."""
    return train_run(load_run(config({"name": str(tiny_bert), "dropout": 0.1}))).folder


@pytest.fixture(scope="module")
def second(config: Callable[..., Path], first: Path) -> Path:
    """A run with other labels on the merged model of the first."""
    return train_run(load_run(config(first, labels="upper"))).folder


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[2, 20, 5, 16, 3]]))[0]


def test_a_run_is_built_on_the_merged_encoder_of_another(second: Path, first: Path, tiny_bert: Path) -> None:
    from transformers import BertModel

    adapted = load_saved(first).model
    inner: Any = adapted.get_submodule("base_model.model.bert")
    merged = BertModel.from_pretrained(first / MERGED)
    torch.testing.assert_close(hidden(merged), hidden(inner), rtol=0, atol=1e-5)
    assert not torch.allclose(hidden(merged), hidden(BertModel.from_pretrained(tiny_bert)), atol=1e-2)
    # its own labels, and a head that was drawn anew
    saved = load_saved(second)
    assert saved.head.labels == ("NEGATIVE", "POSITIVE")
    assert not any("classifier" in name for name in merged.state_dict())
    recorded = json.loads((second / "manifest.json").read_text())["backbone"]
    old = json.loads((first / "manifest.json").read_text())
    assert recorded["run"]["run_id"] == old["run_id"] and recorded["run"]["method"] == "lora"
    assert recorded["weights_sha256"] != old["backbone"]["weights_sha256"]
    # what was the first task's is not handed on
    settings = json.loads((first / MERGED / "config.json").read_text())
    assert (
        settings["hidden_dropout_prob"] == 0.0 and "NEGATIVE" not in str(settings) and "negative" not in str(settings)
    )


def test_another_process_reads_it_again_and_computes_the_same(second: Path, first: Path) -> None:
    here = json.loads((second / "predictions.jsonl").read_text().splitlines()[0])["prediction"]["probabilities"]
    text = sentiment_rows(80, 3)
    unique = list({row["text"]: row for row in text}.values())[32]["text"]
    shutil.rmtree(first / MERGED)  # it is made again where it is not there
    command = [sys.executable, "-m", "peftkit.cli", "predict", str(second), unique]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["probabilities"] == pytest.approx(here, abs=1e-6)
    assert (first / MERGED / ORIGIN).is_file()


def test_a_run_that_was_trained_again_is_another_backbone(
    config: Callable[..., Path], tiny_bert: Path, tmp_path: Path
) -> None:
    file = config(tiny_bert)
    folder = train_run(load_run(file)).folder
    built = train_run(load_run(config(folder))).folder
    again = ["output.overwrite=true", "training.learning_rate=0.03"]
    train_run(load_run(file, again))
    assert not (folder / MERGED).exists()
    with pytest.raises(ArtifactError, match=r"is not the backbone that .* was trained on"):
        load_saved(built)


def test_a_chain_of_three(config: Callable[..., Path], second: Path) -> None:
    third = train_run(load_run(config(second, method={"kind": "head"}))).folder
    assert (second / MERGED / "model.safetensors").is_file()
    assert main(["predict", str(third), "a good film"]) == 0


def test_an_unfinished_run_is_refused(config: Callable[..., Path], first: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(first / "run.yaml", unfinished)
    with pytest.raises(UsageError, match=r"unfinished is not finished: run its command again"):
        train_run(load_run(config(unfinished)))
    with pytest.raises(UsageError, match=r"the run .*unfinished is not finished"):
        load_tokenizer(BackboneSettings(name=str(unfinished)))


def test_a_method_without_a_merged_form_is_refused(config: Callable[..., Path], tiny_bert: Path) -> None:
    folder = train_run(load_run(config(tiny_bert, method={"kind": "prefix", "length": 2}))).folder
    with pytest.raises(
        NotMergeable, match=r"backbone.name: .* cannot be built on: method 'prefix' adds keys and values"
    ):
        train_run(load_run(config(folder)))
    assert not (folder / MERGED).exists()


def test_without_the_step_that_merges_the_error_names_it(config: Callable[..., Path], tiny_bert: Path) -> None:
    from peftkit.prepare import prepare

    folder = train_run(load_run(config(tiny_bert, method={"kind": "head"}))).folder
    run = load_run(config(folder))
    with pytest.raises(
        UsageError, match=r"whose merged model is not there yet; .* merge_backbone\(run\) before prepare"
    ):
        prepare(run)
    merge_backbone(run)
    assert len(prepare(run).train) == 24


def test_a_merge_that_went_wrong_writes_nothing(
    config: Callable[..., Path], tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkit.methods import LoRA

    folder = train_run(load_run(config(tiny_bert))).folder
    plain = LoRA.merge

    def broken(self: LoRA, model: Any) -> Any:
        merged: Any = plain(self, model)
        merged.bert.encoder.layer[0].output.dense.weight.data.mul_(1.01)
        return merged

    monkeypatch.setattr(LoRA, "merge", broken)
    with pytest.raises(ArtifactError, match="computes something else than the run"):
        train_run(load_run(config(folder)))
    assert not (folder / MERGED).exists()


def test_tokens_that_a_task_added_come_along(
    config: Callable[..., Path], tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkit.tasks import SequenceClassification

    plain = SequenceClassification.head
    with monkeypatch.context() as patch:
        patch.setattr(
            SequenceClassification,
            "head",
            lambda self, train: Head(**vars(plain(self, train)) | {"new_tokens": ("<one>", "<two>")}),
        )
        folder = train_run(load_run(config(tiny_bert))).folder
    run = load_run(config(folder))
    merge_backbone(run)
    tokenizer = load_tokenizer(run.backbone)
    assert tokenizer.tokenize("a <one> film") == ["a", "<one>", "film"]
    backbone = load(run.backbone, Head("AutoModelForSequenceClassification", ("a", "b")))
    rows = backbone.model.get_input_embeddings().weight  # type: ignore[operator]
    assert len(rows) == len(tokenizer)
    saved = load_saved(folder)
    trained = next(p for name, p in saved.model.named_parameters() if name.endswith("modules_to_save.default.rows"))
    torch.testing.assert_close(rows[-2:], trained)


def test_pretraining_on_plain_text_chains_into_a_task(
    config: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    texts = [row["text"] for row in sentiment_rows(60, 5)]
    (tmp_path / "train.txt").write_text("\n".join(texts[:40]) + "\n")
    (tmp_path / "dev.txt").write_text("\n".join(texts[40:]) + "\n")
    data = {name: str(tmp_path / f"{name}.txt") for name in ("train", "dev")}
    task = {"kind": "plain_text", "data": data, "max_length": 32}
    folder = train_run(load_run(config(tiny_llama, task=task))).folder
    built = train_run(load_run(config(folder))).folder
    assert load_saved(built).manifest["backbone"]["run"]["method"] == "lora"
    # a language model keeps its output, so that it can be trained on as one
    names = load(BackboneSettings(name=str(folder)), Head("AutoModelForCausalLM"))
    assert names.head_modules == ()
