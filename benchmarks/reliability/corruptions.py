"""Checkpoints and saved adapters of which files are lost, cut, flipped, swapped or mixed with those of older ones.

A trial damages one copy by one of the kinds in `mutations.py`. For checkpoints it is the newest of two that is damaged,
and the run goes on; for adapters, the adapter is loaded. A checkpoint that nothing is done to, and an older one that is
whole and alone, are no corruption and must be taken. Noticed is what is said before anything of the damaged folder is
used. What is noticed is `named` where one of the damaged files is. What is not noticed is compared: a run with the
trained weights that an undamaged checkpoint ends with, a loaded adapter with its own logits.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.reliability import subjects
from benchmarks.reliability.confined import Late, within
from benchmarks.reliability.mutations import KINDS, Mutation, mutate
from benchmarks.reliability.runs import NOT_OFFERED
from benchmarks.reliability.workbench import Workbench
from peftkit.errors import PeftkitError

if TYPE_CHECKING:
    from torch import Tensor

PASSED, REFUSED = "passed over, file named", "refused, file named"
UNNAMED, SAME, OTHER = "noticed, file not named", "silent, same result", "silent, other result"
CRASH, HANGS = "an error that nobody foresaw", "hangs"
COUNTS = {"short": {"lora": 1}, "full": {"lora": 22, "adalora": 11, "bottleneck": 11}}
"""Trials of every kind of damage, by method."""
ACCEPTED, ALARM = "whole, and taken", "whole, and not taken"
WHOLE = ("untouched", "older alone")
"""No damage: nothing is done, or the newest checkpoint is gone and the one before it is there."""
GOOD = (PASSED, REFUSED, ACCEPTED)
SECONDS = 120.0


def trials(tier: str) -> list[str]:
    """What is damaged/method/kind of damage/number."""
    return [
        f"{what}/{method}/{kind}/{number}"
        for method, count in COUNTS[tier].items()
        for what in ("checkpoint", "adapter")
        for kind in KINDS
        for number in range(count)
    ] + [f"checkpoint/{method}/{kind}/0" for method in COUNTS[tier] for kind in WHOLE]


def run(trial: str, column: str, bench: Workbench, folder: Path) -> dict[str, Any]:
    """Damage a copy, and see what is made of it."""
    what, method, kind, _ = trial.split("/")
    if not bench.program(column).offers(method):
        return NOT_OFFERED
    return subjects.told(bench, TRIALS[what, column](bench, method, kind, random.Random(trial), folder))


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Outcomes by what is damaged, and by the kind of damage."""
    done = [row for row in rows if row["outcome"] != "not offered" and row["trial"].split("/")[2] in KINDS]
    tables: dict[str, dict[str, Counter[str]]] = {"checkpoint": {}, "adapter": {}}
    for row in done:
        what, _, kind, _ = row["trial"].split("/")
        tables[what].setdefault(kind, Counter())[row["outcome"]] += 1
    return {"damaged": len(done)} | {
        f"{what}s": {
            "outcomes": dict(sum(kinds.values(), Counter())),
            "by kind": {kind: dict(counts) for kind, counts in kinds.items()},
        }
        for what, kinds in tables.items()
        if kinds
    }


def peftkit_checkpoint(bench: Workbench, method: str, kind: str, draw: random.Random, folder: Path) -> dict[str, Any]:
    """Let a run go on from what `Checkpoints.load` finds."""
    from safetensors.torch import load_file

    from peftkit.methods.base import trained_tensors
    from peftkit.training.checkpoint import TRAINED, Checkpoints

    trained = subjects.peftkit_training(bench, method)
    copied = Path(shutil.copytree(trained.checkpoints, folder / "checkpoints"))
    older, newest = subjects.checkpoints(copied)
    right = {one.name: load_file(one / TRAINED) for one in (older, newest)}
    names = [*_names(newest), *(f"../{one.name}" for one in copied.glob("best-*"))]
    mutation = _damaged(newest, older, names, kind, draw)
    loop = trained.loop
    found = Checkpoints(copied, loop.model, loop.run.method, loop.checkpoints.states)
    heard = _heard(lambda: found.load(loop.progress, 0), PeftkitError)
    if heard.error:
        return _noticed(REFUSED, mutation, heard)
    now, step = trained_tensors(loop.model), heard.value.step
    if not found.passed_over:
        return _unnoticed(mutation, _equal(now, right[newest.name if newest.exists() else older.name]))
    if newest.name == f"step-{step}" or not _equal(now, right[f"step-{step}"]):
        return _unnoticed(mutation, False)
    return _noticed(PASSED, mutation, Heard(None, said="; ".join(found.passed_over)))


