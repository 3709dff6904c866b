"""Text without labels: pre-training that goes on, of decoders on the next token and of encoders on masked ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from peftkit.backbones.load import Head
from peftkit.data.blocks import Block, blocks, masked
from peftkit.data.collate import IGNORED
from peftkit.data.files import Rows
from peftkit.data.prompts import bare_ids, leading_tokens
from peftkit.errors import UsageError
from peftkit.schema import changed
from peftkit.tasks.base import Batch, Encoded, Example, Prediction, Scores, refuse_rows
from peftkit.tasks.columns import texts_in
from peftkit.tasks.language_model import CausalLanguageModel

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

ROWS, MASKABLE, MASKING = "rows", "maskable", "masking"
"""Keys of an example: where the tokens of each row stand; the positions that may be masked; the id of the mask token
and the size of the vocabulary."""


class PlainText(CausalLanguageModel):
    """Rows of text, one behind the other, cut into blocks of `max_length` tokens.

    Every token of every row is in one block. Its loss counts for the row that it is from, given what the block has
    before it; the first token of a block is not predicted unless the tokenizer puts one in front, as Llama's does.
    """

    kind: Literal["plain_text"] = "plain_text"
    text: str = "text"
    objective: Literal["causal", "masked"] = "causal"
    joined: bool = True
    """Blocks go on with the next row where one ends. Without, every row begins a block of its own."""
    end_token: bool = True
    """The tokenizer's end token (of encoders the one that parts texts) stands behind every row."""
    separator: str = ""
    """Text behind every row, such as "\\n" where rows are the lines of one text."""
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Of the tokens of a block, predicted: 80 % of them masked, 10 % replaced, 10 % as they are. Training draws them
    anew in every epoch; in evaluations they are the same every time."""
    mask_seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.generation is not None:
            raise ValueError("generation has no references in plain text; leave it out")
        if self.objective == "masked" and self.packing:
            raise ValueError("packing is for causal models; leave it out")
        if self.joined and not (self.end_token or self.separator):
            raise ValueError("joined rows need something between them: end_token: true, or a separator")
        unused = changed(self, "mask_share", "mask_seed")
        if unused and self.objective == "causal":
            raise ValueError(f"{' and '.join(unused)} would change nothing with objective: causal")
        return self

    @property
    def looks_back(self) -> bool:
        return self.objective == "causal"

    @property
    def figures(self) -> tuple[str, ...]:
        return ("loss", self._perplexity, "token_accuracy")

    def head(self, train: Rows) -> Head:
        return Head("AutoModelForCausalLM" if self.objective == "causal" else "AutoModelForMaskedLM")

    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], supervised: bool = True
    ) -> Encoded:
        """Texts that a person types (not `supervised`) are never joined, so that one does not change another's."""
        end = [_end(tokenizer, self.objective)] if self.end_token else []
        texts = [f"{references[0]}{self.separator}" for references in self.references(rows, labels)]
        ids = [[*one, *end] for one in bare_ids(tokenizer, texts)]
        refuse_rows(rows, [i for i, one in enumerate(ids) if not one], "the text has no tokens", "remove the row")
        before, behind = _frame(tokenizer, self.objective)
        found = list(blocks(ids, self.max_length - len(before) - len(behind), self.joined and supervised))
        if self.objective == "causal":
            examples = [_causal(block, before) for block in found]
        else:
            examples = [self._masked_once(_maskable(block, before, behind, tokenizer), 0) for block in found]
        return Encoded(examples, truncated=0, owners=[block.rows[0][0] for block in found])

    def for_epoch(self, example: Example, epoch: int) -> Example:
        return example if self.objective == "causal" else self._masked_once(example, epoch + 1)

    def predict(self, model: nn.Module, batch: Batch, labels: Sequence[str]) -> list[Prediction]:
        """For every row in the block [row, nats, tokens, right]."""
        supervised = self._supervised(batch["labels"])
        predictions: list[Prediction] = []
        for kept, rows, (nats, right) in zip(supervised, batch[ROWS], self.item_losses(model, batch), strict=True):
            positions, nats, right = kept.nonzero().squeeze(1), nats.double(), right
            parts = []
            for row, start, end in rows:
                own = (positions >= start) & (positions < end)
                parts.append([row, float(nats[own].sum()), int(own.sum()), int(right[own].sum())])
            predictions.append({"parts": parts})
        return predictions

    def join(
        self, found: Sequence[Prediction], encoded: Encoded, rows: Rows, tokenizer: PreTrainedTokenizerBase
    ) -> list[Prediction]:
        joined: list[Prediction] = [{"nats": 0.0, "tokens": 0, "right": 0} for _ in rows.records]
        for prediction in found:
            for row, nats, tokens, right in prediction["parts"]:
                of_row = joined[row]
                of_row |= {
                    "nats": of_row["nats"] + nats,
                    "tokens": of_row["tokens"] + tokens,
                    "right": of_row["right"] + right,
                }
        return joined

    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        """`pseudo_perplexity` of masked models is of masked tokens given all others, which no perplexity of a causal
        model can be compared with."""
        scores = super().score(predictions, rows, labels)
        perplexity = scores.values.pop("perplexity")
        scores.values[self._perplexity] = perplexity
        return scores

    def rows_from_text(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Rows:
        if pairs is not None:
            raise UsageError("this model reads single texts, not pairs")
        return Rows("input", [{self.text: text} for text in texts], range(1, len(texts) + 1))

    def describe(self, prediction: Prediction, record: dict[str, Any]) -> dict[str, Any]:
        """The text's own perplexity; null where it has no token that could be predicted."""
        tokens = prediction["tokens"]
        perplexity = math.exp(min(prediction["nats"] / tokens, 700.0)) if tokens else None
        return {"text": record[self.text], "tokens": tokens, self._perplexity: perplexity}

    def references(self, rows: Rows, labels: Sequence[str]) -> list[list[str]]:
        """The texts themselves."""
        return [[text] for text in texts_in(rows, self.text)]

    @property
    def _perplexity(self) -> str:
        return "perplexity" if self.objective == "causal" else "pseudo_perplexity"

    def _masked_once(self, example: Example, draw: int) -> Example:
        """The example with the masks of one draw, whichever it had."""
        given, hidden = example["input_ids"], example.get("labels", [IGNORED] * len(example["input_ids"]))
        ids = [token if was == IGNORED else was for token, was in zip(given, hidden, strict=True)]
        mask, vocabulary = example[MASKING]
        given, labels = masked(ids, example[MASKABLE], mask, vocabulary, self.mask_share, [self.mask_seed, draw])
        return example | {"input_ids": given, "labels": labels}


def _causal(block: Block, before: list[int]) -> Example:
    ids = [*before, *block.ids]
    return {"input_ids": ids, "labels": [IGNORED] * len(before) + block.ids, ROWS: _shifted(block, len(before))}


def _maskable(block: Block, before: list[int], behind: list[int], tokenizer: PreTrainedTokenizerBase) -> Example:
    if tokenizer.mask_token_id is None:
        raise UsageError("task.objective: masked needs a mask token, and the backbone's tokenizer has none; use causal")
    ids, special = [*before, *block.ids, *behind], set(tokenizer.all_special_ids)
    return {
        "input_ids": ids,
        ROWS: _shifted(block, len(before)),
        MASKABLE: [position for position, token in enumerate(ids) if token not in special],
        MASKING: [tokenizer.mask_token_id, len(tokenizer)],
    }


def _shifted(block: Block, by: int) -> list[list[int]]:
    return [[row, start + by, end + by] for row, start, end in block.rows]


def _frame(tokenizer: PreTrainedTokenizerBase, objective: str) -> tuple[list[int], list[int]]:
    """What stands in front of a block and behind it: of encoders what the tokenizer puts around every text."""
    before = leading_tokens(tokenizer)
    if objective == "causal":
        return before, []
    whole, bare = tokenizer("a").input_ids, bare_ids(tokenizer, ["a"])[0]
    return before, whole[len(before) + len(bare) :]


def _end(tokenizer: PreTrainedTokenizerBase, objective: str) -> int:
    found = (
        tokenizer.eos_token_id if objective == "causal" or tokenizer.sep_token_id is None else tokenizer.sep_token_id
    )
    if found is None:
        raise UsageError("task.end_token: the backbone's tokenizer has no end token; set end_token: false, separator")
    return int(found)
