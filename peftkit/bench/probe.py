"""What an encoder forgets: how well a linear classifier still reads its features after it was tuned to something else.

The classifier is fitted once to the features of the untouched backbone and then frozen. Its score on the tuned
backbone's features says how far these moved; that of one fitted anew says what can still be read from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.backbones.load import Backbone
from peftkit.bench.grid import FeatureProbe
from peftkit.bench.store import Forgetting
from peftkit.data.collate import collate
from peftkit.data.mix import read_data
from peftkit.data.rows import Rows
from peftkit.disk import whole_file
from peftkit.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

BATCH = 64
ROUNDS = 300
"""Of the classifier's optimizer, at most."""


class FrozenProbe:
    """A classifier on the features of the backbone as it is now."""

    def __init__(self, settings: FeatureProbe, backbone: Backbone, device: torch.device, cache: Path) -> None:
        """
        Args:
            cache: a folder; the features of an untouched backbone are computed once for all runs of a grid.
        """
        self._name, self._device = settings.name, device
        splits = read_data(settings.data, label=settings.label)
        rows = [_spread(one, settings.rows) for one in (splits.train, splits.held_out)]
        self._labels = [[str(record[settings.label]) for record in one.records] for one in rows]
        assert backbone.tokenizer is not None
        texts = [_texts(one, settings.text) for one in rows]
        cut = {"truncation": True, "max_length": settings.max_length}
        self._inputs = [[{"input_ids": ids} for ids in backbone.tokenizer(one, **cut).input_ids] for one in texts]
        self._pad = int(backbone.tokenizer.pad_token_id or 0)
        named = json.dumps([settings.model_dump(mode="json"), backbone.weights_sha256, texts, self._labels])
        train, test = self._untouched(backbone.model, cache / f"{hashlib.sha256(named.encode()).hexdigest()[:16]}.npz")
        self._classifier = _fitted(train, self._labels[0])
        self._before = float(self._classifier.score(test, self._labels[1]))

    def forgetting(self, model: nn.Module) -> Forgetting:
        """Beside what it was before, the accuracy on the features of the model as it is now."""
        train, test = (self._features(model, one) for one in self._inputs)
        return Forgetting(
            probe=self._name,
            before=self._before,
            after=float(self._classifier.score(test, self._labels[1])),
            refitted=float(_fitted(train, self._labels[0]).score(test, self._labels[1])),
        )

    def _untouched(self, model: nn.Module, file: Path) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        if not file.is_file():
            train, test = (self._features(model, one) for one in self._inputs)
            with whole_file(file) as partial, partial.open("wb") as stream:
                np.savez(stream, train=train, test=test)
        with np.load(file) as found:
            return found["train"], found["test"]

    def _features(self, model: nn.Module, inputs: Sequence[dict[str, Any]]) -> np.ndarray:
        """The mean over a text's own tokens of what the last block gives: (texts, width)."""
        import torch

        order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]["input_ids"]))
        found: list[Any] = [None] * len(inputs)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for start in range(0, len(order), BATCH):
                part = order[start : start + BATCH]
                batch = collate([inputs[index] for index in part], self._pad, self._device)
                hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
                # what a method puts in front is not the text's own
                hidden = hidden[:, -batch["input_ids"].shape[1] :].float()
                mask = batch["attention_mask"].unsqueeze(-1)
                means = (hidden * mask).sum(1) / mask.sum(1)
                for index, one in zip(part, means.cpu().numpy(), strict=True):
                    found[index] = one
        model.train(was_training)
        import numpy as np

        return np.stack(found)


def _fitted(features: np.ndarray, labels: Sequence[str]) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=ROUNDS)).fit(features, labels)


def _spread(rows: Rows, count: int) -> Rows:
    """So many rows at even distances, because files are often sorted by label."""
    count = min(count, len(rows))
    return rows.take(index * len(rows) // count for index in range(count))


def _texts(rows: Rows, column: str) -> list[str]:
    rows.require(column)
    texts = [record[column] for record in rows.records]
    wrong = next((index for index, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise DataError(f"{rows.where(wrong)}: no text in '{column}', which the probe reads")
    return texts
