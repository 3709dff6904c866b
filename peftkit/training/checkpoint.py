"""Checkpoints of a run in progress, written beside and renamed, so that a reader never sees half of one."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import ArtifactError
from peftkit.methods.base import trained_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftkit.methods.base import Method

BEST = "best.safetensors"
TRAINED = "trained.safetensors"
METHOD_STATE = "method.safetensors"
OPTIMIZER = "optimizer.pt"
PROGRESS = "progress.json"


@dataclass
class Progress:
    """How far a run has come; everything that is not a tensor."""

    run_id: str
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_value: float | None = None
    evaluations_without_gain: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def save_checkpoint(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    method: Method,
    optimizer: Any,
    schedule: Any,
    rank: int,
    processes: int,
    wait: Any,
) -> None:
    """Write `folder`/step-N from all processes (each its random generators), then drop older ones.

    Args:
        wait: called for all processes to meet; the first one writes what they share.
    """
    import torch
    from safetensors.torch import save_file

    final = folder / f"step-{progress.step}"
    partial = folder / f".step-{progress.step}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_trained_tensors(model), partial / TRAINED)
        save_file(method.state(model), partial / METHOD_STATE)
        torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, partial / OPTIMIZER)
        (partial / PROGRESS).write_text(json.dumps({"processes": processes} | asdict(progress)))
    wait()
    torch.save(_random_state(), partial / f"random-{rank}.pt")
    wait()
    if rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for older in _checkpoints(folder)[:-1]:
            shutil.rmtree(older)


def load_checkpoint(
    folder: Path,
    run_id: str,
    model: nn.Module,
    method: Method,
    optimizer: Any,
    schedule: Any,
    rank: int,
    processes: int,
) -> Progress | None:
    """Restore the newest checkpoint in `folder`; None when there is none.

    Raises:
        ArtifactError: it belongs to another run, another number of processes, or is damaged.
    """
    import torch
    from safetensors.torch import load_file

    found = _checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        saved = json.loads((newest / PROGRESS).read_text())
        if saved["run_id"] != run_id or saved.pop("processes") != processes:
            raise ArtifactError(
                f"{newest} was written by another configuration or number of processes; "
                "continue with those, or start again with output.overwrite=true"
            )
        load_trained(model, newest / TRAINED)
        method.load_state(model, load_file(newest / METHOD_STATE))
        states = torch.load(newest / OPTIMIZER, weights_only=True, map_location="cpu")
        optimizer.load_state_dict(states["optimizer"])
        schedule.load_state_dict(states["schedule"])
        _restore_random_state(torch.load(newest / f"random-{rank}.pt", weights_only=True))
    except (OSError, KeyError, ValueError, RuntimeError, EOFError) as error:
        raise ArtifactError(f"{newest} is damaged ({error}); delete it to start again") from error
    return Progress(**saved)


def save_trained(model: nn.Module, file: Path) -> None:
    """Write the trained parameters, beside and renamed."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file(_trained_tensors(model), partial)
    partial.rename(file)


def load_trained(model: nn.Module, file: Path) -> None:
    """Put saved values into the trained parameters."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    parameters = trained_parameters(model)
    if tensors.keys() != parameters.keys():
        raise ArtifactError(f"{file} holds other parameters than this run trains")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])


def _trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().contiguous().cpu() for name, p in trained_parameters(model).items()}


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _random_state() -> dict[str, Any]:
    import numpy as np
    import torch

    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": json.dumps(random.getstate()),
        "numpy": (
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            position,
            has_gauss,
            cached,
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    import numpy as np
    import torch

    version, internal, gauss = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
