"""peftkit: parameter-efficient fine-tuning you can check.

The names below are the Python API; each is imported when it is first used, so `import peftkit` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkit.api import attach, split_fused, trainable_parameters
    from peftkit.artifacts.bundle import bundle
    from peftkit.artifacts.inference import load_predictor
    from peftkit.artifacts.merge import merge
    from peftkit.artifacts.predict import predict_rows
    from peftkit.artifacts.store import load_run
    from peftkit.backbones.bundled import fetch
    from peftkit.backbones.load import BackboneSettings as Backbone
    from peftkit.backbones.quantization import FP4, NF4, Int8
    from peftkit.config import OutputSettings as Output
    from peftkit.config import Run, read_run
    from peftkit.config import TrainingSettings as Training
    from peftkit.data.sources import DataSettings as Data
    from peftkit.data.sources import splits_from
    from peftkit.demonstrations import with_demonstrations
    from peftkit.engine.settings import Engine
    from peftkit.experiment import train
    from peftkit.methods import (
        IA3,
        AdaLoRA,
        BitFit,
        Bottleneck,
        Full,
        HeadOnly,
        LayerNorm,
        LoRA,
        Peft,
        Prefix,
        Prompting,
        PromptTuning,
        PTuning,
        TopLayers,
        VeRA,
    )
    from peftkit.tasks import (
        Chat,
        Completion,
        LabelWords,
        PlainText,
        QuestionAnswering,
        RelationExtraction,
        Seq2Seq,
        SequenceClassification,
        TokenClassification,
    )
    from peftkit.tasks.generation import Generation

_HOMES = {
    "AdaLoRA": ("peftkit.methods", "AdaLoRA"),
    "Backbone": ("peftkit.backbones.load", "BackboneSettings"),
    "BitFit": ("peftkit.methods", "BitFit"),
    "Bottleneck": ("peftkit.methods", "Bottleneck"),
    "Chat": ("peftkit.tasks", "Chat"),
    "Completion": ("peftkit.tasks", "Completion"),
    "Data": ("peftkit.data.sources", "DataSettings"),
    "Int8": ("peftkit.backbones.quantization", "Int8"),
    "Engine": ("peftkit.engine.settings", "Engine"),
    "FP4": ("peftkit.backbones.quantization", "FP4"),
    "Full": ("peftkit.methods", "Full"),
    "Generation": ("peftkit.tasks.generation", "Generation"),
    "HeadOnly": ("peftkit.methods", "HeadOnly"),
    "IA3": ("peftkit.methods", "IA3"),
    "LabelWords": ("peftkit.tasks", "LabelWords"),
    "LayerNorm": ("peftkit.methods", "LayerNorm"),
    "NF4": ("peftkit.backbones.quantization", "NF4"),
    "LoRA": ("peftkit.methods", "LoRA"),
    "Output": ("peftkit.config", "OutputSettings"),
    "PTuning": ("peftkit.methods", "PTuning"),
    "Peft": ("peftkit.methods", "Peft"),
    "PlainText": ("peftkit.tasks", "PlainText"),
    "Prefix": ("peftkit.methods", "Prefix"),
    "PromptTuning": ("peftkit.methods", "PromptTuning"),
    "Prompting": ("peftkit.methods", "Prompting"),
    "QuestionAnswering": ("peftkit.tasks", "QuestionAnswering"),
    "RelationExtraction": ("peftkit.tasks", "RelationExtraction"),
    "Run": ("peftkit.config", "Run"),
    "Seq2Seq": ("peftkit.tasks", "Seq2Seq"),
    "SequenceClassification": ("peftkit.tasks", "SequenceClassification"),
    "TokenClassification": ("peftkit.tasks", "TokenClassification"),
    "TopLayers": ("peftkit.methods", "TopLayers"),
    "Training": ("peftkit.config", "TrainingSettings"),
    "VeRA": ("peftkit.methods", "VeRA"),
    "attach": ("peftkit.api", "attach"),
    "bundle": ("peftkit.artifacts.bundle", "bundle"),
    "fetch": ("peftkit.backbones.bundled", "fetch"),
    "load_predictor": ("peftkit.artifacts.inference", "load_predictor"),
    "load_run": ("peftkit.artifacts.store", "load_run"),
    "merge": ("peftkit.artifacts.merge", "merge"),
    "predict_rows": ("peftkit.artifacts.predict", "predict_rows"),
    "read_run": ("peftkit.config", "read_run"),
    "split_fused": ("peftkit.api", "split_fused"),
    "splits_from": ("peftkit.data.sources", "splits_from"),
    "train": ("peftkit.experiment", "train"),
    "trainable_parameters": ("peftkit.api", "trainable_parameters"),
    "with_demonstrations": ("peftkit.demonstrations", "with_demonstrations"),
}

__all__ = [
    "FP4",
    "IA3",
    "NF4",
    "AdaLoRA",
    "Backbone",
    "BitFit",
    "Bottleneck",
    "Chat",
    "Completion",
    "Data",
    "Engine",
    "Full",
    "Generation",
    "HeadOnly",
    "Int8",
    "LabelWords",
    "LayerNorm",
    "LoRA",
    "Output",
    "PTuning",
    "Peft",
    "PlainText",
    "Prefix",
    "PromptTuning",
    "Prompting",
    "QuestionAnswering",
    "RelationExtraction",
    "Run",
    "Seq2Seq",
    "SequenceClassification",
    "TokenClassification",
    "TopLayers",
    "Training",
    "VeRA",
    "attach",
    "bundle",
    "fetch",
    "load_predictor",
    "load_run",
    "merge",
    "predict_rows",
    "read_run",
    "split_fused",
    "splits_from",
    "train",
    "trainable_parameters",
    "with_demonstrations",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'peftkit' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
