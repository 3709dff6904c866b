"""A backbone: a pretrained model with its tokenizer, and what is known about both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from peftkit.backbones.bundled import bundle_named, fetch
from peftkit.backbones.causal import refuse_encoder
from peftkit.backbones.download import PREFIX
from peftkit.backbones.dropout import set_dropout
from peftkit.backbones.layouts import Layout, layout_for
from peftkit.backbones.modules import head_modules
from peftkit.backbones.precision import Dtype
from peftkit.backbones.quantization import AnyQuantization
from peftkit.backbones.quantize import mend, quantize
from peftkit.backbones.runs import resolved
from peftkit.backbones.task_model import load_model, trained_heads
from peftkit.backbones.weight_files import weight_files, weights_sha256
from peftkit.errors import BackboneError, UsageError, first_line
from peftkit.memory import reset_peak, resident_bytes
from peftkit.schema import Section

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CONFIG = "config.json"
BEFORE = "resident_before_load"
"""The attribute of a loaded model that holds the bytes that were resident in the process before it."""
WEIGHTS_SHA256 = "weights_sha256"
"""Attribute of a model: the hash of the files that it was loaded from."""
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


class BackboneSettings(Section):
    """Which pretrained model, and how it is held in memory."""

    name: str
    """`bundled:minilm`, a folder, a hub id such as FacebookAI/roberta-base, or the folder of a finished run, whose
    merged model is meant."""
    revision: str | None = None
    dtype: Dtype = "float32"
    """Of frozen weights and activations; adapters and heads are float32 with all. `auto`: bfloat16 where the processor
    multiplies it, and else float32; the run records which."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of hidden states, attention and head while training; default: what the model's configuration says."""
    quantization: AnyQuantization | None = None
    """How bitsandbytes packs the linear layers of the blocks; `dtype` is then that of everything else."""


@dataclass(frozen=True)
class Head:
    """What a task puts on top of the backbone."""

    model_class: str
    """A transformers auto class, such as AutoModelForSequenceClassification."""
    labels: tuple[str, ...] = ()
    """In the order of the outputs; none where the outputs are not classes, as in a language model."""
    pretokenized: bool = False
    """The task's texts come as words, not as one string."""
    outputs: int | None = None
    """Width of the head where it is not the number of labels."""
    problem_type: str | None = None
    """What transformers' pipelines are to make of the outputs, such as `multi_label_classification`."""
    chat_template: str | None = None
    """What conversations are written with, where it is not the tokenizer's own; saved with a merged model."""
    new_tokens: tuple[str, ...] = ()
    """Tokens that the task adds to the tokenizer; their embeddings are trained with every method."""

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Head:
        """What `dataclasses.asdict` and JSON made of a head."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()
        }
        return cls(**values)

    def configure(self, config: Any) -> None:
        """Tell a model's configuration about the outputs."""
        if self.labels:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: index for index, label in enumerate(self.labels)}
        if self.problem_type:
            config.problem_type = self.problem_type
        if self.labels or self.outputs:
            config.num_labels = self.outputs or len(self.labels)


