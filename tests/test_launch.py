"""`peftkit launch`: the command for every Accelerate configuration, and what is refused before anything starts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_multi_gpu_env

from peftkit import shipped
from peftkit.cli import main
from peftkit.config import load_run
from peftkit.errors import UsageError
from peftkit.launch import Job, launcher_variables, plan
from peftkit.launch_options import Asked
from peftkit.processes import check_launcher, launch_arguments

SHIPPED = {file.stem: file for file in shipped.launches()}
NAMES = ["cpu_2", "ddp", "fsdp2", "fsdp2_qlora", "multi_node_ddp", "multi_node_fsdp2", "zero2", "zero3"]
SCRIPT = ["peftkit.cli", "train", "my run.yaml", "method.rank=2"]


def planned(name: str | None, gpus: int = 8, **asked: Any) -> Job:
    if name and name.startswith("multi_node"):
        asked = {"address": "first.example"} | asked
    return plan(Asked(accelerate=name, **asked), SCRIPT, gpus)


def understood(job: Job) -> Any:
    """What Accelerate itself makes of the command."""
    return _validate_launch_command(launch_command_parser().parse_args(list(job.arguments)))[0]


def test_these_are_the_shipped_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(SHIPPED) == NAMES
    assert main(["ls"]) == 0
    listed = capsys.readouterr().out
    for file, comment in shipped.launches().items():
        assert f"{file.name:24} {comment}" in listed
        assert len(comment) > 30


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_every_shipped_configuration(name: str) -> None:
    config = load_config_from_file(str(SHIPPED[name]))
    assert isinstance(config, ClusterConfig)
    assert (config.num_machines > 1) == name.startswith("multi_node")
    assert config.mixed_precision == "no"
    expected = {"cpu_": "MULTI_GPU", "ddp": "MULTI_GPU", "mult": None, "fsdp": "FSDP", "zero": "DEEPSPEED"}[name[:4]]
    assert config.distributed_type.value == expected or expected is None


@pytest.mark.parametrize("name", NAMES)
def test_the_command_means_to_accelerate_what_was_asked(name: str) -> None:
    job = planned(name, processes=4, rank=1 if name.startswith("multi_node") else None)
    options = understood(job)
    assert (options.num_processes, options.training_script, options.module) == (4, "peftkit.cli", True)
    assert options.training_script_args == ["train", "my run.yaml", "method.rank=2"]
    assert [options.multi_gpu, options.use_fsdp, options.use_deepspeed].count(True) == 1
    assert options.use_fsdp == ("fsdp" in name)
    if name.startswith("multi_node"):
        machines = (options.num_machines, options.machine_rank, options.main_process_ip, options.main_process_port)
        assert machines == (2, 1, "first.example", 29500)
    else:
        assert (options.num_machines, options.main_process_port) == (1, 0)


@pytest.mark.parametrize(("gpus", "on_cpu"), [(0, True), (2, False)])
def test_without_a_configuration_it_takes_gpus_where_there_are_any(gpus: int, on_cpu: bool) -> None:
    job = planned(None, gpus, processes=2)
    assert ("ACCELERATE_USE_CPU" in job.variables) == on_cpu
    assert understood(job).multi_gpu
    assert job.variables["PEFTKIT_PROCESSES"] == "2"


def test_threads_are_shared_out_unless_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftkit.launch._cores", lambda: 9)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert planned(None, processes=2).variables["OMP_NUM_THREADS"] == "4"
    assert planned("multi_node_ddp", processes=4).variables["OMP_NUM_THREADS"] == "4"
    assert planned("cpu_2", processes=100).variables["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert planned(None, processes=2).variables["OMP_NUM_THREADS"] == "3"


def test_a_dry_run_prints_a_command_and_starts_nothing(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write_config()
    arguments = [
        "launch",
        "--processes",
        "2",
        "--cpu",
        str(file),
        "method.rank=2",
        "--allow",
        "duplicates",
        "--dry-run",
    ]
    assert main(arguments) == 0
    words = shlex.split(capsys.readouterr().err)
    assert {"ACCELERATE_USE_CPU=true", "PEFTKIT_PROCESSES=2", "--multi_gpu"} <= set(words)
    assert words[words.index("-m") :] == [
        *("-m", "peftkit.cli", "train", str(file), "method.rank=2", "--allow", "duplicates")
    ]
    assert not (tmp_path / "run").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no number": ({"processes": None}, "--processes N"),
    "zero": ({"processes": 0}, "--processes N"),
    "no such name": ({"accelerate": "fspd2"}, "did you mean 'fsdp2'"),
    "no GPU": ({"accelerate": "ddp", "gpus": 0}, "no GPU; give --cpu"),
    "few GPUs": ({"accelerate": "fsdp2", "processes": 4, "gpus": 2}, "here is 2 GPU(s); give --processes 2"),
    "few GPUs on each machine": (
        {"accelerate": "multi_node_ddp", "processes": 8, "gpus": 2, "address": "a"},
        "wants 4 GPUs on each machine",
    ),
    "uneven": ({"processes": 3, "machines": 2, "address": "a"}, "evenly"),
    "no address": ({"accelerate": "multi_node_fsdp2", "processes": 4}, "--address HOST"),
    "rank": ({"processes": 4, "machines": 2, "address": "a", "rank": 2}, "0 to 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_starts(case: str) -> None:
    asked, message = REFUSED[case]
    with pytest.raises(UsageError) as refused:
        plan(
            Asked(**({"processes": 2} | {k: v for k, v in asked.items() if k != "gpus"})), SCRIPT, asked.get("gpus", 8)
        )
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"distributed_type": "MEGATRON_LM"}, "MEGATRON_LM; peftkit knows"),
        ({"distributed_type": "MULTI_GPU", "num_proceses": 2}, "num_proceses"),
        ([1], "distributed_type is None"),
    ],
)
def test_a_wrong_accelerate_configuration_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match=message):
        planned(str(file), processes=2)


def test_an_accelerate_configuration_is_bounded_as_others_are(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    file.write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"--accelerate: .*mine\.yaml:1: more than 20,000 keys and values"):
        planned(str(file), processes=2)
    file.write_bytes(b" " * (2**20 + 1))
    with pytest.raises(UsageError, match="the most that is read of a configuration"):
        planned(str(file), processes=2)


def test_the_variables_that_a_run_is_checked_against_are_accelerates(monkeypatch: pytest.MonkeyPatch) -> None:
    job = planned("fsdp2", processes=2)
    real = prepare_multi_gpu_env(understood(job))
    ours = {name: text.lower() for name, text in job.launched.items()}
    assert ours == {name: real[name].lower() for name in ours}
    assert len(ours) == 8


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "precision": ({"distributed_type": "MULTI_GPU", "mixed_precision": "bf16"}, "bf16 and training.precision for fp32"),
    "version 1": ({"fsdp_version": 1}, "FSDP version 1"),
    "version unsaid": ({}, "FSDP version 1"),
    "checkpointing": ({"fsdp_activation_checkpointing": True}, "training.gradient_checkpointing: true"),
    "loading": ({"fsdp_cpu_ram_efficient_loading": True}, "without weights"),
    "loading unsaid": ({"fsdp_version": 2}, "without weights"),
    "wrapping": ({"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, "block by block"),
    "ignored": ({"fsdp_ignored_modules": "classifier"}, "not something peftkit heeds"),
    "parallelism": ({"distributed_type": "FSDP", "parallelism_config": {"parallelism_config_tp_size": 2}}, "tensor"),
    "deepspeed": ({"distributed_type": "DEEPSPEED"}, "use --accelerate fsdp2"),
    "accumulation": (
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"gradient_accumulation_steps": 4}},
        "leave them out",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_settings_that_contradict_the_run_are_refused(case: str, write_config: Callable[..., Path]) -> None:
    config, message = CONTRADICTIONS[case]
    if "distributed_type" not in config:
        config = {"distributed_type": "FSDP", "fsdp_config": config}
    with pytest.raises(UsageError, match=message):
        check_launcher(load_run(write_config()), launcher_variables(config))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("zero")])
def test_shipped_configurations_contradict_no_run(name: str, write_config: Callable[..., Path]) -> None:
    check_launcher(load_run(write_config()), planned(name, processes=2).launched)


def test_a_run_is_checked_in_the_launcher(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["launch", "--processes", "2", "--cpu", str(write_config()), "method.rnak=2"]) == 2
    assert capsys.readouterr().err.count("did you mean") == 1
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("mine")
    assert main(["launch", "--processes", "2", "--cpu", str(write_config())]) == 2
    assert capsys.readouterr().err.count("not a run folder") == 1


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("python /bin/accelerate launch --cpu x.py", "--cpu x.py"),
        ("python -u -m accelerate.commands.launch --cpu x.py", "--cpu x.py"),
        ("python -m accelerate.commands.accelerate_cli launch x.py", "x.py"),
        ("/bin/accelerate-launch x.py", "x.py"),
        ("accelerate env", None),
        ("bash -c true", None),
    ],
)
def test_a_launch_is_known_by_its_command_line(command: str, arguments: str | None) -> None:
    found = launch_arguments(command.split())
    assert found == (arguments.split() if arguments is not None else None)


def test_the_page_says_of_every_configuration_who_launched_it() -> None:
    root = Path(__file__).parents[1]
    rows = [line for line in (root / "docs" / "distributed.md").read_text().splitlines() if line.startswith("| `")]
    table = {row.split("`")[1]: row.split("|")[3].strip() for row in rows}
    assert sorted(table) == NAMES
    for name, launched in table.items():
        tests = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", launched)
        assert tests or launched.startswith("never run"), name
        for file, test in tests:
            text = (root / file).read_text()
            assert f"def {test}(" in text
            assert f'"{name}"' in text
