"""Jobs of two CPU processes, started for real: what they were asked for, how they end, and what is said of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from peftkit.artifacts.manifest import read_manifest

LIMIT = 240
"""Seconds that a job may take on a busy machine."""
MINUTE = 60
STOCK = """
import sys
from accelerate import Accelerator

sys.stdout.write(f"processes: {Accelerator().num_processes}\\n")
"""
"""One write a process: the parts of a `print` of two processes mix in their common output."""
STUCK_METRIC = """
import os
import time
import datasets
import evaluate
from peftkit.training import signs


class Stuck(evaluate.Metric):
    def _info(self):
        integers = datasets.Value("int64")
        features = datasets.Features({"predictions": integers, "references": integers})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        signs.STUCK = 8.0
        time.sleep(3600 if os.environ["RANK"] == "1" else 0)
        return {"stuck": 0.0}
"""
"""A metric that process 1 never comes back from; the limit is lowered, because a test should not wait for it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, toy_data: Path) -> Path:
    """A folder with the configuration of a run that takes a while; what is started in it writes to `run`."""
    folder = tmp_path_factory.mktemp("jobs")
    data = {split: str(toy_data / f"sentiment_{split}.jsonl") for split in ("train", "dev", "test")}
    config = {
        "backbone": {"name": str(tiny_bert)},
        "task": {"kind": "sequence_classification", "data": data, "max_length": 32},
        "method": {"kind": "lora", "rank": 4, "targets": "all"},
        "training": {"learning_rate": 0.001, "max_steps": 120, "evaluate_every": 20, "batch_size": 16},
        "output": {"folder": "run"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "stock.py").write_text(STOCK)
    (folder / "stuck.py").write_text(STUCK_METRIC)
    return folder


@contextmanager
def started(folder: Path, *command: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A command, as a process group of its own, of which nothing is left afterwards."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("ACCELERATE", "PEFTKIT"))}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children: list[psutil.Process] = []
    try:
        yield process
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    finally:
        for one in (*children, process):
            if one.poll() is None if isinstance(one, subprocess.Popen) else one.is_running():
                one.kill()


def launched(folder: Path, *arguments: str, accelerate: str = "cpu_2") -> Any:
    command = ("peftkit.cli", "launch", "--processes", "2", "--cpu", "--accelerate", accelerate, "run.yaml")
    return started(folder, *command, *arguments)


def process_of(launcher: subprocess.Popen[str], rank: int, has_begun: Callable[[], object]) -> psutil.Process:
    """The process of this rank, when the job has come so far."""
    limit = time.monotonic() + LIMIT
    while time.monotonic() < limit:
        if has_begun():
            return next(one for one in psutil.Process(launcher.pid).children() if one.environ()["RANK"] == str(rank))
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.1)
    raise AssertionError("the job did not begin")


def checkpoints(folder: Path) -> list[Path]:
    return list((folder / "run" / "checkpoints").glob("step-*"))


def errors(text: str) -> list[str]:
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith(("error:", "interrupted"))]


@pytest.fixture
def fresh(folder: Path) -> Path:
    """Without a run in the folder."""
    subprocess.run(["rm", "-rf", str(folder / "run")], check=True, timeout=LIMIT)
    return folder


@pytest.mark.parametrize(("rank", "by", "said"), [(1, "SIGKILL", "was ended by SIGKILL"), (0, "SIGSTOP", "silent")])
def test_a_process_that_dies_or_stops_ends_the_job(fresh: Path, rank: int, by: str, said: str) -> None:
    with launched(fresh) as launcher:
        victim = process_of(launcher, rank, lambda: checkpoints(fresh))
        siblings = psutil.Process(launcher.pid).children()
        since = time.monotonic()
        victim.send_signal(getattr(signal, by))
        _, stderr = launcher.communicate(timeout=LIMIT)
        assert time.monotonic() - since < MINUTE
    (error,) = errors(stderr)
    assert f"process {rank}" in error
    assert f"pid {victim.pid}" in error
    assert said in error
    assert launcher.returncode == 1
    assert not any(one.is_running() for one in siblings)
    checkpoint = checkpoints(fresh)[0]
    assert json.loads((checkpoint / "progress.json").read_text())["processes"] == 2


