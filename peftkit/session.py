"""The start of a run: processes, seeds, and a run folder that belongs to it alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.config import Run, run_id
from peftkit.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

MANIFEST = "manifest.json"
RUN_FILE = "run.yaml"
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def start(run: Run) -> Accelerator:
    """Start the processes and seed every generator; the run folder is checked, and untouched until training.

    Raises:
        UsageError: the folder holds something else, or the launcher asks for another precision than the run.
    """
    folder = Path(str(run.output.folder))
    check_folder(run, folder)
    return make_accelerator(run, folder)


def claim(run: Run, accelerator: Accelerator) -> None:
    """Write the resolved run into its folder, which from now on belongs to it."""
    folder = Path(str(run.output.folder))
    check_folder(run, folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write_run(run, folder)
    if run.output.trackers:
        accelerator.init_trackers("tracking", config={"run_id": run_id(run)})
    accelerator.wait_for_everyone()


def make_accelerator(run: Run, folder: Path | None = None) -> Accelerator:
    """Accelerate's processes and precision for a run; generators seeded with the run's seed."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    wanted = MIXED_PRECISION[run.training.precision]
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", wanted):
        raise UsageError(
            f"the launcher asks for {launched} and training.precision for {run.training.precision}; "
            "set one and leave the other out"
        )
    try:
        accelerator = Accelerator(
            mixed_precision=wanted, log_with=list(run.output.trackers) or None, project_dir=folder
        )
    except ValueError as error:
        raise UsageError(f"training.precision or output.trackers: {error}") from error
    set_seed(run.training.seed)
    return accelerator


def check_folder(run: Run, folder: Path) -> None:
    """Refuse a folder with another run, a finished one, or a stranger's files in it."""
    if not folder.exists() or run.output.overwrite:
        if folder.exists() and any(folder.iterdir()) and not (folder / RUN_FILE).is_file():
            raise UsageError(f"{folder} is not a run folder; peftkit will not overwrite it: name another output.folder")
        return
    if not folder.is_dir():
        raise UsageError(f"output.folder: {folder} is a file")
    owner = _owner(folder)
    if owner is None:
        if any(folder.iterdir()):
            raise UsageError(f"{folder} holds other files; name an empty or new output.folder")
    elif owner != run_id(run):
        if _holds_work(folder):
            raise UsageError(
                f"{folder} belongs to run {owner}, not {run_id(run)}; name another output.folder, "
                "or give it up with output.overwrite=true"
            )
    elif (folder / MANIFEST).is_file():
        scores = json.loads((folder / MANIFEST).read_text())["scores"]["after"]
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        raise UsageError(f"{folder} holds this run, finished ({shown}); output.overwrite=true trains it again")


def _holds_work(folder: Path) -> bool:
    """A finished run, or one that has a checkpoint to go on from."""
    return (folder / MANIFEST).is_file() or any(folder.glob("checkpoints/step-*"))


def _owner(folder: Path) -> str | None:
    file = folder / RUN_FILE
    if not file.is_file():
        return None
    first = file.read_text().partition("\n")[0]
    return first.removeprefix("# run ").strip()


def _write_run(run: Run, folder: Path) -> None:
    import yaml

    if folder.exists() and (run.output.overwrite or not _holds_work(folder)):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    partial = folder / f".{RUN_FILE}"
    partial.write_text(f"# run {run_id(run)}\n{text}", encoding="utf-8")
    partial.rename(folder / RUN_FILE)
