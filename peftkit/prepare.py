"""From a run's description to encoded splits: rows, label order, tokens. Needs the tokenizer, not the weights."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peftkit import token_cache
from peftkit.backbones.causal import refuse_unpackable
from peftkit.backbones.layouts import layout_for
from peftkit.backbones.load import Head, chosen_config, load_tokenizer, longest_input, meta_model, resolve_config
from peftkit.backbones.modules import architecture
from peftkit.backbones.quantize import quantize
from peftkit.config import Run
from peftkit.data.augment import augmented
from peftkit.data.files import Rows
from peftkit.data.sources import Splits
from peftkit.demonstrations import require_demonstrations
from peftkit.errors import BackboneError, DataError, MethodError, UsageError
from peftkit.tasks.base import Encoded, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Split:
    """Raw rows and their token ids; `encoded.owner(i)` is the row of example i."""

    name: str
    rows: Rows
    encoded: Encoded
    labels: tuple[str, ...]
    """In the order of the head's outputs."""
    pad_id: int
    """The token id that fills batches up."""
    batch_size: int
    """Examples in one forward pass of an evaluation."""
    tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, example: int) -> str:
        """The place of origin of an example."""
        return self.rows.where(self.encoded.owner(example))


@dataclass(frozen=True)
class Prepared:
    """Everything that training and evaluation need to know about the data."""

    train: Split
    dev: Split
    test: Split
    """The test split; dev again where the data has no test, which `notes` says."""
    head: Head
    tokenizer: PreTrainedTokenizerBase
    class_weights: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """A hash of what is trained and selected on, as JSON: tokens, labels and their order."""
        digest = hashlib.sha256(f"[{json.dumps(self.head.labels)}".encode())
        for split in (self.train, self.dev):  # one example after the other: as lists all at once take gigabytes
            digest.update(b", [")
            for index, example in enumerate(split.encoded.examples):
                digest.update(f"{', ' if index else ''}{json.dumps(example)}".encode())
            digest.update(b"]")
        digest.update(b"]")
        return digest.hexdigest()[:16]


def prepare(run: Run, splits: Splits | None = None) -> Prepared:
    """Read (unless given), check and encode the data of a run.

    Raises:
        UsageError: a file or column that is not there.
        DataError: rows that would make the run worthless, with file and line.
    """
    require_demonstrations(run)
    splits = _augmented(run.task, splits or run.task.splits())
    head = run.task.head(splits.train)
    tokenizer = load_tokenizer(run.backbone, head.pretokenized)
    if head.new_tokens:
        from peftkit.backbones.new_tokens import add_to_tokenizer

        add_to_tokenizer(tokenizer, head.new_tokens)
    check_method(run, head, tokenizer)
    train, dev = (
        encode_split(run, name, rows, head, tokenizer, keeps=True)
        for name, rows in (("train", splits.train), ("dev", splits.dev))
    )
    _check_steps(run, train)
    test = encode_split(run, "test", splits.test, head, tokenizer, keeps=True) if splits.test is not None else dev
    notes = [
        *splits.notes,
        *(note for split in {train.name: train, test.name: test}.values() for note in _losses(run.task, split)),
    ]
    if note := run.task.scoring_note(test.encoded):
        notes.append(f"{test.name}: {note}")
    if splits.test is None:
        notes.append("no test split: the final figures are of dev, which chose the weights: read them with care")
    weights = run.task.class_weights(train.encoded, head.labels)
    return Prepared(train, dev, test, head, tokenizer, tuple(weights), tuple(notes))


def require_fit(run: Run, data: Prepared) -> None:
    """Refuse what the run cannot do with data that was prepared for another run of its task.

    Raises:
        UsageError: as `prepare` raises it.
    """
    check_method(run, data.head, data.tokenizer)
    _check_steps(run, data.train)


