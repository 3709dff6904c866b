"""Inputs that the fuzzers found to end in a traceback, and those like them; each is now refused in plain words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fuzzing.adapters import Adapters
from peftkit.artifacts.store import load_run
from peftkit.backbones.runs import ORIGIN, origin
from peftkit.errors import ArtifactError
from peftkit.tensor_files import read_header

WEIGHTS, CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
OWN = "adapter/trained.safetensors"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("adapters"), ("lora", "bottleneck"))


def json_with(change: Change) -> Callable[[bytes], bytes]:
    def write(content: bytes) -> bytes:
        tree = json.loads(content)
        change(tree)
        return json.dumps(tree).encode()

    return write


def header_with(change: Change) -> Callable[[bytes], bytes]:
    def write(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json_with(change)(content[8 : 8 + length])
        return len(header).to_bytes(8, "little") + header + content[8 + length :]

    return write


def first_of(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


# method, file, what becomes of it, and what the error must say
FOUND: dict[str, tuple[str, str, Callable[[bytes], bytes], str]] = {
    "text for a number": (
        "lora",
        CONFIG,
        json_with(lambda tree: tree.update(lora_alpha="")),
        "is not of bert (BertForSequenceClassification): unsupported operand",
    ),
    "a list for a section": (
        "lora",
        CONFIG,
        json_with(lambda tree: tree.update(arrow_config=["%s", 2**31])),
        "peft cannot read its configuration: `ArrowConfig` must be",
    ),
    "a word that peft does not know": (
        "lora",
        CONFIG,
        json_with(lambda tree: tree.update(rsloar=True)),
        "says 'rsloar', which this peft does not know",
    ),
    "notes that are none": (
        "bottleneck",
        OWN,
        header_with(lambda header: header.update(__metadata__="")),
        "the header's __metadata__ holds something else than texts",
    ),
    "a type that is an object": (
        "lora",
        WEIGHTS,
        header_with(lambda header: first_of(header).update(dtype={"F32": 1})),
        "the header says nothing readable of",
    ),
    "a class that transformers lacks": (
        "lora",
        "manifest.json",
        json_with(lambda tree: tree["head"].update(model_class="a40e01")),
        "head.model_class 'a40e01' is no class of a task",
    ),
    "a class that is no model": (
        "lora",
        "manifest.json",
        json_with(lambda tree: tree["head"].update(model_class="pipeline")),
        "head.model_class 'pipeline' is no class of a task",
    ),
    "a head of many outputs": (
        "lora",
        "manifest.json",
        json_with(lambda tree: tree["head"].update(outputs=2**40)),
        "the head has more outputs, labels or new tokens than a task gives it",
    ),
}


@pytest.mark.parametrize(("method", "name", "change", "message"), FOUND.values(), ids=FOUND)
def test_a_finding_is_refused(
    adapters: Adapters, method: str, name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    content = adapters.runs[method][name]
    assert isinstance(content, bytes)
    example = (method, {name: change(content)}, True)
    assert not adapters.check(example)
    with pytest.raises(ArtifactError) as caught:
        load_run(adapters.folder)
    assert message in str(caught.value)


def test_missing_weights_are_named(adapters: Adapters) -> None:
    for method, name in (("lora", WEIGHTS), ("bottleneck", OWN)):
        assert not adapters.check((method, {name: "nothing"}, True))
        with pytest.raises(ArtifactError, match=name):
            load_run(adapters.folder)


def test_a_shape_of_thousands_of_dimensions_takes_no_time(tmp_path: Path) -> None:
    shape = [2**62] * 50_000  # whose product has three million digits
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ArtifactError, match="the header says nothing readable of 'a'"):
        read_header(file)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"folder": ' + b"[" * 10**5])
def test_what_a_merged_model_says_of_itself_may_be_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ORIGIN).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{ORIGIN} is damaged"):
        origin(tmp_path)
