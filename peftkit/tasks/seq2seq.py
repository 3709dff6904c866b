"""One text written from another by an encoder-decoder: translation, summaries, corrections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from peftkit.backbones.load import Head
from peftkit.data.collate import IGNORED
from peftkit.data.files import Rows
from peftkit.data.templates import Template, columns, render_rows
from peftkit.errors import BackboneError, UsageError
from peftkit.schema import did_you_mean
from peftkit.tasks.base import Batch, Encoded, Prediction, refuse_rows
from peftkit.tasks.columns import texts_in
from peftkit.tasks.generation import Generation
from peftkit.tasks.language_model import ENDS, PROMPT, LanguageModel
from peftkit.tasks.languages import set_languages

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

BEGINS = "begins"
"""Key of an example: generation settings by which a text begins in the target language."""


class Seq2Seq(LanguageModel):
    """The encoder reads the source, the decoder writes the target; the loss is of the target's tokens.

    A target may be a list of references: the loss is of the first, generated text is compared with all. Sources longer
    than `max_length` and targets longer than `max_target_length` are cut, and counted; generated text is compared with
    the whole targets.
    """

    kind: Literal["seq2seq"] = "seq2seq"
    source: str = "source"
    """The column that `peftkit predict RUN TEXT` fills."""
    target: str = "target"
    """A column of texts, or of lists of texts where there are several references."""
    source_prefix: str = ""
    """Stands in front of every source, as T5 was trained with: `translate English to German: `."""
    template: Template | None = None
    """What follows the prefix where it is not the source alone, such as `question: {question} context: {source}`."""
    max_target_length: Annotated[int, Field(gt=1)] = 128
    """Tokens of a target, with those that begin and end it."""
    source_language: str | None = None
    """A language as the tokenizer of a multilingual model calls it: en_XX (mBART), eng_Latn (NLLB)."""
    target_language: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        taken = (self.source,) if self.template is None else columns(self.template)
        if self.source not in taken:
            raise ValueError(f"the template has no {{{self.source}}}{did_you_mean(self.source, taken)}")
        if self.target in taken:
            raise ValueError(f"what the encoder reads shows the answer: '{self.target}' is the target column")
        if (self.source_language is None) != (self.target_language is None):
            raise ValueError("source_language and target_language belong together; give both or neither")
        return self

    @property
    def looks_back(self) -> bool:
        return False

    @property
    def longest_input(self) -> int:
        return self.max_length  # what the decoder takes is no part of it

    def head(self, train: Rows) -> Head:
        return Head("AutoModelForSeq2SeqLM")

    def check_backbone(self, config: Any, virtual_tokens: int) -> None:
        # mBART's decoder starts with the language, which the labels end with
        if config.decoder_start_token_id is None and config.model_type != "mbart":
            raise BackboneError(
                f"this {config.model_type} has no decoder_start_token_id, so its decoder cannot begin; add it to "
                "config.json (T5: the id of its padding token; BART: of its end token)"
            )
        limit = getattr(config, "max_position_embeddings", None)
        written = self.generation.max_new_tokens if self.generation else 0
        for field, tokens in (("max_target_length", self.max_target_length), ("generation.max_new_tokens", written)):
            if limit and tokens + virtual_tokens > limit:
                why = f", of which the method takes {virtual_tokens}" if virtual_tokens else ""
                raise UsageError(f"task.{field} is {tokens}, but the decoder takes at most {limit} tokens{why}")

    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], supervised: bool = True
    ) -> Encoded:
        settings = self.generation or Generation()
        begins = set_languages(tokenizer, self.source_language, self.target_language)
        after: dict[str, Any] = {ENDS: settings.end_tokens(tokenizer)} | ({BEGINS: begins} if begins else {})
        sources, cut = _ids(tokenizer, self.max_length, text=self._sources(rows))
        if not supervised:
            return Encoded([{"input_ids": ids, PROMPT: ids} | after for ids in sources], cut)
        references = self.references(rows, labels)
        targets, cut_targets = _targets(tokenizer, self.max_target_length, [ours[0] for ours in references])
        examples = [{"input_ids": ids, "labels": target} for ids, target in zip(sources, targets, strict=True)]
        if self.generation:
            for index, example in enumerate(examples):
                wanted = settings.limit is None or index < settings.limit
                example |= {PROMPT: example["input_ids"] if wanted else None} | after
        return Encoded(examples, cut, notes=tuple(self._notes(references, cut_targets)))

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        return {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids") if name in batch}

    def _laid_out(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Any], Tensor, int]:
        return super()._laid_out(model, _with_decoder_inputs(model, batch))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Shape (examples, target tokens, vocabulary), of every token of the targets.

        Raises:
            UsageError: a batch without targets, which the decoder reads.
        """
        if "labels" not in batch:
            raise UsageError(f"the decoder reads the targets: give rows with a column '{self.target}'")
        return super().logits(model, _with_decoder_inputs(model, batch))

    def rows_from_text(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Rows:
        if pairs is not None:
            raise UsageError("this model takes single texts, not pairs")
        others = set(columns(self.template or "")) - {self.source}
        if others:
            raise UsageError(f"the template also takes {', '.join(sorted(others))}; give the rows as --file FILE")
        return Rows("input", [{self.source: text} for text in texts], range(1, len(texts) + 1))

    def describe(self, prediction: Prediction, record: dict[str, Any]) -> dict[str, Any]:
        return {"source": record[self.source], "target": prediction["text"]}

    def references(self, rows: Rows, labels: Sequence[str]) -> list[list[str]]:
        """The texts that each row's target may be."""
        rows.require(self.target)
        values = [record[self.target] for record in rows.records]
        found = [value if isinstance(value, list) else [value] for value in values]
        wrong = [index for index, ours in enumerate(found) if not ours or not all(map(_is_text, ours))]
        refuse_rows(rows, wrong, f"no text in '{self.target}'", "remove the row or fill it in")
        return found

    def _sources(self, rows: Rows) -> list[str]:
        texts = texts_in(rows, self.source)
        if self.template is not None:
            texts = render_rows(self.template, rows)
        return [self.source_prefix + text for text in texts]

    def _notes(self, references: Sequence[Sequence[str]], cut: int) -> Iterator[str]:
        if cut:
            yield f"{cut:,} of {len(references):,} targets are cut at {self.max_target_length} tokens"
        others = sum(map(len, references)) - len(references)
        if others:
            yield f"{others:,} more references are compared with what is generated; the loss is of each row's first"

    def _generate(self, model: nn.Module, batch: Batch, predictions: list[Prediction]) -> None:
        with _generation_settings(model, batch[BEGINS][0] if BEGINS in batch else {}):
            super()._generate(model, batch, predictions)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _ids(tokenizer: PreTrainedTokenizerBase, longest: int, **texts: list[str]) -> tuple[list[list[int]], int]:
    """Token ids of `text` or `text_target`, and how many of them had to be cut."""
    encoding = tokenizer(**texts, truncation=True, max_length=longest)
    return encoding["input_ids"], sum(bool(one.overflowing) for one in encoding.encodings or [])


def _targets(tokenizer: PreTrainedTokenizerBase, longest: int, texts: list[str]) -> tuple[list[list[int]], int]:
    """Token ids of targets, each with an end token, and how many had to be cut.

    Raises:
        UsageError: the tokenizer has no end token, so that no target would ever end.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UsageError("the backbone's tokenizer has no end token, so nothing would tell where a target ends")
    (empty,), _ = _ids(tokenizer, longest, text_target=[""])
    missing = [] if end in empty else [int(end)]
    targets, cut = _ids(tokenizer, longest - len(missing), text_target=texts)
    return [[*ids, *missing] for ids in targets], cut


def _with_decoder_inputs(model: nn.Module, batch: Batch) -> Batch:
    """The batch with what the decoder reads: its start token and then the labels, shifted as the model itself does."""
    unwrapped: Any = model.module if hasattr(model, "module") else model
    labels = batch["labels"]
    if hasattr(unwrapped, "prepare_decoder_input_ids_from_labels"):
        return batch | {"decoder_input_ids": unwrapped.prepare_decoder_input_ids_from_labels(labels=labels)}
    # M2M-100 and NLLB shift inside their forward pass alone
    shifted = labels.roll(1, 1)
    shifted[:, 0] = unwrapped.config.decoder_start_token_id
    return batch | {"decoder_input_ids": shifted.masked_fill(shifted == IGNORED, unwrapped.config.pad_token_id)}


@contextmanager
def _generation_settings(model: nn.Module, settings: dict[str, int]) -> Iterator[None]:
    """Give a model these generation settings for a while."""
    unwrapped: Any = model.module if hasattr(model, "module") else model
    config = unwrapped.generation_config
    before = {name: getattr(config, name) for name in settings}
    config.update(**settings)
    try:
        yield
    finally:
        config.update(**before)
