"""What all methods that peft implements share: attaching, saving in peft's own format, loading, merging."""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.backbones.modules import architecture, head_modules
from peftkit.backbones.targets import Target, find_targets
from peftkit.disk import follow_umask
from peftkit.errors import ArtifactError, MethodError, first_line
from peftkit.methods.base import Method, check_fit, check_trained, inside, module_parameters, train_in_float32
from peftkit.methods.peft_files import (
    ADAPTER,
    LEFT_OUT,
    NOTES,
    WEIGHTS,
    adapter_state,
    check_alike,
    put_in,
    quiet_peft,
    read_saved,
    refuse_backbone_weights,
    saved_config,
)
from peftkit.quiet import quiet_libraries

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone

TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


class FromPeft(Method):
    """A translation into a peft configuration; peft does the rest."""

    artifact: ClassVar[str] = "adapter"

    @abstractmethod
    def peft_config(self, backbone: Backbone, targets: list[Target], total_steps: int) -> PeftConfig:
        """The same method in peft's words; targets, and heads that must be trained and saved, included."""

    def targets_in(self, model: nn.Module, layout: Layout) -> list[Target]:
        """The projections that are adapted, by full name; none for methods that adapt the input."""
        targets = getattr(self, "targets", None)
        if targets is None:
            return []
        found = find_targets(model, layout, targets)
        _refuse_trained_whole(found, head_modules(model))
        return found

    def attach(self, backbone: Backbone, total_steps: int) -> nn.Module:
        with quiet_libraries():
            from peft import get_peft_model
        from peftkit.backbones.new_tokens import check_reached

        model: Any = backbone.model
        expected = self.added_parameters(model, backbone.layout) + module_parameters(model, backbone.head_modules)
        train_in_float32(model, backbone.head_modules)
        with quiet_libraries(), quiet_peft():
            config = self.peft_config(backbone, self._split(backbone), total_steps)
            self._refuse_all_biases(config, backbone)
            adapted = self.prepared(get_peft_model(model, config))
        check_reached(adapted)
        check_trained(adapted, expected, self)
        return adapted

    def _refuse_all_biases(self, config: PeftConfig, backbone: Backbone) -> None:
        """peft would train and save them, and loading refuses an adapter that replaces weights of the backbone."""
        if getattr(config, "bias", None) != "all":
            return
        names = (name for name, _ in backbone.model.named_parameters() if name.rpartition(".")[2] == "bias")
        if first := next((name for name in names if not inside(name, backbone.head_modules)), None):
            raise MethodError(
                f"method '{self.kind}' with bias: all saves '{first}', a weight of the backbone itself, which no "
                "adapter replaces; lora_only has the biases of the targets, and method bitfit all of them"
            )

    def save(self, model: nn.Module, folder: Path) -> None:
        from safetensors.torch import save_file

        config, state = self.saved_form(model)
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
        notes = self.notes(model)
        save_file(tensors, folder / WEIGHTS, metadata={NOTES: json.dumps(notes)} if notes else {"format": "pt"})
        config.inference_mode = True
        # peft keeps targets in a set, whose order varies by process, and adds heads that it has been told already
        for name in ("target_modules", "feedforward_modules", "modules_to_save"):
            if isinstance(held := getattr(config, name, None), (set, list)):
                setattr(config, name, sorted(set(held)))
        config.save_pretrained(str(folder))
        follow_umask(folder)

    def load(self, backbone: Backbone, folder: Path) -> nn.Module:
        with quiet_libraries():
            from peft import PeftModel

        targets = self._split(backbone)
        train_in_float32(backbone.model, backbone.head_modules)
        base: Any = backbone.model
        config = saved_config(folder)
        notes, tensors = read_saved(folder)
        saved = set(tensors)
        refuse_backbone_weights(saved, base, backbone.head_modules, folder)
        self._refuse_missing(targets, saved, notes, base, folder)
        try:
            with quiet_libraries(), quiet_peft():
                model = PeftModel.from_pretrained(base, folder, config=config)
        except Exception as error:  # peft checks no types: what does not fit raises whatever it happens to
            lines = [line.strip() for line in str(error).splitlines()]
            reason = next((line for line in lines if line.startswith("size mismatch")), first_line(error))
            raise ArtifactError(f"{folder} is not of {architecture(base)}: {reason}") from error
        differing = sorted(saved ^ set(adapter_state(model)))
        if differing:
            raise ArtifactError(f"{folder} does not fit its configuration: it differs in {', '.join(differing[:3])}")
        self.check_notes(model, notes, folder)
        return self.prepared(model).requires_grad_(False)

    def restore(self, model: nn.Module, folder: Path, dropped: Sequence[str], kept: Sequence[str]) -> None:
        notes, saved = read_saved(folder)
        check_alike(saved_config(folder), model)
        own = adapter_state(model)
        staying = {name: tensor for name, tensor in own.items() if inside(name, kept)}
        tensors = {name: tensor for name, tensor in saved.items() if not inside(name, dropped)}
        check_fit({name: tensor for name, tensor in own.items() if name not in staying}, tensors)
        put_in(model, tensors | staying)
        self.check_notes(model, notes, folder)

    def refuse_other(self, saved: Method) -> None:
        """Nothing: `restore` compares what both come to in peft's words."""
        return

    def _refuse_missing(
        self, targets: list[Target], saved: set[str], notes: dict[str, str], base: nn.Module, folder: Path
    ) -> None:
        """Refuse a file without tensors of some target, as one of a flatter backbone is: peft would leave it out."""
        left_out = set(notes.get(LEFT_OUT, "").split())
        prefixes = tuple(f"base_model.model.{target.name}." for target in targets if target.name not in left_out)
        lost = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in saved)]
        if lost:
            name = lost[0].removeprefix("base_model.model.")[:-1]
            raise ArtifactError(f"{folder} is not of {architecture(base)}: it has nothing for '{name}'")

    def merge(self, model: nn.Module) -> nn.Module:
        from peftkit.backbones.fused import fuse
        from peftkit.backbones.new_tokens import fold

        fold(model)  # first: what was adapted of the embeddings holds for the new rows too
        _unwrap_heads(model)
        untie(model)
        return fuse(model.merge_and_unload(safe_merge=True))  # type: ignore[operator]

    def saved_form(self, model: nn.Module) -> tuple[PeftConfig, dict[str, Tensor]]:
        """What `save` writes: configuration and tensors."""
        peft_model: Any = model
        return copy.copy(peft_model.peft_config[ADAPTER]), adapter_state(model)

    def prepared(self, model: nn.Module) -> nn.Module:
        """The peft model, with what the method mends in it; called when it was attached and when it was loaded."""
        return model

    def notes(self, model: nn.Module) -> dict[str, str]:
        """What the saved file says of itself beside its tensors."""
        return {}

    def check_notes(self, model: nn.Module, notes: dict[str, str], folder: Path) -> None:
        """Refuse a loaded model that is not the one that was saved.

        Raises:
            ArtifactError: says what differs.
        """
        return

    def _split(self, backbone: Backbone) -> list[Target]:
        """The targets; fused projections that are adapted in part are split."""
        targets = self.targets_in(backbone.model, backbone.layout)
        if any(target.fused_in for target in targets):
            from peftkit.backbones.fused import split_fused

            split_fused(backbone.model, backbone.layout, targets)
        return targets


