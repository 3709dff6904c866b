"""The contract of a task, with every family of methods: it learns, is scored, saved, and predicts what it predicted.

Every cell trains on all rows at once, so that the first loss is the untrained model's and the last one the trained
model's, both of the same rows. There is no dropout; only the masks of masked language models are drawn anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_jsonl
from task_contract import BACKBONES, ENTRIES, Entry, FreshProcess, registered

from peftkit.backbones.load import Head
from peftkit.config import Run
from peftkit.data.files import Rows, read_file
from peftkit.errors import PeftkitError
from peftkit.evaluation import predict
from peftkit.experiment import Result, train
from peftkit.prepare import encode_split
from peftkit.session import inference_accelerator

LEARNT = 0.05
"""Most nats an item (squared error: squared units) that full fine-tuning may end with."""
LESS = 0.85
"""Most of the untrained model's loss that any other method may end with."""
STEPS = 24
THOROUGH = ("full", "lora")
"""Methods for which the fresh process is asked about everything."""
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"},
    "adalora": {"kind": "adalora", "target_rank": 2, "initial_rank": 4, "allocate_every": 1}
    | {"warmup_fraction": 0.2, "final_fraction": 0.2},
    "bottleneck": {"kind": "bottleneck", "bottleneck_size": 8},
    "prefix": {"kind": "prefix", "length": 4},
    "prompt": {"kind": "prompt", "length": 4},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera", "rank": 8},
    "partial": {"kind": "bitfit"},
}
WITHOUT_BIASES = {"partial": {"kind": "top_layers", "layers": 1}}
"""In place of BitFit, on Llama and T5."""
RATE = 5e-2
RATES = {"full": 5e-3, "lora": 2e-2, "adalora": 3e-2, "prompt": 0.1}
RATES_WITHOUT_HEAD = RATES | {"prefix": 0.3, "prompt": 0.6, "ia3": 0.3, "partial": 1e-2, "full": 1e-2}
"""A classifier's new head learns fast with any method; without one these few numbers must do it all."""


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, save in BACKBONES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        save(folders[name])
    return folders


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the time would go into curves, which have tests of their own."""
    monkeypatch.setattr("peftkit.training.loop.learning_curve", lambda *_: None)


@pytest.fixture(scope="module")
def fresh() -> Iterator[FreshProcess]:
    process = FreshProcess()
    yield process
    process.close()


def run_of(name: str, entry: Entry, method: str, backbone: Path, folder: Path) -> Run:
    """The run of a cell, read as from a configuration file."""
    kind, _, part = name.partition("/")
    part_name = {"sequence_classification": "problem", "plain_text": "objective"}.get(kind)
    data = str(write_jsonl(folder / "rows.jsonl", entry.rows()))
    task = {"kind": kind, "data": {"train": data, "dev": data}, "max_length": 24} | entry.settings
    steps = entry.full_steps if method == "full" else STEPS
    has_head = entry.backbone == "bert" and part != "masked"
    rates = RATES if has_head else RATES_WITHOUT_HEAD
    settings = METHODS | ({} if entry.backbone == "bert" else WITHOUT_BIASES)
    config = {
        "backbone": {"name": str(backbone)},
        "task": task | ({part_name: part} if part_name else {}),
        "method": settings[method],
        "training": {"learning_rate": rates.get(method, RATE), "max_steps": steps, "batch_size": 64, "seed": 1}
        | {"evaluate_every": steps, "warmup_steps": 2, "keep_best": False},
        "audit": {"overlap": 1.0, "duplicates": 1.0},
        "output": {"folder": str(folder / "run")},
    }
    return Run.model_validate_json(json.dumps(config), strict=True)


def shown(run: Run, result: Result, rows: Rows) -> list[dict[str, Any]]:
    """What `peftkit predict` is to show, of the model that has just been trained."""
    split = result.evaluations["after"].split
    encoded = encode_split(run, "rows", rows, Head("", split.labels), split.tokenizer, supervised=False)
    predictions = predict(result.model, run.task, encoded, inference_accelerator(run))
    described = [run.task.describe(one, record) for one, record in zip(predictions, rows.records, strict=True)]
    plain: list[dict[str, Any]] = json.loads(json.dumps(described))
    return plain


def same(one: Any, other: Any) -> bool:
    """Equal, floats up to rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == pytest.approx(other, rel=1e-5, abs=1e-5)) if isinstance(one, float) else bool(one == other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ENTRIES)
def test_contract(name: str, method: str, backbones: Any, fresh: FreshProcess, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    run = run_of(name, entry, method, backbones[entry.backbone], tmp_path)
    if method in entry.refused:
        with pytest.raises(PeftkitError, match=entry.refused[method]):
            train(run)
        return
    result = train(run)
    check_learnt(entry, method, result)
    folder, rows = str(tmp_path / "run"), tmp_path / "rows.jsonl"
    check_predicted(fresh, run, result, read_file(rows), "--file", str(rows))
    if method in THOROUGH:
        given = run.task.rows_from_text(entry.texts, entry.pairs or None)
        check_predicted(fresh, run, result, given, *entry.texts, *(f"--text-pair={pair}" for pair in entry.pairs))
        scores = json.loads(fresh.run("evaluate", folder, "--json"))["scores"]
        assert same(scores, result.evaluations["after"].scores.values)


def check_predicted(fresh: FreshProcess, run: Run, result: Result, rows: Rows, *arguments: str) -> None:
    """What was saved predicts in another process what the trained model predicts in this one."""
    lines = fresh.run("predict", str(result.folder), *arguments).splitlines()
    assert len(lines) == len(rows)
    assert same([json.loads(line) for line in lines], shown(run, result, rows))


def check_learnt(entry: Entry, method: str, result: Result) -> None:
    """The loss has fallen, on the rows themselves; where everything trains, to almost nothing."""
    losses = result.record.losses
    before, after = (result.evaluations[name].scores for name in ("before", "after"))
    assert after.examples == before.examples > 0
    if method == "full":
        assert losses[-1] < LEARNT, losses
        assert {name: after.values[name] for name in entry.solved} == pytest.approx(entry.solved, rel=0.02)
        assert after.goodness > before.goodness
    else:
        assert losses[-1] < LESS * losses[0], losses
    if after.headline == "loss":
        assert after.value < before.value


def test_every_task_in_the_registry_has_an_entry() -> None:
    assert set(ENTRIES) == set(registered())
