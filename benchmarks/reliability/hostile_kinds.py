"""Folders of saved LoRA adapters that mean harm: what is done to a genuine one, and what peftkit says of it then.

`folder` is that of a finished run, with the adapter in `folder/adapter` as peft saves it, on a BERT of 32 units.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from peftkit.disk import file_sha256, manifest_sha256
from peftkit.methods.peft_files import CONFIG, WEIGHTS

QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
Harm = Callable[[Path], None]


def sign(folder: Path, **changes: Any) -> None:
    """Make the manifest fit what lies in the folder now, as whoever means harm can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    files = [folder / "run.yaml", *sorted(one for one in (folder / "adapter").rglob("*") if one.is_file())]
    manifest["files"] = {one.relative_to(folder).as_posix(): file_sha256(one) for one in files}
    manifest |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": manifest_sha256(manifest)}))


def config(**changes: Any) -> Harm:
    """Other values in the adapter's configuration."""

    def change(folder: Path) -> None:
        file = folder / "adapter" / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def raw(name: str, content: bytes) -> Harm:
    """A file of the adapter with these bytes."""

    def write(folder: Path) -> None:
        (folder / "adapter" / name).write_bytes(content)

    return write


def pickled(folder: Path) -> None:
    """Weights as peft reads them where there are no safetensors."""
    (folder / "adapter" / WEIGHTS).unlink()
    raw("adapter_model.bin", PAYLOAD)(folder)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Harm:
    """Other tensors in a file that is sound."""

    def write(folder: Path) -> None:
        file = folder / "adapter" / WEIGHTS
        held = load_file(file)
        change(held)
        save_file(held, file, metadata={"format": "pt"})

    return write


def header(change: Callable[[dict[str, Any]], None], grow: int = 0) -> Harm:
    """Another header before the same data."""

    def write(folder: Path) -> None:
        file = folder / "adapter" / WEIGHTS
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        found = json.loads(content[8 : 8 + length])
        change(found)
        text = json.dumps(found).encode() + b" " * grow
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return write


def cut(folder: Path) -> None:
    """Weights that end early."""
    file = folder / "adapter" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-64])


def tail(folder: Path) -> None:
    """Something behind the weights."""
    file = folder / "adapter" / WEIGHTS
    file.write_bytes(file.read_bytes() + b"#!/bin/sh\n")


def repeated(folder: Path) -> None:
    """A key of which readers take now the first and now the last."""
    file = folder / "adapter" / CONFIG
    file.write_text(re.sub(r'"r": (\d+)', r'"r": \1, "r": 4000', file.read_text()))


def overlapping(entries: dict[str, Any]) -> None:
    """Two tensors in one place."""
    names = [name for name in entries if name != "__metadata__"]
    entries[names[1]]["data_offsets"] = entries[names[0]]["data_offsets"]


def linked(folder: Path) -> None:
    """Weights that lie somewhere else."""
    file = folder / "adapter" / WEIGHTS
    file.rename(folder / "elsewhere")
    file.symlink_to(folder / "elsewhere")


def piped(folder: Path) -> None:
    """Weights that never end."""
    file = folder / "adapter" / WEIGHTS
    file.unlink()
    os.mkfifo(file)


def linked_folder(folder: Path) -> None:
    """An adapter that lies somewhere else."""
    shutil.move(folder / "adapter", folder / "moved")
    (folder / "adapter").symlink_to(folder / "moved")


