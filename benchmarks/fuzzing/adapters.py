"""Folders of finished runs: saved adapters in peft's format and in peftkit's own with changes, through
`peftkit predict`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from benchmarks.fuzzing import backbone
from benchmarks.fuzzing.mutations import TEXTS, changed_bytes, changed_tree
from benchmarks.fuzzing.watch import told, watched
from peftkit.disk import file_sha256, manifest_sha256

METHODS = ("lora", "prefix", "bottleneck", "ia3", "bitfit", "peft")
"""IA³, LoRA and whatever `kind: peft` names are in peft's format."""
MANIFEST, RUN_FILE = "manifest.json", "run.yaml"
STRANGE = ("a link", "a pipe", "a folder", "nothing")
"""What may stand where a file stood."""
TOKENS = (b"\0", b'"', b"{", b"[", b",", b":", b"NaN", b"1e999", b"\xff")
Content = bytes | str
Example = tuple[str, dict[str, Content], bool]
"""Method, what differs by name in the run's folder, and whether the manifest is made to fit it."""


class Adapters:
    """Runs of a step each, one for each method."""

    def __init__(self, folder: Path, methods: Sequence[str] = METHODS) -> None:
        self.folder = folder / "run"
        place = backbone.make(folder / "backbone")
        self.runs = {method: _trained(method, place, folder / method) for method in methods}

    def examples(self) -> st.SearchStrategy[Example]:
        return _examples(self)

    def check(self, example: Example) -> bool:
        """Examine one folder; returns whether it predicts."""
        method, changes, fits = example
        shutil.rmtree(self.folder, ignore_errors=True)
        for name, content in (self.runs[method] | changes).items():
            _put(self.folder / name, content)
        if fits:
            _sign(self.folder)
        with watched():
            return told(["predict", str(self.folder), "good film"]) == 0


def _trained(method: str, place: Path, folder: Path) -> dict[str, Content]:
    """The files of a finished run, by name."""
    import peftkit

    kind = {"kind": "peft", "type": "LOHA"} if method == "peft" else {"kind": method}
    run = peftkit.Run.model_validate(
        {
            "backbone": {"name": str(place)},
            "task": {"kind": "sequence_classification", "max_length": 16},
            "method": kind,
            "training": {"learning_rate": 0.01, "max_steps": 1, "batch_size": 4},
            "output": {"folder": str(folder)},
        }
    )
    rows = [{"text": f"{label} film {n}", "label": label} for n in range(12) for label in ("good", "bad")]
    with contextlib.redirect_stdout(io.StringIO()):
        peftkit.train(run, splits=peftkit.splits_from(train=rows[:8], dev=rows[8:16], test=rows[16:]))
    kept = [folder / MANIFEST, folder / RUN_FILE, *(one for one in (folder / run.method.artifact).rglob("*"))]
    return {one.relative_to(folder).as_posix(): one.read_bytes() for one in kept if one.is_file()}


def _put(place: Path, content: Content) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    match content:
        case bytes():
            place.write_bytes(content)
        case "a link":
            place.symlink_to("/etc/hostname")
        case "a pipe":
            os.mkfifo(place)
        case "a folder":
            place.mkdir()


def _sign(folder: Path) -> None:
    """Make a manifest fit what lies in the folder, as whoever means harm can."""
    file = folder / MANIFEST
    if not file.is_file() or file.is_symlink():
        return
    try:
        manifest = json.loads(file.read_bytes())
        manifest.pop("sha256", None)
        found = [one for one in (folder / RUN_FILE, *folder.glob("*/*")) if one.is_file() and not one.is_symlink()]
        if manifest.get("files"):
            manifest["files"] = {one.relative_to(folder).as_posix(): file_sha256(one) for one in found}
        manifest["sha256"] = manifest_sha256(manifest)
        file.write_text(json.dumps(manifest))
    except (ValueError, AttributeError, RecursionError):
        return  # what is no manifest cannot be made to fit


@st.composite
def _examples(draw: st.DrawFn, adapters: Adapters) -> Example:
    method = draw(st.sampled_from(sorted(adapters.runs)))
    files, changes = adapters.runs[method], dict[str, Content]()
    for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2, unique=True)):
        folder, content = name.rpartition("/")[0], files[name]
        assert isinstance(content, bytes)
        match draw(st.sampled_from(("content", "content", "content", "content", "bytes", "strange", "more"))):
            case "content":
                changes[name] = _changed(draw, name, content)
            case "bytes":
                changes[name] = changed_bytes(draw, content, TOKENS)
            case "strange":
                changes[name] = draw(st.sampled_from(STRANGE))
            case _:
                suffix = draw(st.sampled_from((".bin", ".safetensors", ".json", ".py", ".npz", "")))
                other = draw(st.sampled_from(("", "{}", "the same", *STRANGE)))
                held = content if other == "the same" else other if other in STRANGE else other.encode()
                changes[f"{folder}/more{suffix}".lstrip("/")] = held
    return method, changes, draw(st.sampled_from((True, True, True, False)))


def _changed(draw: st.DrawFn, name: str, content: bytes) -> bytes:
    """A file that means something else."""
    if name.endswith(".json"):
        return _dumped(changed_tree(draw, json.loads(content)))
    if name.endswith(".yaml"):
        tree = changed_tree(draw, yaml.safe_load(content), nested=60)
        return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")
    return _tensors(draw, content) if name.endswith(".safetensors") else changed_bytes(draw, content)


def _dumped(tree: Any) -> bytes:
    """JSON, also of what is nested deeper than Python's writer goes."""
    try:
        return json.dumps(tree).encode()
    except RecursionError:
        return b"[" * 5000 + b"]" * 5000


def _tensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A weights file with another header, other numbers, or other lengths."""
    length = int.from_bytes(content[:8], "little")
    header, numbers = json.loads(content[8 : 8 + length]), content[8 + length :]
    match draw(st.sampled_from(("header", "names", "numbers", "length"))):
        case "header":
            header = changed_tree(draw, header)
        case "names" if len(header) > 1:
            one, other = (draw(st.sampled_from(sorted(header))) for _ in range(2))
            header[other if draw(st.booleans()) else draw(st.sampled_from(TEXTS))] = header.pop(one)
        case "numbers":
            numbers = changed_bytes(draw, numbers, (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"))
        case _:
            return draw(st.sampled_from((0, 1, 2**23, 2**40, 2**63, 2**64 - 1))).to_bytes(8, "little") + content[8:]
    text = _dumped(header)
    return len(text).to_bytes(8, "little") + text + numbers
