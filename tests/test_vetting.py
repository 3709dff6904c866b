"""Run folders that mean harm, with manifests that fit them: each is refused before anything of it is loaded."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import sentiment_rows
from safetensors.torch import load_file

import peftkit
from benchmarks.reliability.hostile_kinds import LOADED, MANIFESTS, SHOWN, Harm, config, sign
from peftkit.artifacts.store import load_run
from peftkit.artifacts.vetting import check_artifact, check_names
from peftkit.cli import main
from peftkit.errors import ArtifactError
from peftkit.tensor_files import Entry, read_header


@pytest.fixture(scope="module")
def genuine(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = sentiment_rows(24)
    run = peftkit.Run(
        backbone=peftkit.Backbone(name=str(tiny_bert)),
        task=peftkit.SequenceClassification(max_length=16),
        method=peftkit.LoRA(rank=2),
        training=peftkit.Training(learning_rate=1e-2, max_steps=1, batch_size=4),
        output=peftkit.Output(folder=str(tmp_path_factory.mktemp("vetting") / "run")),
    )
    splits = peftkit.splits_from(train=rows[:16], dev=rows[16:20], test=rows[20:])
    return peftkit.train(run, splits=splits).folder


@pytest.fixture
def folder(genuine: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "run"
    shutil.copytree(genuine, copied)
    return copied


RANKS: dict[str, tuple[Harm, str]] = {
    "a rank above the tensors'": (config(r=65_536), "a rank of 65536, where no saved tensor has a side longer than 64"),
    "one in a pattern": (config(rank_pattern={"query": 65_536}), "a rank of 65536, where no saved tensor has a side"),
}


@pytest.mark.parametrize(("harm", "message"), (SHOWN | RANKS).values(), ids=SHOWN | RANKS)
def test_what_schema_and_headers_show_is_refused_at_once(
    folder: Path, harm: Harm, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(folder)
    sign(folder)
    method = peftkit.LoRA(rank=2)
    start = time.process_time()  # not of the clock, which counts what else the machine does
    with pytest.raises(ArtifactError) as caught:
        check_artifact(folder / "adapter", method)
    assert time.process_time() - start < 0.1
    assert message in str(caught.value)
    tracemalloc.start()
    with pytest.raises(ArtifactError):
        check_artifact(folder / "adapter", method)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20
    assert main(["predict", str(folder), "good"]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


@pytest.mark.parametrize(("harm", "message"), LOADED.values(), ids=LOADED)
def test_what_does_not_fit_the_backbone_is_refused(
    folder: Path, harm: Harm, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(folder)
    sign(folder)
    assert main(["predict", str(folder), "good"]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_links_and_pipes(folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    file = folder / "adapter" / "adapter_model.safetensors"
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    for check in (lambda: check_names(folder, manifest), lambda: check_artifact(folder / "adapter", peftkit.LoRA())):
        with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors is a link; put the file itself there"):
            check()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors is no plain file"):
        load_run(folder)
    file.unlink()
    elsewhere.rename(file)
    (folder / "adapter").rename(tmp_path / "moved")
    (folder / "adapter").symlink_to(tmp_path / "moved")
    with pytest.raises(ArtifactError, match="adapter is a link; put the folder itself there"):
        load_run(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": ' + b"[" * 10**5, "manifest.json is damaged"),
        (b'{"format": 1, "format": 1}', "the key 'format' is there twice"),
        (b"[]", "it holds no JSON object"),
        (b"\xff{}", "manifest.json is damaged"),
        (b" " * 2**26 + b"{}", "manifest.json is larger than 67,108,864 bytes; it is no manifest of a run"),
    ],
    ids=["deep nesting", "a repeated key", "no object", "not UTF-8", "huge"],
)
def test_a_manifest_that_is_none(folder: Path, content: bytes, message: str) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        load_run(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": {"model_class": 5}}, "manifest.json is damaged: head.model_class: Input should be a valid string"),
        ({"head": {"model_class": "AutoModel", "more": 1}}, "head.more: Unexpected keyword argument"),
        ({"backbone": []}, "manifest.json is damaged: backbone: "),
        ({"artifact": None}, "manifest.json is damaged: artifact: Input should be a valid string"),
        ({"files": {"run.yaml": 1}}, "manifest.json is damaged: files.run.yaml: Input should be a valid string"),
    ],
    ids=["a number for a name", "one name more", "a list for an object", "nothing", "no hash"],
)
def test_a_manifest_of_other_types(folder: Path, changes: dict[str, Any], message: str) -> None:
    sign(folder, **changes)
    with pytest.raises(ArtifactError) as caught:
        load_run(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(("harm", "message"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_names_what_no_run_has(folder: Path, harm: Harm, message: str) -> None:
    harm(folder)
    with pytest.raises(ArtifactError) as caught:
        load_run(folder)
    assert message in str(caught.value)


def test_going_on_from_a_run_looks_at_it_as_loading_does(
    folder: Path, tiny_bert: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {split: str(toy_data / f"sentiment_{split}.jsonl") for split in ("train", "dev", "test")}
    config = {
        "backbone": {"name": str(tiny_bert)},
        "task": {"kind": "sequence_classification", "data": data, "max_length": 16},
        "method": {"kind": "lora", "rank": 2, "start_from": str(folder)},
        "training": {"learning_rate": 0.01, "max_steps": 1},
        "output": {"folder": str(tmp_path / "second")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    sign(folder, artifact="../elsewhere")
    assert main(["train", str(tmp_path / "run.yaml")]) == 1
    assert "names another sub-folder than method 'lora' writes" in capsys.readouterr().err


def test_what_was_saved_here_is_read(genuine: Path) -> None:
    assert load_run(genuine).model is not None
    file = genuine / "adapter" / "adapter_model.safetensors"
    entries, tensors, content = read_header(file), load_file(file), file.read_bytes()
    assert entries == {name: Entry("F32", tuple(t.shape), entries[name].start) for name, t in tensors.items()}
    header = 8 + int.from_bytes(content[:8], "little")
    for name, tensor in tensors.items():
        values = tensor.numpy().tobytes()
        assert content[header + entries[name].start :].startswith(values), name