def test_a_process_that_is_stuck_in_python_ends_the_job(fresh: Path) -> None:
    with launched(fresh, "task.metrics=[./stuck.py]") as launcher:
        _, stderr = launcher.communicate(timeout=LIMIT)
    (error,) = errors(stderr)
    assert "process 1 " in error
    assert "its last work was scoring (test), at " in error
    assert "stuck.py:17" in error
    assert launcher.returncode == 1


def test_an_interrupted_job_goes_on_where_it_was(fresh: Path) -> None:
    with launched(fresh) as launcher:
        process_of(launcher, 0, lambda: checkpoints(fresh))
        launcher.send_signal(signal.SIGTERM)
        _, stderr = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 128 + signal.SIGTERM
    (line,) = errors(stderr)
    reached = max(int(one.name.removeprefix("step-")) for one in checkpoints(fresh))
    assert line.startswith(f"interrupted; step {reached} is done and its checkpoint is saved")
    with launched(fresh, accelerate="ddp") as launcher:
        stdout, stderr = launcher.communicate(timeout=LIMIT)
    assert (launcher.returncode, errors(stderr)) == (0, [])
    assert f"continuing from step {reached} of 120" in stdout
    assert "2 processes on cpu" in stdout
    assert read_manifest(fresh / "run")["training"]["processes"] == 2
    lines = (fresh / "run" / "log.jsonl").read_text().splitlines()
    assert [event["step"] for event in map(json.loads, lines) if "loss" in event] == list(range(1, 121))
    assert len((fresh / "run" / "predictions.jsonl").read_text().splitlines()) == 60


def test_what_all_processes_refuse_is_said_once(fresh: Path) -> None:
    overrides = [f"task.data.{split}={fresh / 'one_label.csv'}" for split in ("train", "dev", "test")]
    (fresh / "one_label.csv").write_text("text,label\n" + "".join(f"a film {index},good\n" for index in range(40)))
    with launched(fresh, *overrides) as launcher:
        _, stderr = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 1
    assert len(errors(stderr)) == 1


LAUNCH = ("accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
WRONG: dict[str, tuple[tuple[str, ...], Mapping[str, str], str]] = {
    "--cpu": ((*LAUNCH, "--cpu", "--num_processes", "2"), {}, "`accelerate launch` was asked for 2"),
    "no GPU": (
        ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        {"ACCELERATE_USE_CPU": "false"},
        "(WORLD_SIZE) was asked for 2",
    ),
}
"""Ways to get processes other than those that were asked for."""


@pytest.mark.parametrize("case", WRONG)
def test_stock_trains_with_other_processes_than_asked_and_peftkit_refuses(fresh: Path, case: str) -> None:
    command, variables, message = WRONG[case]
    with started(fresh, *command, "stock.py", **variables) as stock:
        stdout, _ = stock.communicate(timeout=LIMIT)
    assert stock.returncode == 0
    assert set(stdout.splitlines()) == {"processes: 1"}
    with started(fresh, *command, "-m", "peftkit.cli", "train", "run.yaml", **variables) as refused:
        _, stderr = refused.communicate(timeout=LIMIT)
    assert refused.returncode != 0
    (error,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert f"{message} processes, and this run is one process; start it with `peftkit launch --processes 2" in error
    assert not (fresh / "run").exists()


def test_two_machines_are_one_job(fresh: Path, tmp_path: Path) -> None:
    port = str(20000 + os.getpid() % 10000)
    command = ("peftkit.cli", "launch", "run.yaml", "training.max_steps=20", "--accelerate", "multi_node_ddp", "--cpu")
    command += ("--processes", "2", "--address", "127.0.0.1", "--port", port, "--rank")
    with started(fresh, *command, "0") as first, started(fresh, *command, "1") as second:
        stdout, stderr = first.communicate(timeout=LIMIT)
        second.communicate(timeout=LIMIT)
    assert (first.returncode, second.returncode) == (0, 0), stderr
    assert "2 processes on cpu" in stdout
    assert read_manifest(fresh / "run")["training"]["processes"] == 2
