"""Checkpoints of a run in progress, written beside, sealed and renamed; the newest that is whole is read."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.changes import DATA, PROCESSES, WEIGHTS, Changes, differences, flat, mend, not_allowed, told
from peftkit.disk import remove_folder, sweep, whole_file, whole_folder
from peftkit.errors import ArtifactError, PeftkitError, first_line
from peftkit.methods.base import trained_parameters, trained_tensors
from peftkit.training.random_state import restore_random_state
from peftkit.training.seal import Described, check_sealed, described, seal
from peftkit.training.state_files import TENSORS, VALUES, read_tree, write_tree
from peftkit.training.whole import put, shared_out, whole_parameters, whole_state

if TYPE_CHECKING:
    from torch import nn

    from peftkit.methods.base import Method

TRAINED = "trained.safetensors"
METHOD_STATE = "method.safetensors"
STATES, RANDOM = "states", "random"
PROGRESS = "progress.json"
FILES = (TRAINED, METHOD_STATE, PROGRESS, *(f"{tree}{end}" for tree in (STATES, RANDOM) for end in (TENSORS, VALUES)))
KEPT = 2
"""Checkpoints that stay: should the disk lose the newest, the one before is there."""


@dataclass
class Progress:
    """What a run is, and how far it has come; everything that is not a tensor."""

    settings: dict[str, Any]
    """Those that decide what is computed, as nested sections."""
    data: str
    """The fingerprint of the encoded data."""
    weights: str
    """The hash of the backbone's weight files."""
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
    changes: list[dict[str, Any]] = field(default_factory=list)
    """What was allowed to change on the way: `step`, `name`, `before`, `after`."""

    def changes_to(self, other: Progress) -> Changes:
        """What makes another run of it."""
        before, after = (
            flat(one.settings) | {DATA: one.data, WEIGHTS: one.weights, PROCESSES: one.processes}
            for one in (self, other)
        )
        return differences(before, after)


