"""Changes of weights as products of two thin matrices: their sums, lengths, angles, and what is nearest to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A change of a weight, b a, of shape (outputs, inputs), kept as its factors."""

    b: Tensor
    """(outputs, rank)."""
    a: Tensor
    """(rank, inputs)."""
    transposed: bool = False
    """The weight is held as (inputs, outputs), as those of embeddings and of GPT-2's projections are."""

    @property
    def rank(self) -> int:
        """Columns of b, whatever the rank of the product."""
        return int(self.a.shape[0])

    @property
    def whole_rank(self) -> int:
        """The most that a matrix of this shape can have."""
        return min(self.b.shape[0], self.a.shape[1])

    def times(self, factor: float) -> LowRank:
        """The change times a number."""
        return replace(self, b=self.b * factor)


Change = Any
"""A `LowRank`, or a tensor of the parameter's own shape."""


def dense(change: Change) -> Tensor:
    """The change in the shape of the parameter."""
    if not isinstance(change, LowRank):
        whole: Tensor = change
        return whole
    product = change.b @ change.a
    return product.T if change.transposed else product


def times(change: Change, factor: float) -> Change:
    """The change times a number."""
    return change.times(factor) if isinstance(change, LowRank) else change * factor


def added(changes: Sequence[Change]) -> Change:
    """The sum. Products are put side by side, [b₁ b₂] [a₁; a₂], which is exact; no higher in rank than the matrix."""
    import torch

    if not all(isinstance(one, LowRank) for one in changes):
        return torch.stack([dense(one) for one in changes]).sum(0)
    b, a = torch.cat([one.b for one in changes], dim=1), torch.cat([one.a for one in changes])
    whole = LowRank(b, a, changes[0].transposed)
    return nearest(whole, whole.whole_rank) if whole.rank > whole.whole_rank else whole


def nearest(change: LowRank, rank: int) -> LowRank:
    """The nearest product of at most this rank in the Frobenius norm (Eckart, Young 1936).

    b a = Q_b (R_b R_aᵀ) Q_aᵀ with the QR decompositions of b and aᵀ, so that the SVD is of a small matrix.
    """
    import torch

    q_b, r_b = torch.linalg.qr(change.b)
    q_a, r_a = torch.linalg.qr(change.a.T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    roots = values[:rank].sqrt()
    b, a = q_b @ (left[:, :rank] * roots), (roots[:, None] * right[:rank]) @ q_a.T
    return LowRank(b, a, change.transposed)


def nearest_to(weight: Tensor, rank: int, transposed: bool) -> LowRank:
    """The nearest product of at most this rank to the change of a weight."""
    import torch

    left, values, right = torch.linalg.svd(weight.T if transposed else weight, full_matrices=False)
    roots = values[:rank].sqrt()
    return LowRank(left[:, :rank] * roots, roots[:, None] * right[:rank], transposed)


def inner(one: Change, other: Change) -> float:
    """Σ over all elements of one ⊙ other; of two products by their factors alone."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return float(((one.b.T @ other.b) * (one.a @ other.a.T)).sum())
    return float((dense(one) * dense(other)).sum())


def length(change: Change) -> float:
    """The Frobenius norm."""
    return max(0.0, inner(change, change)) ** 0.5


def scale_of(change: Change) -> float:
    """The largest number that an element is summed from: what rounding is measured by where products cancel."""
    if isinstance(change, LowRank):
        return float((change.b.abs() @ change.a.abs()).max())
    return float(change.abs().max())
