"""Dropout of a backbone, which every architecture calls by names of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftkit.errors import BackboneError

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PretrainedConfig

HIDDEN = (
    *("hidden_dropout_prob", "hidden_dropout", "hidden_dropout_rate", "dropout", "dropout_rate", "dropout_prob"),
    *("resid_pdrop", "resid_dropout", "residual_dropout", "embd_pdrop", "emb_pdrop", "embed_dropout"),
    *("embedding_dropout", "activation_dropout", "mlp_dropout", "ff_dropout", "ffn_dropout"),
)
ATTENTION = (
    "attention_probs_dropout_prob",
    "attention_dropout",
    "attn_pdrop",
    "attn_dropout",
    "attention_dropout_prob",
)
HEAD = (
    *("classifier_dropout", "classifier_dropout_prob", "classifier_dropout_rate", "seq_classif_dropout"),
    *("qa_dropout", "pooler_dropout", "cls_dropout", "summary_first_dropout", "head_dropout"),
)
NAMES = frozenset((*HIDDEN, *ATTENTION, *HEAD))
"""Names of probabilities in transformers' configurations; layers that are left out whole are another thing."""


def set_dropout(config: PretrainedConfig, probability: float) -> list[str]:
    """Set every dropout probability in a configuration: of hidden states, attention and head; returns their names.

    Raises:
        BackboneError: the architecture has none.
    """
    found = []
    for part in {id(one): one for one in (config, config.get_text_config())}.values():
        for name in sorted(NAMES.intersection(vars(part))):
            if _is_probability(getattr(part, name)) or name in HEAD:
                setattr(part, name, probability)
                found.append(name)
    if not set(found).difference(HEAD):
        raise BackboneError(
            f"backbone.dropout: '{config.model_type}' has no dropout in its configuration; leave it out, and use the "
            "method's own (method.dropout) where it has one"
        )
    return found


def has_dropout(model: Module) -> bool:
    """Whether two passes of the model in training mode differ: some module, or attention function, drops something."""
    return any(_drops(part) for part in model.modules())


def _drops(part: Any) -> bool:
    from torch import nn

    if isinstance(part, nn.Module) and type(part).__name__.endswith("Dropout"):
        return float(getattr(part, "p", getattr(part, "drop_prob", 0.0))) > 0
    # attention functions are handed a number
    return any(_is_probability(value) and value > 0 for name, value in vars(part).items() if name in NAMES)


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
