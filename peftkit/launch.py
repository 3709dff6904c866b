"""From a number of processes to the `accelerate launch` that starts them, checked before anything is started."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from peftkit import shipped
from peftkit.config_file import parse_tree
from peftkit.config_limits import read_text
from peftkit.errors import UsageError, first_line
from peftkit.launch_options import PORT, Asked
from peftkit.processes import PROCESSES
from peftkit.schema import did_you_mean

KINDS = ("MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED", "NO")
"""What an Accelerate configuration may call for: several processes alike, sharded ones, or one."""
PLACEHOLDER = "ADDRESS_OF_MACHINE_0"
"""Where the shipped configurations want an address."""


@dataclass(frozen=True)
class Job:
    """What is started: variables of the environment, and the arguments of `accelerate launch`."""

    variables: dict[str, str]
    arguments: tuple[str, ...]
    processes: int
    launched: dict[str, str]
    """What `accelerate launch` will set in every process, as far as the run can contradict it."""

    @property
    def needs_launcher(self) -> bool:
        """False for a single process that nothing is asked of but to train."""
        return self.processes > 1 or "ACCELERATE_USE_FSDP" in self.launched

    def __str__(self) -> str:
        """The command line that starts the same."""
        variables = [f"{name}={value}" for name, value in self.variables.items()]
        return " ".join([*variables, "accelerate launch", shlex.join(self.arguments)])


def plan(asked: Asked, script: Sequence[str], gpus: int) -> Job:
    """The launch of `python -m` + `script`.

    Args:
        gpus: those of this machine.

    Raises:
        UsageError: no such configuration, or a machine that cannot do what was asked.
    """
    file = _file(asked.accelerate)
    config = _read(file) if file else {}
    asked = replace(asked, cpu=asked.cpu or bool(config.get("use_cpu")) or (file is None and gpus == 0))
    machines, processes = _machines(asked, config)
    _check_devices(asked, config, file, processes // machines, gpus)
    arguments = [*_resources(asked, config, machines, processes), "-m", *script]
    if file:
        arguments = ["--config_file", str(file), *arguments]
    return Job(_variables(asked.cpu, processes, machines), tuple(arguments), processes, launcher_variables(config))


def launcher_variables(config: dict[str, Any]) -> dict[str, str]:
    """What `accelerate launch` makes of an Accelerate configuration for the processes it starts."""
    kind, deepspeed = config.get("distributed_type"), config.get("deepspeed_config") or {}
    variables = {"ACCELERATE_MIXED_PRECISION": str(config.get("mixed_precision") or "no")}
    if config.get("parallelism_config"):
        variables["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
    if kind == "DEEPSPEED":
        variables["ACCELERATE_USE_DEEPSPEED"] = "true"
        variables["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(deepspeed.get("gradient_accumulation_steps", "auto"))
    if kind == "FSDP":
        variables["ACCELERATE_USE_FSDP"] = "true"
        # what Accelerate takes where the file is silent
        settings = {"fsdp_cpu_ram_efficient_loading": True} | (config.get("fsdp_config") or {})
        for name, value in settings.items():
            variables[f"FSDP_{name.removeprefix('fsdp_').upper()}"] = str(value)
    return variables


def _file(name: str | None) -> Path | None:
    if name is None:
        return None
    known = {file.stem: file for file in shipped.launches()}
    if name in known:
        return known[name]
    file = Path(name).expanduser()
    if file.is_file():
        return file
    raise UsageError(f"--accelerate: no file '{name}', and nothing is shipped by that name{did_you_mean(name, known)}")


def _read(file: Path) -> dict[str, Any]:
    """An Accelerate configuration, refused where Accelerate refuses it."""
    text = read_text(file)
    parse_tree(text, f"--accelerate: {file}")
    # Accelerate reads YAML 1.1, in which other words than here are booleans
    config = yaml.safe_load(text)
    if not isinstance(config, dict) or config.get("distributed_type") not in KINDS:
        kind = config.get("distributed_type") if isinstance(config, dict) else None
        raise UsageError(f"--accelerate: {file}: distributed_type is {kind}; peftkit knows {', '.join(KINDS)}")
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        load_config_from_file(str(file))
    except (TypeError, ValueError) as error:
        raise UsageError(f"--accelerate: {file}: {first_line(error)}") from error
    return config


def _machines(asked: Asked, config: dict[str, Any]) -> tuple[int, int]:
    """How many machines, and processes on all of them."""
    machines = asked.machines if asked.machines is not None else int(config.get("num_machines") or 1)
    processes = asked.processes if asked.processes is not None else int(config.get("num_processes") or 0)
    if processes < 1 or machines < 1:
        raise UsageError("say how many processes there are to be: --processes N, over all machines")
    if processes % machines:
        raise UsageError(
            f"{processes} processes cannot be shared out evenly to {machines} machines; Accelerate would drop some"
        )
    if asked.rank is not None and not 0 <= asked.rank < machines:
        raise UsageError(f"--rank {asked.rank}: the ranks of {machines} machine(s) are 0 to {machines - 1}")
    if machines > 1 and (asked.address or config.get("main_process_ip") or PLACEHOLDER) == PLACEHOLDER:
        raise UsageError(f"{machines} machines find each other at the first one's address: --address HOST")
    return machines, processes


def _check_devices(asked: Asked, config: dict[str, Any], file: Path | None, processes: int, gpus: int) -> None:
    """Refuse more processes than GPUs, of which Accelerate says only that a device ordinal is invalid."""
    named = str(config.get("gpu_ids") or "all")
    usable = gpus if named == "all" else min(gpus, len(named.split(",")))
    if asked.cpu or processes <= usable:
        return
    what = f"--accelerate {file.stem}" if file else "this launch"
    mend = f"--processes {usable}" if usable else "--cpu, to try it on this machine's processor"
    have = f"{usable} GPU(s)" if usable else "no GPU"
    raise UsageError(
        f"{what} wants {processes} GPUs on each machine, one for each process, and here is {have}; give {mend}"
    )


def _resources(asked: Asked, config: dict[str, Any], machines: int, processes: int) -> list[str]:
    several = config.get("distributed_type") not in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    arguments = ["--multi_gpu"] if several else []
    arguments += ["--num_processes", str(processes), "--num_machines", str(machines)]
    if not config:
        arguments += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if machines == 1:
        return [*arguments, "--main_process_port", str(asked.port or 0)]
    rank = config.get("machine_rank", 0) if asked.rank is None else asked.rank
    address, port = asked.address or config["main_process_ip"], asked.port or config.get("main_process_port") or PORT
    return [
        *arguments,
        "--machine_rank",
        str(rank),
        "--main_process_ip",
        str(address),
        "--main_process_port",
        str(port),
    ]


def _variables(cpu: bool, processes: int, machines: int) -> dict[str, str]:
    variables = {PROCESSES: str(processes)}
    if cpu:
        variables["ACCELERATE_USE_CPU"] = "true"
    threads = max(1, _cores() // (processes // machines))
    return variables | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
