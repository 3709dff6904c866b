"""The same weights are the same file: safetensors writes several entries of metadata in an order that changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config
from transformers import AutoModelForSequenceClassification

from peftkit.backbones.load import Backbone, wrap
from peftkit.methods import AdaLoRA, Bottleneck, HeadOnly, Peft, Prefix, VeRA
from peftkit.methods.base import Method

METHODS: list[Any] = [HeadOnly(), Bottleneck(), Prefix(length=4), VeRA(rank=4), Peft(type="fourierft", n_frequency=9)]  # type: ignore[call-arg]


def tiny() -> Backbone:
    torch.manual_seed(0)
    return wrap(AutoModelForSequenceClassification.from_config(tiny_config("bert")))


def saved(method: Method, model: torch.nn.Module, folder: Path) -> bytes:
    folder.mkdir()
    method.save(model, folder)
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_saving_again_gives_the_same_bytes(method: Method, tmp_path: Path) -> None:
    model = method.attach(tiny(), 10)
    assert len({saved(method, model, tmp_path / str(turn)) for turn in range(8)}) == 1


def test_of_adalora(tmp_path: Path) -> None:
    method = AdaLoRA(target_rank=1, initial_rank=2, allocate_every=1, warmup_fraction=0.1, final_fraction=0.1)
    model = method.attach(tiny(), 10)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 11):
        model(input_ids=torch.arange(5, 15)[None]).logits.square().sum().backward()
        optimizer.step()
        method.after_step(model, step)
        optimizer.zero_grad()
    assert len({saved(method, model, tmp_path / str(turn)) for turn in range(8)}) == 1
