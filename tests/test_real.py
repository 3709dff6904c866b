"""The real backbone, and real data where it is at hand."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peftkit import shipped
from peftkit.cli import main

# rows enough that training has every label, and little work for each
SHORT = ["training.max_steps=6", "training.batch_size=4", "training.evaluate_every=epoch", "task.max_length=8"]
PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base, run, merged, texts = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
labels = len(json.load(open(f"{run}/manifest.json"))["head"]["labels"])
tokenizer = AutoTokenizer.from_pretrained(merged)
batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
adapted = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels),
                                    f"{run}/adapter")
with torch.no_grad():
    for model in (adapted, AutoModelForSequenceClassification.from_pretrained(merged)):
        print(json.dumps(model.eval()(**batch).logits.tolist()))
"""


@pytest.fixture(scope="module")
def reuters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short real run: LoRA on MiniLM, 240 rows of Reuters R8."""
    folder = tmp_path_factory.mktemp("reuters") / "run"
    config = shipped.folder() / "configs" / "reuters_r8_lora.yaml"
    overrides = ["task.data.limit=240", "task.max_length=32", "training.learning_rate=3e-3"]
    overrides += ["training.max_steps=100", "training.evaluate_every=100", f"output.folder={folder}"]
    assert main(["train", str(config), *overrides]) == 0
    return folder


def test_training_beats_the_majority_answer(reuters: Path) -> None:
    scores = json.loads((reuters / "scores.json").read_text())
    assert scores["after"]["values"]["accuracy"] > scores["majority"]["values"]["accuracy"] + 0.15


def test_plain_peft_and_plain_transformers_compute_the_same(reuters: Path, tmp_path: Path) -> None:
    """In a fresh process without peftkit, against the logits of the run read back by peftkit."""
    import torch

    from peftkit.artifacts.store import load_run as load_saved
    from peftkit.backbones.bundled import fetch

    saved = load_saved(reuters)
    texts = [str(record["Text"]) for record in saved.run.task.splits().held_out.head(20).records]
    batch = saved.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        ours = saved.model(**batch).logits
    merged = tmp_path / "merged"
    assert main(["merge", str(reuters), str(merged)]) == 0
    arguments = [sys.executable, "-c", PLAIN, str(fetch("bundled:minilm")), str(reuters), str(merged)]
    printed = subprocess.run([*arguments, json.dumps(texts)], check=True, capture_output=True, text=True).stdout
    tolerance = 1e-5 * max(1.0, float(ours.abs().max()))
    for line in printed.splitlines():
        assert float((torch.tensor(json.loads(line)) - ours).abs().max()) <= tolerance


RECIPES = {
    "lora": ["method={kind: lora}"],
    "qlora": ["method={kind: lora}", "backbone.quantization={kind: nf4}"],
    "adalora": ["method={kind: adalora}"],
    "bottleneck_adapters": ["method={kind: bottleneck, bottleneck_size: 8}"],
    "prefix": ["method={kind: prefix}"],
    "from_peft": ["method={kind: ia3}"],
    "partial": ["method={kind: bitfit}"],
    "head": ["method={kind: head}"],
    "full": ["method={kind: full}"],
}
"""With what the configuration says otherwise."""


def test_no_recipe_is_forgotten() -> None:
    others = {"prompting", "continual"}  # have tests of their own: of language models, and of several tasks
    assert set(RECIPES) | others == {file.stem for file in shipped.recipes()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_as_a_script(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_config: Callable[..., Path]
) -> None:
    """A recipe does what `peftkit train` does; one in a process of its own, the others with what is imported here."""
    if recipe == "qlora":  # packs rows of 64 and more
        config, short = shipped.folder() / "configs" / "reuters_r8_lora.yaml", [*SHORT, "task.data.limit=100"]
    else:
        config, short = write_config(), ["training.epochs=1"]
    arguments = [str(config), *short, *RECIPES[recipe]]
    folders = [tmp_path / name for name in ("recipe", "verb")]
    command = [str(shipped.folder() / f"{recipe}.py"), "--config", *arguments, f"output.folder={folders[0]}"]
    if recipe == "lora":
        subprocess.run([sys.executable, *command], check=True)
    else:
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(command[0], run_name="__main__")
        assert ended.value.code == 0
    assert main(["train", *arguments, f"output.folder={folders[1]}"]) == 0
    assert _losses(folders[0]) == _losses(folders[1])


@pytest.fixture(scope="module")
def adalora_on_sst2(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """AdaLoRA on SST-2 twice, evaluated at its end and after every third step."""
    config = shipped.folder() / "configs" / "sst2_adalora.yaml"
    short = ["training.max_steps=24", "training.batch_size=8", "task.data.limit=120", "task.max_length=16"]
    short += ["method.allocate_every=2", "training.keep_best=false"]
    folders = {every: tmp_path_factory.mktemp("adalora") / "run" for every in ("24", "3")}
    for every, folder in folders.items():
        arguments = [*short, f"training.evaluate_every={every}", f"output.folder={folder}"]
        assert main(["train", str(config), *arguments]) == 0
    return folders


def test_the_final_rank_of_adalora_is_its_budget(adalora_on_sst2: dict[str, Path]) -> None:
    from safetensors import safe_open

    folder = adalora_on_sst2["24"]
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        ranks = [file.get_slice(name).get_shape()[0] for name in file.keys() if ".lora_A." in name]  # noqa: SIM118
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    trajectory = [event["total_rank"] for event in events if "total_rank" in event]
    matrices = 6 * 6  # query, key, value, output, up and down in each of six layers
    assert sum(ranks) == 8 * matrices == trajectory[-1]
    assert trajectory[0] == 12 * matrices
    assert trajectory == sorted(trajectory, reverse=True)
    assert (folder / "rank_trajectory.png").stat().st_size > 10_000


def test_evaluation_does_not_change_adalora(adalora_on_sst2: dict[str, Path]) -> None:
    rarely, often = (adalora_on_sst2[every] for every in ("24", "3"))
    assert _losses(rarely) == _losses(often)
    adapters = [folder / "adapter" / "adapter_model.safetensors" for folder in (rarely, often)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def _losses(folder: Path) -> list[str]:
    """The loss of every step, to the last bit."""
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [float(event["loss"]).hex() for event in events if "loss" in event]
