"""Models shared out between two CPU processes by torch's fully_shard: what they hold, write, resume and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layout_cells
import pytest
import torch
from architectures import CAUSAL, SEQ2SEQ, SEQUENCE, Place, save_checkpoint
from conftest import save_word_tokenizer, sentiment_rows, write_jsonl
from safetensors.torch import load_file

from peftkit.artifacts.store import load_run
from peftkit.cli import main
from peftkit.config import Run
from peftkit.errors import UsageError
from peftkit.training.sharding import Sharding, asked_for, sharding_of

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LORA = {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"}
FULL = {"kind": "full"}
SGD = {"optimizer": "sgd", "learning_rate": 0.02}
GENERATION = {"max_new_tokens": 6, "limit": 2, "metrics": ["exact_match"]}
COMPLETION = {"kind": "completion", "prompt": "text", "completion": "label", "max_length": 24, "generation": GENERATION}
SEQ2SEQ_TASK = {"kind": "seq2seq", "source": "text", "target": "label", "max_target_length": 8}
ALIKE: dict[str, dict[str, Any]] = {
    # B is frozen, and saved
    "frozen_adapter": {"backbone": Place("bert", SEQUENCE), "method": LORA | {"initialization": "mica"}},
    # its output projection is its embeddings
    "tied_full": {"backbone": Place("gpt2", CAUSAL), "task": COMPLETION, "method": FULL, "training": SGD},
    "encoder_decoder": {
        "backbone": Place("bart", SEQ2SEQ),
        "task": SEQ2SEQ_TASK | {"max_length": 24, "generation": GENERATION | {"beams": 2}},
        "method": LORA,
    },
    # its layers are one block
    "shared_block": {"backbone": Place("albert", SEQUENCE), "method": FULL, "training": SGD},
    "offloaded": {
        "backbone": Place("bert", SEQUENCE),
        "method": FULL,
        "training": SGD | {"adversarial": 0.5},
        "environment": FSDP | {"FSDP_OFFLOAD_PARAMS": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"},
    },
}
"""Trained once by one process, and once by two that share the model out."""
REGULARISED = {"training": {"r_drop": 0.5}, "method": LORA | {"dropout": 0.1}}
STOPPED: dict[str, dict[str, Any]] = {
    "lora_ddp": REGULARISED | {"environment": {}},
    "lora_fsdp": REGULARISED,
    "full_fsdp": {"method": FULL},
}
"""Trained twice by two processes: at once, and in two goes."""
STOP_AFTER = 3
CHECKS = (
    "several_dtypes",
    "other_weights_in_one_process",
    "a_trained_number",
    "passes_of_one_process_alone",
    "a_failure_in_one_process",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs: `tied_full/one`, `tied_full/two`, …, `lora_ddp/at_once`, `lora_ddp/in_two`, …"""
    folder = tmp_path_factory.mktemp("sharding")
    for seed, (split, count) in enumerate({"train": 17, "dev": 5, "test": 13}.items()):
        write_jsonl(folder / f"{split}.jsonl", sentiment_rows(count, seed))
    cells = [_cell(folder, name, one, "two") for name, one in ALIKE.items()]
    for name, one in STOPPED.items():
        cells.append(_cell(folder, name, one, "at_once"))
        cells.append(_cell(folder, name, one, "in_two") | {"stop_after": STOP_AFTER})
        cells.append(_cell(folder, name, one, "in_two"))
    layout_cells.launch([*cells, *({"check": check} for check in CHECKS)], folder / "cells.json")
    for name, one in ALIKE.items():
        layout_cells.run_cell(_cell(folder, name, one | {"environment": {}}, "one"))
    return folder


def _cell(folder: Path, name: str, one: dict[str, Any], last: str) -> dict[str, Any]:
    backbone = save_checkpoint(one.get("backbone", Place("bert", SEQUENCE)), folder)
    save_word_tokenizer(backbone)
    method, task = one["method"], one.get("task")
    run = layout_cells.config(folder / name / last, backbone, folder, method, task, **one.get("training", {}))
    if name in STOPPED:
        run["backbone"]["dropout"] = 0.1
    return {"config": run, "environment": one.get("environment", FSDP)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    return load_file(file)


def predictions(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["prediction"] for line in (run / "predictions.jsonl").read_text().splitlines()]


def facts(run: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((run / layout_cells.FACTS).read_text())
    return found


@pytest.mark.parametrize("name", ALIKE)
def test_weights_and_predictions_are_those_of_one_process(folder: Path, name: str) -> None:
    one, two = folder / name / "one", folder / name / "two"
    found, expected = weights(two), weights(one)
    assert found.keys() == expected.keys()
    for tensor in found:
        torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=1e-4)
    pairs = list(zip(predictions(two), predictions(one), strict=True))
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"text", "label"}:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-3)
        assert all(ours.get(key) == theirs.get(key) for key in ("text", "label"))
    if "generation" in ALIKE[name].get("task", {}):
        written = ["text" in ours for ours, _ in pairs]
        assert sum(written) == 2, "one batch, for which one process writes while the other has nothing to write"


