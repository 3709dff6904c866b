"""DoRA (Liu et al. 2024) on what LoRA's fused function gives: m / ‖W + s·BA‖ · (W x + s·B A x) + b.

peft multiplies B A out, and the identity through both, for the norms of every forward pass. They are a sum of three
parts that need no such matrix, the first of which never changes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


class Magnitude:
    """Scales outputs of one layer by what trains in DoRA over the norms of its directions."""

    def __init__(self) -> None:
        self._squares: Tensor | None = None
        """‖W‖² of each row, made once: W is frozen."""

    def scaled(
        self, output: Tensor, magnitude: Tensor, weight: Tensor, bias: Tensor | None, low: tuple[Tensor, Tensor, float]
    ) -> Tensor:
        """The output of the layer, (…, out).

        Args:
            output: (…, out), W x + s · B A x.
            magnitude: (out), m.
            weight: (out, in), W, frozen.
            low: A (rank, in), B (out, rank) and s.
        """
        # the norms count as constants (section 4.3), so that no gradient goes through them
        factors = magnitude / self._norms(weight, *low)
        if factors.dtype != output.dtype:  # what trains is near 1, and has more digits than bfloat16
            found = output * factors
            return (found if bias is None else found + bias).to(output.dtype)
        return output * factors if bias is None else torch.addcmul(bias, output, factors)

    @torch.no_grad()
    def _norms(self, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """(out): ‖W + s·B A‖ of each row, by ‖W‖² + 2 s · B·(W Aᵀ) + s² · B (A Aᵀ) Bᵀ."""
        exact = torch.promote_types(down.dtype, torch.float32)
        down, up = down.to(exact), up.to(exact) * scale
        crossed = linear(weight, down.to(weight.dtype)).to(exact)
        if self._squares is None:
            self._squares = weight.to(exact).square().sum(1)
        squares = self._squares + (up * (2 * crossed + up @ (down @ down.t()))).sum(1)
        return squares.clamp_min_(0).sqrt_()
