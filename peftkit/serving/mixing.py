"""Texts of several adapters in one forward pass of the backbone they share.

Rows of one adapter stand together. At every linear layer, W x is computed for all rows, and each adapter adds its own
scale · B A x to its rows, as peft does for an adapter alone. Two ways lead from there to predictions, and both go
through the code of the tasks:

- *reading* (classes, tags, answers): the blocks of the backbone run once, over everybody's rows, and where the
  architecture allows over their real tokens only. Then each adapter's own model is asked, in whose blocks what was
  computed for its rows is put in place of computing it again; what stands behind the blocks, pooler and head, is its
  own.
- *writing*: the resident model generates for all rows at once. Language models have no heads of their own.

What an adapter changes elsewhere (embeddings, norms, keys, values, hidden states) keeps it out: its texts go alone.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from peftkit.artifacts.inference import in_precision
from peftkit.artifacts.loading import PROBE, SavedRun
from peftkit.backbones.layouts import block_modules, layout_for
from peftkit.backbones.modules import base_model, linears
from peftkit.data.collate import collate
from peftkit.engine.padding_free import UNPADDED, without_padding
from peftkit.methods.base import inside
from peftkit.methods.peft_files import ADAPTER
from peftkit.tasks.base import Batch, Example
from peftkit.tasks.language_model import LanguageModel
from peftkit.tasks.plain_text import PlainText

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

READING = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")
AGREEMENT = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}
"""Largest |difference| / max(1, largest number) between an adapter in a mixed pass and alone, by the weights' dtype."""


@dataclass(frozen=True)
class Share:
    """One adapter's part of a batch: its rows are those from `first` up to `end`."""

    layers: Mapping[str, Any]
    first: int
    end: int


