"""docs/results.md says what the result files say, and every run beats its baseline."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from peftkit import shipped
from peftkit.config import load_run

ROOT = Path(__file__).parents[1]
RUNS = json.loads((ROOT / "benchmarks" / "results" / "tasks.json").read_text(encoding="utf-8"))["runs"]


def test_the_page_is_that_of_the_result_files() -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "results_page.py"))["page"]()
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == made


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["config"])
def test_every_run_beats_its_baseline(run: dict[str, Any]) -> None:
    made, scores = load_run(shipped.folder() / "configs" / f"{run['config']}.yaml"), run["scores"]
    name = made.task.headline
    sign = -1 if name == "loss" else 1
    baselines = [scores[when][name] for when in ("majority", "before") if when in scores]
    assert baselines or not made.method.trains
    assert all(sign * scores["after"][name] > sign * one for one in baselines)


@pytest.mark.parametrize("data", ["gsm8k", "e2e_nlg", "dialogsum", "sst2_label_words"])
def test_training_beats_prompting(data: str) -> None:
    scores = {run["config"]: run["scores"]["after"] for run in RUNS}
    name = "accuracy" if data.startswith("sst2") else "loss"
    tuned = scores.pop(f"{data}_lora")[name]
    prompted = [one[name] for config, one in scores.items() if config.startswith(data)]
    assert prompted
    assert all(tuned > one if name == "accuracy" else tuned < one for one in prompted)