@dataclass
class Checkpoints:
    """The checkpoints of one run: step-N, of which the newest two stay, and the weights that scored best on dev.

    `states` are what remembers something from step to step and has `state_dict` and `load_state_dict`, such as the
    optimizer; all that they hold must be tensors and plain values.
    """

    folder: Path
    model: nn.Module
    method: Method
    states: dict[str, Any]
    passed_over: list[str] = field(default_factory=list)
    """Why `load` did not take newer checkpoints than it did."""
    _best: Described = field(default_factory=dict)
    """The file of the best weights, once there is one."""
    _whole: dict[Path, Described] = field(default_factory=dict)
    """Checkpoints known to be whole, oldest first, with the files of the best weights that they mean."""

    def save(self, progress: Progress, random_states: Sequence[dict[str, Any]], writes: bool = True) -> None:
        """Write step-N, read it back, then drop what is older. For all processes to call.

        Args:
            random_states: `random_state()` of every process.
            writes: this process is the one that writes.

        Raises:
            OSError: the disk is full; the checkpoint before is still there.
            ArtifactError: the disk holds something else than what was written; so is it then.
        """
        states = {name: whole_state(one.state_dict(), writes) for name, one in self.states.items()}
        with whole_parameters(self.model, writes):
            if writes:
                self._write(progress, random_states, states)

    def _write(self, progress: Progress, random_states: Sequence[dict[str, Any]], states: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        final = self.folder / f"step-{progress.step}"
        with whole_folder(final) as partial:
            save_file(trained_tensors(self.model), partial / TRAINED)
            save_file(self.method.state(self.model), partial / METHOD_STATE)
            write_tree(states, partial, STATES)
            write_tree(list(random_states), partial, RANDOM)
            (partial / PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
            seal(partial, progress.step, self._best)
        self._whole.pop(final, None)
        self._whole[final] = check_sealed(final, FILES, with_best=False)
        self._whole = dict(list(self._whole.items())[-KEPT:])
        for other in set(self._found()) - self._whole.keys():
            remove_folder(other)
        meant = {name for best in self._whole.values() for name in best}
        for weights in self.folder.glob("best-*"):
            if weights.name not in meant:
                weights.unlink()

    def load(self, fresh: Progress, process: int, allowed: Collection[str] = ()) -> Progress | None:
        """Restore the newest checkpoint that is whole; None when there is none at all.

        Args:
            fresh: the progress of a run that has not begun, to compare with.
            process: the rank of this one, whose random state is restored; 0 clears up after a killed run.
            allowed: the names of what may differ.

        Raises:
            ArtifactError: it belongs to another run, data, backbone or number of processes, or none is whole.
        """
        if process == 0 and self.folder.is_dir():
            sweep(self.folder)
        newest = self._newest_whole()
        if newest is None:
            return None
        try:
            # scores may be NaN, which JSON proper has not
            progress = Progress(**json.loads((newest / PROGRESS).read_text(encoding="utf-8")))
            _accept(newest, progress, fresh, allowed)
            self._restore(newest, process)
        except PeftkitError:
            raise
        except Exception as error:  # whole files of another format make libraries raise kinds of their own
            raise ArtifactError(
                f"{newest} cannot be loaded ({first_line(error)}); continue with the version of peftkit that wrote it, "
                "or start again with output.overwrite=true"
            ) from error
        return progress

    def save_best(self, step: int, writes: bool = True) -> None:
        """Keep the trained parameters as they are now. For all processes to call, of which one `writes`."""
        from safetensors.torch import save_file

        # named by step: were it one file, a run killed between it and its checkpoint would resume with a later best
        file = self.folder / f"best-{step}.safetensors"
        with whole_parameters(self.model, writes):
            if writes:
                with whole_file(file) as partial:
                    save_file(trained_tensors(self.model), partial)
                self._best = described([file])

    def load_best(self, step: int) -> None:
        """Put back what `save_best` kept."""
        load_trained(self.model, self.folder / f"best-{step}.safetensors")

    def _newest_whole(self) -> Path | None:
        self.passed_over = []
        for folder in reversed(self._found()):
            try:
                self._best = check_sealed(folder, FILES)
            except ArtifactError as error:
                self.passed_over.append(str(error))
                continue
            self._whole = {folder: self._best}
            return folder
        if self.passed_over:
            raise ArtifactError(
                f"no checkpoint in {self.folder} is whole: {'; '.join(self.passed_over)}. Restore one of them, or "
                "start again with output.overwrite=true"
            )
        return None

    def _restore(self, newest: Path, process: int) -> None:
        from safetensors.torch import load_file

        load_trained(self.model, newest / TRAINED)
        self.method.load_state(self.model, load_file(newest / METHOD_STATE))
        saved = read_tree(newest, STATES)
        for name, one in self.states.items():
            one.load_state_dict(shared_out(saved[name], one))
        random_states = read_tree(newest, RANDOM)
        if process < len(random_states):  # a process more than there were keeps the seed it has
            restore_random_state(random_states[process])

    def _found(self) -> list[Path]:
        folders = [one for one in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", one.name)]
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def bytes_needed(model: nn.Module, method: Method, keep_best: bool) -> int:
    """The most that checkpoints of `model` take: weights, two moments and the method's state, and the best weights, of
    the checkpoints that stay and of a new one.

    The artifact is written when the new one is gone.
    """
    weights = sum(p.nbytes for p in trained_parameters(model).values())
    state = sum(tensor.nbytes for tensor in method.state(model).values())
    return (KEPT + 1) * (weights * (3 + keep_best) + state)


def load_trained(model: nn.Module, file: Path) -> None:
    """Put saved values into the trained parameters."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    parameters = trained_parameters(model)
    if {name: t.shape for name, t in tensors.items()} != {name: p.shape for name, p in parameters.items()}:
        raise ArtifactError(f"{file} holds other parameters than this run trains")
    for name, parameter in parameters.items():
        put(parameter, tensors[name])


def _accept(place: Path, progress: Progress, fresh: Progress, allowed: Collection[str]) -> None:
    """Make the progress that of the run as it is now, if nothing has changed but what may."""
    changes = progress.changes_to(fresh)
    if refused := not_allowed(changes, allowed):
        raise ArtifactError(
            f"{place} is of another run: {told(refused)}; go on with the same, {mend(refused)}; or start again with "
            "output.overwrite=true"
        )
    progress.changes += [
        {"step": progress.step, "name": name, "before": before, "after": after}
        for name, (before, after) in changes.items()
    ]
    progress.settings, progress.data, progress.weights = fresh.settings, fresh.data, fresh.weights
    progress.processes = fresh.processes
