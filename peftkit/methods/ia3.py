"""(IA)³ (Liu et al. 2022), through peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peftkit.backbones.layouts import in_blocks
from peftkit.methods.from_peft import FromPeft, are_transposed, refuse_embeddings, task_type

if TYPE_CHECKING:
    from peft import IA3Config
    from torch import nn

    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone
    from peftkit.backbones.targets import Target


class IA3(FromPeft):
    """A vector of ones that trains, times keys, values and what goes into the feed-forward network's `down` projection.

    Section 3.3 of the paper: softmax(Q (l_k ⊙ K)ᵀ / √d) (l_v ⊙ V), and (l_ff ⊙ γ(W₁ x)) W₂. The model starts as the
    untouched one. The outputs of other targets are scaled like keys and values.
    """

    kind: Literal["ia3"] = "ia3"
    targets: str | tuple[str, ...] = "key+value+down"
    """Roles and module names, joined by `+` or as a list; the default is the paper's."""

    def peft_config(self, backbone: Backbone, targets: list[Target], total_steps: int) -> IA3Config:
        from peft import IA3Config

        names = [target.name for target in targets]
        return IA3Config(
            target_modules=names,
            feedforward_modules=[target.name for target in targets if scales_input(target, backbone.layout)],
            fan_in_fan_out=are_transposed(backbone.model, names),
            modules_to_save=list(backbone.head_modules) or None,
            task_type=task_type(backbone.model),
        )

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        """Key width + value width + feed-forward width, of each block and each of its attentions."""
        targets = self.targets_in(model, layout)
        refuse_embeddings(model, targets, "(IA)³")
        return sum(target.inputs if scales_input(target, layout) else target.outputs for target in targets)


def scales_input(target: Target, layout: Layout) -> bool:
    """Whether it is the projection out of the feed-forward network."""
    match = in_blocks(layout).search(target.name)
    return match is not None and match["path"] in layout.roles.get("down", ())
