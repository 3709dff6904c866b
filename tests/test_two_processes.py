"""Two CPU processes train like one: every family of methods through its recipe, in one launch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import write_jsonl
from safetensors.torch import load_file

from peftkit.artifacts.store import load_run
from peftkit.cli import main

ROOT = Path(__file__).parents[1]
TRAINING = {"learning_rate": 0.003, "epochs": 3, "batch_size": 16, "micro_batch_size": 3, "seed": 1}
SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"}, "task": {"loss": "weighted"}},
    "adalora": {
        "method": {"kind": "adalora", "target_rank": 2, "initial_rank": 4, "alpha": 8},
        "training": {"max_steps": 20, "keep_best": False},
    },
    "bottleneck_adapters": {
        "method": {"kind": "bottleneck", "placement": "parallel", "bottleneck_size": 8, "train_layernorm": True}
    },
    "prefix": {
        "method": {"kind": "prefix", "length": 4, "reparametrization_size": 8},
        "training": {"gradient_checkpointing": True},
    },
}
"""By recipe."""
SCRIPT = """
import runpy, sys
for recipe, config in zip(sys.argv[1::2], sys.argv[2::2]):
    sys.argv[:] = [recipe, "--config", config]
    try:
        runpy.run_path(recipe, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, toy_data: Path) -> Path:
    """A folder that holds a run for each recipe and number of processes: `lora/one`, `lora/two`, …"""
    folder = tmp_path_factory.mktemp("processes")
    lines = (toy_data / "sentiment_train.jsonl").read_text().splitlines()
    uneven = write_jsonl(folder / "uneven.jsonl", [json.loads(line) for line in lines[:33]])  # 16, 16 and 1
    data = {"train": str(uneven)} | {name: str(toy_data / f"sentiment_{name}.jsonl") for name in ("dev", "test")}
    configs = {recipe: _write(folder, recipe, tiny_bert, data) for recipe in SECTIONS}
    _launch(folder, configs)
    for recipe, config in configs.items():
        assert main(["train", str(config), f"output.folder={folder / recipe / 'one'}"]) == 0
    return folder


def _write(folder: Path, recipe: str, backbone: Path, data: dict[str, str]) -> Path:
    sections = SECTIONS[recipe]
    config = {
        "backbone": {"name": str(backbone)},
        "task": {"kind": "sequence_classification", "data": data, "max_length": 32} | sections.get("task", {}),
        "method": sections["method"],
        "training": TRAINING | sections.get("training", {}),
        "output": {"folder": str(folder / recipe / "two")},
    }
    file = folder / f"{recipe}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def _launch(folder: Path, configs: dict[str, Path]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = folder / "every_recipe.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launcher, "--main_process_port", str(port), "--num_machines", "1", "--mixed_precision", "no"]
    pairs = [text for recipe, config in configs.items() for text in (str(ROOT / f"recipes/{recipe}.py"), str(config))]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), *pairs], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def _events(folder: Path, key: str) -> Iterator[float]:
    events = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return (event[key] for event in events if key in event)


@pytest.mark.parametrize("recipe", SECTIONS)
def test_every_figure_is_that_of_one_process(folders: Path, recipe: str) -> None:
    two, one = (json.loads((folders / recipe / name / "manifest.json").read_text()) for name in ("two", "one"))
    assert (two["training"]["processes"], one["training"]["processes"]) == (2, 1)
    assert two["training"]["tokens"] == one["training"]["tokens"]
    keys = ("loss", "gradient_norm", "dev_accuracy", *(("penalty", "total_rank") if recipe == "adalora" else ()))
    for key in keys:
        both = [list(_events(folders / recipe / name, key)) for name in ("two", "one")]
        assert both[0] == pytest.approx(both[1], abs=1e-5)
    losses = list(_events(folders / recipe / "two", "loss"))
    assert len(set(losses)) == len(losses) == (20 if recipe == "adalora" else 9)


@pytest.mark.parametrize("recipe", SECTIONS)
def test_the_saved_weights_are_those_of_one_process(folders: Path, recipe: str) -> None:
    (file,) = (folders / recipe / "two" / "adapter").glob("*.safetensors")
    two, one = (load_file(folders / recipe / name / "adapter" / file.name) for name in ("two", "one"))
    assert two.keys() == one.keys()
    for name in two:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4)
    if recipe == "adalora":
        configs = [
            json.loads((folders / recipe / n / "adapter/adapter_config.json").read_text()) for n in ("two", "one")
        ]
        assert configs[0]["target_modules"] == configs[1]["target_modules"]
        assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]
    if recipe == "bottleneck_adapters":
        state = load_run(folders / recipe / "two").model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in two.items())


@pytest.mark.parametrize("recipe", SECTIONS)
def test_every_row_is_predicted_once_and_in_order(folders: Path, recipe: str) -> None:
    lines = [(folders / recipe / name / "predictions.jsonl").read_text().splitlines() for name in ("two", "one")]
    pairs = list(zip(*(map(json.loads, some) for some in lines), strict=True))
    assert [a["index"] for a, _ in pairs] == list(range(60))
    for a, b in pairs:
        assert (a["place"], a["reference"]) == (b["place"], b["reference"])
        assert a["prediction"]["probabilities"] == pytest.approx(b["prediction"]["probabilities"], abs=1e-4)
