"""Methods that merge, over backbones of every kind, in every dtype: read back by another process, compared.

Every method meets every kind of backbone, and every dtype; every kind of backbone meets every dtype.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from merging import METHODS, llama, made, rows
from safetensors import safe_open

from peftkit.artifacts.loading import TOLERANCE
from peftkit.artifacts.merge import merge
from peftkit.artifacts.settings import MergeSettings
from peftkit.artifacts.store import load_run

DTYPES: tuple[Any, ...] = ("float32", "bfloat16", "float16")
NF4 = {"quantization": {"kind": "nf4", "compute_dtype": "float32"}}
PLACES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "head and new tokens": ("bert", "relations", {}),
    "tied": ("tied", "text", {}),
    "untied": ("untied", "text", {}),
    "quantised, with a head": ("untied", "classes", NF4),
    "bfloat16, with a head": ("tied", "classes", {"dtype": "bfloat16"}),
}
NOT_QUANTISED = ("full", "top_layers", "pissa", "lora_bias")
NOT_HALF = ("full", "top_layers", "bitfit", "layernorm")
CELLS = [
    (method, place, DTYPES[(i + j) % 3])
    for i, method in enumerate(METHODS)
    for j, place in enumerate(PLACES)
    if not (place.startswith("quantised") and method in NOT_QUANTISED)
    and not (place.startswith("bfloat16") and method in NOT_HALF)
    and not (PLACES[place][1] == "text" and method == "head")
]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("merged")
    return {"bert": tiny_bert} | {name: llama(root / name, tied=name == "tied") for name in ("tied", "untied")}


def test_each_pair_is_there() -> None:
    methods, places = {cell[0] for cell in CELLS}, {cell[1] for cell in CELLS}
    assert methods == set(METHODS) and places == set(PLACES)
    assert {(place, dtype) for _, place, dtype in CELLS} == {(place, dtype) for place in PLACES for dtype in DTYPES}
    assert len({(method, dtype) for method, _, dtype in CELLS}) >= 3 * (len(METHODS) - 3)


@pytest.mark.parametrize(("method", "place", "dtype"), CELLS, ids=lambda one: one)
def test_what_is_read_back_computes_what_was_evaluated(
    method: str, place: str, dtype: Any, backbones: dict[str, Path], tmp_path: Path
) -> None:
    name, task, held = PLACES[place]
    folder = made(backbones[name], task, method, tmp_path / "run", **held)
    report = merge(load_run(folder), tmp_path / "out", rows(task), MergeSettings(dtype=dtype))
    half = "bfloat16" if held.get("dtype") == "bfloat16" else dtype
    band = max(TOLERANCE[dtype], TOLERANCE[half])
    assert report.largest_difference <= band * max(1.0, report.largest_logit)
    assert report.arithmetic <= 1e-5
    assert report.rows == report.examples == 12
    assert report.equal_predictions == 12 or band > 1e-5
    assert report.argmax_agreement is not None and report.argmax_agreement >= 0.9
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        kinds = {file.get_slice(tensor).get_dtype() for tensor in file.keys()}  # noqa: SIM118
    assert kinds == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]}
    assert json.loads((tmp_path / "out" / "peftkit_merge.json").read_text())["relative"] == report.relative
