"""Cells of the layout tests: training runs, in this process or in several, with what they computed.

    accelerate launch tests/layout_cells.py CELLS

runs the list of cells in the JSON file CELLS, one after the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

PROCESSES = 2
GRADIENTS, FACTS = "gradients.safetensors", "facts.json"
COUNTED_STEP = 4


class Stopped(Exception):
    """The run ends here, as if it had been killed."""


def config(
    folder: Path,
    backbone: Path,
    data: Path,
    method: dict[str, Any],
    task: dict[str, Any] | None = None,
    **training: Any,
) -> dict[str, Any]:
    """A run over train (8, 8 and 1 rows), dev and test in `data`, that is written into `folder`."""
    files = {name: str(data / f"{name}.jsonl") for name in ("train", "dev", "test")}
    settings = {"learning_rate": 0.003, "epochs": 2, "batch_size": 8, "evaluation_batch_size": 2, "seed": 1}
    return {
        "backbone": {"name": str(backbone)},
        "task": {"kind": "sequence_classification", "data": files, "max_length": 32} | (task or {}),
        "method": method,
        "training": settings | training,
        "audit": {"overlap": 1.0},
        "output": {"folder": str(folder)},
    }


def launch(cells: list[dict[str, Any]], file: Path, processes: int = PROCESSES) -> None:
    """Run cells in CPU processes that Accelerate starts."""
    file.write_text(json.dumps(cells))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    options = ["--main_process_port", str(port), "--num_machines", "1", "--mixed_precision", "no"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launcher, *options, __file__, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-8000:]


def run_cell(cell: dict[str, Any]) -> None:
    """Train as `cell["config"]` says; beside the run's own files its folder gets gradients and facts.

    A cell may hold `environment` (variables while it runs), `float64`, `count` (count messages between processes in
    one step) and `stop_after` (a step behind whose checkpoint the run ends). A cell that holds `check` instead calls
    that function of `sharding_checks`.
    """
    if "check" in cell:
        import sharding_checks

        getattr(sharding_checks, cell["check"])()
        return
    from safetensors.torch import save_file

    from peftkit.config import Run
    from peftkit.experiment import train

    run = Run.model_validate_json(json.dumps(cell["config"]), strict=True)
    gradients: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, cell.get("environment", {})))
        stack.enter_context(_recorded(cell, gradients, facts))
        if cell.get("float64"):
            stack.enter_context(_in_float64())
        with contextlib.suppress(Stopped):
            result = train(run)
            facts |= _bytes(result.model)
    if int(os.environ.get("RANK", "0")) == 0:
        folder = Path(str(run.output.folder))
        save_file(gradients, folder / GRADIENTS)
        (folder / FACTS).write_text(json.dumps(facts))


@contextlib.contextmanager
def _recorded(cell: dict[str, Any], gradients: dict[str, Any], facts: dict[str, Any]) -> Iterator[None]:
    """Keep the whole gradient of every step, before it is clipped, and count messages."""
    import torch

    from peftkit.methods.base import trained_parameters
    from peftkit.training.loop import _Loop
    from peftkit.training.whole import whole

    update, accumulate, save = _Loop._update, _Loop._accumulate, _Loop._save

    def recording(loop: Any, rate: float, batch: Any) -> float:
        for name, parameter in trained_parameters(loop.model).items():
            if parameter.grad is not None:
                gradients[f"{loop.progress.step}:{name}"] = whole(parameter.grad).detach().clone().contiguous()
        return update(loop, rate, batch)

    def counting(loop: Any, batch: Any, size: int) -> float:
        if not cell.get("count") or loop.progress.step != COUNTED_STEP:
            return accumulate(loop, batch, size)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss = accumulate(loop, batch, size)
        names = [event.name for event in profile.events() if event.name.startswith("gloo:")]
        facts["messages"] = {name: names.count(name) for name in sorted(set(names))}
        return loss

    def stopping(loop: Any) -> None:
        save(loop)
        if loop.progress.step == cell.get("stop_after"):
            loop.accelerator.wait_for_everyone()
            if loop.accelerator.is_main_process:
                loop.accelerator.run_lock.release()
            raise Stopped

    patches = {"_update": recording, "_accumulate": counting, "_save": stopping}
    with mock.patch.multiple(_Loop, **patches), mock.patch("peftkit.training.loop.learning_curve"):
        yield


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    """Compute in float64 whatever is computed in float32 otherwise."""
    import torch

    from peftkit import experiment

    def start(*given: Any) -> None:
        given[-1].double()

    torch.set_default_dtype(torch.float64)
    patched = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
    try:
        with patched, mock.patch.object(experiment, "start_from", start):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def _bytes(model: Any) -> dict[str, int]:
    """Of what is frozen and of what trains: bytes of the whole model, and in this process."""
    found = dict.fromkeys(("frozen", "frozen_here", "trained", "trained_here"), 0)
    for parameter in model.parameters():
        kind = "trained" if parameter.requires_grad else "frozen"
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        found[kind] += parameter.nbytes
        found[f"{kind}_here"] += local.nbytes
    return found


def main(file: str) -> None:
    for cell in json.loads(Path(file).read_text()):
        print(cell.get("check") or cell["config"]["output"]["folder"], file=sys.stderr, flush=True)
        run_cell(cell)


if __name__ == "__main__":
    main(sys.argv[1])
