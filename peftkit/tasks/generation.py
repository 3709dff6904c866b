"""Text that a language model writes: how it is chosen, and the tokens that follow a prompt."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from peftkit.errors import UsageError
from peftkit.metrics.text import TextScore
from peftkit.quiet import quiet_libraries
from peftkit.schema import Section, changed, did_you_mean

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Positive = Annotated[int, Field(gt=0)]


class Generation(Section):
    """How text is written, and how it is scored. Greedy unless it says otherwise.

    Of a model's own generation settings only the tokens that begin and end a text are followed.
    """

    max_new_tokens: Positive = 64
    beams: Positive = 1
    length_penalty: float = 1.0
    """Of beams: their log-probability is divided by length ** length_penalty, so more makes texts longer."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """Groups of so many tokens occur once only; 0 lets them recur."""
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sampled is from the fewest tokens whose probabilities add up to this (Holtzman et al. 2020)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of sampling; the same prompts in one batch give the same texts."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A text ends before the first of these."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a text beside the tokenizer's end token, such as `<|im_end|>`."""
    metrics: tuple[TextScore, ...] = ()
    """What generated texts are scored with."""
    limit: Positive | None = None
    """Texts to generate for in an evaluation, from the first row on; loss is of all rows. `peftkit predict` has no
    limit."""

    @model_validator(mode="after")
    def _belong_together(self) -> Generation:
        unused = changed(self, "temperature", "top_p")
        if unused and not self.do_sample:
            raise ValueError(f"{' and '.join(unused)} would change nothing without do_sample: true")
        if self.do_sample and self.beams > 1:
            raise ValueError("do_sample and beams are two ways to choose tokens; keep one")
        if self.length_penalty != 1.0 and self.beams == 1:
            raise ValueError("length_penalty compares beams; set beams to 2 or more, or leave it out")
        return self

    def end_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The ids that end a text.

        Raises:
            UsageError: a stop token that the tokenizer does not have.
        """
        known = tokenizer.get_vocab()
        for token in self.stop_tokens:
            if token not in known:
                raise UsageError(f"task.generation.stop_tokens: no token '{token}'{_special_like(token, tokenizer)}")
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return list(dict.fromkeys([*own, *(known[token] for token in self.stop_tokens)]))

    def text(self, tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
        """New tokens as text, without special tokens, up to the first stop."""
        text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
        ends = [text.find(stop) for stop in self.stop]
        return text[: min((end for end in ends if end >= 0), default=len(text))]


def generate(
    model: nn.Module, prompts: Sequence[Sequence[int]], ends: Iterable[int], settings: Generation
) -> list[list[int]]:
    """The tokens that follow each prompt, without the one that ended them.

    Prompts of a decoder are padded on the left and masked, so each gets what it gets alone; an encoder's on the right.

    Args:
        model: in evaluation mode; wrappers of peft and of several processes are seen through.
        prompts: token ids; of an encoder-decoder, what its encoder reads.
        ends: ids that end a text, beside those of the model's own generation settings.
    """
    import torch

    writer = unwrapped(model)
    of_encoder = bool(writer.config.is_encoder_decoder)
    device, stops = next(writer.parameters()).device, _all_ends(writer, ends)
    width = max(map(len, prompts))
    if not of_encoder:
        _check_room(writer.config, width, settings.max_new_tokens)
    fill = stops[0] if stops else 0
    ids = torch.tensor([_filled(one, width, fill, left=not of_encoder) for one in prompts], device=device)
    mask = torch.tensor([_filled([1] * len(one), width, 0, left=not of_encoder) for one in prompts], device=device)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), quiet_libraries():
        # by content, so that no draw depends on what was generated before
        torch.manual_seed(zlib.crc32(repr([list(one) for one in prompts]).encode(), settings.seed & 0xFFFFFFFF))
        config = _configuration(settings, stops, fill)
        # processes need not write for equally long: see peftkit.training.on_request
        given = {"input_ids": ids, "attention_mask": mask, "synced_gpus": False}
        output = writer.generate(**given, generation_config=config)
    new = output[:, 1:] if of_encoder else output[:, width:]
    return [_until(row, stops) for row in new.tolist()]


def _check_room(config: Any, given: int, new: int) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and given + new > positions:
        raise UsageError(
            f"a prompt of {given:,} tokens and {new:,} new ones are more than the model's {positions:,} positions; "
            "lower task.max_length or task.generation.max_new_tokens"
        )


def unwrapped(model: Any) -> Any:
    """The model inside what accelerate puts around it for several processes."""
    return model.module if hasattr(model, "module") else model


def _configuration(settings: Generation, stops: list[int], fill: int) -> GenerationConfig:
    """transformers fills in what is left out from the model's own settings, so what matters is said outright."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        min_length=0,
        min_new_tokens=0,
        num_beams=settings.beams,
        length_penalty=settings.length_penalty,
        early_stopping=False,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        repetition_penalty=1.0,
        do_sample=settings.do_sample,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=0 if settings.do_sample else 50,  # 50 is what transformers does not warn of without sampling
        num_return_sequences=1,
        use_cache=True,
        eos_token_id=stops or None,
        pad_token_id=fill,
    )


def _all_ends(model: Any, ends: Iterable[int]) -> list[int]:
    own = model.generation_config.eos_token_id
    return list(dict.fromkeys([*ends, *([] if own is None else [own] if isinstance(own, int) else own)]))


def _filled(row: Sequence[int], width: int, fill: int, left: bool) -> list[int]:
    padding = [fill] * (width - len(row))
    return [*padding, *row] if left else [*row, *padding]


def _until(row: Sequence[int], stops: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in stops), len(row))
    return list(row[:end])


def _special_like(token: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return did_you_mean(token, map(str, tokenizer.all_special_tokens))