def check_method(run: Run, head: Head, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what the backbone, or the method on it, cannot do, before weights load.

    Raises:
        UsageError: texts that are too long for it, or a method that does not fit its architecture.
    """
    _check_length(run, longest_input(run.backbone, tokenizer))
    _check_architecture(run, head)


def _augmented(task: Task, splits: Splits) -> Splits:
    """With changed copies among the rows of train, where the task asks for them."""
    if not task.augmentation:
        return splits
    train, note = augmented(splits.train, task.free_texts, task.augmentation)
    return replace(splits, train=train, notes=(*splits.notes, note))


def encode_split(
    run: Run,
    name: str,
    rows: Rows,
    head: Head,
    tokenizer: PreTrainedTokenizerBase,
    supervised: bool = True,
    keeps: bool = False,
) -> Split:
    """Rows with their token ids, and label ids when `supervised`.

    Args:
        keeps: keep what was encoded for other runs, where the rows are many and `output.keep_tokens` says so.
    """
    if keeps and run.output.keep_tokens and len(rows) >= token_cache.MANY:
        encoded = token_cache.encoded(run.task, rows, tokenizer, head.labels, supervised)
    else:
        encoded = run.task.encode(rows, tokenizer, head.labels, supervised)
    _refuse_dropped(name, rows, encoded)
    if not encoded.examples:
        raise DataError(f"{rows.source}: no row is left to {'learn from' if supervised else 'predict'}{_why(encoded)}")
    pad_id = int(tokenizer.pad_token_id or 0)
    return Split(name, rows, encoded, head.labels, pad_id, run.training.evaluation_batch_size, tokenizer)


def _check_steps(run: Run, train: Split) -> None:
    try:
        run.method.check_steps(run.training.total_steps(len(train.encoded)))
    except MethodError as error:
        raise UsageError(f"method: {error}") from error


def _check_length(run: Run, limit: int | None) -> None:
    taken = run.method.virtual_tokens()
    longest = run.task.longest_input
    if limit is not None and longest + taken > limit:
        why = f", of which method '{run.method.kind}' takes {taken}" if taken else ""
        more = f" and {longest - run.task.max_length} more are generated" if longest > run.task.max_length else ""
        raise UsageError(
            f"task.max_length is {run.task.max_length}{more}, but {run.backbone.name} takes at most {limit} tokens{why}"
        )


def _check_architecture(run: Run, head: Head) -> None:
    """Refuse what the method cannot do to this architecture, before weights load: its shapes are enough."""
    model = meta_model(chosen_config(run.backbone, resolve_config(run.backbone)), head)
    config: Any = model.config
    run.task.check_backbone(config, run.method.virtual_tokens())
    if getattr(run.task, "packing", False):
        refuse_unpackable(model)
    if run.training.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(
            f"training.gradient_checkpointing: transformers has none for {architecture(model)}; leave it out"
        )
    layout = layout_for(config.model_type)
    if run.backbone.quantization is not None:
        try:
            quantize(model, layout, run.backbone.quantization)
        except BackboneError as error:
            raise UsageError(f"backbone.quantization: {error}") from error
    try:
        run.method.added_parameters(model, layout)
    except MethodError as error:
        raise UsageError(f"method: {error}") from error


def _refuse_dropped(name: str, rows: Rows, encoded: Encoded) -> None:
    """Only rows of train may go: a score of what is left of the others would be of another test."""
    if encoded.dropped and name != "train":
        index, reason = next(iter(encoded.dropped.items()))
        more = f" (and {len(encoded.dropped) - 1:,} more rows)" if len(encoded.dropped) > 1 else ""
        raise DataError(f"{rows.where(index)}: {reason}{more}; only rows of train are dropped: mend or remove it")


def _why(encoded: Encoded) -> str:
    reasons = Counter(encoded.dropped.values())
    return f" ({', '.join(f'{count:,} {reason}' for reason, count in reasons.items())})" if reasons else ""


def _losses(task: Task, split: Split) -> Iterator[str]:
    """What of a split the model does not get to see."""
    cut, dropped = split.encoded.truncated, split.encoded.dropped
    if cut:
        share = 100 * cut / len(split)
        yield f"{split.name}: {cut:,} of {len(split):,} rows ({share:.1f} %) are cut at {task.max_length} tokens"
    if dropped:
        first = split.rows.where(next(iter(dropped)))
        yield f"{split.name}: {len(dropped):,} of {len(split):,} rows are dropped{_why(split.encoded)}, e.g. {first}"
    for note in split.encoded.notes:
        yield f"{split.name}: {note}"
