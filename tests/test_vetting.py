"""Run folders that mean harm, with manifests that fit them: each is refused before anything of it is loaded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import sentiment_rows
from safetensors.torch import load_file, save_file

import peftkit
from peftkit.artifacts.store import load_run
from peftkit.artifacts.vetting import check_artifact, check_names
from peftkit.cli import main
from peftkit.disk import file_sha256, manifest_sha256
from peftkit.errors import ArtifactError
from peftkit.tensor_files import Entry, read_header

QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
Harm = Callable[[Path], None]


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


def sign(folder: Path, **changes: Any) -> None:
    """Make the manifest fit what lies in the folder now, as whoever means harm can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    files = [folder / "run.yaml", *sorted(one for one in (folder / "adapter").rglob("*") if one.is_file())]
    manifest["files"] = {one.relative_to(folder).as_posix(): file_sha256(one) for one in files}
    manifest |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": manifest_sha256(manifest)}))


def config(**changes: Any) -> Harm:
    def change(folder: Path) -> None:
        file = folder / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def raw(name: str, content: bytes) -> Harm:
    def write(folder: Path) -> None:
        (folder / "adapter" / name).write_bytes(content)

    return write


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Harm:
    def write(folder: Path) -> None:
        file = folder / "adapter" / "adapter_model.safetensors"
        held = load_file(file)
        change(held)
        save_file(held, file, metadata={"format": "pt"})

    return write


def header(change: Callable[[dict[str, Any]], None], grow: int = 0) -> Harm:
    def write(folder: Path) -> None:
        file = folder / "adapter" / "adapter_model.safetensors"
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        found = json.loads(content[8 : 8 + length])
        change(found)
        text = json.dumps(found).encode() + b" " * grow
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return write


def cut(folder: Path) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])


def tail(folder: Path) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes() + b"#!/bin/sh\n")


def repeated(folder: Path) -> None:
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"r": 2', '"r": 2, "r": 4000'))


def overlapping(entries: dict[str, Any]) -> None:
    names = [name for name in entries if name != "__metadata__"]
    entries[names[1]]["data_offsets"] = entries[names[0]]["data_offsets"]


