"""A short run of each fuzzer; `python benchmarks/fuzz.py` runs them for as long as one likes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from benchmarks.fuzzing.adapters import Adapters
from benchmarks.fuzzing.configs import Configs
from benchmarks.fuzzing.data import TASKS, Data
from benchmarks.fuzzing.watch import Finding, told, watched

AUDITED_ONLY = ("chats", "pairs", "prompts")
"""Tasks that no BERT can be trained on."""


def examine(target: Any, count: int) -> list[bool]:
    """The same inputs each time; returns which of them were accepted."""
    accepted: list[bool] = []

    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.examples())
    def one(example: Any) -> None:
        accepted.append(target.check(example))

    one()
    return accepted


def test_configurations(tmp_path: Path) -> None:
    accepted = examine(Configs(tmp_path), 80)
    assert any(accepted)
    assert not all(accepted)


def test_adapters(tmp_path: Path) -> None:
    accepted = examine(Adapters(tmp_path, ("lora", "bottleneck")), 20)
    assert any(accepted)
    assert not all(accepted)


def test_data_files(tmp_path: Path) -> None:
    accepted = examine(Data(tmp_path), 40)
    assert any(accepted)
    assert not all(accepted)


def test_what_is_fed_is_sound_before_it_is_changed(tmp_path: Path) -> None:
    configs, data = Configs(tmp_path / "configs"), Data(tmp_path / "data")
    assert all(configs.check((text, ())) for text in configs.texts[:5])
    for task, (_, rows) in TASKS.items():
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        assert data.check((task, "jsonl", content)) == (task not in AUDITED_ONLY), task


def test_findings_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Finding, match="longer than"), watched(seconds=0.05):
        while True:
            pass
    with pytest.raises(Finding, match="memory grew by"), watched(growth=-1):
        pass
    monkeypatch.setattr("peftkit.cli.main", lambda arguments: 1)
    with pytest.raises(Finding, match="exit code 1 and ''"):
        told(["validate", "x"])
    monkeypatch.setattr("peftkit.cli.main", lambda arguments: 3)
    with pytest.raises(Finding, match="exit code 3"):
        told(["validate", "x"])
