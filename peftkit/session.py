"""The start of a run: processes, seeds, and a run folder that belongs to it alone."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.backbones.quantize import check_backend
from peftkit.backbones.runs import MANIFEST, RUN_FILE
from peftkit.changes import Changes, differences, flat, mend, not_allowed, told
from peftkit.config import Run, load_run, run_id, settings_of
from peftkit.config_file import to_yaml
from peftkit.data.mix import missing_files
from peftkit.disk import require_writable, write_text
from peftkit.errors import ConfigError, UsageError
from peftkit.memory import give_back_freed_blocks
from peftkit.processes import MIXED_PRECISION, check_launcher, check_processes
from peftkit.training import watch
from peftkit.training.optimizer import check_optimizer
from peftkit.training.sharding import Sharding, sharding_of, unseen

if TYPE_CHECKING:
    from accelerate import Accelerator
    from filelock import BaseFileLock

LOCK = ".lock"
BEFORE_RUN_FILE = {LOCK, f".{RUN_FILE}.partial"}
"""What a process that was killed as it began leaves in a folder that it did not come to own."""
HEADER = "# run "
"""How the first line of `run.yaml` starts; the run's id follows. It tells a run folder from any other."""


def start(run: Run, needs_data: bool = True) -> Accelerator:
    """Start the processes and seed every generator; the run folder is checked, and untouched until training.

    Args:
        needs_data: the rows come from where `run.task.data` says; its files are looked for first.

    Raises:
        ConfigError: data files that are not there.
        UsageError: the folder holds something else, the launcher's settings contradict the run or gave it other
            processes than it was asked for, or this device has not the precision, the optimizer or bitsandbytes' code.
    """
    folder = check_start(run, os.environ, needs_data)
    from accelerate.utils import set_seed

    sharding = sharding_of(run)
    accelerator = _training_accelerator(run, folder)
    accelerator.sharding = _among(accelerator, sharding)
    accelerator.engine = run.engine
    if run.training.precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate would train in float32 without a word
        raise UsageError("training.precision: fp16 needs a GPU; use bf16 or fp32 here")
    check_optimizer(run.training.optimizer, accelerator.device.type)
    if run.training.on_out_of_memory == "split" and accelerator.num_processes > 1:
        raise UsageError(
            "training.on_out_of_memory: split is for one process, because the others would wait for one that takes its "
            "step again; leave it out and lower training.micro_batch_size"
        )
    if run.training.allocator == "tight" and accelerator.device.type == "cpu" and not give_back_freed_blocks():
        raise UsageError("training.allocator: tight is for Linux with glibc; leave it out here")
    if run.backbone.quantization is not None:
        check_backend(str(accelerator.device))
    set_seed(run.training.seed)
    return accelerator


def check_start(run: Run, environment: Mapping[str, str], needs_data: bool = True) -> Path:
    """Everything about a start that can be refused before there is a process; returns the run folder.

    Args:
        environment: the variables that a launcher sets in its processes.

    Raises:
        ConfigError: data files that are not there.
        UsageError: the folder holds something else, or the launcher's settings contradict the run.
    """
    folder = run_folder(run)
    check_folder(run, folder)
    _check_continued(run, folder)
    if needs_data and run.task.data and (missing := missing_files(run.task.data)):
        raise ConfigError(missing)
    check_launcher(run, environment)
    return folder


def _check_continued(run: Run, folder: Path) -> None:
    """Refuse to go on from what is no finished run, or to write over it."""
    if run.method.start_from is None:
        return
    start = Path(run.method.start_from).expanduser()
    if not (start / MANIFEST).is_file():
        raise UsageError(f"method.start_from: {start} is not a finished run (it has no {MANIFEST})")
    if start.absolute() == folder.absolute():
        raise UsageError(f"method.start_from and output.folder are both {folder}; write to another folder")


def claim(run: Run, accelerator: Accelerator) -> None:
    """Write the resolved run into its folder, which from now on belongs to it; `release` gives the folder back.

    Raises:
        UsageError: another process is training into the folder.
    """
    folder = run_folder(run)
    check_folder(run, folder)
    watch.pace_of(accelerator).arrive()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        accelerator.run_lock = _lock(folder)
        _write_run(run, folder)
    if run.output.trackers:
        accelerator.init_trackers("tracking", config={"run_id": run_id(run)})
    accelerator.wait_for_everyone()


def release(run: Run, accelerator: Accelerator) -> None:
    """Give the run folder back; the lock of a process that died is free by itself."""
    accelerator.run_lock.release()
    (run_folder(run) / LOCK).unlink(missing_ok=True)


def _lock(folder: Path) -> BaseFileLock:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"another process is training into {folder}; wait for it, or name another output.folder"
        ) from None
    return lock


def inference_accelerator(run: Run) -> Accelerator:
    """Accelerate's processes and the precision that the run was trained in, or float32 where a CPU has no float16."""
    import torch

    precision = MIXED_PRECISION[run.training.precision]
    accelerator = _accelerator("no" if precision == "fp16" and not torch.cuda.is_available() else precision)
    accelerator.engine = run.engine
    return accelerator


