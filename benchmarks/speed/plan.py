"""What all arms of a workload compute: batches, first weights, schedule. Made once, by peftkit's own preparation.

    python -m benchmarks.speed.plan '{"config": …, "overrides": […], "folder": …}'

A folder of a plan holds `plan.json`, peft's files of the untrained adapter (`adapter/`), the untrained head
(`heads.safetensors`) and the model's configuration (`config.json`).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.speed.floor import Amount
from benchmarks.speed.products import Product, Shapes, shapes_of

PLAN, ADAPTER, HEADS = "plan.json", "adapter", "heads.safetensors"
READ_BY_MODELS = ("input_ids", "token_type_ids", "labels")


@dataclass(frozen=True)
class Plan:
    """A training, to the last token."""

    asked: list[str]
    """The configuration and the overrides that it was made of."""
    method: str
    backbone: str
    """The folder of the pretrained weights."""
    model_class: str
    tokenizer: str
    pad_id: int
    training: dict[str, Any]
    """`training` of the run."""
    warmup_steps: int
    batches: list[list[dict[str, Any]]]
    """The examples of each step."""
    shapes: Shapes

    @property
    def tokens(self) -> list[int]:
        """Real tokens of each step."""
        return [sum(len(one["input_ids"]) for one in batch) for batch in self.batches]

    @property
    def amount(self) -> Amount:
        """What a step reads on average."""
        examples = [one for batch in self.batches for one in batch]
        steps = len(self.batches)
        lengths = [len(one["input_ids"]) for one in examples]
        labelled = sum(_labelled(one["labels"]) for one in examples)
        squares = sum(length**2 for length in lengths)
        return Amount(sum(lengths) / steps, len(examples) / steps, labelled / steps, squares / steps)


def read_plan(folder: Path) -> Plan:
    """The plan in a folder."""
    saved = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    shapes = saved.pop("shapes")
    products = tuple(Product(**one) for one in shapes.pop("products"))
    return Plan(**saved, shapes=Shapes(products=products, **shapes))


def is_made(folder: Path, config: Path, overrides: Sequence[str]) -> bool:
    """Whether the folder holds the plan of just that."""
    file = folder / PLAN
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["asked"] == [str(config), *overrides]


def make_plan(config: Path, overrides: Sequence[str], folder: Path) -> Plan:
    """Do what `peftkit train` does before its first step, and write down what comes of it."""
    from safetensors.torch import save_file

    from peftkit.backbones.load import load, resolve
    from peftkit.config import load_run
    from peftkit.methods.base import inside
    from peftkit.prepare import prepare
    from peftkit.session import start
    from peftkit.training import batches

    shutil.rmtree(folder, ignore_errors=True)
    (folder / ADAPTER).mkdir(parents=True)
    run = load_run(config, [*overrides, f"output.folder={folder / 'run'}"])
    start(run)
    data = prepare(run)
    backbone = load(run.backbone, data.head)
    heads = {
        name: one.detach().clone()
        for name, one in backbone.model.named_parameters()
        if inside(name, backbone.head_modules)
    }
    backbone.model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
    if heads:
        save_file(heads, folder / HEADS)
    settings, encoded = run.training, data.train.encoded
    total = settings.total_steps(len(encoded))
    model = run.method.attach(backbone, total_steps=total)
    if run.method.artifact == ADAPTER:
        run.method.save(model, folder / ADAPTER)
    ahead = batches.steps(encoded.lengths, settings.batch_size, settings.seed, settings.group_by_length)
    taken = [[_read(encoded.examples[index]) for index in batch] for _, batch in islice(ahead, total)]
    plan = Plan(
        asked=[str(config), *overrides],
        method=run.method.kind,
        backbone=str(resolve(run.backbone)),
        model_class=data.head.model_class,
        tokenizer=str(resolve(run.backbone)),
        pad_id=data.train.pad_id,
        training=settings.model_dump(mode="json"),
        warmup_steps=settings.warmup(total),
        batches=taken,
        shapes=shapes_of(model, _longest(taken)),
    )
    (folder / PLAN).write_text(json.dumps(asdict(plan)), encoding="utf-8")
    return plan


def _read(example: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in example.items() if name in READ_BY_MODELS}


def _longest(batches: list[list[dict[str, Any]]]) -> dict[str, Any]:
    import torch

    example = max((one for batch in batches for one in batch), key=lambda one: len(one["input_ids"]))
    return {name: torch.tensor([value]) for name, value in example.items() if name != "labels"}


def _labelled(labels: Any) -> int:
    """How many tokens of an example are predicted from the one before."""
    from peftkit.data.collate import IGNORED

    return sum(label != IGNORED for label in labels[1:]) if isinstance(labels, list) else 0


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    make_plan(Path(asked["config"]), asked["overrides"], Path(asked["folder"]))