@dataclass
class Backbone:
    """A pretrained model, ready for a method to be attached."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    layout: Layout
    head_modules: tuple[str, ...]
    """Modules that are trained and saved with every method: the head, and whatever the checkpoint lacked."""
    name: str = ""
    revision: str | None = None
    weights_sha256: str = ""


def load(settings: BackboneSettings, head: Head) -> Backbone:
    """Load weights and put the task's head on them. A new head is drawn from torch's global generator.

    Raises:
        BackboneError: no such model, no safetensors weights, weights of the blocks missing, or quantised before.
    """
    import torch

    from peftkit.backbones.new_tokens import add_to_model

    folder = resolve(settings)
    reset_peak()
    before = resident_bytes()
    config = chosen_config(settings, folder)
    layout = layout_for(config.model_type)
    files = weight_files(folder)
    tokenizer = load_tokenizer(settings, head.pretokenized)
    head.configure(config)
    model, fresh = load_model(folder, files, config, head.model_class, getattr(torch, settings.dtype))
    if head.new_tokens:
        add_to_model(model, tokenizer, head.new_tokens)
    if settings.quantization is not None:
        quantize(model, layout, settings.quantization)
    tell_padding(model, tokenizer)
    if head.chat_template:
        tokenizer.chat_template = head.chat_template
    setattr(model, BEFORE, before)
    loaded_from = weights_sha256(files)
    setattr(model, WEIGHTS_SHA256, loaded_from)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        layout=layout,
        head_modules=trained_heads(model, fresh, folder),
        name=settings.name,
        revision=_revision(settings, folder),
        weights_sha256=loaded_from,
    )


def wrap(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> Backbone:
    """A Backbone around a transformers model that the caller loaded."""
    config: Any = model.config
    return Backbone(mend(model), tokenizer, layout_for(config.model_type, model), head_modules(model))


def load_tokenizer(settings: BackboneSettings, pretokenized: bool = False) -> PreTrainedTokenizerBase:
    """The backbone's fast tokenizer. A missing padding token becomes the end token; attention masks tell them apart."""
    from transformers import AutoTokenizer

    folder = resolve(settings)
    read_config(folder)  # says best what is wrong with a folder that holds no model
    # byte-level BPE glues a word to the space before it; words given one by one need that space
    extra = {"add_prefix_space": True} if pretokenized else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BackboneError(f"no usable tokenizer in {folder}: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise BackboneError(f"{folder} has no fast tokenizer (tokenizer.json), which aligning words needs")
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # what transformers makes of a folder without tokenizer files, in silence: every word would be unknown
        raise BackboneError(f"the tokenizer in {folder} has no vocabulary; add tokenizer.json or the model's own files")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BackboneError(f"the tokenizer in {folder} has neither a padding nor an end token; give it one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer without the length at which it last cut or filled up texts, which other tools would heed."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def longest_input(settings: BackboneSettings, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most tokens the backbone takes, where its tokenizer or configuration says so."""
    positions = getattr(read_config(resolve_config(settings)), "max_position_embeddings", None)
    # a tokenizer that was never told holds an astronomically large number
    limits = [limit for limit in (tokenizer.model_max_length, positions) if limit and 0 < limit < 10**9]
    return min(limits, default=None)


def resolve(settings: BackboneSettings, files: Sequence[str] = HUB_FILES) -> Path:
    """The local folder that holds the backbone; downloads it (from a hub only `files`) if need be."""
    name = settings.name
    if name.startswith(PREFIX):
        if bundle_named(name).kind != "backbone":
            raise UsageError(f"{name} is a data set, not a backbone; name it under task.data.name")
        return fetch(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return resolved(folder.absolute())  # what peft records for whoever loads the adapter
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"backbone.name: no folder {folder}")
    return _from_hub(settings, files)


def resolve_config(settings: BackboneSettings) -> Path:
    """A local folder that holds the backbone's config.json; from the hub, nothing else is downloaded."""
    return resolve(settings, ("config.json",))


def read_config(folder: Path) -> PretrainedConfig:
    """The model's configuration, of an architecture that transformers itself knows."""
    from transformers import AutoConfig

    if not (folder / CONFIG).is_file():
        raise BackboneError(f"{folder} has no {CONFIG}; name the folder that holds the model")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(
            f"{folder / CONFIG} is not a configuration transformers knows: {first_line(error)}"
        ) from error


def chosen_config(settings: BackboneSettings, folder: Path) -> PretrainedConfig:
    """The configuration in a folder, with what the settings change in it."""
    config = read_config(folder)
    if getattr(config, "quantization_config", None):
        raise BackboneError(
            f"the weights in {folder} were quantised before; name the checkpoint that they were made from, and set "
            "backbone.quantization"
        )
    if settings.dropout is not None:
        set_dropout(config, settings.dropout)
    return config


def meta_model(config: PretrainedConfig, head: Head | None, dtype: str = "float32") -> nn.Module:
    """The model's shapes without its weights: parameters on the meta device. Without a head, the bare backbone."""
    import torch
    import transformers

    auto = getattr(transformers, head.model_class if head else "AutoModel")
    if head:
        head.configure(config)
    try:
        with torch.device("meta"):
            model: nn.Module = auto.from_config(config, dtype=getattr(torch, dtype))
    except ValueError as error:
        raise BackboneError(f"'{config.model_type}' cannot serve this task: {first_line(error)}") from error
    if head and head.model_class == "AutoModelForCausalLM":
        refuse_encoder(model)
    return model


def tell_padding(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Decoders look for the last token that is not padding: they must be told what batches are filled up with."""
    model.config.pad_token_id = tokenizer.pad_token_id


def _revision(settings: BackboneSettings, folder: Path) -> str | None:
    """The commit that was loaded, for a hub model; hub snapshots are folders named by their commit."""
    if settings.name.startswith(PREFIX):
        return bundle_named(settings.name).version
    return folder.name if folder.parent.name == "snapshots" else settings.revision


def _from_hub(settings: BackboneSettings, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                settings.name, revision=settings.revision, allow_patterns=list(files), ignore_patterns=["*/*"]
            )
        )
    except Exception as error:  # huggingface_hub raises its own, httpx's and OS errors alike
        raise BackboneError(
            f"cannot get '{settings.name}' from the hub: {first_line(error)}; it is neither a folder here nor "
            "`bundled:` (`peftkit fetch --list`)"
        ) from error
