"""Losses of classification. Each is Σ weight · loss over the supervised items, divided by Σ weight once per
optimizer step, so that it is the same for every split of a batch into micro-batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from peftkit.errors import DataError
from peftkit.schema import Section

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(Section):
    """−log p of the right class."""

    kind: Literal["cross_entropy"] = "cross_entropy"

    def class_weights(self, counts: Sequence[int]) -> list[float]:
        """The weight of each class, given how often each occurs in training."""
        return [1.0] * len(counts)

    def item_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Unweighted losses of shape (items,) for `logits` (items, classes) and `labels` (items,)."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits, labels, reduction="none")

    def losses_and_gradients(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`item_losses`, and the gradient of their sum by the logits: softmax − one-hot; without a graph."""
        logs = logits.log_softmax(-1)
        at = labels.unsqueeze(1)
        losses = -logs.gather(1, at).squeeze(1)
        return losses, logs.exp_().scatter_add_(1, at, -logs.new_ones(at.shape))


class Weighted(CrossEntropy):
    """Cross-entropy in which rare classes count more, or classes count as given."""

    kind: Literal["weighted"] = "weighted"  # type: ignore[assignment]
    weights: Literal["balanced"] | tuple[Annotated[float, Field(gt=0)], ...] = "balanced"
    """`balanced`: examples / (classes · examples of the class), or one weight a label in label order."""

    def class_weights(self, counts: Sequence[int]) -> list[float]:
        if self.weights != "balanced":
            if len(self.weights) != len(counts):
                raise DataError(f"task.loss.weights has {len(self.weights)} weights for {len(counts)} labels")
            return list(self.weights)
        return [sum(counts) / (len(counts) * count) if count else 0.0 for count in counts]


class LabelSmoothed(CrossEntropy):
    """Cross-entropy against (1 − s) · one-hot + s / classes (Szegedy et al. 2016, section 7)."""

    kind: Literal["label_smoothed"] = "label_smoothed"  # type: ignore[assignment]
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 0.1

    def item_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)

    def losses_and_gradients(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return _by_autograd(self, logits, labels)


class Focal(CrossEntropy):
    """(1 − p)^γ · −log p, which dwells on what is still wrong (Lin et al. 2017, equation 4)."""

    kind: Literal["focal"] = "focal"  # type: ignore[assignment]
    gamma: Annotated[float, Field(gt=0)] = 2.0

    def item_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = super().item_losses(logits, labels)
        # expm1 is exact where p is near 1; the floor keeps the gradient finite at p = 1 when γ < 1
        wrong = (-losses).expm1().neg().clamp(min=1e-30)
        return wrong.pow(self.gamma) * losses

    def losses_and_gradients(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return _by_autograd(self, logits, labels)


class BinaryCrossEntropy(Section):
    """−w·y·log p − (1 − y)·log(1 − p) of each label by itself, then the mean over the labels of an example."""

    kind: Literal["binary_cross_entropy"] = "binary_cross_entropy"
    positive_weights: Literal["balanced"] | tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """w: `balanced` is rows without the label / rows with it, or one weight a label in label order; default 1."""

    def label_weights(self, positives: Sequence[int], rows: int) -> list[float]:
        """w of each label, given how many of the training rows have it."""
        if self.positive_weights is None:
            return [1.0] * len(positives)
        if self.positive_weights == "balanced":
            return [(rows - count) / count if 0 < count < rows else 1.0 for count in positives]
        if len(self.positive_weights) != len(positives):
            given = len(self.positive_weights)
            raise DataError(f"task.loss.positive_weights has {given} weights for {len(positives)} labels")
        return list(self.positive_weights)

    def item_losses(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Shape (items,), for `logits` and 0/1 `labels` of shape (items, labels) and `weights` (labels,)."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        losses = binary_cross_entropy_with_logits(logits, labels.to(logits), pos_weight=weights, reduction="none")
        return losses.mean(-1)


class SquaredError(Section):
    """(prediction − number)², in the numbers' own unit: nothing is rescaled."""

    kind: Literal["squared_error"] = "squared_error"

    def item_losses(self, predictions: Tensor, numbers: Tensor) -> Tensor:
        """Shape (items,), for two tensors of that shape."""
        return (predictions - numbers).square()


def _loss_by_name(value: Any) -> Any:
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, dict):  # pydantic's strict mode takes lists for tuples from JSON only, and this is Python
        return {key: tuple(one) if isinstance(one, list) else one for key, one in value.items()}
    return value


_Loss = Annotated[CrossEntropy | Weighted | LabelSmoothed | Focal, Field(discriminator="kind")]
_LossName = Literal["cross_entropy", "weighted", "label_smoothed", "focal"]
AnyLoss = Annotated[_Loss, BeforeValidator(_loss_by_name, json_schema_input_type=_Loss | _LossName)]

_SequenceLoss = Annotated[
    CrossEntropy | Weighted | LabelSmoothed | Focal | BinaryCrossEntropy | SquaredError, Field(discriminator="kind")
]
_SequenceLossName = Literal[_LossName, "binary_cross_entropy", "squared_error"]
AnySequenceLoss = Annotated[
    _SequenceLoss, BeforeValidator(_loss_by_name, json_schema_input_type=_SequenceLoss | _SequenceLossName)
]


def _by_autograd(loss: CrossEntropy, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    with torch.enable_grad():
        held = logits.detach().requires_grad_()
        losses = loss.item_losses(held, labels)
        (gradient,) = torch.autograd.grad(losses.sum(), held)
    return losses.detach(), gradient


def summed_loss(loss: CrossEntropy, logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """Σ weight · loss, a scalar in float32, over `logits` (items, classes) and `labels` (items,)."""
    return (loss.item_losses(logits.float(), labels) * class_weights[labels]).sum()
