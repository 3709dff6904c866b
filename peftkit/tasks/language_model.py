"""What all language models share: a loss on each supervised token, perplexity, and text that the model writes."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import model_validator

from peftkit.backbones.causal import check_packing
from peftkit.data.collate import IGNORED
from peftkit.data.files import Rows
from peftkit.data.packing import Layout, lay_out
from peftkit.engine.padding_free import is_unpadded
from peftkit.engine.supervised import check_last, engaged_head, for_chunks, sample, summed_losses
from peftkit.errors import DataError, UsageError
from peftkit.metrics.text import names_of, of_each, text_scores
from peftkit.tasks.base import Batch, Counts, Encoded, Example, Prediction, Scores, Task
from peftkit.tasks.generation import Generation, generate, unwrapped
from peftkit.tasks.outputs_read import logits_at_places, output_only_at

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
PROMPT, ENDS = "prompt", "ends"
"""Keys of an example: the token ids that text is generated after (None: for this row there is none), and the ids of
tokens that end it."""
CHUNK = 512  # logits that are turned into float32 at once


class LanguageModel(Task, ABC):
    """Tokens are predicted, and only those whose label is not `IGNORED` count.

    Labels stand where their tokens stand, as in transformers. A prediction holds the summed negative log-likelihood
    of the supervised tokens (`nats`), their number (`tokens`), how many of them rank first (`right`) and, where text
    is generated, the `text`. Dev is scored during training without generating.
    """

    generation: Generation | None = None
    """How text is generated where the model is evaluated; left out, only the loss is computed."""

    @model_validator(mode="after")
    def _losses_and_metrics_fit(self) -> Self:
        if self.loss.kind == "weighted":
            raise ValueError(
                "loss: weighted is for classes; a language model takes cross_entropy, label_smoothed, focal"
            )
        if self.metrics and self.generation is None:
            raise ValueError("metrics compare texts; set generation (its own metrics need no evaluate module)")
        return self

    @property
    def looks_back(self) -> bool:
        """The token at a position is predicted from the one before; not so in encoder-decoders and masked models."""
        return True

    @property
    def headline(self) -> str:
        return "loss"

    @property
    def figures(self) -> tuple[str, ...]:
        return ("loss", "perplexity", "token_accuracy", *names_of(self.generation.metrics if self.generation else ()))

    def label_column(self) -> str | None:
        return None

    @property
    def longest_input(self) -> int:
        return self.max_length + (self.generation.max_new_tokens if self.generation else 0)

    def scoring_note(self, encoded: Encoded) -> str:
        written = sum(example.get(PROMPT) is not None for example in encoded.examples)
        if not self.generation or written == len(encoded):
            return ""
        return f"text is generated for {written:,} of {len(encoded):,} rows, and the loss is of all"

    def order(self, encoded: Encoded) -> list[int]:
        """Rows that text is generated for go together: a batch takes as long as its longest text."""
        if self.generation is None:
            return super().order(encoded)
        lengths, examples = encoded.lengths, encoded.examples
        return sorted(range(len(encoded)), key=lambda index: (examples[index].get(PROMPT) is None, -lengths[index]))

    def while_training(self) -> Self:
        return self.model_copy(update={"generation": None, "metrics": ()})

    def class_weights(self, encoded: Encoded, labels: Sequence[str]) -> list[float]:
        return []

    def example_weight(self, example: Example, class_weights: Sequence[float]) -> float:
        labels = example["labels"][1:] if self.looks_back else example["labels"]
        return float(sum(label != IGNORED for label in labels))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Shape (examples, tokens, vocabulary), of every position."""
        logits: Tensor = model(**self.model_inputs(batch)).logits
        return logits

    def supervised_logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (items, vocabulary) and labels (items,) of the supervised tokens, example by example; no others are
        computed."""
        inputs, places, width, labels = self._read(model, batch)
        return logits_at_places(model, inputs, places, width), labels

    def summed_loss(self, model: nn.Module, batch: Batch, class_weights: Tensor) -> Tensor:
        losses = self._at_head(model, batch, partial(summed_losses, losses=self.loss.losses_and_gradients))
        return super().summed_loss(model, batch, class_weights) if losses is None else losses

    def loss_of(self, logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
        return self.loss.item_losses(logits.float(), labels).sum()

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """What of a batch goes into the model."""
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids")
        return {name: batch[name] for name in names if name in batch}

    def predict(self, model: nn.Module, batch: Batch, labels: Sequence[str]) -> list[Prediction]:
        predictions: list[Prediction] = [{} for _ in batch["input_ids"]]
        if "labels" in batch:
            for prediction, (nats, hits) in zip(predictions, self.item_losses(model, batch), strict=True):
                prediction |= {"nats": float(nats.double().sum()), "tokens": len(nats), "right": int(hits.sum())}
        if self.generation or "labels" not in batch:
            self._generate(model, batch, predictions)
        return predictions

    def item_losses(self, model: nn.Module, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """For each example: nats of its supervised tokens, and whether each of them ranks first."""
        import torch
        from torch.nn.functional import cross_entropy

        def compare(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
            return cross_entropy(logits.float(), wanted, reduction="none"), logits.argmax(-1) == wanted

        found = self._at_head(model, batch, partial(for_chunks, use=compare))
        if found is None:
            logits, wanted = self.supervised_logits(model, batch)
            found = list(map(compare, logits.split(CHUNK), wanted.split(CHUNK)))
        losses, right = (torch.cat(parts) for parts in zip(*found, strict=True))
        counts = self._supervised(batch["labels"]).sum(1).tolist()
        return list(zip(losses.split(counts), right.split(counts), strict=True))

    def split_logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """Logits (its supervised tokens, vocabulary) of each example."""
        counts = self._supervised(batch["labels"]).sum(1).tolist()
        return self.supervised_logits(model, batch)[0].split(counts)

    def join(
        self, found: Sequence[Prediction], encoded: Encoded, rows: Rows, tokenizer: PreTrainedTokenizerBase
    ) -> list[Prediction]:
        """Generated tokens become text."""
        settings = self.generation or Generation()
        for prediction in found:
            if "generated" in prediction:
                prediction["text"] = settings.text(prediction.pop("generated"), tokenizer)
        return list(found)

    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        """Over the supervised tokens of all rows: nats a token, its exponential, and the share ranked first; over the
        generated texts, the metrics."""
        tokens = sum(prediction["tokens"] for prediction in predictions)
        if not tokens:
            raise DataError(
                f"{rows.source}: no token of these rows is predicted, so they have no loss; give longer texts"
            )
        loss = sum(prediction["nats"] for prediction in predictions) / tokens
        right = sum(prediction["right"] for prediction in predictions) / tokens
        values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": right}
        if self.generation and self.generation.metrics:
            values |= text_scores(self.generation.metrics, *self.metric_inputs(predictions, rows, labels))
        return Scores("loss", values, examples=len(predictions), lower_is_better=True)

    def counts(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str], figure: str | None = None
    ) -> Counts | None:
        """Of loss and perplexity nats and tokens, of token accuracy tokens that rank first, of the mean over generated
        texts the figure of each text; rows that no text is generated for have no part in that."""
        sums = {"loss": "nats", "perplexity": "nats", "pseudo_perplexity": "nats", "token_accuracy": "right"}
        figure = figure or self.headline
        if figure in sums:
            numerators = [float(one[sums[figure]]) for one in predictions]
            tokens = [float(one["tokens"]) for one in predictions]
            return Counts(numerators, tokens, "exp" if figure.endswith("perplexity") else "identity")
        found = of_each(figure, *self.metric_inputs(predictions, rows, labels)) if figure in self.figures else None
        return None if found is None else Counts(found, [1.0] * len(found))

    def metric_inputs(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]
    ) -> tuple[list[str], list[list[str]]]:
        """The generated texts, and the references of each."""
        pairs = zip(predictions, self.references(rows, labels), strict=True)
        written = [(prediction["text"], references) for prediction, references in pairs if "text" in prediction]
        if not written:
            raise UsageError("metrics compare texts, and none were generated; set task.generation")
        return [text for text, _ in written], [references for _, references in written]

    def majority(self, train: Rows, rows: Rows, labels: Sequence[str]) -> list[Prediction] | None:
        return None

    def _generate(self, model: nn.Module, batch: Batch, predictions: list[Prediction]) -> None:
        wanted = [index for index, prompt in enumerate(batch.get(PROMPT, ())) if prompt is not None]
        if wanted:
            prompts, ends = [batch[PROMPT][index] for index in wanted], batch[ENDS][wanted[0]]
            found = generate(model, prompts, ends, self.generation or Generation())
            for index, tokens in zip(wanted, found, strict=True):
                predictions[index]["generated"] = tokens

    def _read(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Any], Tensor, int, Tensor]:
        """The model's inputs, where in its flattened outputs supervised tokens are predicted, how long those are, and
        the labels (items,)."""
        kept = self._supervised(batch["labels"])
        at = kept.roll(-1, 1) if self.looks_back else kept
        inputs, places, width = self._laid_out(model, batch)
        return inputs, places[at], width, batch["labels"][kept]

    def _at_head(self, model: nn.Module, batch: Batch, compute: Callable[[nn.Linear, Tensor, Tensor], T]) -> T | None:
        """What is computed of the output projection, what it is given where tokens are supervised, and their labels;
        None where logits have to be formed."""
        plain = unwrapped(model)
        head = engaged_head(plain)
        if head is None:
            return None
        inputs, places, width, labels = self._read(model, batch)
        found: list[tuple[T, Tensor]] = []

        def instead(rows: Tensor) -> Tensor:
            rest, expected = sample(head, rows)
            found.append((compute(head, rows, labels), expected))
            return rest

        with output_only_at(model, inputs, places, width, instead):
            logits = model(**inputs).logits
        ((computed, expected),) = found
        check_last(plain, head, expected, logits)
        return computed

    def _supervised(self, labels: Tensor) -> Tensor:
        """Where labels count; nothing comes before the first token that could predict it."""
        kept = labels != IGNORED
        if self.looks_back:
            kept[:, 0] = False
        return kept

    def _laid_out(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Any], Tensor, int]:
        """The model's inputs, the place of each labelled token in its flattened outputs, and the outputs' length."""
        import torch

        labels = batch["labels"]
        places = torch.arange(labels.numel(), device=labels.device).view_as(labels)
        return self.model_inputs(batch), places, labels.shape[1]


class CausalLanguageModel(LanguageModel, ABC):
    """A language model whose tokens see those before them."""

    packing: bool = False
    """Let the examples of a forward pass share sequences of at most `max_length` tokens without seeing each other, so
    that less padding is computed. Neither the loss nor a prediction changes."""

    def _laid_out(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Any], Tensor, int]:
        if not self.packing or is_unpadded(unwrapped(model)):  # either way no padding is computed
            return super()._laid_out(model, batch)
        check_packing(unwrapped(model))
        layout = lay_out(batch["attention_mask"], self.max_length)
        return _packed(batch, layout), layout.places, layout.shape[1]


def _packed(batch: Batch, layout: Layout) -> dict[str, Any]:
    """Without a mask and without a cache transformers keeps apart what starts again at position 0."""
    ids = layout.packed(batch["input_ids"], batch["attention_mask"].bool())
    return {"input_ids": ids, "position_ids": layout.position_ids, "use_cache": False}
