"""Adapters in peft's own files: reading them, comparing them, and putting them into a model."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import ArtifactError, MethodError, first_line
from peftkit.methods.base import inside, refuse_nan
from peftkit.quiet import quiet_libraries
from peftkit.schema import shown
from peftkit.tensor_files import parse_object, read_tensors

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

ADAPTER = "default"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NOTES = "peftkit"
"""The only entry of the weights' metadata, as JSON: of several, safetensors writes now one first and now another."""
UNDECISIVE = frozenset(
    {
        *("inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "task_type"),
        *("modules_to_save", "fan_in_fan_out"),
    }
)
"""Fields of peft's configurations that a saved adapter's function does not depend on, given the model that it is on."""
LEFT_OUT = "left_out"
"""Under this, the notes name the targets that training left without any weights."""


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """peft's view of what belongs to the adapter, by the names that its files have."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        # said of biases beside B, too
        warnings.filterwarnings("ignore", "Adapter .* LoRA tensor.* have invalid shape")
        state: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def saved_config(folder: Path) -> PeftConfig:
    """The configuration that `save` wrote.

    Raises:
        ArtifactError: peft cannot read it, or it says something that this peft does not know.
    """
    from peft import PeftConfig

    try:
        with quiet_libraries(), quiet_peft():
            config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # peft checks no types: what does not fit raises whatever it happens to
        raise ArtifactError(f"{folder}: peft cannot read its configuration: {first_line(error)}; restore it") from error
    known = {field.name for field in dataclasses.fields(config)} | {"peft_version"}
    said = parse_object((folder / CONFIG).read_bytes(), folder / CONFIG)
    if unknown := sorted(name for name, value in said.items() if value and name not in known):
        raise ArtifactError(
            f"{folder / CONFIG} says '{shown(unknown[0])}', which this peft does not know; upgrade peft to the version "
            "that it was saved with"
        )
    return config


def check_alike(saved: PeftConfig, model: Any) -> None:
    """Refuse a saved configuration with which the same tensors would compute something else.

    Raises:
        MethodError: names the field and both values.
    """
    theirs, ours = (_decisive(config) for config in (saved, model.peft_config[ADAPTER]))
    for name in theirs.keys() | ours.keys():
        if theirs.get(name) != ours.get(name):
            raise MethodError(
                f"it was saved with peft's {name} {_short(theirs.get(name))}, and here it is {_short(ours.get(name))}; "
                "set the method to what was saved"
            )


def put_in(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give an adapter, heads included, these values by the names that its files have.

    Raises:
        MethodError: peft did not take them all.
    """
    import torch
    from peft import set_peft_model_state_dict

    with quiet_libraries(), quiet_peft():
        set_peft_model_state_dict(model, dict(tensors))
    for name, tensor in adapter_state(model).items():
        if not torch.equal(tensor.cpu(), tensors[name].to(tensor.dtype).cpu()):
            raise MethodError(f"peft did not take up '{name}'; this method cannot go on from a saved run")


def _decisive(config: PeftConfig) -> dict[str, Any]:
    """What of a configuration decides what its tensors compute, in a form that can be compared."""
    fields = config.to_dict()
    return {
        name: sorted(value) if isinstance(value, list | set | tuple) else value
        for name, value in fields.items()
        if value and name not in UNDECISIVE and "dropout" not in name and "init" not in name
    }


def read_saved(folder: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The notes and the tensors of a saved file."""
    from safetensors import safe_open

    tensors = read_tensors(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = file.metadata() or {}
    refuse_nan(tensors, folder / WEIGHTS)
    return parse_object(metadata.get(NOTES, "{}"), folder / WEIGHTS), tensors


def refuse_backbone_weights(names: Iterable[str], base: nn.Module, heads: tuple[str, ...], folder: Path) -> None:
    """Refuse an adapter that would put other weights in the place of the backbone's, as peft lets it.

    Raises:
        ArtifactError: names the weight.
    """
    own = set(base.state_dict())
    for name in names:
        inner = name.removeprefix("base_model.model.")
        if inner in own and not inside(inner, heads):
            raise ArtifactError(f"{folder} holds '{inner}', a weight of the backbone itself, which no adapter replaces")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence what peft warns of although it is right so.

    It finds out for each module whether its weights are transposed, which targets of both kinds make it say; that names
    agree, and that projections are drawn alike on loading, is checked by us; BOFT does without its CUDA kernel; LN
    tuning knows no names; a matrix that word embeddings and output share is merged into two where one of them alone is
    adapted. What a configuration says that peft does not know is refused by us.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Failed to load the CUDA extension|Setting boft_n_butterfly_factor to 1")
        warnings.filterwarnings("ignore", "Unexpected keyword arguments")
        warnings.filterwarnings("ignore", "Unsupported layer type .*Norm")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied layer is part")
        warnings.filterwarnings("ignore", "Found missing adapter keys|The following (rank|alpha)_pattern keys")
        warnings.filterwarnings("ignore", "Specified to not (save|load) vera_A and vera_B")
        yield
