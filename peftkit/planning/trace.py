"""One training step and one batch of an evaluation of a run, gone through without weights: what they hold and compute.

The model, the method and the task's loss are the run's own. Nothing is allocated but the token ids.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from peftkit.backbones.causal import CHECKED
from peftkit.backbones.layouts import block_modules, layout_for
from peftkit.backbones.load import Backbone, Head, chosen_config, meta_model, resolve_config
from peftkit.backbones.modules import head_modules
from peftkit.backbones.quantize import is_quantized, quantize
from peftkit.config import Run
from peftkit.data.collate import collate
from peftkit.engine.engage import engaged, shortened
from peftkit.methods import TopLayers
from peftkit.methods.base import trained_parameters
from peftkit.planning.held import Trace
from peftkit.planning.states import optimizer_bytes
from peftkit.planning.workload import Workload
from peftkit.tasks.generation import unwrapped
from peftkit.training.activations import recompute_activations
from peftkit.training.regularise import make_objective

if TYPE_CHECKING:
    from torch import nn

    from peftkit.planning.ledger import Ledger

PHASES = ("forward", "backward", "lowest block")
SMALL = 0.1
"""Share of the weights below which the gradients of a step's earlier micro-batches are added rather than traced."""
SHALLOW = 5
"""Blocks up to which a model is traced as it is."""
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}


def expected(run: Run, head: Head, work: Workload, held: Callable[[int], int] = int) -> Trace:
    """The trace of a run; of deep models from that of two shallow ones, which has the same figures.

    Args:
        held: what an allocator takes for a storage of so many bytes.
    """
    config = chosen_config(run.backbone, resolve_config(run.backbone))
    blocks = config.get_text_config().num_hidden_layers
    if blocks <= SHALLOW or config.is_encoder_decoder or isinstance(run.method, TopLayers):
        return traced(run, head, work, held=held)
    period = _period(config.get_text_config())
    smaller, larger = (traced(run, head, work, count, held) for count in (2 * period, 3 * period))
    if smaller.blocks != 2 * period or (blocks - larger.blocks) % period:
        return traced(run, head, work, held=held)  # blocks that are not counted by that number, or differ
    return larger.with_blocks(smaller, blocks)


def _period(config: Any) -> int:
    """After how many blocks kinds of attention come again."""
    kinds = list(getattr(config, "layer_types", None) or ())
    periods = range(1, len(kinds) + 1)
    return next((one for one in periods if all(a == b for a, b in zip(kinds, kinds[one:], strict=False))), 1)


def traced(run: Run, head: Head, work: Workload, blocks: int | None = None, held: Callable[[int], int] = int) -> Trace:
    """Go through a step of `work`, and a batch of its evaluation.

    Args:
        blocks: of how many blocks the model is; None: as its configuration says.
    """
    from peftkit.planning.shapes import Shapes

    ledger = Shapes(held)
    model = ledger.without_values(attached(run, head, blocks))
    if getattr(run.task, "packing", False):
        setattr(unwrapped(model), CHECKED, True)  # what the run tries on numbers cannot be tried without
    return trace_model(ledger, model, run, work)


def attached(run: Run, head: Head, blocks: int | None = None) -> nn.Module:
    """The model of a run on the meta device, with its method attached; no generator is advanced."""
    import torch

    config = chosen_config(run.backbone, resolve_config(run.backbone))
    if blocks is not None:
        set_blocks(config, blocks)
    with torch.random.fork_rng(devices=[]):
        model = meta_model(config, head, run.backbone.dtype)
        layout = layout_for(config.model_type)
        if run.backbone.quantization is not None:
            quantize(model, layout, run.backbone.quantization)
        backbone = Backbone(model, None, layout, head_modules(model), name=run.backbone.name)
        with torch.device("meta"):
            return run.method.attach(backbone, total_steps=1_000_000)