PAYLOAD = pickle.dumps({"weights": [1.0]})
# what schema and headers show
SHOWN: dict[str, tuple[Harm, str]] = {
    "pickled weights": (raw("adapter_model.bin", PAYLOAD), "adapter_model.bin may be a pickle, which can run code"),
    "a pickled checkpoint": (raw("extra.pt", PAYLOAD), "extra.pt may be a pickle"),
    "numpy objects": (raw("extra.npy", PAYLOAD), "extra.npy may be a pickle"),
    "another method": (config(peft_type="IA3"), "peft_type is 'IA3', and method 'lora' is saved as LORA"),
    "an import": (config(auto_mapping={"parent_library": "os", "base_model_class": "system"}), "auto_mapping is {'par"),
    "replicated layers": (config(layer_replication=[[0, 10**6]]), "layer_replication is [[0, 1000000]], which peftkit"),
    "a Megatron import": (config(megatron_config={"a": 1}), "megatron_config is {'a': 1}"),
    "other parameters": (config(target_parameters=["weight"]), "target_parameters is ['weight']"),
    "a regular expression": (config(target_modules="(a+)+$"), "target_modules is '(a+)+$', not a list"),
    "one in a list": (config(target_modules=["(a+)+$"]), "target_modules has '(a+)+$', which is no module's name"),
    "one in ranks": (config(rank_pattern={"(a+)+$": 2}), "rank_pattern has '(a+)+$', which is no module's name"),
    "one in scales": (config(alpha_pattern={".*": 2}), "alpha_pattern has '.*', which is no module's name"),
    "a path": (config(modules_to_save=["../../head"]), "modules_to_save has '../../head', which is no module's name"),
    "a huge rank": (config(r=10**9), "r is 1000000000, not a whole number from 0 to 65,536"),
    "a rank above the tensors'": (config(r=65_536), "a rank of 65536, where no saved tensor has a side longer than 64"),
    "one in a pattern": (config(rank_pattern={"query": 65_536}), "a rank of 65536, where no saved tensor has a side"),
    "a negative rank": (config(r=-2), "r is -2, not a whole number"),
    "a rank of text": (config(r="8"), "r is '8', not a whole number"),
    "huge ranks in a pattern": (config(rank_pattern={"query": 10**9}), "rank_pattern has 1000000000 for a value"),
    "a million targets": (config(target_modules=["q"] * 70_000), "not a list of at most 65,536 module names"),
    "a repeated key": (repeated, "the key 'r' is there twice"),
    "no JSON": (raw("adapter_config.json", b"{'r': 2}"), "adapter_config.json is damaged"),
    "no object": (raw("adapter_config.json", b"[]"), "it holds no JSON object"),
    "deep nesting": (raw("adapter_config.json", b"[" * 10**5), "adapter_config.json is damaged"),
    "a number that is none": (raw("adapter_config.json", b'{"r": NaN}'), "NaN is no JSON number"),
    "a huge configuration": (raw("adapter_config.json", b" " * 2**20 + b"{}"), "is larger than 524,288 bytes"),
    "a huge header": (header(lambda found: None, grow=2**24), "and 8,388,608 are the most that is read"),
    "a header past the end": (raw("adapter_model.safetensors", struct.pack("<Q", 2**62)), "ends inside its header"),
    "an empty file": (raw("adapter_model.safetensors", b""), "is cut short"),
    "cut weights": (cut, "bytes of tensors where its header tells of"),
    "bytes behind the weights": (tail, "bytes of tensors where its header tells of"),
    "overlapping tensors": (header(overlapping), "the places of its tensors do not fit their shapes"),
    "a negative shape": (
        header(lambda found: found[f"{QUERY}.lora_A.weight"].update(shape=[-2, 32])),
        "the header says nothing readable of",
    ),
    "a strange type": (
        header(lambda found: found[f"{QUERY}.lora_A.weight"].update(dtype="OBJECT")),
        "the header says nothing readable of",
    ),
}
# what only the backbone, or the numbers themselves, show
LOADED: dict[str, tuple[Harm, str]] = {
    "a weight of the backbone": (
        tensors(lambda held: held.update({QUERY.removesuffix(".query") + ".key.weight": torch.zeros(32, 32)})),
        "holds 'bert.encoder.layer.0.attention.self.key.weight', a weight of the backbone itself",
    ),
    "a missing tensor": (tensors(lambda held: held.pop(f"{QUERY}.lora_A.weight")), "it differs in"),
    "a missing module": (
        tensors(lambda held: [held.pop(f"{QUERY}.lora_{one}.weight") for one in "AB"]),  # type: ignore[arg-type]
        "it has nothing for 'bert.encoder.layer.0.attention.self.query'",
    ),
    "a stranger": (tensors(lambda held: held.update({"base_model.model.x.lora_A": torch.zeros(2, 2)})), "differs"),
    "another shape": (
        tensors(lambda held: held.update({f"{QUERY}.lora_A.weight": torch.zeros(3, 32)})),
        "size mismatch",
    ),
    "not a number": (
        tensors(lambda held: held[f"{QUERY}.lora_A.weight"].fill_(float("nan"))),  # type: ignore[arg-type]
        "lora_A.weight' holds NaN or infinity",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("harm", "message"), SHOWN.values(), ids=SHOWN)
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


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "adapter/../../secret", "..\\secret"])
def test_a_manifest_that_names_files_elsewhere(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("secret")
    sign(folder, files={name: file_sha256(folder.parent / "secret")})
    with pytest.raises(ArtifactError, match="which is outside of the folder"):
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


def test_a_manifest_that_names_another_sub_folder(folder: Path) -> None:
    sign(folder, artifact="../../elsewhere")
    with pytest.raises(ArtifactError, match="names another sub-folder than method 'lora' writes"):
        load_run(folder)


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
    assert read_header(file) == {name: Entry("F32", tuple(t.shape)) for name, t in load_file(file).items()}
