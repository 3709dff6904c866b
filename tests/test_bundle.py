"""A run bundled with its backbone: read by a process of its own, with nothing else of the machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.artifacts import bundle as bundling
from peftkit.artifacts import bundle_check
from peftkit.artifacts.inference import load_predictor
from peftkit.cli import main

TEXTS = ["a good film", "the sad , sad story was very dark"]
FRESH = """
import json, sys
import peftkit
print(json.dumps(peftkit.load_predictor(sys.argv[1])(json.loads(sys.argv[2]))))
assert not [name for name in sys.modules if name.startswith("peftkit.training")]
"""


def refused(capfd: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    capfd.readouterr()
    assert main(arguments) == code
    return capfd.readouterr().err


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process stand for the other one, whose start takes seconds."""
    monkeypatch.setattr(bundling, "_in_another_process", bundle_check.main)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["prompt", "bottleneck", "writer_prefix", "sentiment", "answers"])
def test_every_method_can_be_bundled(name: str, small_run: Callable[[str], Path], tmp_path: Path) -> None:
    run, target = small_run(name), tmp_path / "bundle"
    assert main(["bundle", str(run), str(target)]) == 0
    pairs = ["film and music", "story"] if name == "answers" else None
    assert _close(load_predictor(target)(TEXTS, pairs), load_predictor(run)(TEXTS, pairs))


def test_a_bundle_needs_nothing_but_itself(
    small_run: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, target = small_run("prefix"), tmp_path / "bundle"
    error = refused(capfd, 1, "merge", str(run), str(tmp_path / "merged"))
    assert "peftkit bundle RUN OUT" in error and not (tmp_path / "merged").exists()
    assert main(["bundle", str(run), str(target)]) == 0
    assert "peftkit.load_predictor" in capfd.readouterr().out
    report = json.loads((target / "peftkit_bundle.json").read_text())
    assert report["relative"] <= 1e-6 and report["numbers"] > 40
    expected = load_predictor(run)(TEXTS)
    moved = target.rename(tmp_path / "elsewhere")
    # the backbone that the run names is not there any more
    alone = _without_backbone(moved, tmp_path / "gone")
    command = [sys.executable, "-W", "error", "-c", FRESH, str(alone), json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert _close(json.loads(done.stdout), expected)


def _without_backbone(folder: Path, nowhere: Path) -> Path:
    """The bundle as on a machine that has no such folder as its run.yaml and manifest name."""
    manifest = json.loads((folder / "manifest.json").read_text())
    there = manifest["backbone"]["folder"]
    text = (folder / "run.yaml").read_text()
    assert there in text
    (folder / "run.yaml").write_text(text.replace(there, str(nowhere)))
    manifest["backbone"] |= {"folder": str(nowhere), "name": str(nowhere)}
    manifest["files"]["run.yaml"] = bundling.file_sha256(folder / "run.yaml")
    manifest.pop("sha256")
    manifest["sha256"] = bundling.manifest_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_close, one, other))
    return bool(one == pytest.approx(other, abs=1e-6)) if isinstance(one, float) else bool(one == other)


@pytest.mark.usefixtures("here")
def test_a_bundle_is_a_run_that_predicts_and_is_bundled_again(
    small_run: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["bundle", str(small_run("prefix")), str(first), "--probe-rows", "2"]) == 0
    assert main(["bundle", str(first), str(second), "--probe-rows", "2"]) == 0
    shutil.rmtree(first)
    capfd.readouterr()
    assert main(["predict", str(second), *TEXTS]) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert _close(found, load_predictor(small_run("prefix"))(TEXTS))


def test_targets_and_rows_that_do_not_do_are_refused(
    small_run: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = str(small_run("prefix"))
    (tmp_path / "there").mkdir()
    assert "exists" in refused(capfd, 2, "bundle", run, str(tmp_path / "there"))
    assert f"lies inside {run};" in refused(capfd, 2, "bundle", run, f"{run}/bundle")
    assert "no run folder" in refused(capfd, 2, "bundle", str(tmp_path / "nothing"), str(tmp_path / "b"))
    assert "no such file" in refused(capfd, 2, "bundle", run, str(tmp_path / "b"), "--data", str(tmp_path / "no.jsonl"))
    assert [one.name for one in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("fault", ["weights", "tokenizer", "process"])
def test_a_bundle_that_is_not_the_run_is_not_written(
    fault: str,
    small_run: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = bundling._copy

    def tampered(source: Path, target: Path) -> None:
        copy(source, target)
        if fault == "tokenizer" and target.name == "tokenizer.json":
            target.write_text(target.read_text().replace('"film"', '"movie"'))
        if fault == "weights" and target.name == "trained.safetensors":
            from safetensors.torch import load_file, save_file

            changed = {name: tensor + 1e-3 for name, tensor in load_file(target).items()}
            save_file(changed, target)

    monkeypatch.setattr(bundling, "_copy", tampered)
    if fault == "process":
        monkeypatch.setattr(sys, "executable", "false")
    else:
        monkeypatch.setattr(bundling, "_in_another_process", bundle_check.main)
    error = refused(capfd, 1, "bundle", str(small_run("prefix")), str(tmp_path / "bundle"), "--probe-rows", "4")
    said = {"weights": "logits differ", "tokenizer": "reads texts otherwise", "process": "could not be loaded"}
    assert said[fault] in error, error
    assert list(tmp_path.iterdir()) == []
