"""The short tier of `benchmarks/reliability`: the command runs, and what it does to peftkit's runs leaves none lost."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability import EXPERIMENTS, kills, tracing
from benchmarks.reliability.__main__ import RESULTS, main
from benchmarks.reliability.rows import Rows
from benchmarks.reliability.workbench import Made, differing

QUICK = ("kills", "sigterm")
"""Those that are cheap; two processes are killed in test_kills.py, and disks are filled in test_disk_full.py."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the command wrote of every trial, by experiment."""
    if not tracing.available():
        pytest.skip("there is no strace here")
    out = tmp_path_factory.mktemp("reliability")
    assert main(["--tier", "short", "--columns", "peftkit", "--out", str(out), *QUICK]) == 0
    summary = json.loads((out / "sigterm.json").read_text(encoding="utf-8"))
    assert summary["peftkit"] == {"trials": 1, "outcomes": {"same bytes": 1}}
    assert {"command", "date", "tier", "environment", "stock"} <= summary.keys()
    lines = {name: (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in QUICK}
    return {name: [json.loads(line) for line in lines[name]] for name in QUICK}


def test_a_run_that_is_asked_to_end_goes_on_to_the_same_bytes(rows: dict[str, list[dict[str, Any]]]) -> None:
    (row,) = rows["sigterm"]
    assert (row["outcome"], row["exit_code"]) == ("same bytes", 143)


def test_a_run_that_is_killed_at_a_system_call_goes_on_to_the_same_bytes(
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    (row,) = rows["kills"]
    (place,) = row["killed"]
    assert row["outcome"] == "same bytes"
    assert "/run/" in place


def test_calls_are_counted_by_name_in_the_main_thread(tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text(
        '7  openat(AT_FDCWD, "/a/run/x", O_RDONLY) = 3</a/run/x>\n'
        '8  openat(AT_FDCWD, "/a/run/y", O_RDONLY <unfinished ...>\n'
        '7  write(3</a/run/x>, "1", 1)    = 1\n'
        "8  <... openat resumed>) = 4</a/run/y>\n"
        '7  openat(AT_FDCWD, "/a/run/z", O_RDONLY) = 3</a/run/z>\n'
        "7  +++ killed by SIGKILL +++\n",
        encoding="utf-8",
    )
    assert [(call.name, call.number) for call in tracing.read(trace)] == [("openat", 1), ("write", 1), ("openat", 2)]


def test_a_command_that_was_stopped_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "kills.jsonl"
    first = json.dumps({"trial": "lora-call-0", "column": "peftkit"})
    file.write_text(f'{first}\n{{"trial": "lora-ca', encoding="utf-8")
    assert len(Rows(file, kills, "full").done) == 1
    assert file.read_text(encoding="utf-8") == f"{first}\n"


def test_what_the_machine_lacks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--out", str(tmp_path), "kills"]) == 0
    assert "kills: strace is not installed; nothing is tried" in capsys.readouterr().err
    assert not (tmp_path / "kills.json").exists()


def test_one_bit_of_a_loss_is_a_difference() -> None:
    made = Made(((1, (0.1).hex()),), {"adapter": "a"})
    assert differing(made, made) == []
    assert differing(Made(((1, (0.1 + 2**-56).hex()),), {"adapter": "b"}), made) == ["losses", "adapter"]


def test_what_is_committed_is_of_the_full_tier_and_good() -> None:
    for name in EXPERIMENTS:
        experiment = import_module(f"benchmarks.reliability.{name}")
        rows = Rows(RESULTS / f"{name}.jsonl", experiment, "full")
        document = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        assert document["tier"] == "full", name
        for column in {"peftkit", "stock"} & document.keys():
            assert document[column] == json.loads(json.dumps(rows.counted(column))), name
        assert set(document["peftkit"]["outcomes"]) <= set(experiment.GOOD), name
