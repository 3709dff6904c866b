"""The model card of a run: figures from its own files, metadata that the Hub's library reads."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from peftkit.cli import main


def written(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    capfd.readouterr()
    assert main(["card", *arguments]) == 0
    return capfd.readouterr().out


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson 1927, by its formula."""
    z, share = 1.959963984540054, right / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def test_a_card_says_what_the_run_holds(small_run: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    run = small_run("sentiment")
    manifest = json.loads((run / "manifest.json").read_text())
    text = written(capfd, str(run))
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-classification")
    assert "peftkit" in data.tags
    training = manifest["training"]
    assert f"{training['trainable_parameters']:,} trained of {training['total_parameters']:,}" in text
    for fact in (manifest["run_id"], manifest["data"], manifest["backbone"]["weights_sha256"], *manifest["notes"]):
        assert fact in text
    count = len((run / "predictions.jsonl").read_text().splitlines())
    accuracy = manifest["scores"]["after"]["accuracy"]
    found = re.search(r"Accuracy ([\d.]+), 95% interval ([\d.]+) to ([\d.]+) \((\d+) of (\d+)", text)
    assert found
    assert (int(found[4]), int(found[5])) == (round(accuracy * count), count)
    assert [float(found[n]) for n in (2, 3)] == pytest.approx(wilson(int(found[4]), count), abs=5e-5)


def test_the_card_of_a_merged_model_has_the_merge_and_loads_by_transformers(
    small_run: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, merged, file = small_run("sentiment"), tmp_path / "merged", tmp_path / "README.md"
    assert main(["merge", str(run), str(merged)]) == 0
    written(capfd, str(run), "--merged", str(merged), "--out", str(file))
    text = file.read_text()
    assert ModelCard(text).data.library_name == "transformers"
    report = json.loads((merged / "peftkit_merge.json").read_text())
    assert f"{report['equal_predictions']:,} of {report['rows']:,} predictions equal" in text
    assert f"relative {report['relative']:.2g}" in text
    loading = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert loading
    found: dict[str, object] = {}
    exec(loading[1], found)
    assert type(found["model"]).__name__ == "BertForSequenceClassification"
    assert main(["card", str(run), "--out", str(file)]) == 2
    assert "exists" in capfd.readouterr().err


def test_emissions_are_what_the_reader_knows_of_the_machine(
    small_run: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    run = small_run("sentiment")
    manifest = json.loads((run / "manifest.json").read_text())
    text = written(capfd, str(run))
    assert "co2_eq_emissions" not in text and "were not measured" in text and "--watts W" in text
    assert f"({manifest['hardware']['cores']} cores)" in text
    text = written(capfd, str(run), "--watts", "2e6", "--co2-per-kwh", "300")
    found = ModelCard(text, ignore_metadata_errors=False).data.co2_eq_emissions
    hours = manifest["training"]["seconds"] / 3600
    assert found["emissions"] == pytest.approx(hours * 2000 * 300, abs=1e-3)
    assert found["source"].startswith("estimate: ") and found["training_type"] == "fine-tuning"
    assert found["hardware_used"].endswith("cores)") and "estimated, not measured" in text
    text = written(capfd, str(run), "--watts", "65")
    assert "co2_eq_emissions" not in text and f"{hours * 0.065:.3g} kWh" in text
    for options in (["--watts", "0"], ["--watts", "nan"], ["--co2-per-kwh", "300"], ["--watts", "much"]):
        assert main(["card", str(run), *options]) == 2
        assert options[0] in capfd.readouterr().err


def test_a_merge_of_another_run_and_other_folders_are_refused(
    small_run: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, merged = small_run("sentiment"), tmp_path / "merged"
    merged.mkdir()
    for text, code, words in (
        (None, 2, "has no peftkit_merge.json"),
        ('{"run_id": "0"}', 1, "was merged from run 0"),
        ("{", 1, "is damaged"),
    ):
        if text is not None:
            (merged / "peftkit_merge.json").write_text(text)
        assert main(["card", str(run), "--merged", str(merged)]) == code
        assert words in capfd.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    manifest = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(manifest.replace('"seconds":', '"seconds": 1, "other":'))
    assert main(["card", str(copy)]) == 1
    assert main(["card", str(merged)]) == 2


def test_what_is_no_share_of_examples_has_no_interval(
    small_run: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert "no interval" in written(capfd, str(small_run("writer_prefix")))