def run_folder(run: Run) -> Path:
    """Where the run is written."""
    if run.output.folder is None:
        raise UsageError("output.folder is not set; name the folder that the run is written to")
    return Path(run.output.folder)


def check_folder(run: Run, folder: Path) -> None:
    """Refuse a folder with another run, a finished one, or a stranger's files in it."""
    if not folder.exists():
        require_writable(folder)
        return
    if not folder.is_dir():
        raise UsageError(f"output.folder: {folder} is a file")
    owner = _owner(folder)
    if owner is None:
        if any(entry.name not in BEFORE_RUN_FILE for entry in folder.iterdir()):
            raise UsageError(
                f"{folder} is not a run folder and holds other files, which peftkit will not overwrite; "
                "name an empty or new output.folder"
            )
    elif not run.output.overwrite:
        _check_owner(run, folder, owner)


def _check_owner(run: Run, folder: Path, owner: str) -> None:
    if owner == run_id(run):
        if (folder / MANIFEST).is_file():
            raise UsageError(
                f"{folder} holds this run, finished{_scores(folder)}; output.overwrite=true trains it again"
            )
        return
    if not _holds_work(folder):
        return
    changes = _changes(run, folder)
    refused = changes if (folder / MANIFEST).is_file() else not_allowed(changes, run.output.allow_changes)
    if refused:
        way_on = "" if (folder / MANIFEST).is_file() else f"go on as it began, {mend(refused)}; or "
        raise UsageError(
            f"{folder} belongs to run {owner}, not {run_id(run)}: {told(refused)}; {way_on}name another output.folder, "
            "or give it up with output.overwrite=true"
        )


def _changes(run: Run, folder: Path) -> Changes:
    """What this run sets otherwise than the one in the folder."""
    return differences(flat(settings_of(load_run(folder / RUN_FILE))), flat(settings_of(run)))


def _scores(folder: Path) -> str:
    try:
        scores = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["scores"]["after"]
        return f" ({', '.join(f'{name} {value:.4f}' for name, value in scores.items())})"
    # a damaged manifest is no reason to overwrite it
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def _training_accelerator(run: Run, folder: Path) -> Accelerator:
    trackers, precision = run.output.trackers, MIXED_PRECISION[run.training.precision]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`log_with=", UserWarning)  # told below, as an error
            accelerator = _accelerator(precision, log_with=list(trackers) or None, project_dir=folder)
    except ValueError as error:
        raise UsageError(f"training.precision or output.trackers: {error}") from error
    started = {str(getattr(one, "value", one)) for one in accelerator.log_with}
    if missing := [name for name in trackers if name not in started and name != "all"]:
        # Accelerate leaves these out without a word
        raise UsageError(f"output.trackers: {missing[0]} is not installed here; install it, or leave it out")
    return accelerator


def _among(accelerator: Accelerator, sharding: Sharding | None) -> Sharding | None:
    """What to shard, now that processes and device are known."""
    if sharding is None:
        return None
    if accelerator.num_processes == 1:
        accelerator.print("one process: there is nobody to share the model with, so it is not sharded")
        return None
    if sharding.offload and sharding.of_trained and accelerator.device.type != "cpu":
        # gradients in the memory of the CPU would have to be summed over processes there
        raise UsageError(
            "fsdp_offload_params is for what is frozen, and this method trains the backbone; set fsdp_offload_params: "
            "false in the file that accelerate launch reads"
        )
    return sharding


def _accelerator(mixed_precision: str, **options: Any) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    # its precision is kept for the whole process; a second run in the same Python may want another
    AcceleratorState._reset_state()
    # buffers, such as positions, are the same in all processes and stay so: sending them in every step is for nothing
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    with unseen():
        accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=handlers, **options)
    check_processes(accelerator.num_processes)
    accelerator.pace = watch.start(accelerator)
    return accelerator


def _holds_work(folder: Path) -> bool:
    """A finished run, or one that has a checkpoint to go on from."""
    return (folder / MANIFEST).is_file() or any(folder.glob("checkpoints/step-*"))


def _owner(folder: Path) -> str | None:
    """The run that a folder belongs to; None for a folder that peftkit did not make."""
    try:
        with (folder / RUN_FILE).open(encoding="utf-8") as lines:
            first = lines.readline()
    except (OSError, UnicodeDecodeError):
        return None
    return first.removeprefix(HEADER).strip() if first.startswith(HEADER) else None


def _write_run(run: Run, folder: Path) -> None:
    if run.output.overwrite or not _holds_work(folder):
        _empty(folder)
    text = to_yaml(run.model_dump(mode="json"))
    write_text(folder / RUN_FILE, f"{HEADER}{run_id(run)}\n{text}")


def _empty(folder: Path) -> None:
    """Remove what is in a folder and leave the folder, which may be a link or the root of a disk.

    `run.yaml` goes last, so that a folder half emptied still counts as a run's."""
    for entry in sorted(folder.iterdir(), key=lambda path: path.name == RUN_FILE):
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
