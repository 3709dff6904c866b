"""Virtual tokens in front of the input: prompt tuning (Lester et al. 2021) and P-tuning (Liu et al. 2021), by peft."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from peftkit.backbones.modules import architecture, base_model
from peftkit.errors import MethodError, NotMergeable
from peftkit.methods.from_peft import ADAPTER, FromPeft, task_type
from peftkit.methods.virtual_tokens import align

if TYPE_CHECKING:
    from peft import PeftConfig, PromptEncoderConfig, PromptTuningConfig
    from torch import Tensor, nn

    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone
    from peftkit.backbones.quantization import Quantization
    from peftkit.backbones.targets import Target
    from peftkit.tasks.base import Task


class VirtualTokens(FromPeft):
    """`length` embeddings of no word stand in front of every input; logits still belong to the input's tokens.

    Encoders that classify by their first position classify by that of the first virtual token, as in peft. In
    encoder-decoders they stand in front of the encoder's input.
    """

    size: ClassVar[str | None] = "length"
    length: Annotated[int, Field(gt=0)]

    def virtual_tokens(self) -> int:
        return self.length

    def conflicts(self, *, task: Task, dtype: str, quantization: Quantization | None, checkpointing: bool) -> list[str]:
        if getattr(task, "packing", False):
            return [
                f"method '{self.kind}' puts its tokens in front of a sequence, so of the examples that task.packing "
                "lets share one only the first would see them; leave packing out, or use kind: prefix"
            ]
        return []

    def prepared(self, model: nn.Module) -> nn.Module:
        peft_model: Any = model
        if peft_model.word_embeddings.weight is not peft_model.get_base_model().get_input_embeddings().weight:
            raise MethodError(f"peft takes another module of {architecture(peft_model)} for its word embeddings")
        align(model, self.length)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        raise NotMergeable(
            f"method '{self.kind}' adds {self.length} tokens to the input, which no weight of the model can hold; "
            "ship the run folder, which `peftkit predict` and peft load, or with its backbone as what `peftkit bundle "
            "RUN OUT` writes"
        )

    def stored_parameters(self, model: nn.Module, layout: Layout) -> int:
        """length · width of the word embeddings."""
        return self.length * self._width(model)

    def _width(self, model: nn.Module) -> int:
        """The width of the word embeddings, of a model that can take them."""
        _task_with_prompts(model)
        transformer: Any = model
        positions = getattr(transformer.config.get_text_config(), "max_position_embeddings", None)
        if positions and self.length >= positions:
            raise MethodError(
                f"{self.length} virtual tokens leave no room in the {positions} positions of {architecture(model)}; "
                "lower method.length"
            )
        return int(transformer.get_input_embeddings().embedding_dim)

    def _common(self, model: nn.Module, heads: tuple[str, ...]) -> dict[str, Any]:
        """What all of peft's prompt configurations take.

        Left to peft, the width would be the hidden one, which ALBERT's and ELECTRA's embeddings do not have;
        encoder-decoders would save a second prompt that nothing reads; and DistilBERT's heads would not be found.
        """
        transformer: Any = model
        return {
            "num_virtual_tokens": self.length,
            "num_layers": transformer.config.get_text_config().num_hidden_layers,
            "num_attention_heads": transformer.config.get_text_config().num_attention_heads,
            "token_dim": self._width(model),
            "num_transformer_submodules": 1,
            "modules_to_save": list(heads) or None,
            "task_type": _task_with_prompts(model),
        }


class PromptTuning(VirtualTokens):
    """The virtual tokens' embeddings themselves train. The default length is the paper's."""

    kind: Literal["prompt"] = "prompt"
    length: Annotated[int, Field(gt=0)] = 100
    initialization: Literal["vocabulary", "random", "text"] = "vocabulary"
    """`vocabulary`: embeddings of random words; `random`: standard normal; `text`: those of `initialization_text`."""
    initialization_text: str | None = None
    """Its tokens are repeated or cut to the length, such as the names of the classes."""

    @model_validator(mode="after")
    def _text_where_it_is_used(self) -> PromptTuning:
        if (self.initialization == "text") != bool(self.initialization_text and self.initialization_text.strip()):
            raise ValueError("initialization: text and initialization_text go together; give both or neither")
        return self

    def peft_config(self, backbone: Backbone, targets: list[Target], total_steps: int) -> PromptTuningConfig:
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            prompt_tuning_init="SAMPLE_VOCAB" if self.initialization == "vocabulary" else "RANDOM",
            **self._common(backbone.model, backbone.head_modules),
        )

    def attach(self, backbone: Backbone, total_steps: int) -> nn.Module:
        start = self._embedded_text(backbone) if self.initialization_text else None
        model: Any = super().attach(backbone, total_steps)
        if start is not None:
            model.prompt_encoder[ADAPTER].embedding.weight.data.copy_(start)
        adapted: nn.Module = model
        return adapted

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        """length · width of the word embeddings."""
        return self.stored_parameters(model, layout)

    def _embedded_text(self, backbone: Backbone) -> Tensor:
        """The text's word embeddings, (length, width)."""
        import torch

        if backbone.tokenizer is None:
            raise MethodError(
                "method.initialization: text needs a tokenizer, which this model came without; use vocabulary"
            )
        ids = backbone.tokenizer(self.initialization_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise MethodError(f"method.initialization_text: '{self.initialization_text}' has no tokens")
        model: Any = backbone.model
        embeddings = model.get_input_embeddings()
        chosen = list(itertools.islice(itertools.cycle(ids), self.length))
        with torch.no_grad():
            start: Tensor = embeddings(torch.tensor(chosen, device=embeddings.weight.device))
        return start


class PTuning(VirtualTokens):
    """The virtual tokens' embeddings come out of a network that trains and is left behind when they are saved.

    The defaults are those of the paper's LAMA runs: (3, 3, 3) tokens, here all in front, through a bidirectional LSTM
    of two layers and two linear layers.
    """

    kind: Literal["p_tuning"] = "p_tuning"
    length: Annotated[int, Field(gt=0)] = 9
    encoder: Literal["lstm", "mlp"] = "lstm"
    encoder_hidden_size: Annotated[int, Field(gt=0)] | None = None
    """Default: the width of the word embeddings, which the two directions of the LSTM share."""

    def peft_config(self, backbone: Backbone, targets: list[Target], total_steps: int) -> PromptEncoderConfig:
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            encoder_reparameterization_type=self.encoder.upper(),
            encoder_hidden_size=self._hidden(self._width(backbone.model)),
            **self._common(backbone.model, backbone.head_modules),
        )

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        """length · d + the network's: d → h → h → d, or 2 · (4h(d + h + 2) + 4h(2h + h + 2)) + 2h → 2h → d."""
        width = self._width(model)
        hidden = self._hidden(width)
        if self.encoder == "mlp":
            network = (width + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * width
        else:
            recurrent = sum(2 * 4 * hidden * (inputs + hidden + 2) for inputs in (width, 2 * hidden))
            network = recurrent + (2 * hidden + 1) * 2 * hidden + (2 * hidden + 1) * width
        return self.length * width + network

    def saved_form(self, model: nn.Module) -> tuple[PeftConfig, dict[str, Tensor]]:
        """The network's outputs instead of the network, of which peft would save `mlp_head` as it ends in "head"."""
        config, state = super().saved_form(model)
        return config, {name: tensor for name, tensor in state.items() if not name.startswith("prompt_encoder.")}

    def restore(self, model: nn.Module, folder: Path, dropped: Sequence[str], kept: Sequence[str]) -> None:
        raise MethodError(
            "method 'p_tuning' leaves its network behind when it is saved, so it cannot train on; train for longer in "
            "one run, or use method 'prompt', which can"
        )

    def _hidden(self, width: int) -> int:
        return self.encoder_hidden_size or (width if self.encoder == "mlp" else max(1, width // 2))


def _task_with_prompts(model: nn.Module) -> str:
    """peft's name of the model's task.

    Raises:
        MethodError: the model cannot take embeddings in place of ids there, or peft has no such task.
    """
    transformer: Any = model
    task = task_type(model)
    if type(model).__name__.endswith("ForQuestionAnswering"):
        task = "QUESTION_ANS"
    if task is None and base_model(model) is model:
        return "FEATURE_EXTRACTION"
    if task is None:
        raise MethodError(
            f"peft puts virtual tokens in front of classifiers, taggers and language models; {architecture(model)} is "
            "none of them: use another method"
        )
    if getattr(transformer.config, "is_encoder_decoder", False) and task in ("SEQ_CLS", "QUESTION_ANS"):
        raise MethodError(
            f"{architecture(model)} feeds its decoder the ids of its input, which virtual tokens do not have; use "
            "another method, or train the task as text to text"
        )
    return task
