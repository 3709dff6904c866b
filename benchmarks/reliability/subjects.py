"""What the experiments on files do harm to: checkpoints and saved adapters of both columns, made once and copied."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.reliability import stock
from benchmarks.reliability.workbench import EVERY, METHODS, Workbench
from peftkit.config import Run
from peftkit.quiet import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor

READ_ON_RESUMING = (
    *("adapter_config.json", "adapter_model.safetensors", "model.safetensors"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
)
"""Files of the stock checkpoint that a run goes on with; beside them lie a README, a tokenizer and settings."""
OWN_METHODS: dict[str, dict[str, Any]] = METHODS | {"head": {"kind": "head"}}
FIRST_CHECKPOINT = EVERY
"""The step of a run's first."""
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
SEEDS = (1, 2)
"""Of an adapter, and of the other one that its files are mixed with."""


@dataclass
class Trained:
    """A training of peftkit that has taken its last step and is not saved: its checkpoints are there."""

    checkpoints: Path
    loop: Any


@cache
def peftkit_training(bench: Workbench, method: str) -> Trained:
    """The checkpoints of a run, and what loads them as a run that goes on does."""
    from peftkit.backbones.load import load
    from peftkit.prepare import prepare
    from peftkit.session import release, start
    from peftkit.training.loop import _Loop, train

    run = peftkit_run(bench, method, bench.program("peftkit").folder / f"training-{method}")
    with silent():
        accelerator = start(run)
        data = prepare(run)
        model = run.method.attach(load(run.backbone, data.head), total_steps=run.training.total_steps(60))
        train(model, run, data, accelerator)
        release(run, accelerator)
        return Trained(Path(str(run.output.folder)) / "checkpoints", _Loop(model, run, data, accelerator, ()))


@cache
def peftkit_adapter(bench: Workbench, method: str, seed: int) -> Path:
    """A finished run."""
    from peftkit.experiment import train

    run = peftkit_run(
        bench, method, bench.program("peftkit").folder / f"adapter-{method}-{seed}", seed=seed, max_steps=4
    )
    with silent():
        return train(run).folder


def peftkit_run(bench: Workbench, method: str, folder: Path, **training: Any) -> Run:
    """The description of a run into `folder`."""
    return Run(**bench.peftkit_config(OWN_METHODS[method], **training), output={"folder": str(folder)})


@cache
def stock_training(bench: Workbench, method: str) -> Path:
    """A folder with the last two checkpoints but the one of the last step, so that there is something to go on with."""
    folder = bench.program("stock").folder / f"training-{method}"
    with silent():
        stock_trainer(bench, method, folder, save_total_limit=3).train()
    shutil.rmtree(checkpoints(folder)[-1])
    return folder


@cache
def stock_adapter(bench: Workbench, method: str, seed: int) -> Path:
    """A folder that `save_model` wrote."""
    folder = bench.program("stock").folder / f"adapter-{method}-{seed}"
    with silent():
        trainer = stock_trainer(bench, method, folder, seed=seed, max_steps=4)
        trainer.train()
        for config in trainer.model.peft_config.values():
            config.lora_alpha *= seed  # a mix of two adapters that differ in nothing else would be the other one whole
        trainer.save_model(str(folder / "final"))
    return folder / "final"


def stock_trainer(bench: Workbench, method: str, folder: Path, seed: int = 1, **arguments: Any) -> Any:
    """The stock column's Trainer for a folder."""
    config = json.loads(bench.program("stock").configs[method].read_text(encoding="utf-8"))
    model = copy.deepcopy(_stock_model(bench, method))
    trainer = stock.make_trainer(config | {"output": str(folder), "seed": seed}, model)
    for name, value in arguments.items():
        setattr(trainer.args, name, value)
    return trainer


@cache
def _stock_model(bench: Workbench, method: str) -> Any:
    """Untrained; made once, because making it takes longer than training it."""
    from transformers import set_seed

    set_seed(1)
    model = stock.make_model(json.loads(bench.program("stock").configs[method].read_text(encoding="utf-8")))
    # Trainer collects garbage whenever it starts, and would look through all that is imported
    gc.collect()
    gc.freeze()
    return model


def checkpoints(folder: Path) -> list[Path]:
    """Folders whose names end in a step, oldest first."""
    found = [one for one in folder.glob("*-*") if one.is_dir()]
    return sorted(found, key=lambda one: int(one.name.rpartition("-")[2]))


@cache
def stock_base(bench: Workbench) -> Any:
    """The model that a stock adapter is put on; copied, because a hostile one may change it."""
    from transformers import AutoModelForSequenceClassification, set_seed

    with silent():
        set_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(bench.backbone, num_labels=2).eval()


def stock_loaded(bench: Workbench, folder: Path) -> Any:
    """The adapter in a folder as peft loads it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(stock_base(bench)), folder).eval()


def outputs(model: Any) -> Tensor:
    """Logits for some tokens."""
    import torch

    ids = torch.arange(5, 25).view(4, 5)
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


def told(bench: Workbench, row: dict[str, Any]) -> dict[str, Any]:
    """What came of a trial, without the folder that is another one in every command."""
    if "said" in row:
        row["said"] = row["said"].replace(f"{bench.folder}/", "")[:200]
    return row


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing of what libraries say is shown."""
    with quiet_libraries(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
