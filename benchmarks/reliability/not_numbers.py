"""NaN and infinity planted into a training, from some step on: in its loss, a module's output, a weight or a gradient.

The same hooks are put on the transformers model of both columns. peftkit must stop in that step or the next, name the
module or the parameter (a loss of NaN from finite logits has none), leave the last checkpoint whole and of numbers, and
leave no finished run. Of the stock column it is kept whether the run succeeds, what it logs as the loss from that step
on, and whether what it saved is of numbers.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.reliability import subjects
from benchmarks.reliability.confined import Late, within
from benchmarks.reliability.runs import NOT_OFFERED
from benchmarks.reliability.workbench import Workbench

if TYPE_CHECKING:
    from torch import Tensor, nn

STOPS = "stops in time, origin named, checkpoint whole"
GOOD = (STOPS,)
METHODS = ("lora", "adalora", "bottleneck", "prefix", "full", "head")
STEPS = (2, 10)
"""Before there is a checkpoint, and after several."""
VALUES = {"nan": float("nan"), "inf": float("inf")}
MODULES = {
    "embedding": "embeddings.word_embeddings",
    "attention": "encoder.layer.0.attention.self.query",
    "activation": "encoder.layer.1.intermediate",
    "logits": "classifier",
}
PLACES = ("loss", *MODULES, "trained weight", "other weight", "gradient")
SECONDS = 120.0


def trials(tier: str) -> list[str]:
    """Method/place/value/step."""
    if tier == "short":
        return [f"lora/{place}/nan/2" for place in ("attention", "gradient")]
    return [
        f"{method}/{place}/{value}/{step}"
        for method in METHODS
        for place in PLACES
        for value in VALUES
        for step in STEPS
    ]


def run(trial: str, column: str, bench: Workbench, folder: Path) -> dict[str, Any]:
    """Train with something planted."""
    method, place, value, step = trial.split("/")
    if column == "stock" and not bench.program("stock").offers(method):
        return NOT_OFFERED
    plant = Plant(place, VALUES[value], int(step))
    train = _peftkit if column == "peftkit" else _stock
    return subjects.told(bench, train(bench, method, plant, folder))


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Outcomes by place."""
    table: dict[str, Counter[str]] = {}
    for row in rows:
        if row["outcome"] != "not offered":
            table.setdefault(row["trial"].split("/")[1], Counter())[row["outcome"]] += 1
    return {"by place": {place: dict(counts) for place, counts in table.items()}}


class Plant:
    """What is planted where; it counts the steps of the model that it is put on."""

    def __init__(self, place: str, value: float, step: int) -> None:
        self.place, self.value, self.step = place, value, step
        self.taken, self.named = 0, ""

    @property
    def is_due(self) -> bool:
        return self.taken >= self.step

    def put(self, model: nn.Module) -> None:
        """Put it on a BERT with whatever method."""
        # what every forward pass goes through, and peft's classes do not go around
        _, first = _ending(model.named_modules(), "embeddings")
        first.register_forward_pre_hook(lambda module, inputs: self._count(module))
        if self.place in MODULES:
            self.named, part = _ending(model.named_modules(), MODULES[self.place])
            part.register_forward_hook(self._spoilt)
        elif self.place != "loss":
            self.named, parameter = _ending(_parameters(model, self.place), "")
            if self.place == "gradient":
                parameter.register_hook(lambda gradient: gradient * self.value if self.is_due else gradient)
            else:
                first.register_forward_pre_hook(lambda module, inputs: self._overwrite(parameter))

    @contextmanager
    def in_loss(self) -> Iterator[None]:
        """Plant it into the cross-entropy that both columns compute their loss with."""
        import torch

        original = torch.nn.functional.cross_entropy

        def spoilt(logits: Tensor, *given: Any, **named: Any) -> Tensor:
            loss = original(logits, *given, **named)
            return loss * self.value if self.place == "loss" and self.is_due and logits.requires_grad else loss

        with patch.object(torch.nn.functional, "cross_entropy", spoilt):
            yield

    def _count(self, module: nn.Module) -> None:
        self.taken += module.training

    def _spoilt(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return output * self.value if module.training and self.is_due else output

    def _overwrite(self, parameter: Tensor) -> None:
        if self.is_due:
            parameter.data.view(-1)[0] = self.value


def _parameters(model: nn.Module, place: str) -> Iterator[tuple[str, Tensor]]:
    """Matrices that train, or one of the backbone that does not where there is one."""
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer", "")
        if place == "other weight" and plain.endswith("encoder.layer.1.output.dense.weight"):
            yield name, parameter
        if place != "other weight" and parameter.requires_grad and parameter.ndim > 1:
            yield name, parameter


def _ending(named: Any, end: str) -> tuple[str, Any]:
    return next((name, part) for name, part in named if name.endswith(end))


def _peftkit(bench: Workbench, method: str, plant: Plant, folder: Path) -> dict[str, Any]:
    from peftkit.experiment import train

    run = subjects.peftkit_run(bench, method, folder / "run")
    attach = type(run.method).attach

    def attached(method: Any, backbone: Any, total_steps: int) -> nn.Module:
        model = attach(method, backbone, total_steps)
        plant.put(model)
        return model

    with patch.object(type(run.method), "attach", attached), plant.in_loss():
        said = _said(lambda: train(run))
    outcome = _judged(said, plant, folder / "run")
    return {"outcome": outcome, "said": said}


def _judged(said: str, plant: Plant, folder: Path) -> str:
    told = re.search(r"^TrainingError: the (?:loss|gradient norm) is (?:nan|-?inf) at step (\d+)", said)
    if not told:
        return "goes on" if (folder / "manifest.json").exists() else "stops otherwise"
    if int(told[1]) not in (plant.step, plant.step + 1):
        return "stops late"
    if plant.named not in said:
        return "stops, origin not named"
    return STOPS if _last_is_whole(folder, plant.step) else "stops, checkpoint not whole"


def _last_is_whole(folder: Path, step: int) -> bool:
    from safetensors.torch import load_file

    from peftkit.training.checkpoint import FILES
    from peftkit.training.seal import check_sealed

    found = subjects.checkpoints(folder / "checkpoints")
    for one in found:
        check_sealed(one, FILES)
    tensors = [tensor for one in found for file in one.glob("*.safetensors") for tensor in load_file(file).values()]
    numbers = all(bool(one.isfinite().all()) for one in tensors if one.is_floating_point())
    return numbers and not (folder / "manifest.json").exists() and (bool(found) or step <= subjects.FIRST_CHECKPOINT)


def _stock(bench: Workbench, method: str, plant: Plant, folder: Path) -> dict[str, Any]:
    trainer = subjects.stock_trainer(bench, method, folder / "run")
    plant.put(trainer.model)

    def train() -> None:
        trainer.train()
        trainer.save_model(str(folder / "final"))

    with plant.in_loss():
        said = _said(train)
    if said:
        return {"outcome": "stops", "said": said}
    # a gradient spoils the loss of the step behind it
    losses = [event["loss"] for event in trainer.state.log_history if "loss" in event][plant.step :]
    numbers = all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    logged = "loss logged as 0.0" if losses and not any(losses) else "loss logged as a number"
    saved = "saved numbers" if numbers else "saved NaN"
    return {"outcome": f"succeeds, {logged}, {saved}", "losses": losses[:4]}


def _said(action: Callable[[], object]) -> str:
    """What ends it, or nothing."""
    try:
        with subjects.silent(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            within(SECONDS, action)
    except (Exception, Late) as error:
        return f"{type(error).__name__}: {error}"
    return ""
