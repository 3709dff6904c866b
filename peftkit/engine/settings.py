"""Which techniques a training uses to be fast."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftkit.engine.compiled import Compiled
from peftkit.schema import Section


class Engine(Section):
    """Ways to compute the same in less time; what they change are the last bits, and which draws dropout makes.

    All are part of what names a run, so that a run that goes on, or is run again, computes the same bytes.
    """

    fused_lora: bool = True
    """Compute LoRA's projections of one input together, with one copy of the input kept; what peft does otherwise
    (DoRA with dropout, other variants, adapters with a bias, several at once) stays with peft."""
    padding_free: bool = True
    """Compute the real tokens of a batch in one row; only attention pads, within groups of examples of similar length.
    Encoder-decoders and models that compute attention scores by themselves (DeBERTa, MPNet) stay padded."""
    supervised_loss: bool = True
    """Take a language model's loss from some supervised tokens at a time, with the gradient formed in the forward pass,
    so that their logits are never held together. What changes its logits afterwards (Gemma 2, BART) stays as it was."""
    read_positions: bool = True
    """Of the last block, compute only what is read of it: the first token for a class, tokens with labels. For BERT's
    and Llama's relatives, where batches go without padding and nothing else was added to the block's modules."""
    attention: Literal["auto", "sdpa", "plain"] = "auto"
    """What attends where the model would use torch's `sdpa`: that, the plain formula, or for each dtype and length
    whichever is faster; the formula is on CPUs for long texts with dropout, and for short ones in half precision."""
    compiled_attention: Compiled = Field(default="auto", validate_default=True)
    """With `attention: auto` and without padding, attend on CPUs by C++ that is compiled when it is first needed, pads
    nothing and keeps no scores. `auto`: where there is a compiler; the run records which."""
    fast_dropout: bool = True
    """On CPUs, draw dropout from wide random words, of which masks of bytes are kept."""
    compiled_dropout: Compiled = Field(default="auto", validate_default=True)
    """With `fast_dropout`, drop by C++ that is compiled when it is first needed and draws by a seed and a number's
    place, so that no mask is kept. `auto`: where there is a compiler; the run records which."""
