"""What a launcher asked of a run: processes, which it must have, and settings, which must not contradict it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from peftkit.config import Run
from peftkit.errors import UsageError

PROCESSES = "PEFTKIT_PROCESSES"
"""How many processes `peftkit launch` was asked for."""
COUNTS = (PROCESSES, "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where `peftkit launch`, torch's launchers and those of MPI say how many processes there are."""
LAUNCHED = "ACCELERATE_MIXED_PRECISION"
"""What `accelerate launch` sets in every process that it starts, however many."""
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
DEEPSPEED = (
    "the launcher asks for DeepSpeed, whose engine accumulates, clips and steps by itself, as the training loop does; "
    "the two together were never proven to train right: use --accelerate fsdp2, which shards what ZeRO shards"
)


def check_processes(actual: int) -> None:
    """Refuse a run that has not the number of processes that its launcher was asked for.

    Stock launchers start one process in place of several without a word, as `accelerate launch --cpu` does, and
    Accelerate takes each of several processes for the only one where there is no GPU.

    Raises:
        UsageError: says what was asked for, what there is, and the command that gives it.
    """
    who, asked = _asked()
    if asked is not None and asked != actual:
        have = "this run is one process" if actual == 1 else f"this run has {actual}"
        raise UsageError(
            f"{who} was asked for {asked} processes, and {have}; start it with `peftkit launch --processes {asked} "
            f"CONFIG`, or on CPUs `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked} …`"
        )


def require_one_process(what: str) -> None:
    """Refuse work that several processes would do over each other.

    Raises:
        UsageError: this is one of several processes.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(f"{what} is for one process; give the command without a launcher")


def check_launcher(run: Run, environment: Mapping[str, str]) -> None:
    """Refuse what a launcher's settings ask for and the run contradicts, or would leave undone without a word.

    Args:
        environment: the variables that the launcher sets.

    Raises:
        UsageError: names the setting and its mend.
    """
    if problems := list(_contradictions(run, environment)):
        raise UsageError("; ".join(problems))


def _contradictions(run: Run, environment: Mapping[str, str]) -> Iterator[str]:
    launched = environment.get(LAUNCHED, "no")
    if launched not in ("no", MIXED_PRECISION[run.training.precision]):
        yield (
            f"the launcher asks for {launched} and training.precision for {run.training.precision}; "
            "set one and leave the other out"
        )
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto") not in ("auto", "1"):
        yield (
            "the launcher sets gradient_accumulation_steps, which follow from training.batch_size and "
            "training.micro_batch_size here; leave them out of the Accelerate configuration"
        )
    if _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        yield DEEPSPEED
    for variable, what in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor, context or sequence parallelism"),
    ):
        if _is_on(environment, variable):
            yield f"the launcher asks for {what}, which peftkit has not; use --accelerate ddp or fsdp2"
    if _is_on(environment, "ACCELERATE_USE_FSDP"):
        yield from _sharding(environment)


def _sharding(environment: Mapping[str, str]) -> Iterator[str]:
    """peftkit shards by torch's own `fully_shard`, so what only Accelerate's plugin does would not be done."""
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        yield f"the launcher asks for FSDP version {version}, and peftkit shards with version 2; set fsdp_version: 2"
    if _is_on(environment, "FSDP_ACTIVATION_CHECKPOINTING"):
        yield (
            "the launcher asks for fsdp_activation_checkpointing; leave it out and set "
            "training.gradient_checkpointing: true, which does that, once"
        )
    if _is_on(environment, "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        yield (
            "the launcher asks for fsdp_cpu_ram_efficient_loading, with which transformers leaves all processes but "
            "the first without weights; set it to false"
        )
    if environment.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP") != "TRANSFORMER_BASED_WRAP":
        yield "peftkit shards block by block; set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, or leave it out"
    if "FSDP_IGNORED_MODULES" in environment:
        yield "fsdp_ignored_modules is not something peftkit heeds; leave it out"


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("true", "1", "yes")


def _asked() -> tuple[str, int | None]:
    """Who asked for how many processes; None where nobody did."""
    for variable in COUNTS:
        if (count := os.environ.get(variable, "")).isdecimal():
            return "`peftkit launch`" if variable == PROCESSES else f"the launcher ({variable})", int(count)
    return "`accelerate launch`", _asked_of_accelerate() if LAUNCHED in os.environ else None


def _asked_of_accelerate() -> int | None:
    """What the `accelerate launch` above this process was told, on its command line or by its configuration.

    It tells a single process that it starts nothing of that.
    """
    import psutil

    for parent in psutil.Process().parents():
        try:
            command, folder = parent.cmdline(), Path(parent.cwd())
        except (psutil.Error, OSError):  # it has ended, or is another user's
            continue
        if (arguments := launch_arguments(command)) is not None:
            return _number_of_processes(arguments, folder)
    return None


def launch_arguments(command: Sequence[str]) -> list[str] | None:
    """The arguments of `accelerate launch` in a command line; None where it is none."""
    for position, word in enumerate(command):
        name, following = Path(word).name, command[position + 1 : position + 2]
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and list(following) == ["launch"]:
            return list(command[position + 2 :])
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return list(command[position + 1 :])
    return None


def _number_of_processes(arguments: list[str], folder: Path) -> int | None:
    """By Accelerate's own reading of its arguments, which were given in `folder`."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(arguments)
    if options.num_processes is not None:
        return int(options.num_processes)
    file = options.config_file or default_config_file
    if options.config_file is None and (options.cpu or not Path(file).is_file()):
        return None
    count = int(load_config_from_file(str(folder / file)).num_processes)
    return count if count > 0 else None
