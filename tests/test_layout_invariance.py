"""The same global batches give the same training, however they are cut and shared out.

Every class of runs is trained once in one process with whole batches, and that is what its other layouts are compared
with: gradients of all steps, as vectors, before they are clipped; losses; the saved weights; the predictions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import layout_cells
import pytest
import torch
from conftest import sentiment_rows, write_jsonl
from safetensors.torch import load_file
from torch import Tensor

LORA = {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"}
CAUSAL = {"kind": "completion", "prompt": "text", "completion": "label", "loss_on": "all"}
# the gradient of a key's bias is zero, and AdamW makes steps of full length of what rounding leaves there in float32
SGD = {"optimizer": "sgd", "learning_rate": 0.02}
CLASSES: dict[str, dict[str, Any]] = {
    "lora": {"method": LORA},
    "adalora": {
        "method": {"kind": "adalora", "target_rank": 2, "initial_rank": 4, "alpha": 8},
        "training": {"max_steps": 12},
    },
    "bottleneck": {
        "method": {"kind": "bottleneck", "placement": "parallel", "bottleneck_size": 8, "train_layernorm": True}
    },
    "prefix": {"method": {"kind": "prefix", "length": 4, "reparametrization_size": 8}},
    "full": {"method": {"kind": "full"}, "training": SGD, "engine": {"padding_free": False}},
    "full_unpadded": {"method": {"kind": "full"}, "training": SGD},
    "top_layers": {"method": {"kind": "top_layers", "layers": 1}, "training": SGD},
    "causal": {"method": LORA, "task": CAUSAL},
    "float64": {"method": {"kind": "full"}, "float64": True},
}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ONE, TWO = 1, 2
PARTS, RECOMPUTED = {"micro_batch_size": 1}, {"gradient_checkpointing": True}
LAYOUTS: dict[str, tuple[int, dict[str, str], dict[str, Any]]] = {
    "parts": (ONE, {}, PARTS),
    "recomputed": (ONE, {}, RECOMPUTED),
    "ddp": (TWO, {}, {}),
    "ddp_parts": (TWO, {}, PARTS),
    "fsdp": (TWO, FSDP, {}),
    "fsdp_parts": (TWO, FSDP, PARTS),
    "fsdp_recomputed": (TWO, FSDP, PARTS | RECOMPUTED),
}
"""Processes, what the launcher says, and training settings."""
CELLS = {
    "lora": tuple(LAYOUTS),
    "adalora": ("parts", "ddp_parts", "fsdp_recomputed"),
    "bottleneck": ("parts", "ddp_parts", "fsdp_recomputed"),
    "prefix": ("parts", "ddp_parts", "fsdp_recomputed"),
    "full": ("parts", "recomputed", "ddp_parts", "fsdp", "fsdp_parts"),
    "full_unpadded": ("parts", "ddp_parts"),
    "top_layers": ("parts", "fsdp_recomputed"),
    "causal": ("parts", "packed", "packed_ddp", "packed_fsdp"),
    "float64": ("parts", "fsdp_parts"),
}
PACKED = {"packing": True}
COUNTED = {
    ("lora", "ddp_parts"): {"gloo:all_reduce": 2},
    ("lora", "fsdp_parts"): {"gloo:all_reduce": 2, "gloo:all_gather": 24},
    ("full", "ddp_parts"): {"gloo:all_reduce": 2},
    ("full", "fsdp_parts"): {"gloo:all_reduce": 4, "gloo:all_gather": 24},
    ("top_layers", "fsdp_recomputed"): {"gloo:all_reduce": 3, "gloo:all_gather": 24},
}
"""Messages in a step of four parts for each process. One is the loss; gradients are one more, or where they are shared
out one for each unit that trains (the blocks, and the rest). Shares are gathered for each part: three units, twice."""
PAIRS = [(name, layout) for name, layouts in CELLS.items() for layout in layouts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_llama: Path) -> Path:
    """A folder with a run for each class and layout: `lora/whole`, `lora/parts`, …"""
    folder = tmp_path_factory.mktemp("layouts")
    for seed, (split, count) in enumerate({"train": 17, "dev": 5, "test": 13}.items()):
        write_jsonl(folder / f"{split}.jsonl", sentiment_rows(count, seed))
    cells = {pair: _cell(folder, *pair, tiny_llama if pair[0] == "causal" else tiny_bert) for pair in _all_pairs()}
    layout_cells.launch([cell for pair, cell in cells.items() if _layout(pair[1])[0] == TWO], folder / "cells.json")
    for pair, cell in cells.items():
        if _layout(pair[1])[0] == ONE:
            layout_cells.run_cell(cell)
    return folder


def _all_pairs() -> Iterator[tuple[str, str]]:
    yield from ((name, "whole") for name in CELLS)
    yield from PAIRS


def _layout(name: str) -> tuple[int, dict[str, str], dict[str, Any]]:
    return LAYOUTS.get(name.removeprefix("packed_"), (ONE, {}, {}))


def _cell(folder: Path, name: str, layout: str, backbone: Path) -> dict[str, Any]:
    _, environment, training = _layout(layout)
    chosen = CLASSES[name]
    task = chosen.get("task", {}) | (PACKED if layout.startswith("packed") else {})
    settings = {"evaluate_every": 6, "keep_best": False} | chosen.get("training", {}) | training
    run = layout_cells.config(folder / name / layout, backbone, folder, chosen["method"], task, **settings)
    # without padding there is nothing to pack
    run["engine"] = {"padding_free": False} if layout.startswith("packed") else chosen.get("engine", {})
    return {
        "config": run,
        "environment": environment,
        "float64": chosen.get("float64", False),
        "count": (name, layout) in COUNTED,
    }


def gradients(run: Path) -> dict[int, Tensor]:
    """The gradient of each step as one vector in float64."""
    parts: dict[int, list[Tensor]] = {}
    for key, tensor in sorted(load_file(run / layout_cells.GRADIENTS).items()):
        parts.setdefault(int(key.partition(":")[0]), []).append(tensor.double().flatten())
    return {step: torch.cat(parts[step]) for step in sorted(parts)}


def figures(run: Path, key: str) -> list[float]:
    events = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [event[key] for event in events if key in event]


def tolerance(name: str) -> float:
    # without padding products have other shapes in each layout, and where whole blocks train their rounding adds up
    return {"float64": 1e-12, "full": 2e-6, "full_unpadded": 2e-6, "top_layers": 2e-6}.get(name, 1e-6)


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_every_gradient_and_loss_is_that_of_whole_batches(folder: Path, name: str, layout: str) -> None:
    expected, found = (gradients(folder / name / one) for one in ("whole", layout))
    assert list(found) == list(expected) == list(range(12 if name == "adalora" else 6))
    for step, gradient in found.items():
        assert (gradient - expected[step]).norm() <= tolerance(name) * expected[step].norm(), f"step {step}"
    for key in ("loss", "gradient_norm"):
        ours, theirs = (figures(folder / name / one, key) for one in (layout, "whole"))
        assert ours == pytest.approx(theirs, rel=tolerance(name))
        assert len(set(ours)) == len(found), "every step is logged once"


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_the_saved_weights_are_those_of_whole_batches(folder: Path, name: str, layout: str) -> None:
    kind = "model" if CLASSES[name]["method"]["kind"] == "full" else "*"
    (file,) = (folder / name / layout).glob(f"{kind}/*.safetensors")
    found, expected = load_file(file), load_file(folder / name / "whole" / file.parent.name / file.name)
    assert found.keys() == expected.keys()
    for tensor in found:
        torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_every_row_is_predicted_once_and_in_order(folder: Path, name: str, layout: str) -> None:
    found, expected = (
        [json.loads(line) for line in (folder / name / one / "predictions.jsonl").read_text().splitlines()]
        for one in (layout, "whole")
    )
    assert [one["index"] for one in found] == list(range(13))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["reference"] == theirs["reference"]
        for key, value in theirs["prediction"].items():
            assert ours["prediction"][key] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-4))


@pytest.mark.parametrize(("name", "layout"), COUNTED)
def test_gradients_are_summed_over_processes_once_in_a_step(folder: Path, name: str, layout: str) -> None:
    facts = json.loads((folder / name / layout / layout_cells.FACTS).read_text())
    assert facts["messages"] == COUNTED[name, layout]
