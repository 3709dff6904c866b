"""A disk that is full at different moments of a run: what is said, what is left, and how it goes on."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peftkit.cli import main
from peftkit.disk import file_sha256
from peftkit.training.checkpoint import FILES
from peftkit.training.seal import check_sealed

SIZES = (16, 200, 400, 600, 750, 850)
"""KiB; three checkpoints and the best weights take about 1,000."""
Config = Callable[..., Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A place for a small disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if mounted(folder, "size=16k").returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)


def mounted(folder: Path, options: str) -> subprocess.CompletedProcess[bytes]:
    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False, timeout=60)


@pytest.fixture
def config(write_config: Config) -> Path:
    """A run of three evaluations."""
    training = {"learning_rate": 0.002, "max_steps": 9, "evaluate_every": 3, "batch_size": 16, "seed": 1}
    return write_config(method={"kind": "full"}, training=training)


def test_a_disk_of_any_size_leaves_a_run_that_goes_on(
    disk: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), f"output.folder={tmp_path / 'whole'}"]) == 0
    reached = {}
    for size in SIZES:
        assert mounted(disk, f"remount,size={size}k").returncode == 0
        folder = disk / f"run{size}"
        with monkeypatch.context() as patched:
            # the room is looked for before; this is about a disk that others fill meanwhile
            patched.setattr("peftkit.training.loop.require_space", lambda folder, needed: None)
            assert main(["train", str(config), f"output.folder={folder}"]) == 1, size
        error = capfd.readouterr().err.splitlines()[-1]
        assert error.startswith("error: no space left on the disk that holds "), size
        found = sorted(folder.glob("checkpoints/step-*"))
        for one in found:
            check_sealed(one, FILES)
        assert not list(folder.glob("checkpoints/.*"))
        reached[size] = len(found)
        assert mounted(disk, "remount,size=64m").returncode == 0
        assert main(["train", str(config), f"output.folder={folder}"]) == 0, size
        for name in ("model/model.safetensors", "predictions.jsonl"):
            assert file_sha256(folder / name) == file_sha256(tmp_path / "whole" / name), size
        shutil.rmtree(folder)
    assert set(reached.values()) == {0, 1, 2}, reached
