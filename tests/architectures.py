"""Tiny random models of every architecture, one batch that fits them all, and its loss."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, PreTrainedConfig

from peftkit.backbones.load import Backbone, wrap
from peftkit.backbones.quantization import Quantization
from peftkit.backbones.quantize import quantize

SEQUENCE = "AutoModelForSequenceClassification"
TOKEN = "AutoModelForTokenClassification"
CAUSAL = "AutoModelForCausalLM"
SEQ2SEQ = "AutoModelForSeq2SeqLM"
CLASSES = 3

_SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2, "head_dim": 8}
_RELATIVE = _SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}
_STACKS = {"d_model": 32, "vocab_size": 48, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
_BART = {
    f"{stack}_{name}": value
    for stack in ("encoder", "decoder")
    for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 40}.items()
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _SMALL,
    "roberta": _SMALL,
    "distilbert": _SMALL | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40},
    "electra": _SMALL | {"embedding_size": 16},
    "albert": _SMALL | {"embedding_size": 16},
    "deberta": _RELATIVE,
    "deberta-v2": _RELATIVE | {"share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"},
    "modernbert": _SMALL | {"cls_token_id": 1, "sep_token_id": 2},
    "mpnet": _SMALL,
    "gpt2": _SMALL | {"n_inner": 40},
    "gpt_neox": _SMALL,
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "gemma": _GROUPED,
    "t5": _STACKS | {"d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
    "bart": _STACKS | _BART | {"max_position_embeddings": 32, "init_std": 0.2, "bos_token_id": 1},
}
_DECODERS = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma")
TASKS: dict[str, tuple[str, ...]] = {
    name: {"t5": (SEQUENCE, TOKEN, SEQ2SEQ), "bart": (SEQUENCE, SEQ2SEQ)}.get(
        name, (SEQUENCE, TOKEN, CAUSAL) if name in _DECODERS else (SEQUENCE, TOKEN)
    )
    for name in CONFIGS
}
"""What each architecture is used for, of what transformers offers; sequence classification is first."""

# Rows of unlike length, each with one end token, as T5 and BART want it of a sequence classifier.
IDS = torch.tensor([[1, 7, 11, 12, 13, 9, 2], [1, 20, 21, 22, 2, 0, 0]])
MASK = (torch.arange(7) < torch.tensor([[7], [5]])).long()


@dataclass(frozen=True)
class Place:
    """Where a method is tried: an architecture with the head of a task."""

    architecture: str
    model_class: str
    quantization: Quantization | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """What of the usual configuration is otherwise: blocks of 4-bit weights must fit its rows."""
        return wider(self.architecture) if self.quantization else {}

    @property
    def task(self) -> str:
        """The task as a short word: `SequenceClassification`."""
        return self.model_class.removeprefix("AutoModelFor")


def wider(architecture: str) -> dict[str, Any]:
    """A feed-forward network of 64 units for one of 40."""
    names = ("intermediate_size", "hidden_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
    return {name: 64 for name in names if name in CONFIGS[architecture]}


def tiny_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    """Two blocks of 32 units without dropout."""
    config = AutoConfig.for_model(architecture, **CONFIGS[architecture] | changes, num_labels=CLASSES)
    rates = [name for name, value in config.to_dict().items() if "drop" in name and isinstance(value, float)]
    for name in (*rates, "classifier_dropout"):  # of which heads have one even where the configuration has none
        setattr(config, name, 0.0)
    return config


@functools.cache
def on_meta(place: Place) -> nn.Module:
    """Shapes without weights; counting leaves them as they are."""
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, place.model_class).from_config(
            tiny_config(place.architecture, **place.changes)
        )
    return model


def save_checkpoint(place: Place, root: Path, **changes: Any) -> Path:
    """A checkpoint in which no bias, normalisation or head is at its usual start."""
    changes = place.changes | changes
    folder = root / "-".join([place.architecture, place.task, *map(str, changes.values())])
    if not folder.is_dir():
        torch.manual_seed(0)
        model = getattr(transformers, place.model_class).from_config(tiny_config(place.architecture, **changes))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


@functools.cache
def _loaded(folder: Path, model_class: str) -> nn.Module:
    model: nn.Module = getattr(transformers, model_class).from_pretrained(folder)
    return model.eval()


def backbone_of(folder: Path, model_class: str, head_seed: int, quantization: Quantization | None = None) -> Backbone:
    """The checkpoint with a head drawn anew, so that a head that is not saved is noticed."""
    backbone = wrap(copy.deepcopy(_loaded(folder, model_class)))
    if quantization is not None:
        quantize(backbone.model, backbone.layout, quantization)
    chance = torch.Generator().manual_seed(head_seed)
    for name in backbone.head_modules:
        for parameter in backbone.model.get_submodule(name).parameters():
            nn.init.normal_(parameter, std=0.2, generator=chance)
    return backbone


def logits_of(model: nn.Module, model_class: str) -> Tensor:
    """Logits of the batch: (examples, classes), or (real tokens, classes)."""
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    if model_class == SEQ2SEQ:
        inputs |= {"decoder_input_ids": IDS.flip(1)}
    logits: Tensor = model(**inputs).logits
    if model_class == SEQUENCE:
        return logits
    assert logits.shape[:2] == IDS.shape, f"logits of shape {tuple(logits.shape)} for inputs {tuple(IDS.shape)}"
    return logits if model_class == SEQ2SEQ else logits[MASK.bool()]


def evaluated(model: nn.Module, model_class: str) -> Tensor:
    """Logits without gradients, in evaluation mode, flat over tokens."""
    model.eval()
    with torch.no_grad():
        return logits_of(model, model_class).flatten(0, -2)


def loss_of(model: nn.Module, model_class: str) -> Tensor:
    """Cross-entropy of the batch against made-up labels."""
    logits = logits_of(model, model_class).flatten(0, -2).float()
    return cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])
