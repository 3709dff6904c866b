"""Tokens that a task adds to a backbone: their embeddings train, whatever the method, and no other embedding changes.

The new rows are a child of the task model beside its head, so that every method trains, saves and loads them as it does
heads. What the frozen word embeddings give for the new ids is replaced by these rows; `fold` writes them into the
matrix, which leaves a plain transformers model.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from peftkit.backbones.modules import architecture
from peftkit.errors import BackboneError, MethodError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.backbones.load import Backbone

NAME = "new_tokens"
"""The child of the task model."""
SPREAD = 0.1
"""How far new rows start from the mean embedding, in standard deviations of each number over the vocabulary."""


class NewTokens(nn.Module):
    """Rows of shape (tokens, width), in float32, for the token ids that are theirs."""

    def __init__(self, rows: Tensor, ids: Sequence[int]) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.float())
        self.ids: Tensor
        self.register_buffer("ids", torch.tensor(ids, device=rows.device), persistent=False)

    def forward(self, ids: Tensor, embedded: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """`embedded` (…, width), with the rows, times `scale`, in the places of their `ids` (…)."""
        found = ids.unsqueeze(-1) == self.ids
        # all positions look a row up, so that the rows are in the graph of every batch
        rows = nn.functional.embedding(found.int().argmax(-1), self.rows).to(embedded.dtype) * scale
        return torch.where(found.any(-1, keepdim=True), rows.to(embedded.dtype), embedded)


def add_to_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> set[str]:
    """Let `tokens` be one token each wherever their exact text stands; returns those that it did not know."""
    from transformers import AddedToken

    fresh = set(tokens) - set(tokenizer.get_vocab())
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return fresh


def add_to_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add the tokens to the tokenizer, and to the model embeddings of them that train.

    They start near the mean embedding, the same every time; those that the vocabulary had before from their own.

    Raises:
        BackboneError: the model has an output for every token, or embeds tokens in a way of its own.
    """
    task_model: Any = model
    if task_model.get_output_embeddings() is not None:
        raise BackboneError(
            f"{architecture(model)} predicts tokens, and of new ones only the input would train; use words that its "
            "tokenizer has"
        )
    fresh = add_to_tokenizer(tokenizer, tokens)
    weight = task_model.get_input_embeddings().weight.detach()
    ids = cast(list[int], tokenizer.convert_tokens_to_ids(list(tokens)))
    starts = [_start(weight, t) if t in fresh else weight[i].float() for t, i in zip(tokens, ids, strict=True)]
    if len(tokenizer) > weight.shape[0]:
        task_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = torch.stack(starts)
    setattr(model, NAME, NewTokens(rows, ids))
    for embeddings in _embeddings(task_model):
        embeddings.weight.data[ids] = rows.to(embeddings.weight.dtype)
        _connect(model, embeddings, torch.tensor(ids, device=rows.device))


def fold(model: nn.Module) -> nn.Module:
    """The plain model: new rows written into the word embeddings, and nothing beside them. A model without new tokens
    stays as it is."""
    for owner, embeddings, key in list(_connections(model)):
        ids, rows = _values(owner)
        embeddings.weight.data[ids] = rows.to(embeddings.weight)
        del embeddings._forward_hooks[key]
    for owner in [module for module in model.modules() if NAME in module._modules]:
        delattr(owner, NAME)
    return model


def rows_by_name(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Ids and rows of the new tokens, by the name of each matrix of embeddings that `fold` would write them into."""
    places = {id(embeddings): _values(owner) for owner, embeddings, _ in _connections(model)}
    return {f"{name}.weight": places[id(part)] for name, part in model.named_modules() if id(part) in places}


def fold_backbone(backbone: Backbone) -> None:
    """The same for a method that trains the whole matrix of embeddings anyway."""
    fold(backbone.model)
    backbone.head_modules = tuple(name for name in backbone.head_modules if name != NAME)


def check_reached(model: nn.Module) -> None:
    """Refuse a method that put something in the place of the word embeddings which does not ask them.

    Raises:
        MethodError: the new rows would not train.
    """
    wrapped: Any = model
    calls: list[bool] = []
    parts = [module for module in model.modules() if isinstance(module, NewTokens)]
    handles = [part.register_forward_hook(lambda *_: calls.append(True)) for part in parts]
    with torch.no_grad():
        for part in parts[:1]:
            wrapped.get_input_embeddings()(part.ids)
    for handle in handles:
        handle.remove()
    if parts and not calls:
        raise MethodError(
            "the method replaces the word embeddings, so the task's new tokens would not train; leave the embeddings "
            "out of its targets"
        )


def _start(weight: Tensor, token: str) -> Tensor:
    noise = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(zlib.crc32(token.encode())))
    spread, mean = torch.std_mean(weight, dim=0)
    return mean.float() + SPREAD * spread.float() * noise.to(weight.device)


def _embeddings(model: Any) -> list[nn.Embedding]:
    """All modules that hold the word embeddings; encoder-decoders have one for each side."""
    weight = model.get_input_embeddings().weight
    return [part for part in model.modules() if isinstance(part, nn.Embedding) and part.weight is weight]


def _connect(model: nn.Module, embeddings: nn.Embedding, ids: Tensor) -> None:
    """Let the model's new rows stand in for what `embeddings` give."""
    with torch.no_grad():
        own = embeddings(ids)
        # not a closure: a copy of the model must ask its own rows
        embeddings.register_forward_hook(partial(_replaced, model))
        if not torch.equal(embeddings(ids), own):
            raise BackboneError(f"{architecture(model)} does not simply look embeddings up; it can take no new tokens")


def _replaced(model: nn.Module, embeddings: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
    scale = getattr(embeddings, "embed_scale", 1.0)
    found: Tensor = model.get_submodule(NAME)(inputs[0], embedded, scale)
    return found


def _connections(model: nn.Module) -> Iterator[tuple[nn.Module, Any, int]]:
    """(the task model, its embeddings, the hook's key) wherever rows stand in."""
    for module in model.modules():
        for key, hook in module._forward_hooks.items():
            if isinstance(hook, partial) and hook.func is _replaced:
                yield hook.args[0], module, key


def _values(owner: nn.Module) -> tuple[Tensor, Tensor]:
    """Ids and rows as they are in use: peft keeps the untrained rows beside the trained ones."""
    child = owner.get_submodule(NAME)
    first = next(part for part in child.modules() if isinstance(part, NewTokens))
    with torch.no_grad():
        return first.ids, child(first.ids, torch.zeros_like(first.rows))
