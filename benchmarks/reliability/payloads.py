"""Pickles that make a file when they are read, in every place where a file of somebody else is looked for.

A trial puts one into an adapter or a checkpoint, which is then signed or sealed again, or into a backbone, reads that
in a forked process, and looks for the file. The payload does no harm: it opens a new file in the trial's folder.
"""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reliability import hostile_kinds, subjects
from benchmarks.reliability.confined import apart
from benchmarks.reliability.runs import NOT_OFFERED
from benchmarks.reliability.workbench import Workbench

EXECUTED, REFUSED, PASSED, UNREAD = "executed", "refused", "passed over", "not read"
GOOD = (REFUSED, PASSED)
SECONDS, MEGABYTES = 120.0, 4000


class Opens:
    """Unpickled, it opens a new file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.file), "x")


def plain(file: Path) -> bytes:
    """A pickle and nothing else."""
    return pickle.dumps(Opens(file), protocol=2)


def saved_by_torch(file: Path, zipped: bool = True) -> bytes:
    """What `torch.save` writes: an archive, or as before 1.6."""
    import torch

    stream = io.BytesIO()
    torch.save({"state": Opens(file)}, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


FORMS: dict[str, Callable[[Path], bytes]] = {
    "pickle": plain,
    "torch archive": saved_by_torch,
    "torch before 1.6": lambda file: saved_by_torch(file, zipped=False),
}
PLACES: dict[str, tuple[str, ...]] = {
    "adapter": ("adapter_model.bin", "adapter_model.safetensors", "adapter_config.json"),
    "checkpoint": (
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin", "adapter_model.bin"),
        *("trained.safetensors", "states.safetensors", "states.json", "random.safetensors", "manifest.json"),
    ),
    "backbone": ("pytorch_model.bin", "model.safetensors", "tokenizer.json"),
}
SHORT = (
    *("adapter/adapter_model.bin/pickle", "backbone/pytorch_model.bin/torch archive"),
    *("checkpoint/optimizer.pt/torch archive", "checkpoint/states.safetensors/pickle"),
)
OF_PEFTKIT = ("trained.safetensors", "states.safetensors", "states.json", "random.safetensors", "manifest.json")


def trials(tier: str) -> list[str]:
    """What is read/the file in it/the form of the payload."""
    if tier == "short":
        return list(SHORT)
    return [f"{what}/{name}/{form}" for what, names in PLACES.items() for name in names for form in FORMS]


def run(trial: str, column: str, bench: Workbench, folder: Path) -> dict[str, Any]:
    """Put a payload in its place, read it, and look whether it ran."""
    what, name, form = trial.split("/")
    if column == "stock" and name in OF_PEFTKIT:
        return NOT_OFFERED
    opened = folder / "opened"
    read = READ[what, column](bench, folder, name, FORMS[form](opened))
    found = apart(lambda: _read(read), SECONDS, MEGABYTES)
    if opened.exists():
        found["outcome"] = EXECUTED
    return subjects.told(bench, {"outcome": f"ended by {found['ended']}"} | found)


def _read(read: Callable[[], object]) -> dict[str, Any]:
    try:
        with subjects.silent():
            return {"outcome": PASSED if read() == PASSED else UNREAD}
    except Exception as error:
        return {"outcome": REFUSED, "said": f"{type(error).__name__}: {error}"}


def _peftkit_adapter(bench: Workbench, folder: Path, name: str, payload: bytes) -> Callable[[], object]:
    from peftkit.artifacts.loading import load_run

    copied = Path(shutil.copytree(subjects.peftkit_adapter(bench, "lora", 1), folder / "run"))
    _placed(copied / "adapter", name, payload)
    hostile_kinds.sign(copied)
    return lambda: load_run(copied)


def _stock_adapter(bench: Workbench, folder: Path, name: str, payload: bytes) -> Callable[[], object]:
    copied = Path(shutil.copytree(subjects.stock_adapter(bench, "lora", 1), folder / "adapter"))
    _placed(copied, name, payload)
    subjects.stock_base(bench)
    return lambda: subjects.stock_loaded(bench, copied)


def _peftkit_checkpoint(bench: Workbench, folder: Path, name: str, payload: bytes) -> Callable[[], object]:
    from peftkit.training.checkpoint import Checkpoints
    from peftkit.training.seal import check_sealed, seal

    trained = subjects.peftkit_training(bench, "lora")
    copied = Path(shutil.copytree(trained.checkpoints, folder / "checkpoints"))
    newest = subjects.checkpoints(copied)[-1]
    best = check_sealed(newest, _names(newest))
    (newest / "manifest.json").unlink()
    (newest / name).write_bytes(payload)
    if name != "manifest.json":
        seal(newest, int(newest.name.partition("-")[2]), best)
    loop = trained.loop
    found = Checkpoints(copied, loop.model, loop.run.method, loop.checkpoints.states)
    return lambda: found.load(loop.progress, 0) and found.passed_over and PASSED


def _stock_checkpoint(bench: Workbench, folder: Path, name: str, payload: bytes) -> Callable[[], object]:
    copied = Path(shutil.copytree(subjects.stock_training(bench, "lora"), folder / "run"))
    newest = subjects.checkpoints(copied)[-1]
    _placed(newest, name, payload)
    trainer = subjects.stock_trainer(bench, "lora", copied)
    return lambda: trainer.train(resume_from_checkpoint=str(newest))


def _peftkit_backbone(bench: Workbench, folder: Path, name: str, payload: bytes) -> Callable[[], object]:
    from peftkit.backbones.load import BackboneSettings, Head, load

    copied = _backbone(bench, folder, name, payload)
    return lambda: load(BackboneSettings(name=str(copied)), Head("AutoModelForSequenceClassification", ("a", "b")))


def _stock_backbone(bench: Workbench, folder: Path, name: str, payload: bytes) -> Callable[[], object]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    copied = _backbone(bench, folder, name, payload)

    return lambda: (
        AutoTokenizer.from_pretrained(copied),
        AutoModelForSequenceClassification.from_pretrained(copied),
    )


READ = {
    ("adapter", "peftkit"): _peftkit_adapter,
    ("adapter", "stock"): _stock_adapter,
    ("checkpoint", "peftkit"): _peftkit_checkpoint,
    ("checkpoint", "stock"): _stock_checkpoint,
    ("backbone", "peftkit"): _peftkit_backbone,
    ("backbone", "stock"): _stock_backbone,
}


def _backbone(bench: Workbench, folder: Path, name: str, payload: bytes) -> Path:
    copied = Path(shutil.copytree(bench.backbone, folder / "backbone"))
    _placed(copied, name, payload)
    return copied


def _placed(folder: Path, name: str, payload: bytes) -> None:
    """Weights are read as a pickle only where there are no safetensors."""
    if name in ("adapter_model.bin", "pytorch_model.bin"):
        for file in folder.glob("*model.safetensors"):
            file.unlink()
    (folder / name).write_bytes(payload)


def _names(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir() if one.name != "manifest.json"]