def test_each_process_holds_its_half_of_what_is_shared(folder: Path) -> None:
    lora, full, ddp = (facts(folder / name / "at_once") for name in ("lora_fsdp", "full_fsdp", "lora_ddp"))
    assert lora["frozen"] / 2 <= lora["frozen_here"] < 0.51 * lora["frozen"]
    assert lora["trained_here"] == lora["trained"] == ddp["trained"]
    assert ddp["frozen_here"] == ddp["frozen"] == lora["frozen"]
    assert (full["frozen"], full["trained"] / 2) == (0, pytest.approx(full["trained_here"], rel=0.02))
    tied = facts(folder / "tied_full" / "two")
    assert tied["trained"] == facts(folder / "tied_full" / "one")["trained"]


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_in_two_goes_ends_with_the_bytes_of_one_at_once(folder: Path, name: str) -> None:
    at_once, in_two = (folder / name / last for last in ("at_once", "in_two"))
    (file,) = [*at_once.glob("adapter/*.safetensors"), *at_once.glob("model/*.safetensors")]
    assert (in_two / file.relative_to(at_once)).read_bytes() == file.read_bytes()
    assert predictions(in_two) == predictions(at_once)
    for key in ("loss", "gradient_norm", "dev_accuracy"):
        logs = (
            [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (at_once, in_two)
        )
        first, second = ([event[key] for event in log if key in event] for log in logs)
        assert first == second


def test_sharded_and_not_two_processes_train_alike_with_dropout(folder: Path) -> None:
    ddp, fsdp = (weights(folder / name / "at_once") for name in ("lora_ddp", "lora_fsdp"))
    for name in ddp:
        torch.testing.assert_close(fsdp[name], ddp[name], rtol=0, atol=1e-4)


def test_what_was_trained_in_shares_loads_and_merges_like_any_run(folder: Path) -> None:
    run = folder / "lora_fsdp" / "at_once"
    assert main(["merge", str(run), str(folder / "merged")]) == 0
    full = folder / "full_fsdp" / "at_once"
    state = load_run(full).model.state_dict()
    for name, tensor in weights(full).items():
        torch.testing.assert_close(state[name], tensor)
    assert json.loads((full / "model" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    assert json.loads((full / "manifest.json").read_text())["training"]["total_parameters"] == sum(
        tensor.numel() for tensor in weights(full).values()
    )


@pytest.mark.usefixtures("folder")
def test_the_checks_in_two_processes_held() -> None:
    """`launch` fails where one of `CHECKS` does."""


class TestWhatTheLauncherSays:
    def test_it_is_read(self) -> None:
        assert asked_for({}) is asked_for({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}) is None
        assert asked_for(FSDP) == Sharding(reshard_after_forward=True, offload=False)
        said = {"FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_OFFLOAD_PARAMS": "true"}
        assert asked_for(FSDP | said) == Sharding(reshard_after_forward=False, offload=True)

    @pytest.mark.parametrize(
        "setting",
        [{"optimizer": "adafactor"}, {"optimizer": "adamw_8bit"}, {"optimizer": "paged_adamw"}, {"precision": "fp16"}],
    )
    def test_what_cannot_be_shared_out_is_refused(
        self, setting: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in FSDP.items():
            monkeypatch.setenv(name, value)
        (name, value), *_ = setting.items()
        for method in (FULL, {"kind": "top_layers"}):
            tree = layout_cells.config(tmp_path / "run", tmp_path, tmp_path, method, **setting)
            with pytest.raises(UsageError, match=f"training.{name}: {value} does not work on what method"):
                sharding_of(Run.model_validate_json(json.dumps(tree)))
        tree = layout_cells.config(tmp_path / "run", tmp_path, tmp_path, LORA, **setting)
        assert sharding_of(Run.model_validate_json(json.dumps(tree))) == Sharding()

    def test_one_process_says_that_it_does_not_shard(
        self, write_config: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        for name, value in FSDP.items():
            monkeypatch.setenv(name, value)
        assert main(["train", str(write_config()), "training.max_steps=1"]) == 0
        assert "one process: there is nobody to share the model with" in capfd.readouterr().out
