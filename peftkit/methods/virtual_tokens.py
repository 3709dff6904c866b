"""What peft leaves open where virtual tokens stand in front of the input: places that go by the input's positions.

The hooks here are put on a peft model once; afterwards logits and labels belong to the tokens that were given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from peftkit.backbones.modules import base_model
from peftkit.data.collate import IGNORED
from peftkit.errors import MethodError

if TYPE_CHECKING:
    from torch import nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

BY_POSITION = {
    "TOKEN_CLS": ("logits",),
    "CAUSAL_LM": ("logits",),
    "QUESTION_ANS": ("start_logits", "end_logits"),
    "FEATURE_EXTRACTION": ("last_hidden_state",),
}
"""Outputs with one entry a position, for each of peft's task types."""
TOKEN_TYPES = "token_types_behind_prompt"


def align(model: nn.Module, length: int) -> None:
    """Let a peft model with `length` virtual tokens take and give one entry for each token of its input.

    Outputs lose the virtual tokens' entries; labels, positions of answers and `logits_to_keep` are moved behind them.
    Decoders classify by the last token that is not padding, which they look for in `input_ids`: they are given ids
    made from the attention mask beside the embeddings, or padding would change what they answer. peft drops position
    ids: language models count theirs from the attention mask, or padding on the left would change what they generate.
    It drops the token types of questions and their contexts too: they go past it.
    """
    peft_model: Any = model
    peft_model.register_forward_pre_hook(partial(_move_behind, length), with_kwargs=True)
    peft_model.register_forward_hook(partial(_cut, length), with_kwargs=True)
    task, task_model = peft_model.active_peft_config.task_type, peft_model.get_base_model()
    if task == "SEQ_CLS":
        task_model.register_forward_pre_hook(_with_ids, with_kwargs=True)
        base_model(task_model).register_forward_pre_hook(_without_ids, with_kwargs=True)
    if task == "QUESTION_ANS":
        task_model.register_forward_pre_hook(_with_token_types, with_kwargs=True)
    if task == "CAUSAL_LM":
        task_model.register_forward_pre_hook(_with_positions, with_kwargs=True)
        # peft warns of every position that it drops
        given = peft_model.base_model_prepare_inputs_for_generation
        peft_model.base_model_prepare_inputs_for_generation = partial(_prepare_without_positions, given)


def _move_behind(length: int, model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Arguments:
    """What is given by position, for an input that is `length` longer."""
    from torch import is_tensor
    from torch.nn.functional import pad

    names = list(inspect.signature(type(model).forward).parameters)[1:]
    given = dict(zip(names, arguments, strict=False)) | named
    if model._adapters_disabled:
        return (), given
    task = model.active_peft_config.task_type
    if task == "TOKEN_CLS" and given.get("labels") is not None:
        given["labels"] = pad(given["labels"], (length, 0), value=IGNORED)
    if is_tensor(given.get("logits_to_keep")):
        given["logits_to_keep"] = given["logits_to_keep"] + length
    if task == "QUESTION_ANS" and given.get("token_type_ids") is not None:
        setattr(model.get_base_model(), TOKEN_TYPES, pad(given.pop("token_type_ids"), (length, 0)))
    for name in ("start_positions", "end_positions"):
        if given.get(name) is not None:
            given[name] = given[name] + length
    padding = model.config.get_text_config().pad_token_id
    no_mask = given.get("attention_mask") is None and given.get("input_ids") is not None
    if task == "SEQ_CLS" and no_mask and padding is not None:
        given["attention_mask"] = (given["input_ids"] != padding).long()
    return (), given


def _cut(length: int, model: Any, arguments: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
    """Outputs of the virtual tokens, which stand in front."""
    task = model.active_peft_config.task_type
    of_decoder = task == "FEATURE_EXTRACTION" and getattr(model.config, "is_encoder_decoder", False)
    if model._adapters_disabled or task not in BY_POSITION or of_decoder:
        return
    if isinstance(output, tuple):
        raise MethodError("virtual tokens need outputs by name: call the model with return_dict=True")
    inputs = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
    for name in BY_POSITION[task]:
        values = output.get(name)
        # fewer when the caller asked for some positions only
        if values is not None and values.shape[1] == inputs.shape[1] + length:
            output[name] = values[:, length:]


def _with_ids(task_model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Arguments | None:
    import torch

    embeddings, mask = named.get("inputs_embeds"), named.get("attention_mask")
    padding = task_model.config.get_text_config().pad_token_id
    if embeddings is None or padding is None:
        return None
    real = torch.ones(embeddings.shape[:2], device=embeddings.device) if mask is None else mask
    return arguments, named | {"input_ids": torch.where(real != 0, 0 if padding else 1, padding)}


def _without_ids(backbone: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Arguments | None:
    if named.get("inputs_embeds") is None:
        return None
    return (None, *arguments[1:]) if arguments else (), named | ({} if arguments else {"input_ids": None})


def _with_token_types(task_model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Arguments | None:
    """What `_move_behind` left for this call."""
    types = vars(task_model).pop(TOKEN_TYPES, None)
    return None if types is None else (arguments, named | {"token_type_ids": types})


def _with_positions(task_model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Arguments | None:
    """Positions of the tokens that are given, counted over what the attention mask lets in."""
    mask, inputs = named.get("attention_mask"), named.get("inputs_embeds")
    inputs = named.get("input_ids", arguments[0] if arguments else None) if inputs is None else inputs
    takes_them = "position_ids" in inspect.signature(task_model.forward).parameters
    if not takes_them or named.get("position_ids") is not None or mask is None or mask.ndim != 2 or inputs is None:
        return None
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return arguments, named | {"position_ids": positions[:, -inputs.shape[1] :]}


def _prepare_without_positions(prepare: Callable[..., dict[str, Any]], *arguments: Any, **named: Any) -> dict[str, Any]:
    inputs = prepare(*arguments, **named)
    inputs.pop("position_ids", None)
    return inputs
