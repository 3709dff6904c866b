"""What a transformers model consists of, as far as the model itself tells."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module


def base_model(model: Module) -> Module:
    """The pretrained part of a task model; a bare model is its own."""
    return getattr(model, "base_model", model)


def head_modules(model: Module) -> tuple[str, ...]:
    """The freshly initialised children of a task model.

    None in a language model: what stands beside its output (`vocab_transform`, `lm_head`) was pretrained.
    T5 keeps its stacks and embeddings beside the head, so the backbone is told by type and not by name.
    """
    from torch import nn
    from transformers import PreTrainedModel

    task_model: Any = model
    bare = not any(isinstance(child, PreTrainedModel) for child in model.children())
    if bare or task_model.get_output_embeddings() is not None:
        return ()
    pretrained = (PreTrainedModel, nn.Embedding)
    rest = ((name, child) for name, child in model.named_children() if not isinstance(child, pretrained))
    return tuple(name for name, child in rest if next(child.parameters(), None) is not None)


def linears(model: Module) -> Iterator[tuple[str, Module]]:
    """Every linear projection, GPT-2's transposed ones too, by its full name."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return ((name, part) for name, part in model.named_modules() if isinstance(part, (nn.Linear, Conv1D)))


def adaptable(model: Module) -> list[str]:
    """Names of all modules of the kinds that peft adapts, embeddings and head included."""
    from torch import nn

    others = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    known = dict(linears(model))
    return [name for name, part in model.named_modules() if name in known or isinstance(part, others)]


def norms(model: Module) -> dict[str, Module]:
    """Every normalisation layer with parameters, by its full name: torch's and each architecture's own."""
    return {
        name: part
        for name, part in model.named_modules()
        if type(part).__name__.endswith("Norm") and next(part.parameters(recurse=False), None) is not None
    }


def named(names: Iterable[str], entry: str) -> set[str]:
    """Those that are `entry` or end in it, whole parts only."""
    return {name for name in names if name == entry or name.endswith(f".{entry}")}


def number_free_tails(names: Iterable[str]) -> list[str]:
    """The number-free ways to name modules: `attention.self.query`, `self.query`, `query`."""
    paths = dict.fromkeys(re.split(r"(?:^|\.)\d+\.", name)[-1] for name in names)
    return [path.split(".", start)[-1] for path in paths for start in range(path.count(".") + 1)]


def architecture(model: Any) -> str:
    """The model for an error message: `bert (BertModel)`."""
    return f"{model.config.model_type} ({type(model).__name__})"
