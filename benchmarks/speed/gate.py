"""Whether peftkit computes what stock computes: losses and gradients of every technique, step by step.

Without dropout, from the same weights, over the same batches, with the same optimizer and schedule: Trainer + peft in
float32 is the reference. In float32 every loss must be within LOSS of its loss, and every gradient that is compared
must have a cosine above COSINE with its gradient. Measured and kept, and no reason to fail: what bfloat16 makes of the
same training, in both tools, and what Trainer + peft itself makes of it with one thread, which is its own rounding.

    python -m benchmarks.speed.gate '{"kind": "stock", …, "file": …}'

is the process of one training; it writes losses and gradients to a file.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed import stock
from benchmarks.speed.arms import BASE, DTYPE
from benchmarks.speed.plan import make_plan
from benchmarks.speed.processes import answer
from benchmarks.speed.results import Results
from benchmarks.speed.rounds import tell
from benchmarks.speed.workloads import Workload
from peftkit.environment import describe

LOSS, COSINE = 1e-5, 0.99999
COMPARED = 50
"""Gradients that are kept of a training; those of its first ten steps are among them."""
NO_DROPOUT = ("method.dropout=0.0", "backbone.dropout=0.0")
NAMES = (
    "fused_lora", "padding_free", "supervised_loss", "read_positions", "compiled_attention", "fast_dropout",
    "compiled_dropout",
)  # fmt: skip
PLAIN: dict[str, Any] = dict.fromkeys(NAMES, False) | {"attention": "sdpa"}
ALONE: dict[str, dict[str, Any]] = {
    "engine off": {},
    "fused_lora": {"fused_lora": True},
    "padding_free": {"padding_free": True},
    "supervised_loss": {"supervised_loss": True},
    "read_positions": {"padding_free": True, "read_positions": True},  # which goes only with padding_free
    "attention": {"attention": "plain"},
    "compiled_attention": {"padding_free": True, "attention": "auto", "compiled_attention": True},
    "fast_dropout": {"fast_dropout": True},
    "compiled_dropout": {"fast_dropout": True, "compiled_dropout": True},
}
TOGETHER, ONE_THREAD = "all together", "one thread"
REFERENCE = "reference.npz"


@dataclass
class Recorder:
    """Notes gradients before the optimizer's steps, and what is kept for backward passes."""

    chosen: frozenset[int]
    """Steps, from 0, whose gradients are kept."""
    model: Any = None
    steps: int = 0
    gradients: list[Any] = field(default_factory=list)
    kept_bytes: int = 0
    """The most that a step kept for its backward pass, besides parameters."""
    _alive: dict[int, int] = field(default_factory=dict)
    _own: frozenset[int] = frozenset()

    def ready(self, model: Any) -> None:
        """The model is about to train."""
        self.model = model
        self._own = frozenset(one.untyped_storage()._cdata for one in model.parameters())

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch every optimizer of this process."""
        import torch
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        handle = register_optimizer_step_pre_hook(self._before_step)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            handle.remove()

    def _pack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if self.model is not None and storage._cdata not in self._own:
            self._alive[storage._cdata] = storage.nbytes()
        return tensor

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        import torch

        self.kept_bytes, self._alive = max(self.kept_bytes, sum(self._alive.values())), {}
        if self.steps in self.chosen:
            trained = sorted((name, one) for name, one in self.model.named_parameters() if one.requires_grad)
            parts = [torch.zeros_like(one) if one.grad is None else one.grad for _, one in trained]
            self.gradients.append(torch.cat([part.detach().float().flatten() for part in parts]).cpu().numpy())
        self.steps += 1


@dataclass(frozen=True)
class Course:
    """What a training went through."""

    losses: Any
    gradients: Any
    """(chosen steps, trained numbers), parameters by name."""
    kept_bytes: int

    def save(self, file: Path) -> None:
        """Write it for another process."""
        np.savez(file, losses=self.losses, gradients=self.gradients, kept_bytes=self.kept_bytes)

    @classmethod
    def read(cls, file: Path) -> Course:
        """What `save` wrote."""
        with np.load(file) as saved:
            return cls(saved["losses"], saved["gradients"], int(saved["kept_bytes"]))


def chosen_steps(steps: int) -> frozenset[int]:
    """The steps whose gradients are compared."""
    return frozenset({*range(min(10, steps)), *range(0, steps, max(1, steps // (COMPARED - 10)))})


def of_stock(folder: Path, steps: int, is_bfloat16: bool = False) -> Course:
    """Train by Trainer + peft in this process."""
    recorder = Recorder(chosen_steps(steps))
    with recorder.recording():
        # with the order of the plan: grouping by length would compare other batches
        figures = stock.train(folder, "trainer", False, None, recorder.ready, is_bfloat16)
    return Course(np.array(figures["losses"]), np.array(recorder.gradients), recorder.kept_bytes)


def of_peftkit(config: Path, overrides: Sequence[str], steps: int) -> Course:
    """Train by peftkit in this process, and note its course."""
    recorder = Recorder(chosen_steps(steps))
    with recorder.recording():
        record = trained_here(config, overrides, recorder.ready)
    return Course(np.array(record.losses), np.array(recorder.gradients), recorder.kept_bytes)


def trained_here(config: Path, overrides: Sequence[str], ready: Callable[[Any], None]) -> Any:
    """Train by peftkit in this process, as `peftkit train` does; returns what the training records.

    Args:
        ready: told the model before it trains.
    """
    from peftkit.backbones.load import load
    from peftkit.config import load_run
    from peftkit.prepare import prepare
    from peftkit.session import start
    from peftkit.training.loop import train

    run = load_run(config, overrides)
    accelerator = start(run)
    data = prepare(run)
    backbone = load(run.backbone, data.head)
    model = run.method.attach(backbone, total_steps=run.training.total_steps(len(data.train.encoded)))
    ready(model)
    return train(model, run, data, accelerator)


def compared(reference: Course, other: Course) -> dict[str, Any]:
    """The largest distance of losses and the least cosine of gradients, with their places."""
    apart = np.abs(other.losses - reference.losses)
    dots = (reference.gradients.astype(np.float64) * other.gradients).sum(1)
    norms = [np.linalg.norm(one.gradients.astype(np.float64), axis=1) for one in (reference, other)]
    cosines = dots / (norms[0] * norms[1])
    return {
        "largest_loss_difference": float(apart.max()),
        "at_step": int(apart.argmax()) + 1,
        "least_cosine": float(cosines.min()),
        "kept_bytes": other.kept_bytes,
        "passes": bool(apart.max() <= LOSS and cosines.min() > COSINE),
    }


def engines() -> dict[str, dict[str, Any]]:
    """The engine's settings of each comparison: every technique alone, and all as they are by default."""
    return {name: PLAIN | changes for name, changes in ALONE.items()} | {TOGETHER: {}}