def trace_model(ledger: Ledger, model: nn.Module, run: Run, work: Workload) -> Trace:
    """The same for a model that is there, with values or without, under its kind of ledger."""
    from peftkit.planning.shapes import NeedsValues

    if run.backbone.quantization is not None:
        from peftkit.backbones.quantized_layers import packed_bytes
    parts = block_modules(model, layout_for(_config(model).model_type))
    ledger.hold(tensor for tensor in (*model.parameters(), *model.buffers()))
    quantised: list[Any] = [part for part in model.modules() if is_quantized(part)]
    # what codes are scaled by is no parameter, and with 8 bits a buffer, which was counted
    scales = sum(packed_bytes(part) - part.weight.nbytes - _buffers(part) for part in quantised)
    codes = sum(part.in_features * part.out_features - part.weight.numel() for part in quantised)
    ledger.live += scales
    weights, own = ledger.live, list(trained_parameters(model).values())
    if run.training.precision != "fp32":
        _autocast(model, PRECISIONS[run.training.precision])
    kept = 0
    peaks: dict[str, int] = {}
    if run.method.trains:
        if run.training.gradient_checkpointing:
            recompute_activations(model)
        kept, peaks = _step(ledger, model, run, work)
    step, ledger.operations = ledger.operations, Counter()
    model.zero_grad()
    ledger.peak = ledger.live
    # a last block that does less would be alike in no other, and deep models are told from two shallow ones
    alike = run.engine.model_copy(update={"read_positions": False})
    with shortened(model, alike), ledger, _evaluating(model), contextlib.suppress(NeedsValues):
        # a prediction ends in numbers; by then the model has run
        run.task.while_training().predict(model, collate(work.evaluation, work.pad_id), _labels(run, work))
    return Trace(
        weights=weights,
        trained=sum(one.nbytes for one in own),
        trained_parameters=sum(one.numel() for one in own),
        parameters=sum(one.numel() for one in model.parameters()) + codes,
        largest_trained=max((one.numel() for one in own), default=0),
        kept=kept,
        peaks=peaks,
        evaluation=ledger.peak,
        step=step,
        predict=ledger.operations,
        state=optimizer_bytes(run.training.optimizer, own),
        largest_block=max((sum(one.nbytes for one in part.parameters()) for part in parts.values()), default=0),
        blocks=len(parts),
    )


def set_blocks(config: Any, blocks: int) -> None:
    """Make a configuration that of a model with so many blocks."""
    text = config.get_text_config()
    text.num_hidden_layers = blocks
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:blocks]


def _step(ledger: Ledger, model: nn.Module, run: Run, work: Workload) -> tuple[int, dict[str, int]]:
    """Forward and backward passes of the micro-batches; what is kept between them, and the peaks."""
    import torch

    objective = make_objective(run.task, run.training, model)
    weights = torch.tensor(work.class_weights)
    peaks = dict.fromkeys(PHASES, 0)
    trained = sum(one.nbytes for one in trained_parameters(model).values())
    kept = 0

    def enter(phase: str) -> None:
        ledger.peak = ledger.live
        mark.append(phase)

    def leave() -> None:
        peaks[mark[-1]] = max(peaks[mark[-1]], ledger.peak)

    def lowest(_: Any) -> None:
        leave()
        enter("lowest block")

    mark: list[str] = []
    model.train()
    as_run = engaged(model, run.engine, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]), as_run, _watched(model, lowest):
        for index, examples in enumerate(work.micro_batches):
            if index and trained < SMALL * ledger.live:
                # no longer than the first, beside gradients that weigh little
                peaks = {phase: peak + trained for phase, peak in peaks.items()}
                break
            batch = collate([run.task.for_epoch(one, 0) for one in examples], work.pad_id)
            for number in range(objective.passes):
                with ledger:
                    enter("forward")
                    before = ledger.live
                    loss = objective.loss(model, model, batch, weights, number)
                    if index == len(work.micro_batches) - 1 and (extra := run.method.penalty(model)) is not None:
                        loss = loss + extra
                    leave()
                    kept = max(kept, ledger.live - before)
                    enter("backward")
                    loss.backward()
                    leave()
                    del loss
    return kept, peaks


@contextlib.contextmanager
def _watched(model: nn.Module, call: Any) -> Iterator[None]:
    """Call when the backward pass comes to the lowest block."""
    blocks = block_modules(model, layout_for(_config(model).model_type))

    def watch(block: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(call)

    handle = next(iter(blocks.values())).register_forward_hook(watch) if blocks else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _autocast(model: Any, dtype: str) -> None:
    """What Accelerate makes of a model in mixed precision: a forward pass under autocast, its outputs in float32."""
    import torch
    from accelerate.utils import convert_outputs_to_fp32

    forward = torch.autocast("cpu", getattr(torch, dtype))(model.forward)
    model.forward = convert_outputs_to_fp32(forward)


def _buffers(module: nn.Module) -> int:
    return sum(one.nbytes for one in module.buffers(recurse=False))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    import torch

    model.eval()
    with torch.no_grad():
        yield
    model.train()


def _labels(run: Run, work: Workload) -> tuple[str, ...]:
    return tuple(map(str, range(len(work.class_weights)))) or ("",)


def _config(model: Any) -> Any:
    """The configuration of a transformers model, and of one that peft wrapped."""
    return model.config if not hasattr(model, "get_base_model") else model.get_base_model().config
