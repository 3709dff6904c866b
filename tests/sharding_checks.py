"""What the sharding tests check inside two processes, function by function; each is called in both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from peftkit.errors import TrainingError, UsageError
from peftkit.training.on_request import on_request
from peftkit.training.sharding import Sharding, is_sharded, place
from peftkit.training.whole import whole


def several_dtypes() -> None:
    """Packed bytes of 4-bit weights, half precision and float32 are shared out together, and count as before."""
    accelerator, model = _accelerator(), _bert().requires_grad_(False)
    model.classifier.requires_grad_(True)
    packed = torch.arange(7, dtype=torch.uint8).view(7, 1)
    for layer in model.bert.encoder.layer:
        layer.packed = nn.Parameter(packed.clone(), requires_grad=False)
        layer.packed.quant_state = {"shape": (14,)}
        layer.output.dense.bfloat16()
        layer.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        layer.output.dense.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16(),))
        layer.register_forward_pre_hook(_sees_whole_bytes)
    ids = torch.arange(8).view(2, 4)
    expected = model(input_ids=ids).logits
    place(model, accelerator)
    layer = model.bert.encoder.layer[0]
    assert layer.packed.to_local().shape == (4 - accelerator.process_index, 1)
    assert layer.packed.quant_state == {"shape": (14,)}
    assert not hasattr(layer.scale, "to_local"), "a single number cannot be shared out"
    assert not hasattr(model.classifier.weight, "to_local"), "what trains stays whole"
    found = model(input_ids=ids).logits
    assert torch.equal(found, expected)
    found.sum().backward()
    assert model.classifier.weight.grad is not None
    assert torch.equal(whole(layer.packed), packed)


def other_weights_in_one_process() -> None:
    accelerator, model = _accelerator(), _bert()
    model.classifier.bias.data += accelerator.process_index
    with _raises(TrainingError, "they differ in classifier.bias"):
        place(model, accelerator)
    assert not is_sharded(model)


def a_trained_number() -> None:
    accelerator, model = _accelerator(of_trained=True), _bert()
    model.scale = nn.Parameter(torch.tensor(2.0))
    with _raises(UsageError, "a single number trains"):
        place(model, accelerator)


def passes_of_one_process_alone() -> None:
    """One process computes three times, the other not at all; both see the same weights after it."""
    accelerator, model = _accelerator(), _bert()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    place(model, accelerator)
    weight = model.bert.encoder.layer[1].output.dense.weight
    ids = torch.arange(8).view(2, 4)
    with on_request(model, accelerator), torch.no_grad():
        found = [model(input_ids=ids).logits for _ in range(3 * accelerator.process_index)]
        if found:  # as a wrapped model writes text: what is inside computes, and a block comes last
            model.bert(input_ids=ids)
    assert all(torch.equal(one, found[0]) for one in found)
    assert model.bert.encoder.layer[1].output.dense.weight is weight
    # a training step goes on as if nothing had been: the backward pass gathers the same blocks in both
    model(input_ids=ids).logits.sum().backward()


def a_failure_in_one_process() -> None:
    accelerator, model = _accelerator(), _bert().requires_grad_(False)
    place(model, accelerator)
    first = accelerator.is_main_process
    expected = (ValueError, "broken here") if first else (TrainingError, "another process failed")
    with _raises(*expected), on_request(model, accelerator), torch.no_grad():
        if first:
            raise ValueError("broken here")
        model(input_ids=torch.arange(8).view(2, 4))


def _bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _accelerator(**settings: Any) -> Any:
    from accelerate import Accelerator

    accelerator: Any = Accelerator()
    accelerator.sharding = Sharding(**settings)
    return accelerator


def _sees_whole_bytes(layer: Any, inputs: Any) -> None:
    assert layer.packed.flatten().tolist() == list(range(7))


@contextlib.contextmanager
def _raises(kind: type[Exception], message: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")