def gate(workload: Workload, steps: int, batch: int | None, work: Path, results: Results) -> dict[str, Any]:
    """Compare every technique of a workload; what each came to, and `passes` of all in float32. What is kept is not
    made again."""
    settings = (*workload.settings("lora", steps, work, batch), *NO_DROPOUT, "training.keep_best=false")
    folder = work / "gate" / workload.name
    single, half = (*settings, f"{DTYPE}float32"), (*settings, f"{DTYPE}bfloat16")
    asked: dict[str, dict[str, Any]] = {
        BASE: {"kind": "stock", "overrides": single},
        f"{BASE}, {ONE_THREAD}": {"kind": "stock", "overrides": single, "threads": 1},
        **{name: {"overrides": (*single, _override(engine))} for name, engine in engines().items()},
        f"{BASE}, bfloat16": {"kind": "stock", "overrides": single, "is_bfloat16": True},
        f"{TOGETHER}, bfloat16": {"overrides": half},
    }
    found: dict[str, Any] = results.kept.setdefault("settings", {})
    results.set("environment", describe())
    for name, one in asked.items():
        if name in found and (name != BASE or (folder / REFERENCE).exists() or asked.keys() <= found.keys()):
            continue
        file = folder / (REFERENCE if name == BASE else "course.npz")
        common = {"kind": "peftkit", "config": str(workload.file), "steps": steps, "folder": str(folder)}
        answer("gate", common | one | {"file": str(file)})
        course = Course.read(file)
        found[name] = compared(Course.read(folder / REFERENCE), course)
        found[name] |= {"losses": [round(float(loss), 7) for loss in course.losses]}
        found[name]["is_gated"] = not name.endswith((ONE_THREAD, "bfloat16"))
        results.write()
        shown = found[name]
        tell(f"{name}: losses within {shown['largest_loss_difference']:.1e}, cosine {shown['least_cosine']:.7f}")
    results.set("passes", all(one["passes"] for one in found.values() if one["is_gated"]))
    return results.kept


def _override(engine: dict[str, Any]) -> str:
    return f"engine={json.dumps(engine)}"


def _one(asked: dict[str, Any]) -> None:
    import torch

    config, folder, steps = Path(asked["config"]), Path(asked["folder"]), asked["steps"]
    torch.set_num_threads(asked.get("threads", torch.get_num_threads()))
    folder.mkdir(parents=True, exist_ok=True)
    if asked["kind"] == "stock":
        make_plan(config, asked["overrides"], folder / "plan")
        course = of_stock(folder / "plan", steps, asked.get("is_bfloat16", False))
    else:
        shutil.rmtree(folder / "run", ignore_errors=True)
        overrides = [*asked["overrides"], f"output.folder={folder / 'run'}"]
        course = of_peftkit(config, overrides, steps)
    course.save(Path(asked["file"]))


if __name__ == "__main__":
    _one(json.loads(sys.argv[1]))
    print("{}")