class Mixer:
    """The resident model, with a place in each of its layers where adapters add what is theirs."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.body: Any = base_model(model)
        self._shares: Sequence[Share] = ()
        self._rows = 0
        self.forwards = 0
        """Passes through the blocks so far: one a mixed batch, and one a token where text is written."""
        self._blocks = block_modules(self.body, layout_for(model.config.model_type, model))
        self._found: Any = None
        self._tokens: list[Tensor] = []
        self._known: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()
        self._unpadded = contextlib.ExitStack()
        if model.get_output_embeddings() is None:  # where text is written, rows are padded on the left
            self._unpadded.enter_context(without_padding(model))
        prefix = "" if self.body is model else f"{model.base_model_prefix}."
        self._in_blocks = tuple(f"{prefix}{name}." for name in self._blocks)
        self._prefix = prefix
        for name, module in linears(model):
            module.register_forward_hook(_Adding(self, name))
        for block in self._blocks.values():
            block.register_forward_hook(self._keep)
        next(iter(self._blocks.values())).register_forward_hook(self._count)

    def examine(self, saved: SavedRun) -> tuple[dict[str, Any], str]:
        """The layers that an adapter adds to, and why its texts cannot go with others'; empty where they can."""
        writes = isinstance(saved.run.task, LanguageModel) and not isinstance(saved.run.task, PlainText)
        if saved.run.backbone.quantization is not None:
            return {}, "the backbone is quantised"
        if saved.head.new_tokens:
            return {}, "it has tokens of its own"
        if writes:
            layers, why = self._layers(saved, whole=True)
        elif saved.head.model_class in READING and not self.model.config.is_encoder_decoder:
            layers, why = self._layers(saved, whole=False)
        else:
            return {}, f"task '{saved.run.task.kind}' reads more than the last hidden states"
        if not why and not self._agrees(saved, layers, writes):
            why = "in a mixed pass it would not compute what it does alone"
        return ({}, why) if why else (layers, "")

    @contextlib.contextmanager
    def sharing(self, shares: Sequence[Share]) -> Iterator[None]:
        """Within it, the resident model computes for these rows what each adapter would."""
        self._shares, self._rows = shares, shares[-1].end
        try:
            yield
        finally:
            self._shares, self._rows, self._found, self._tokens = (), 0, None, []

    def read(self, shares: Sequence[Share], examples: Sequence[Example], pad_id: int) -> Any:
        """Run the blocks once over the examples of all shares; returns what the last block computed."""
        device = next(self.model.parameters()).device
        batch = collate([{name: one[name] for name in _given(one)} for one in examples], pad_id, device)
        extra = {"use_cache": False} if "use_cache" in inspect.signature(self.body.forward).parameters else {}
        with self.sharing(shares):
            self.body(**batch, **extra)
            return self._found

    @contextlib.contextmanager
    def in_place(self, model: nn.Module, found: Any, share: Share, width: int) -> Iterator[None]:
        """Within it, the blocks of an adapter's own model give what was found for its rows, cut to `width` tokens."""
        blocks = self._blocks_in(model)
        own = _cut(found, share, width)
        for block in blocks:
            block.forward = lambda *given, **named: own
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def _blocks_in(self, model: nn.Module) -> list[nn.Module]:
        if model not in self._known:
            body: Any = base_model(_plain(model))
            self._known[model] = list(block_modules(body, layout_for(body.config.model_type, body)).values())
        return self._known[model]

    def add(self, name: str, given: Tensor, output: Any) -> Any:
        """Add to a layer's output, row by row, what the adapters have for that layer."""
        row = self._row
        places: Sequence[Any] = self._tokens_of(row) if row else self._rows_of(given)
        source, target = (given[0], output[0]) if row else (given, output)
        for share, own in zip(self._shares, places, strict=True):
            if (layer := share.layers.get(name)) is None:
                continue
            first, second, scale = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.scaling[ADAPTER]
            added = second(first(source[own].to(first.weight.dtype))) * scale
            if row and added.dtype == target.dtype:
                target.index_add_(0, own, added)
            else:
                target[own] = (target[own] + added).to(target.dtype)
        return output

    @property
    def _row(self) -> Any:
        """How the real tokens of the batch stand in one row; None where the batch is computed as it is."""
        return getattr(getattr(self.body, UNPADDED, None), "current", None)

    def _rows_of(self, given: Tensor) -> list[slice]:
        factor = given.shape[0] // self._rows  # beams are rows of their own, behind one another
        return [slice(share.first * factor, share.end * factor) for share in self._shares]

    def _tokens_of(self, row: Any) -> list[Tensor]:
        """Where each share's tokens stand in the row; the same in all layers."""
        if not self._tokens:
            owner = row.places // row.shape[1]
            spans = ((owner >= share.first) & (owner < share.end) for share in self._shares)
            self._tokens = [span.nonzero().squeeze(1) for span in spans]
        return self._tokens

    @property
    def is_shared(self) -> bool:
        """Whether rows of adapters are in the pass that is going on."""
        return bool(self._shares)

    def _keep(self, module: nn.Module, given: Any, output: Any) -> None:
        if self._shares:
            self._found = output if self._row is None else _batched(output, self._row)

    def _count(self, module: nn.Module, given: Any, output: Any) -> None:
        self.forwards += 1

    def _layers(self, saved: SavedRun, whole: bool) -> tuple[dict[str, Any], str]:
        """What an adapter adds, by the resident model's names, if nothing else of its model differs where it counts.

        Args:
            whole: the model with its output projection counts; else what comes before pooler and head.
        """
        plain = _plain(saved.model)
        own = {id(parameter) for parameter in plain.parameters()}
        if outside := [name for name, one in saved.model.named_parameters() if id(one) not in own]:
            return {}, f"it changes what the backbone is given ('{outside[0]}')"
        model = plain if whole else base_model(plain)
        prefix = "" if whole else self._prefix
        resident = dict(self.model.named_parameters(remove_duplicate=False))
        heads = saved.manifest["trained_heads"]
        behind = [name.removeprefix(f"{plain.base_model_prefix}.") for name in heads]
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if ".lora_A." in name or ".lora_B." in name or (not whole and inside(name, behind)):
                continue
            same = resident.get(prefix + name.replace(".base_layer.", "."))
            if same is None or same.data_ptr() != parameter.data_ptr() or same.shape != parameter.shape:
                return {}, f"it changes the backbone beyond its linear layers ('{name}')"
        layers: dict[str, Any] = {}
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and len(module.lora_A):
                layers[prefix + name] = module
        if not whole and (outside := [name for name in layers if not name.startswith(self._in_blocks)]):
            return {}, f"it adapts what is outside of the blocks ('{outside[0]}')"
        return layers, ""

    def _agrees(self, saved: SavedRun, layers: dict[str, Any], writes: bool) -> bool:
        """Whether the adapter computes in a mixed pass what it does alone, tried on two texts of unlike length."""
        import torch

        device = next(self.model.parameters()).device
        texts = [saved.tokenizer(text)["input_ids"][-16:] for text in (*PROBE, " ".join(PROBE))]
        examples: list[Example] = [{"input_ids": ids} for ids in texts]
        batch = collate(examples, int(saved.tokenizer.pad_token_id or 0), device)
        share = Share(layers, 0, len(examples))
        if self.model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = batch["input_ids"]
        with torch.no_grad(), in_precision(saved.run, device):
            alone = saved.model(**batch)[0]
            if writes:
                with self.sharing([share]):
                    mixed = self.model(**batch)[0]
            else:
                found = self.read([share], examples, int(saved.tokenizer.pad_token_id or 0))
                with self.in_place(saved.model, found, share, batch["input_ids"].shape[1]):
                    mixed = saved.model(**batch)[0]
        if alone.shape[:2] == batch["attention_mask"].shape:
            real = batch["attention_mask"].bool()
            alone, mixed = alone[real], mixed[real]
        difference = float((alone.float() - mixed.float()).abs().max()) / max(1.0, float(alone.abs().max()))
        computed = "bfloat16" if saved.run.training.precision == "bf16" else saved.run.backbone.dtype
        return difference <= AGREEMENT[computed]


class _Adding:
    """The hook of one layer, with its name."""

    def __init__(self, mixer: Mixer, name: str) -> None:
        self.mixer, self.name = mixer, name

    def __call__(self, module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        return self.mixer.add(self.name, given[0], output) if self.mixer.is_shared and given else None


def _batched(found: Any, row: Any) -> Any:
    """What a block returned of a row, as a padded batch."""
    return tuple(_batched(one, row) for one in found) if isinstance(found, tuple) else row.batch(found)


def _plain(model: Any) -> Any:
    """The transformers model inside of peft's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _given(example: Batch) -> list[str]:
    return [name for name in ("input_ids", "token_type_ids") if name in example]


def _cut(found: Any, share: Share, width: int) -> Any:
    """An adapter's rows of what a block returned: a tensor, or a tuple with one."""
    if isinstance(found, tuple):
        return tuple(_cut(one, share, width) for one in found)
    tensor: torch.Tensor | None = found
    return tensor if tensor is None or tensor.ndim < 3 else tensor[share.first : share.end, :width]