def peftkit_adapter(bench: Workbench, method: str, kind: str, draw: random.Random, folder: Path) -> dict[str, Any]:
    """Load a finished run of which a file is damaged."""
    from peftkit.artifacts.loading import load_run, read_manifest

    one, other = (subjects.peftkit_adapter(bench, method, seed) for seed in subjects.SEEDS)
    copied = Path(shutil.copytree(one, folder / one.name))
    names = [*read_manifest(copied)["files"], "manifest.json"]
    mutation = mutate(copied, other, names, kind, draw)
    heard = _heard(lambda: load_run(copied), PeftkitError)
    if heard.error:
        return _noticed(REFUSED, mutation, heard)
    return _unnoticed(mutation, subjects.outputs(heard.value.model).equal(subjects.outputs(load_run(one).model)))


def stock_checkpoint(bench: Workbench, method: str, kind: str, draw: random.Random, folder: Path) -> dict[str, Any]:
    """Let Trainer go on from the last checkpoint."""
    copied = Path(shutil.copytree(subjects.stock_training(bench, method), folder / "run"))
    older, newest = subjects.checkpoints(copied)
    names = [name for name in _names(newest) if name in subjects.READ_ON_RESUMING]
    mutation = _damaged(newest, older, names, kind, draw)
    heard = _heard(lambda: _resumed(bench, method, copied))
    if heard.error:
        return _noticed(REFUSED, mutation, heard)
    return _unnoticed(mutation, _equal(heard.value, _undamaged(bench, method)))


def stock_adapter(bench: Workbench, method: str, kind: str, draw: random.Random, folder: Path) -> dict[str, Any]:
    """Load an adapter as peft does."""
    one, other = (subjects.stock_adapter(bench, method, seed) for seed in subjects.SEEDS)
    copied = Path(shutil.copytree(one, folder / "adapter"))
    mutation = mutate(copied, other, subjects.ADAPTER, kind, draw)
    heard = _heard(lambda: subjects.outputs(subjects.stock_loaded(bench, copied)))
    if heard.error:
        return _noticed(REFUSED, mutation, heard)
    return _unnoticed(mutation, heard.value.equal(subjects.outputs(subjects.stock_loaded(bench, one))))


TRIALS = {
    ("checkpoint", "peftkit"): peftkit_checkpoint,
    ("checkpoint", "stock"): stock_checkpoint,
    ("adapter", "peftkit"): peftkit_adapter,
    ("adapter", "stock"): stock_adapter,
}


@dataclass(frozen=True)
class Heard:
    """What came of an action: its value, or the error that ended it."""

    value: Any
    error: BaseException | None = None
    said: str = ""
    foreseen: bool = True


def _heard(action: Callable[[], Any], foreseen: type[Exception] = Exception) -> Heard:
    """Do it without a word on the terminal; an error of another kind than `foreseen` would be a traceback there."""
    try:
        with subjects.silent(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Heard(within(SECONDS, action))
    except (Exception, Late) as error:
        return Heard(None, error, f"{type(error).__name__}: {error}", isinstance(error, foreseen))


def _damaged(newest: Path, older: Path, names: list[str], kind: str, draw: random.Random) -> Mutation:
    if kind == "older alone":
        shutil.rmtree(newest)
    return Mutation(kind, ()) if kind in WHOLE else mutate(newest, older, names, kind, draw)


def _noticed(how: str, mutation: Mutation, heard: Heard) -> dict[str, Any]:
    if mutation.kind in WHOLE:
        return {"outcome": ALARM, "said": heard.said}
    outcome = how if any(Path(name).name in heard.said for name in mutation.files) else UNNAMED
    if not heard.foreseen:
        outcome = HANGS if isinstance(heard.error, Late) else CRASH
    return {"outcome": outcome, "files": mutation.files, "said": heard.said}


def _unnoticed(mutation: Mutation, is_same: bool) -> dict[str, Any]:
    if mutation.kind in WHOLE:
        return {"outcome": ACCEPTED if is_same else OTHER}
    return {"outcome": SAME if is_same else OTHER, "files": mutation.files}


def _resumed(bench: Workbench, method: str, folder: Path) -> dict[str, Tensor]:
    """What is trained when Trainer has gone on to the last step."""
    from transformers.trainer_utils import get_last_checkpoint

    trainer = subjects.stock_trainer(bench, method, folder, save_strategy="no")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


@cache
def _undamaged(bench: Workbench, method: str) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder, subjects.silent():
        shutil.copytree(subjects.stock_training(bench, method), folder, dirs_exist_ok=True)
        return _resumed(bench, method, Path(folder))


def _names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir() if one.is_file())


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())
