"""Every shipped configuration trains on its real data, and on its real backbone or the first blocks of it."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftkit import shipped
from peftkit.backbones.bundled import fetch
from peftkit.cli import main
from peftkit.config import load_run
from peftkit.schema import Section

ROOT = Path(__file__).parents[1]

STEPS = ["training.max_steps=2", "training.batch_size=4", "training.evaluate_every=epoch"]
ROWS = {"reuters_r8": 100, "semeval2010_task8": 240, "wnut17": 300}
"""Rows enough that those of train have every label of the others; 40 are enough for the other data sets."""
WORDS = ["task.max_length=8"]
SPANS = ["task.max_length=64", "task.stride=16"]
FEW = ["task.data.limit=8", "training.evaluation_batch_size=8"]
FEWER = ["task.data.limit=4", "training.batch_size=2", "training.evaluation_batch_size=4"]
ANSWERS = ["task.generation={max_new_tokens: 2, limit: 2, metrics: [rouge]}"]
LITTLE = {
    "sequence_classification": WORDS,
    "token_classification": [*WORDS, "task.long_rows=cut"],
    "relation_extraction": ["task.max_length=32"],
    "question_answering": [*SPANS, "task.data.limit=12"],
    "label_words": [*FEW, "task.max_length=160"],
    "plain_text": [*FEW, "task.max_length=48"],
    "completion": [*FEWER, *ANSWERS, "task.max_length=96"],
    "chat": [*FEWER, *ANSWERS],
    "seq2seq": ANSWERS,
}
"""By task: little work a row."""
WHOLE = {"gsm8k_lora", "sst2_label_words_prompting"}
"""On SmolLM2 with all its 30 blocks, which take most of the time; the other configurations see two of them."""
INTENTS = "task.data={train: '${PEFTKIT_DATA}/banking77/train.csv', dev_fraction: 0.03, test_fraction: 0.03}"


@pytest.fixture(scope="module")
def tiny_t5(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbone that `benchmarks/tiny_t5.py` makes."""
    folder = tmp_path_factory.mktemp("backbone") / "tiny_t5"
    make = runpy.run_path(str(ROOT / "benchmarks" / "tiny_t5.py"))["make"]
    make(real_data / "multi30k_en_de" / "train.jsonl", folder)
    return folder


@pytest.fixture(scope="module")
def first_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's embeddings, first two blocks, final norm, head and tokenizer."""
    whole, folder = fetch("bundled:smollm2-135m"), tmp_path_factory.mktemp("backbone") / "smollm2"
    model = AutoModelForCausalLM.from_pretrained(whole, num_hidden_layers=2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("config", shipped.configs(), ids=lambda path: path.stem)
def test_every_shipped_configuration_runs(config: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if "PEFTKIT_DATA" in config.read_text():
        request.getfixturevalue("real_data")
    run, data = load_run(config), config.stem.rsplit("_", 1)[0]
    rows = next((count for name, count in ROWS.items() if data.startswith(name)), 40)
    limit = [INTENTS] if data == "banking77" else [f"task.data.limit={rows}"]
    overrides = [*STEPS, *limit, *LITTLE[run.task.kind], f"output.folder={tmp_path / 'run'}"]
    if run.method.kind == "adalora":
        overrides.append("training.max_steps=6")  # room for a schedule
    if data == "multi30k_en_de":
        overrides.append(f"backbone.name={request.getfixturevalue('tiny_t5')}")
    elif run.backbone.name == "bundled:smollm2-135m" and config.stem not in WHOLE:
        overrides.append(f"backbone.name={request.getfixturevalue('first_blocks')}")
    assert main(["train", str(config), *overrides]) == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert {"after"} | ({"before"} if run.method.trains else set()) <= set(scores) <= {"majority", "before", "after"}
    assert all(math.isfinite(value) for one in scores.values() for value in one["values"].values())


@pytest.mark.parametrize("sequence", shipped.sequences(), ids=lambda path: path.stem)
def test_every_shipped_sequence_runs(
    sequence: Path, tmp_path: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / sequence.name
    config.write_text(sequence.read_text().replace("limit: 300", "limit: 100").replace("length: 64", "length: 8"))
    steps = ["training.max_steps=1", "training.batch_size=4", "training.evaluate_every=1", "seeds=[1]"]
    recipe = shipped.folder() / "continual.py"
    overrides = ["--config", str(config), *steps, f"output.folder={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", [str(recipe), *overrides])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(recipe), run_name="__main__")
    assert ended.value.code == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    (seed,) = found["seeds"]
    assert [len(row) for row in seed["matrix"]] == [len(found["tasks"])] * len(found["tasks"])
    assert all(math.isfinite(value) for value in found["mean"].values())


def test_shipped_configurations_share_one_data_root() -> None:
    for config in shipped.configs():
        data = load_run(config).task.data
        assert isinstance(data, Section)
        named = [value for value in (data.train, data.dev, data.test) if value]
        assert data.name or all(str(value).startswith("${PEFTKIT_DATA}/") for value in named)
