"""Checkpoints of a run in progress, written beside and renamed, so that a reader never sees half of one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.disk import whole_file, whole_folder
from peftkit.errors import ArtifactError
from peftkit.methods.base import trained_parameters, trained_tensors
from peftkit.training.whole import put, shared_out, whole_parameters, whole_state

if TYPE_CHECKING:
    from torch import nn

    from peftkit.methods.base import Method

TRAINED = "trained.safetensors"
METHOD_STATE = "method.safetensors"
OPTIMIZER = "optimizer.pt"
RANDOM = "random.pt"
PROGRESS = "progress.json"


@dataclass
class Progress:
    """How far a run has come; everything that is not a tensor."""

    run_id: str
    data: str
    """The fingerprint of the encoded data."""
    processes: int
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_value: float | None = None
    evaluations_without_gain: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    micro_batch_size: int | None = None
    """Most examples in one forward pass, once memory did not suffice for what the settings say."""


@dataclass
class Checkpoints:
    """The checkpoints of one run: step-N, of which the newest stays, and the weights that scored best on dev.

    `states` are what remembers something from step to step and has `state_dict` and `load_state_dict`, such as the
    optimizer; all that they hold must be tensors and plain values.
    """

    folder: Path
    model: nn.Module
    method: Method
    states: dict[str, Any]

    def save(self, progress: Progress, random_states: Sequence[dict[str, Any]], writes: bool = True) -> None:
        """Write step-N, then drop what is older. For all processes to call.

        Args:
            random_states: `random_state()` of every process.
            writes: this process is the one that writes.

        Raises:
            OSError: the disk is full; the checkpoint before is still there.
        """
        states = {name: whole_state(one.state_dict(), writes) for name, one in self.states.items()}
        with whole_parameters(self.model, writes):
            if writes:
                self._write(progress, random_states, states)

    def _write(self, progress: Progress, random_states: Sequence[dict[str, Any]], states: dict[str, Any]) -> None:
        import torch
        from safetensors.torch import save_file

        with whole_folder(self.folder / f"step-{progress.step}") as partial:
            save_file(trained_tensors(self.model), partial / TRAINED)
            save_file(self.method.state(self.model), partial / METHOD_STATE)
            torch.save(states, partial / OPTIMIZER)
            torch.save(list(random_states), partial / RANDOM)
            (partial / PROGRESS).write_text(json.dumps(asdict(progress)))
        for older in self._found()[:-1]:
            shutil.rmtree(older)
        for weights in set(self.folder.glob("best-*")) - {self._best(progress.best_step)}:
            weights.unlink()

    def load(self, fresh: Progress, process: int) -> Progress | None:
        """Restore the newest checkpoint; None when there is none.

        Args:
            fresh: the progress of a run that has not begun, to compare with.

        Raises:
            ArtifactError: it belongs to another run, other data, another number of processes, or is damaged.
        """
        found = self._found()
        if not found:
            return None
        newest = found[-1]
        try:
            progress = Progress(**json.loads((newest / PROGRESS).read_text()))
            _check_same(newest, progress, fresh)
            self._restore(newest, process)
        except ArtifactError:
            raise
        except Exception as error:  # damaged files make json, safetensors, torch and pickle raise kinds of their own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ArtifactError(f"{newest} is damaged ({reason}); delete it to start again") from error
        return progress

    def save_best(self, step: int, writes: bool = True) -> None:
        """Keep the trained parameters as they are now. For all processes to call, of which one `writes`."""
        from safetensors.torch import save_file

        with whole_parameters(self.model, writes):
            if writes:
                with whole_file(self._best(step)) as partial:
                    save_file(trained_tensors(self.model), partial)

    def load_best(self, step: int) -> None:
        """Put back what `save_best` kept."""
        load_trained(self.model, self._best(step))

    def _restore(self, newest: Path, process: int) -> None:
        import torch
        from safetensors.torch import load_file

        load_trained(self.model, newest / TRAINED)
        self.method.load_state(self.model, load_file(newest / METHOD_STATE))
        saved = torch.load(newest / OPTIMIZER, weights_only=True, map_location="cpu")
        for name, one in self.states.items():
            one.load_state_dict(shared_out(saved[name], one))
        restore_random_state(torch.load(newest / RANDOM, weights_only=True)[process])

    def _best(self, step: int) -> Path:
        # named by step: were it one file, a run killed between it and its checkpoint would resume with a later best
        return self.folder / f"best-{step}.safetensors"

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def bytes_needed(model: nn.Module, method: Method, keep_best: bool) -> int:
    """The most that checkpoints of `model` take: weights, two moments and the method's state, old and new, and twice
    the best weights.

    The artifact is written when one of each is gone.
    """
    weights = sum(p.nbytes for p in trained_parameters(model).values())
    state = sum(tensor.nbytes for tensor in method.state(model).values())
    return weights * (2 * 3 + 2 * keep_best) + 2 * state


def load_trained(model: nn.Module, file: Path) -> None:
    """Put saved values into the trained parameters."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    parameters = trained_parameters(model)
    if {name: t.shape for name, t in tensors.items()} != {name: p.shape for name, p in parameters.items()}:
        raise ArtifactError(f"{file} holds other parameters than this run trains")
    for name, parameter in parameters.items():
        put(parameter, tensors[name])


def random_state() -> dict[str, Any]:
    """Every generator of this process, as tensors and plain values."""
    import numpy as np
    import torch

    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": json.dumps(random.getstate()),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to what `random_state` returned."""
    import numpy as np
    import torch

    version, internal, gauss = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _check_same(place: Path, progress: Progress, fresh: Progress) -> None:
    differing = [
        what
        for name, what in (
            ("run_id", "configuration"),
            ("data", "rows or tokenizer"),
            ("processes", "number of processes"),
        )
        if getattr(progress, name) != getattr(fresh, name)
    ]
    if differing:
        raise ArtifactError(
            f"{place} was written with another {' and '.join(differing)}; "
            "continue with the same, or start again with output.overwrite=true"
        )
