"""A checkpoint as the model of a task: which of its weights go where, and which are new."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.backbones.modules import head_modules
from peftkit.errors import BackboneError, first_line
from peftkit.quiet import quiet_libraries

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

MODEL_CLASSES = (
    *("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering"),
    *("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"),
)
"""Those of transformers' auto classes that tasks use."""


def load_model(
    folder: Path, files: Iterable[Path], config: PretrainedConfig, model_class: str, dtype: Any
) -> tuple[nn.Module, set[str]]:
    """The model, and the names of the parameters that the checkpoint did not have.

    Args:
        model_class: one of transformers' auto classes.

    Raises:
        BackboneError: the checkpoint is damaged, or transformers has no such class for it.
    """
    import transformers

    auto_class = getattr(transformers, model_class)
    try:
        renamed = _key_mapping(auto_class, config, files)
        with quiet_libraries():
            model, info = auto_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                key_mapping=renamed,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and safetensors raise many kinds for a damaged checkpoint
        raise BackboneError(f"cannot load {folder} as {model_class}: {first_line(error)}") from error
    _save_under_own_names(model, renamed)
    mismatched = {item[0] if isinstance(item, tuple) else item for item in info["mismatched_keys"]}
    return model, set(info["missing_keys"]) | mismatched


def trained_heads(model: nn.Module, fresh: set[str], folder: Path) -> tuple[str, ...]:
    """Head modules, plus a pooler that the checkpoint lacked: random weights that stay random ruin a run."""
    heads = list(head_modules(model))
    for name in sorted(fresh):
        if any(name.startswith(f"{head}.") for head in heads):
            continue
        pooler = name[: name.index("pooler") + len("pooler")] if "pooler" in name else None
        if pooler is None:
            raise BackboneError(f"the checkpoint in {folder} lacks '{name}', a weight of the backbone itself")
        heads.append(pooler)
    return tuple(heads)


def _key_mapping(auto_class: Any, config: Any, files: Iterable[Path]) -> dict[str, str]:
    """What transformers is to rename on loading: patterns of weight names, and what they become.

    Llama and its relatives keep their blocks under `model`, yet their class for question answering looks for them under
    `transformer`, finds nothing, and starts from random weights.
    """
    from safetensors import safe_open

    found = auto_class._model_mapping.get(type(config), None)
    prefix = getattr(found[0] if isinstance(found, tuple) else found, "base_model_prefix", "model")
    held: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            held.update(name.partition(".")[0] for name in weights.keys())  # noqa: SIM118
    return {r"^model\.": f"{prefix}."} if "model" in held and prefix not in held else {}


def _save_under_own_names(model: Any, mapping: dict[str, str]) -> None:
    """Let the model be saved under the names of its own class, which reads no others, and not under those that it was
    loaded from, as transformers does."""
    conversions = getattr(model, "_weight_conversions", None)
    if mapping and conversions:
        model._weight_conversions = [
            one for one in conversions if mapping.keys().isdisjoint(one.source_patterns)
        ] or None