PAYLOAD = pickle.dumps({"weights": [1.0]})
SHOWN: dict[str, tuple[Harm, str]] = {
    "pickled weights": (pickled, "adapter_model.bin may be a pickle, which can run code"),
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
    "a negative rank": (config(r=-2), "r is -2, not a whole number"),
    "a rank of text": (config(r="8"), "r is '8', not a whole number"),
    "huge ranks in a pattern": (config(rank_pattern={"query": 10**9}), "rank_pattern has 1000000000 for a value"),
    "a million targets": (config(target_modules=["q"] * 70_000), "not a list of at most 65,536 module names"),
    "a repeated key": (repeated, "the key 'r' is there twice"),
    "no JSON": (raw(CONFIG, b"{'r': 2}"), "adapter_config.json is damaged"),
    "no object": (raw(CONFIG, b"[]"), "it holds no JSON object"),
    "deep nesting": (raw(CONFIG, b"[" * 10**5), "adapter_config.json is damaged"),
    "a number that is none": (raw(CONFIG, b'{"r": NaN}'), "NaN is no JSON number"),
    "a huge configuration": (raw(CONFIG, b" " * 2**20 + b"{}"), "is larger than 524,288 bytes"),
    "a huge header": (header(lambda found: None, grow=2**24), "and 8,388,608 are the most that is read"),
    "a header past the end": (raw(WEIGHTS, struct.pack("<Q", 2**62)), "ends inside its header"),
    "an empty file": (raw(WEIGHTS, b""), "is cut short"),
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
"""What schema and headers show."""
LOADED: dict[str, tuple[Harm, str]] = {
    "a weight of the backbone": (
        tensors(lambda held: held.update({"base_model.model.bert.embeddings.LayerNorm.weight": torch.zeros(32)})),
        "holds 'bert.embeddings.LayerNorm.weight', a weight of the backbone itself",
    ),
    "a missing tensor": (tensors(lambda held: held.pop(f"{QUERY}.lora_A.weight")), "it differs in"),
    "a missing module": (
        tensors(lambda held: [held.pop(f"{QUERY}.lora_{one}.weight") for one in "AB"]),
        "it has nothing for 'bert.encoder.layer.0.attention.self.query'",
    ),
    "a stranger": (tensors(lambda held: held.update({"base_model.model.x.lora_A": torch.zeros(2, 2)})), "differs"),
    "another shape": (
        tensors(lambda held: held.update({f"{QUERY}.lora_A.weight": torch.zeros(3, 32)})),
        "size mismatch",
    ),
    "not a number": (
        tensors(lambda held: held[f"{QUERY}.lora_A.weight"].fill_(float("nan"))),
        "lora_A.weight' holds NaN or infinity",
    ),
}  # fmt: skip
"""What only the backbone, or the numbers themselves, show."""
PLACED: dict[str, tuple[Harm, str]] = {
    "a link": (linked, "adapter_model.safetensors is a link; put the file itself there"),
    "a pipe": (piped, "adapter_model.safetensors is no plain file"),
    "a linked folder": (linked_folder, "is a link; put the folder itself there"),
}
"""What the file system shows; these keep the manifest that they have."""


def manifest(**changes: Any) -> Harm:
    """Other values in the manifest, which is signed again."""
    return lambda folder: sign(folder, **changes)


def secret(name: str) -> Harm:
    """A manifest that counts a file of somebody else among the run's."""

    def name_it(folder: Path) -> None:
        (folder.parent / "secret").write_text("secret")
        sign(folder, files={name: file_sha256(folder.parent / "secret")})

    return name_it


def head(**changes: Any) -> Harm:
    """Another head than a task makes."""

    def change(folder: Path) -> None:
        held = json.loads((folder / "manifest.json").read_text())["head"]
        sign(folder, head=held | changes)

    return change


MANIFESTS: dict[str, tuple[Harm, str]] = {
    "a file above": (secret("../secret"), "which is outside of the folder"),
    "a file of the system": (secret("/etc/passwd"), "which is outside of the folder"),
    "a way around": (secret("adapter/../../secret"), "which is outside of the folder"),
    "a way of Windows": (secret("..\\secret"), "which is outside of the folder"),
    "half a name": (manifest(files={"run.yaml\0": "0"}), "which is no file's name"),
    "another sub-folder": (
        manifest(artifact="../../elsewhere"),
        "names another sub-folder than method 'lora' writes",
    ),
    "a class of its own": (head(model_class="pipeline"), "head.model_class 'pipeline' is no class of a task"),
}
"""What only a run of peftkit has."""
