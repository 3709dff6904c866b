"""What prefix tuning puts into attention modules, and into a model's counting of positions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftkit.backbones.attention import AttentionModule, open_seam
from peftkit.backbones.attention_inputs import Attention, BeforeAttention
from peftkit.backbones.modules import base_model

STD = 0.02
"""Of random keys and values."""
POSITIONS = ("position_embeddings", "wpe", "embed_positions", "rotary_emb")
"""Names that architectures give to what turns positions into numbers."""


class PrefixLayer(BeforeAttention):
    """Keys and values, (length, width) each, that every query sees before the others."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys (length, key width) and values (length, value width), all heads side by side."""
        raise NotImplementedError

    def forward(self, attention: Attention) -> Attention:
        keys, values = self.rows()
        return attention.prepended(self._by_head(keys, attention.key), self._by_head(values, attention.value))

    def _by_head(self, rows: Tensor, like: Tensor) -> Tensor:
        """(length, width) as (batch, key heads, length, width of a head), for each example its own dropout."""
        batch, heads, _, width = like.shape
        split = rows.to(like.dtype).view(-1, heads, width).transpose(0, 1)
        dropped: Tensor = self.dropout(split.expand(batch, -1, -1, -1))
        return dropped


class DirectPrefix(PrefixLayer):
    """Keys and values that are themselves what trains (P-tuning v2, Liu et al. 2022, section 3.2)."""

    def __init__(self, keys: Tensor, values: Tensor, dropout: float) -> None:
        super().__init__(dropout)
        self.key = nn.Parameter(keys.float())
        self.value = nn.Parameter(values.float())

    def rows(self) -> tuple[Tensor, Tensor]:
        return self.key, self.value


class SharedStart(nn.Module):
    """tanh of a projected (length, width) matrix: what all layers of one kind of attention project on."""

    def __init__(self, length: int, width: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.down = nn.Linear(width, size)

    def forward(self) -> Tensor:
        return torch.tanh(self.down(self.embedding))


class ReparametrizedPrefix(PrefixLayer):
    """Keys and values as the outputs of an MLP, which trains more steadily (Li & Liang 2021, section 4.3).

    The MLP's last matrix ends in all layers' keys and values; each layer holds the columns that are its own.
    """

    def __init__(self, shared: SharedStart, module: AttentionModule, dropout: float) -> None:
        super().__init__(dropout)
        self.shared = shared
        self.widths = (module.key_width, module.value_width)
        self.up = nn.Linear(shared.down.out_features, sum(self.widths))

    def rows(self) -> tuple[Tensor, Tensor]:
        keys, values = self.up(self.shared()).split(self.widths, dim=-1)
        return keys, values


class Recorder(BeforeAttention):
    """Changes nothing and remembers the keys and values of the first example, (length, width) each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, attention: Attention) -> Attention:
        keys, values = (states[0].transpose(0, 1).flatten(1) for states in (attention.key, attention.value))
        self.seen.append((keys, values))
        return attention

    def mean(self) -> tuple[Tensor, Tensor]:
        """Of all calls: more than one where blocks are shared."""
        keys, values = zip(*self.seen, strict=True)
        return torch.stack(keys).mean(0), torch.stack(values).mean(0)


def drawn(modules: list[AttentionModule], length: int) -> list[tuple[Tensor, Tensor]]:
    """Small normal keys and values, from torch's global generator."""
    shapes = (((length, module.key_width), (length, module.value_width)) for module in modules)
    return [(torch.randn(keys) * STD, torch.randn(values) * STD) for keys, values in shapes]


def recorded(model: nn.Module, modules: list[AttentionModule], ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """The keys and values that the modules attend to when the model reads `ids`, on both sides where it has two."""
    base, device = base_model(model), next(model.parameters()).device
    inputs = {"input_ids": torch.tensor([ids], device=device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "decoder_input_ids" in inspect.signature(base.forward).parameters:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    recorders = [Recorder() for _ in modules]
    attending = [model.get_submodule(module.name) for module in modules]
    for attention, recorder in zip(attending, recorders, strict=True):
        open_seam(attention)
        attention.add_module("recorder", recorder)
    was_training = base.training
    with torch.no_grad():
        base.eval()(**inputs)
    base.train(was_training)
    for attention in attending:
        del attention.recorder
    return [recorder.mean() for recorder in recorders]


def shift_positions(model: nn.Module, count: int) -> None:
    """Let the positions of all tokens begin at `count`, as if so many were in the cache."""
    for part in counted_positions(model):
        place, name = _argument(part)
        part.register_forward_pre_hook(partial(_shift, count=count, place=place, name=name), with_kwargs=True)


def counted_positions(model: nn.Module) -> Iterator[nn.Module]:
    """What turns positions into numbers in models that count the tokens in their cache.

    Encoders take no cache: their tokens have the positions that they were pretrained with, whatever is prepended.
    """
    for name, part in model.named_modules():
        if name.rpartition(".")[2] in POSITIONS:
            owner = _innermost_model(model, name)
            if "past_key_values" in inspect.signature(owner.forward).parameters:
                yield part


def _innermost_model(model: nn.Module, name: str) -> nn.Module:
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:count])) for count in range(len(parts)))
    return [one for one in around if isinstance(one, PreTrainedModel)][-1]


def _argument(part: nn.Module) -> tuple[int, str]:
    """Where `forward` takes positions: place and name."""
    names = list(inspect.signature(part.forward).parameters)
    name = "position_ids" if "position_ids" in names else names[0]
    return names.index(name), name


def _shift(
    part: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], count: int, place: int, name: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    held = options[name] if name in options else inputs[place]
    padding = getattr(part, "padding_idx", None)
    # RoBERTa keeps one position for padding, wherever it stands
    moved = held + count if padding is None else torch.where(held == padding, held, held + count)
    if name in options:
        return inputs, options | {name: moved}
    return (*inputs[:place], moved, *inputs[place + 1 :]), options
