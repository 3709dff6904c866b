"""A plain transformers model of a task, as a folder or a name has it, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftkit.backbones.load import BackboneSettings, Head, read_config, resolve, weight_files
from peftkit.backbones.task_model import load_model
from peftkit.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

MODEL_CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
"""By the end of an architecture's name, which config.json has, the class that both models are loaded as."""


def load_plain(name: str) -> tuple[nn.Module, Head]:
    """The model, and what its task put on it.

    Raises:
        UsageError: no model of a task, or one that lacks weights.
        BackboneError: no such model, or none that can be read.
    """
    import torch

    folder = resolve(BackboneSettings(name=name))
    config: Any = read_config(folder)
    found = (config.architectures or ["none"])[0]
    model_class = next((one for end, one in MODEL_CLASSES.items() if found.endswith(end)), None)
    if model_class is None:
        raise UsageError(
            f"{name} is a {found}, which is no model of a task; its config.json should name one in architectures, such "
            "as BertForSequenceClassification"
        )
    labels = tuple(map(str, config.id2label.values())) if "Classification" in model_class else ()
    model, fresh = load_model(folder, weight_files(folder), config, model_class, torch.float32)
    if fresh:
        raise UsageError(f"{name} lacks '{min(fresh)}'; name the folder of the whole model")
    return model.eval(), Head(model_class, labels=labels)
