"""What a step is trained on: the task's loss alone, or with R-Drop or adversarial training beside it.

Both are scaled so that they are the plain loss where they do nothing (without dropout; as epsilon goes to 0): the
learning rate and the bound on gradients mean the same with and without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftkit.backbones.dropout import has_dropout
from peftkit.config import TrainingSettings
from peftkit.engine.padding_free import padded
from peftkit.errors import TrainingError, UsageError
from peftkit.tasks.base import Batch, Task

if TYPE_CHECKING:
    from torch import Tensor, nn


class Objective:
    """The task's loss, in one pass."""

    passes = 1
    """Forward and backward passes of a micro-batch; their losses add up, and their gradients with them."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def loss(self, model: nn.Module, plain: nn.Module, batch: Batch, class_weights: Tensor, number: int) -> Tensor:
        """Σ weight · loss of a pass (0, 1, …); what came before it went through its backward pass.

        Args:
            model: what gradients are averaged over processes by.
            plain: the same without that, for forward passes beside the one through `model`.
        """
        return self.task.summed_loss(model, batch, class_weights)


class RDrop(Objective):
    """½ (loss of one dropout + loss of another) + ½ α · ½ (KL(p ‖ q) + KL(q ‖ p)).

    Half of equation 4 of Wu et al. 2021, whose α it is (5 in their translation, 0.1 to 1 in GLUE). The divergences have
    the weights that the losses of their items have.
    """

    def __init__(self, task: Task, alpha: float, model: nn.Module) -> None:
        super().__init__(task)
        self.alpha = alpha
        if not has_dropout(model):
            raise UsageError(
                "training.r_drop compares two passes with different dropout, and this model has none: set "
                "backbone.dropout, or method.dropout where the method has it"
            )

    def loss(self, model: nn.Module, plain: nn.Module, batch: Batch, class_weights: Tensor, number: int) -> Tensor:
        one, labels = self.task.supervised_logits(model, batch)
        # a second pass through DistributedDataParallel would write to buffers that the first one's gradients need
        other, _ = self.task.supervised_logits(plain, batch)
        losses = [self.task.loss_of(logits, labels, class_weights) for logits in (one, other)]
        divergence = self.task.divergence(one, other, labels, class_weights)
        return (losses[0] + losses[1] + self.alpha * divergence) / 2


class Adversarial(Objective):
    """½ loss(e) + ½ loss(e + ε g / ‖g‖₂), where g is the gradient of the loss by e, an example's embedded tokens.

    Miyato et al. 2017, equations 2 to 4 (FGM), with λ = 1. The norm is over all tokens of an example. Their embeddings
    were trained from the start and normalised for it; here they are the backbone's, and ε is in their unit.
    """

    passes = 2

    def __init__(self, task: Task, epsilon: float, model: nn.Module) -> None:
        super().__init__(task)
        self.epsilon, self._layers = epsilon, embedding_layers(model)
        self._seen: list[Tensor] = []

    def loss(self, model: nn.Module, plain: nn.Module, batch: Batch, class_weights: Tensor, number: int) -> Tensor:
        examples, added = len(batch["input_ids"]), iter(self._perturbations() if number else ())

        def remember(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if len(output) != examples:
                raise TrainingError(
                    f"training.adversarial: {examples} examples came to the embeddings as {len(output)} rows, but each "
                    "is perturbed by itself; turn packing off, or leave adversarial out"
                )
            if output.requires_grad:
                output.retain_grad()
            else:
                output.requires_grad_()
            self._seen.append(output)
            return output

        def perturb(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output + next(added).to(output.dtype)

        self._seen = []
        handles = [layer.register_forward_hook(perturb if number else remember) for layer in self._layers]
        try:
            with padded(plain):  # each example is perturbed by itself, and has a row of its own
                loss = self.task.summed_loss(model, batch, class_weights) / 2
        finally:
            for handle in handles:
                handle.remove()
        if not number and not self._seen:
            raise TrainingError("training.adversarial: no token went through the model's embeddings; leave it out")
        return loss

    def _perturbations(self) -> list[Tensor]:
        """ε g / ‖g‖₂ of each example, for each time that its tokens were embedded; 0 where g is 0 or overflowed."""
        gradients = [one.new_zeros(one.shape) if one.grad is None else one.grad for one in self._seen]
        return perturbations(gradients, self.epsilon)


def perturbations(gradients: list[Tensor], epsilon: float) -> list[Tensor]:
    """ε g / ‖g‖₂ with one norm for each example over all of its `gradients`, whose first dimension are examples."""
    import torch

    flat = torch.cat([one.float().flatten(1) for one in gradients], dim=1)
    norms = flat.norm(dim=1)
    usable = torch.isfinite(norms) & (norms > 0)
    factors = torch.where(usable, epsilon / norms, 0.0)
    found = []
    for one in gradients:
        shape = (-1, *[1] * (one.ndim - 1))
        found.append(torch.where(usable.view(shape), one.float() * factors.view(shape), 0.0))
    return found


def embedding_layers(model: Any) -> list[nn.Module]:
    """What embeds tokens: encoder-decoders may have a module for each side, with one matrix."""
    from torch import nn

    first = model.get_input_embeddings()
    inside = set(first.modules())
    others = (part for part in model.modules() if isinstance(part, nn.Embedding) and part not in inside)
    return [first, *(part for part in others if part.weight is first.weight)]


def make_objective(task: Task, settings: TrainingSettings, model: nn.Module) -> Objective:
    """The objective that the settings ask for.

    Raises:
        UsageError: R-Drop for a model without dropout.
    """
    if settings.r_drop is not None:
        return RDrop(task, settings.r_drop, model)
    if settings.adversarial is not None:
        return Adversarial(task, settings.adversarial, model)
    return Objective(task)
