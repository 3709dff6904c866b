"""Runs that are killed again and again end with the bytes of those that nothing happened to."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import sentiment_rows, write_jsonl
from kills import Killer

from peftkit.disk import file_sha256

KILLED = -signal.SIGKILL
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all", "dropout": 0.1},
    "adalora": {"kind": "adalora", "target_rank": 2, "initial_rank": 4, "alpha": 8, "allocate_every": 1},
    "bottleneck": {"kind": "bottleneck", "placement": "parallel", "bottleneck_size": 8},
    "prefix": {"kind": "prefix", "length": 4, "reparametrization_size": 8},
    "full": {"kind": "full"},
}
STEPS = 21
"""Three epochs of 7, over 100 rows in batches of 16: the last has 4. AdaLoRA's budget falls from step 3 to 14."""
KILLS: tuple[tuple[str, int], ...] = (
    ("step", 2),  # before there is a checkpoint
    ("file", 9),
    ("step", 7),  # the end of an epoch, before it is scored
    ("file", 40),
    ("step", 21),
)
"""One after the other in the same run; each goes on from the newest checkpoint, of every third step and every epoch."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A folder with a configuration for each method."""
    folder = tmp_path_factory.mktemp("kills")
    data = {name: str(write_jsonl(folder / f"{name}.jsonl", sentiment_rows(n, n))) for name, n in ROWS.items()}
    for name, method in METHODS.items():
        config = {
            "backbone": {"name": str(tiny_bert), "dropout": 0.1},
            "task": {"kind": "sequence_classification", "data": data, "max_length": 32},
            "method": method,
            "training": {
                "learning_rate": 0.002 if name == "full" else 0.01,
                "max_steps": STEPS,
                "batch_size": 16,
                "micro_batch_size": 5,
                "checkpoint_every": 3,
                "seed": 1,
            },
            "audit": {"overlap": 1.0},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


ROWS = {"train": 100, "dev": 12, "test": 12}


@pytest.fixture(scope="module")
def killer(folder: Path) -> Iterator[Killer]:
    one = Killer(folder / "said.txt", "train", str(folder / "lora.yaml"), f"output.folder={folder / 'first'}")
    yield one
    one.close()


def train(killer: Killer, folder: Path, method: str, name: str, **how: Any) -> list[int]:
    return killer.run("train", str(folder / f"{method}.yaml"), f"output.folder={folder / method / name}", **how)


def whole(killer: Killer, folder: Path, method: str, processes: int = 1) -> Path:
    """The run that nothing happens to; trained once."""
    name = f"whole{processes}"
    if not (folder / method / name).exists():
        assert train(killer, folder, method, name, processes=processes) == [0] * processes, killer.said
    return folder / method / name


def assert_same(one: Path, other: Path) -> None:
    """Every figure of every step, and every byte that was saved."""
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, other)]
    logs = [[event for event in log if "memory_growth_bytes" not in event] for log in logs]  # of this process alone
    for log in logs:
        for event in log:
            event.pop("tokens_per_second", None)
    hexed = [[{key: float(value).hex() for key, value in event.items()} for event in log] for log in logs]
    assert hexed[0] == hexed[1]
    tokens = [json.loads((run / "manifest.json").read_text())["training"]["tokens"] for run in (one, other)]
    assert tokens[0] == tokens[1]
    assert [event["step"] for event in logs[0] if "loss" in event] == list(range(1, STEPS + 1))
    (weights,) = one.glob("*/*.safetensors")
    for file in (weights, one / "predictions.jsonl", one / "scores.json"):
        assert file_sha256(file) == file_sha256(other / file.relative_to(one)), file.name


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_killed_again_and_again(method: str, killer: Killer, folder: Path) -> None:
    for moment in KILLS:
        assert train(killer, folder, method, "killed", moment=moment) == [KILLED], killer.said
        assert not (folder / method / "killed" / "manifest.json").exists()
        with (folder / method / "killed" / "log.jsonl").open("a") as log:
            log.write('{"step": 99, "lo')
    assert train(killer, folder, method, "killed") == [0], killer.said
    assert f"continuing from step {STEPS - 3} of {STEPS}" in killer.said
    assert_same(folder / method / "killed", whole(killer, folder, method))
    assert not (folder / method / "killed" / "checkpoints").exists()


@pytest.mark.parametrize("operation", range(3, 110, 26))
def test_killed_at_any_operation_on_a_file(operation: int, killer: Killer, folder: Path) -> None:
    name = f"file{operation}"
    assert train(killer, folder, "lora", name, moment=("file", operation)) == [KILLED], killer.said
    assert train(killer, folder, "lora", name) == [0], killer.said
    assert_same(folder / "lora" / name, whole(killer, folder, "lora"))


@pytest.mark.parametrize("method", ["adalora"])
def test_two_processes_of_which_either_is_killed(method: str, killer: Killer, folder: Path) -> None:
    for rank, moment in ((1, ("step", 4)), (0, ("file", 50)), (1, ("step", 17))):
        codes = train(killer, folder, method, "two", moment=moment, processes=2, rank=rank)
        assert codes == [KILLED, KILLED], killer.said
    assert train(killer, folder, method, "two", processes=2) == [0, 0], killer.said
    assert_same(folder / method / "two", whole(killer, folder, method, processes=2))


# --- signals that ask -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_run_after_its_step(name: str, code: int, killer: Killer, folder: Path) -> None:
    for step in (1, 5, 7, STEPS):  # the first, one in an epoch, the last of an epoch, the last of all
        assert train(killer, folder, "lora", name, moment=(name, step)) == [code], killer.said
        (line,) = [line for line in killer.said.splitlines() if line.startswith("interrupted; ")]
        assert f"step {step} is done and its checkpoint is saved" in line
        assert "Traceback" not in killer.said
        assert (folder / "lora" / name / "checkpoints" / f"step-{step}").is_dir()
    assert train(killer, folder, "lora", name) == [0], killer.said
    assert_same(folder / "lora" / name, whole(killer, folder, "lora"))


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_end_after_the_same_step_whichever_gets_the_signal(rank: int, killer: Killer, folder: Path) -> None:
    name = f"asked{rank}"
    how: dict[str, Any] = {"processes": 2, "rank": rank}
    assert train(killer, folder, "lora", name, moment=("SIGTERM", 5), **how) == [143, 143], killer.said
    assert killer.said.count("interrupted; step 5 is done and its checkpoint is saved") == 1
    assert train(killer, folder, "lora", name, **how) == [0, 0], killer.said
    assert "continuing from step 5 of" in killer.said
    assert_same(folder / "lora" / name, whole(killer, folder, "lora", processes=2))


def test_killed_before_its_folder_has_its_configuration(killer: Killer, folder: Path) -> None:
    run = folder / "lora" / "early"
    run.mkdir(parents=True)
    for name in (".lock", ".run.yaml.partial"):  # as between the writing of run.yaml and its renaming
        (run / name).touch()
    assert train(killer, folder, "lora", "early") == [0], killer.said
    assert_same(run, whole(killer, folder, "lora"))
    assert not [file.name for file in run.iterdir() if file.name.startswith(".")]
