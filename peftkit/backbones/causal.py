"""Which architectures predict the next token, and which of those can tell apart examples that share a sequence."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from peftkit.backbones.modules import architecture
from peftkit.errors import BackboneError, UsageError

if TYPE_CHECKING:
    from torch import nn

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
MASK = "create_causal_mask"
CHECKED = "keeps_examples_apart"
"""The mark of a model that was tried."""
LEAK, ROUNDING = 1e-3, 0.1  # of the largest logit; bfloat16 rounds to 0.01


def refuse_encoder(model: nn.Module) -> None:
    """Refuse an encoder under the head of a causal language model, which transformers builds without a word: its
    tokens see those behind them, so the loss would be of copying.

    Raises:
        BackboneError: names the architecture.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    transformer: Any = model
    if transformer.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        transformer.config, "is_decoder", False
    ):
        raise BackboneError(
            f"{architecture(model)} is an encoder: its tokens see those behind them, so it cannot learn to predict "
            "the next one; choose a decoder"
        )


def refuse_unpackable(model: nn.Module) -> None:
    """Refuse packing where shapes alone tell that transformers does not keep examples apart by their position ids.

    Not all can be told so: OPT fills in a mask where none is given. `check_packing` finds those.

    Raises:
        UsageError: names the architecture, and what in it does not.
    """
    transformer: Any = model
    config = transformer.config
    others = sorted(set(getattr(config, "layer_types", None) or ()) - PACKABLE_LAYERS)
    reason = f"has layers of type {others[0]}" if others else ""
    if getattr(config, "alibi", False):
        reason = "counts positions from key to query (ALiBi), across examples"
    if not any(_masks_by_position(part) for part in model.modules()):
        reason = "does not make its masks from position ids"
    if reason:
        raise _unpackable(model, reason)


def _masks_by_position(part: nn.Module) -> bool:
    forward = inspect.unwrap(type(part).forward)
    return "position_ids" in inspect.signature(forward).parameters and MASK in forward.__code__.co_names


def check_packing(model: nn.Module) -> None:
    """Try on three short examples whether `model` keeps examples apart that share a sequence; done once for a model.

    Raises:
        UsageError: what an example gets depends on its neighbour, or differs from what it gets alone.
    """
    import torch

    asked: Any = model
    if getattr(asked, CHECKED, False):
        return
    ids = torch.tensor([[1, 2, 3, 7, 8, 9, 7], [4, 5, 6, 7, 8, 9, 7]], device=next(model.parameters()).device)
    ids = ids % asked.config.get_text_config().vocab_size
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=ids.device)
    was_training = model.training
    with torch.no_grad():
        asked.eval()
        one, other = (
            asked(input_ids=row[None], position_ids=places, use_cache=False).logits[0, 3:].float() for row in ids
        )
        alone = asked(input_ids=ids[:1, 3:], use_cache=False).logits[0].float()
    asked.train(was_training)
    largest = alone.abs().max()
    # of equal shape, they differ by a leak alone; beside the second, also by rounding
    if not (one - other).abs().max() <= LEAK * largest or not (one - alone).abs().max() <= ROUNDING * largest:
        raise _unpackable(model, "does not keep examples apart by their position ids")
    setattr(asked, CHECKED, True)


def _unpackable(model: nn.Module, reason: str) -> UsageError:
    return UsageError(
        f"task.packing: {architecture(model)} {reason}, so examples in one sequence would see each other; "
        "set packing: false"
    )
