"""What all language models share: a loss on each supervised token, perplexity, and text that the model writes."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.data.collate import IGNORED
from peftkit.data.files import Rows
from peftkit.tasks.base import Batch, Encoded, Example, Prediction, Scores, Task

if TYPE_CHECKING:
    from torch import Tensor, nn


class LanguageModel(Task, ABC):
    """Tokens are predicted, and only those whose label is not `IGNORED` count.

    Labels stand where their tokens stand, as in transformers. A prediction holds the summed negative log-likelihood
    of the supervised tokens (nats) and their number, and, where text is generated, the text.
    """

    looks_back: ClassVar[bool] = True
    """The token at a position is predicted from the one before; False where encoder-decoders or masks do without."""

    @property
    def headline(self) -> str:
        return "loss"

    def label_column(self) -> str | None:
        return None

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
        """Logits (items, vocabulary) and labels (items,) of the supervised tokens; no others are computed."""
        import torch

        labels = batch["labels"]
        kept = labels != IGNORED
        if self.looks_back:
            kept[:, 0] = False
        at = kept.roll(-1, 1) if self.looks_back else kept
        with _output_only_at(model, at):
            logits = model(**self.model_inputs(batch)).logits
        return torch.flatten(logits, 0, -2), labels[kept]

    def summed_loss(self, model: nn.Module, batch: Batch, class_weights: Tensor) -> Tensor:
        logits, labels = self.supervised_logits(model, batch)
        return self.loss.item_losses(logits.float(), labels).sum()

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """What of a batch goes into the model."""
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids")
        return {name: batch[name] for name in names if name in batch}

    def predict(self, model: nn.Module, batch: Batch, labels: Sequence[str]) -> list[Prediction]:
        from torch.nn.functional import cross_entropy

        logits, wanted = self.supervised_logits(model, batch)
        losses = cross_entropy(logits.float(), wanted, reduction="none")
        right = logits.argmax(-1) == wanted
        kept = batch["labels"] != IGNORED
        counts = (kept[:, 1:] if self.looks_back else kept).sum(1).tolist()
        return [
            {"nats": float(nats.double().sum()), "tokens": count, "right": int(hits.sum())}
            for nats, hits, count in zip(losses.split(counts), right.split(counts), counts, strict=True)
        ]

    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        """Over the supervised tokens of all rows: nats a token, its exponential, and the share ranked first."""
        tokens = sum(prediction["tokens"] for prediction in predictions)
        loss = sum(prediction["nats"] for prediction in predictions) / tokens
        right = sum(prediction["right"] for prediction in predictions) / tokens
        values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": right}
        return Scores("loss", values, examples=len(predictions), lower_is_better=True)

    def majority(self, train: Rows, rows: Rows, labels: Sequence[str]) -> list[Prediction] | None:
        return None


@contextmanager
def _output_only_at(model: Any, positions: Tensor) -> Iterator[None]:
    """Let the output projection see only the hidden states at `positions` (examples, tokens).

    What is computed after it, such as a bias or a cap on logits, works on any number of positions.
    """
    unwrapped = model.module if hasattr(model, "module") else model  # DistributedDataParallel's
    projection = unwrapped.get_output_embeddings()

    def select(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = inputs
        before = hidden.shape[1] - positions.shape[1]  # virtual tokens that the method put in front
        return (hidden[:, before:][positions].unsqueeze(0), *others)

    handle = projection.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
