"""The seam in attention modules that compute their scores by themselves: DeBERTa (both) and MPNet.

Each class is transformers' own with another `forward`, which computes the same and asks the module's `BeforeAttention`
children first. Relative positions are terms of the scores between real tokens; what is prepended has none.
DeBERTa's models have an argument for other queries than the hidden states, and never give it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deberta import modeling_deberta
from transformers.models.deberta_v2 import modeling_deberta_v2
from transformers.models.mpnet import modeling_mpnet

from peftkit.backbones.attention_inputs import Attention, changed


class OpenMPNet(modeling_mpnet.MPNetSelfAttention):
    """softmax(Q Kᵀ / √d + position bias) V"""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **_: Any,
    ) -> tuple[Tensor, ...]:
        query, key, value = (
            part(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        query = query / math.sqrt(self.attention_head_size)
        context, weights = _attend(self, Attention(query, key, value, attention_mask, position_bias, causal=False))
        return (self.o(context), weights) if output_attentions else (self.o(context),)


class OpenDeberta(modeling_deberta.DisentangledSelfAttention):
    """softmax((Q Kᵀ + content to position + position to content) / √(d · terms)) V"""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self.transpose_for_scores(self.in_proj(hidden_states)).chunk(3, dim=-1)
        query = query + self.transpose_for_scores(self.q_bias[None, None])
        value = value + self.transpose_for_scores(self.v_bias[None, None])
        terms = 1 + len(self.pos_att_type)
        query = query / math.sqrt(self.attention_head_size * terms)
        bias = None
        if self.pos_att_type and relative_pos is not None and rel_embeddings is not None:
            bias = self.disentangled_att_bias(query, key, relative_pos, self.pos_dropout(rel_embeddings), terms)
        context, weights = _attend(self, Attention(query, key, value, attention_mask.bool(), bias, causal=False))
        return context, weights if output_attentions else None


class OpenDebertaV2(modeling_deberta_v2.DisentangledSelfAttention):
    """The same as DeBERTa's, the position terms with scales of their own."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        heads = self.num_attention_heads
        query, key, value = (
            self.transpose_for_scores(part(hidden_states), heads)
            for part in (self.query_proj, self.key_proj, self.value_proj)
        )
        kinds = [kind for kind in ("c2p", "p2c") if kind in self.pos_att_type]
        terms, bias = 1 + len(kinds), None
        if self.relative_attention and kinds:
            between = self.pos_dropout(rel_embeddings)
            bias = self.disentangled_attention_bias(query, key, relative_pos, between, terms).unflatten(0, (-1, heads))
        query = query / math.sqrt(query.shape[-1] * terms)
        query, key, value = (one.unflatten(0, (-1, heads)) for one in (query, key, value))
        context, weights = _attend(self, Attention(query, key, value, attention_mask.bool(), bias, causal=False))
        return context, weights if output_attentions else None


OPEN: dict[type[nn.Module], type[nn.Module]] = {one.__mro__[1]: one for one in (OpenMPNet, OpenDeberta, OpenDebertaV2)}
"""The class that each of transformers' is replaced by."""


def _attend(module: Any, attention: Attention) -> tuple[Tensor, Tensor]:
    """(batch, queries, heads · width), and the weights after dropout."""
    query, key, value, mask, bias, _ = changed(module, attention)
    scores = query @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = module.dropout(scores.softmax(-1))
    return (weights @ value).transpose(1, 2).flatten(2), weights
