"""Every shipped configuration trains, on its real backbone and its real data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftkit import shipped
from peftkit.cli import main
from peftkit.config import load_run
from peftkit.schema import Section

# rows enough that training has every label, and little work for each
SHORT = ["training.max_steps=6", "training.batch_size=4", "training.evaluate_every=epoch", "task.max_length=8"]


@pytest.mark.parametrize("config", shipped.configs(), ids=lambda path: path.stem)
def test_every_shipped_configuration_runs(config: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if "PEFTKIT_DATA" in config.read_text():
        request.getfixturevalue("real_data")
    limit = f"task.data.limit={240 if 'reuters' in config.stem else 1000}"
    assert main(["train", str(config), *SHORT, limit, f"output.folder={tmp_path / 'run'}"]) == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert set(scores) == {"majority", "before", "after"}


def test_shipped_configurations_share_one_data_root() -> None:
    for config in shipped.configs():
        data = load_run(config).task.data
        assert isinstance(data, Section)
        named = [value for value in (data.train, data.dev, data.test) if value]
        assert data.name or all(value.startswith("${PEFTKIT_DATA}/") for value in named)
