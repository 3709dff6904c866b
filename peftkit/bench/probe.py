"""What a backbone forgets when it is tuned to something else: what its features say, or its language.

Of features: a linear classifier is fitted once to those of the untouched backbone and then frozen. Its score on the
tuned backbone's features says how far these moved; that of one fitted anew says what can still be read from them. Of
language: the loss on general text, before and after.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from peftkit.backbones.load import Backbone, BackboneSettings, longest_input
from peftkit.bench.probes import FeatureProbe, LanguageModelProbe, Probe
from peftkit.bench.store import Forgetting
from peftkit.config import Run
from peftkit.data.collate import collate
from peftkit.data.mix import read_data
from peftkit.data.rows import Rows
from peftkit.disk import whole_file, write_text
from peftkit.errors import DataError, UsageError
from peftkit.tasks import PlainText
from peftkit.tasks.base import Encoded

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from torch import nn

Forgotten: TypeAlias = "Callable[[nn.Module], Forgetting]"
BATCH = 64
BLOCKS = 8
"""Of text that are read at once."""
ROUNDS = 300
"""Of the classifier's optimizer, at most."""


def probed(settings: Probe, run: Run, backbone: Backbone, accelerator: Accelerator, cache: Path) -> Forgotten:
    """What a model that is made of the backbone, as it is now, has forgotten.

    Args:
        cache: a folder; what is known of an untouched backbone is computed once for all runs of a grid.
    """
    if settings.kind == "language_model":
        return LossProbe(settings, run, backbone, accelerator, cache).forgetting
    return FrozenProbe(settings, run.backbone, backbone, accelerator, cache).forgetting


class FrozenProbe:
    """A classifier on the features of the backbone as it is now."""

    def __init__(
        self,
        settings: FeatureProbe,
        loaded_as: BackboneSettings,
        backbone: Backbone,
        accelerator: Accelerator,
        cache: Path,
    ) -> None:
        self._name, self._device = settings.name, accelerator.device
        splits = read_data(settings.data, label=settings.label)
        rows = [_spread(one, settings.rows) for one in (splits.train, splits.held_out)]
        self._labels = [[str(record[settings.label]) for record in one.records] for one in rows]
        assert backbone.tokenizer is not None
        texts = [_texts(one, settings.text) for one in rows]
        cut = {"truncation": True, "max_length": settings.max_length}
        self._inputs = [[{"input_ids": ids} for ids in backbone.tokenizer(one, **cut).input_ids] for one in texts]
        self._pad = int(backbone.tokenizer.pad_token_id or 0)
        file = cache / f"{_named(settings, loaded_as, backbone, texts, self._labels)}.npz"
        with placed(backbone.model, accelerator):
            train, test = self._untouched(backbone.model, file)
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


class LossProbe:
    """The loss of the backbone, as it is now, on blocks of general text, in nats a token."""

    def __init__(
        self, settings: LanguageModelProbe, run: Run, backbone: Backbone, accelerator: Accelerator, cache: Path
    ) -> None:
        from peftkit.prepare import Split

        tokenizer, taken = backbone.tokenizer, run.method.virtual_tokens()
        assert tokenizer is not None
        limit = longest_input(run.backbone, tokenizer)
        if limit is not None and settings.max_length + taken > limit:
            why = f", of which the method takes {taken}" if taken else ""
            raise UsageError(
                f"probe.max_length is {settings.max_length}, but {run.backbone.name} takes at most {limit} tokens{why}"
            )
        self._name, self._accelerator = settings.name, accelerator
        self._task = PlainText(
            data=settings.data,
            text=settings.text,
            separator=settings.separator,
            end_token=False,
            max_length=settings.max_length,
        )
        rows = read_data(settings.data).held_out
        read = _whole_blocks(self._task.encode(rows, tokenizer, ()), settings, rows)
        self._split = Split("probe", rows, read, (), int(tokenizer.pad_token_id or 0), BLOCKS, tokenizer)
        ids = [example["input_ids"] for example in read.examples]
        file = cache / f"{_named(settings, run.backbone, backbone, ids)}.json"
        if not file.is_file():
            with placed(backbone.model, accelerator):
                write_text(file, json.dumps(self._loss(backbone.model)))
        self._before = float(json.loads(file.read_text(encoding="utf-8")))

    def forgetting(self, model: nn.Module) -> Forgetting:
        """Beside what it was before, the loss of the model as it is now."""
        return Forgetting(probe=self._name, before=self._before, after=self._loss(model), lower_is_better=True)

    def _loss(self, model: nn.Module) -> float:
        from peftkit.evaluation import evaluate

        return evaluate(model, self._task, self._split, self._accelerator).scores.value


def _whole_blocks(encoded: Encoded, settings: LanguageModelProbe, rows: Rows) -> Encoded:
    """So many blocks at even distances, all of one length."""
    whole = [index for index, length in enumerate(encoded.lengths) if length == settings.max_length]
    if not whole:
        raise DataError(f"{rows.source}: no block of {settings.max_length} tokens; lower probe.max_length")
    count = min(settings.blocks, len(whole))
    chosen = [whole[index * len(whole) // count] for index in range(count)]
    return Encoded([encoded.examples[index] for index in chosen], 0, [encoded.owner(index) for index in chosen])


def _named(settings: Probe, loaded_as: BackboneSettings, backbone: Backbone, *read: Any) -> str:
    """A name for what is measured of an untouched backbone."""
    settings_of_both = [one.model_dump(mode="json") for one in (settings, loaded_as)]
    named = json.dumps([*settings_of_both, backbone.weights_sha256, *read])
    return hashlib.sha256(named.encode()).hexdigest()[:16]


@contextmanager
def placed(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """The model where it computes, and then where it was: a method draws its first weights there."""
    from peftkit.training.sharding import place

    before = next(model.parameters()).device
    place(model, accelerator)
    yield
    if before != next(model.parameters()).device:
        model.to(before)


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