def task_type(model: nn.Module) -> str | None:
    """peft's name of the model's task, which decides which class it is loaded as.

    None where peft's general class serves better: that of question answering does not hand on `token_type_ids`.
    """
    name = type(model).__name__
    return next((task for suffix, task in TASK_TYPES.items() if name.endswith(suffix)), None)


def refuse_embeddings(model: nn.Module, targets: list[Target], what: str) -> None:
    """Refuse embeddings among the targets of what is for linear layers only.

    Raises:
        MethodError: names the embedding.
    """
    from torch import nn

    for target in targets:
        if target.fused_in is None and isinstance(model.get_submodule(target.name), nn.Embedding):
            raise MethodError(
                f"{what} is for linear layers, and '{target.name}' is an embedding; leave it out of the targets"
            )


def _unwrap_heads(model: nn.Module) -> None:
    """Put the trained heads in their places: most tuners of peft can only unload those that are one linear layer."""
    from peft.utils import ModulesToSaveWrapper

    for name, part in [one for one in model.named_modules() if isinstance(one[1], ModulesToSaveWrapper)]:
        model.set_submodule(name, part.modules_to_save[ADAPTER])


def tied_and_adapted(model: Any) -> bool:
    """Whether word embeddings and output share a matrix, and only one of the two modules has an update."""
    task_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    sides = [task_model.get_input_embeddings(), task_model.get_output_embeddings()]
    if None in sides:
        return False
    plain = [getattr(side, "base_layer", side) for side in sides]
    return plain[0].weight is plain[1].weight and sum(hasattr(side, "base_layer") for side in sides) == 1


def untie(model: Any) -> None:
    """Give word embeddings and output a matrix each where one alone is adapted: merged, they are two."""
    if not tied_and_adapted(model):
        return
    from torch import nn

    task_model = model.get_base_model()
    output = task_model.get_output_embeddings()
    output = getattr(output, "base_layer", output)
    output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    task_model.config.tie_word_embeddings = False


def are_transposed(model: nn.Module, names: list[str]) -> bool:
    """Whether the weights are (in, out), as GPT-2's are; said outright, or peft warns that it found out."""
    from transformers.pytorch_utils import Conv1D

    return all(isinstance(model.get_submodule(name), Conv1D) for name in names)


def _refuse_trained_whole(targets: list[Target], heads: tuple[str, ...]) -> None:
    """Refuse updates of what is trained and saved as a whole anyway."""
    for target in targets:
        if any(f"{target.name}.".startswith(f"{head}.") for head in heads):
            raise MethodError(
                f"target '{target.name}' is in the head, which trains as a whole; leave it out of the targets"
            )
