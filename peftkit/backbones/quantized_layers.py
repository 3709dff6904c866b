"""Linear layers whose weights bitsandbytes packs, the same in training and evaluation on every device.

They are bitsandbytes' own classes, which peft knows, with another forward pass. Three faults of the originals on a CPU
do not get here: the first evaluation packs 4-bit weights anew, and training then gets no gradients; what was packed
anew is unpacked wrongly by a merge; and rows of weights that are no multiple of the block are unpacked wrongly.
"""

from __future__ import annotations

import copy
from typing import Any, get_args

import bitsandbytes
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkit.backbones.quantization import FourBit, Int8, Quantization
from peftkit.errors import BackboneError

NESTED_BLOCK = 256
"""Blocks whose magnitudes share a scale in double quantisation."""
LARGEST = 127.0


class FourBitLinear(Linear4bit):
    """x Wᵀ + b, where W (outputs, inputs) is unpacked for each product and nothing is kept for the backward pass."""

    was_transposed = False
    quant_state: Any

    def forward(self, x: Tensor) -> Tensor:
        # the module's state, not the parameter's: sharding puts a plain parameter in the place of the packed one
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return bitsandbytes.matmul_4bit(x.to(dtype), self.weight, self.quant_state, bias=bias).to(x.dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """W, with the values that its codes stand for."""
        state = copy.copy(self.quant_state)
        state.dtype = dtype
        return functional.dequantize_4bit(self.weight.data, state)


class EightBitLinear(Linear8bitLt):
    """The same, with W = codes · scale / 127 for each output row."""

    was_transposed = False
    compute_dtype: torch.dtype
    scales: Tensor
    """One for each output; the largest magnitude of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        product: Tensor = _Product.apply(x.to(dtype), self.weight, bias, self)
        return product.to(x.dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """W, with the values that its codes stand for."""
        return (self.weight.data.float() * (self.scales / LARGEST)[:, None]).to(dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ + b for a layer that unpacks W; both passes unpack it, so that no copy of it lives between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        ctx.layer, ctx.bias_dtype = layer, None if bias is None else bias.dtype
        return nn.functional.linear(x, layer.unpacked(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (gradient,) = gradients
        needs_input, _, needs_bias, _ = ctx.needs_input_grad
        of_input = gradient @ ctx.layer.unpacked(gradient.dtype) if needs_input else None
        of_bias = gradient.flatten(0, -2).sum(0, dtype=ctx.bias_dtype) if needs_bias else None
        return of_input, None, of_bias, None


def packing_device(model: nn.Module) -> torch.device:
    """Where weights are packed: a GPU is a hundred times as fast as a core, and they go there anyway."""
    own = next(model.parameters()).device
    return torch.device("cuda", torch.cuda.current_device()) if own.type == "cpu" and torch.cuda.is_available() else own


def pack(name: str, module: Any, settings: Quantization, device: torch.device) -> nn.Module:
    """A packed layer with the weights of a linear one (or of GPT-2's `Conv1D`), which it takes the place of.

    Raises:
        BackboneError: blocks that do not fit its rows.
    """
    transposed = isinstance(module, Conv1D)
    weight = (module.weight.data.T.contiguous() if transposed else module.weight.data).to(device)
    if isinstance(settings, FourBit):
        refuse_ragged(name, weight.shape[1], settings.block_size)
        layer = _four_bit(weight, settings)
    else:
        layer = _eight_bit(weight, settings)
    layer.bias = module.bias if module.bias is None else nn.Parameter(module.bias.data.to(device))
    layer.was_transposed = transposed
    layer.train(module.training).weight.requires_grad_(False)
    return layer


def unpack(layer: Any) -> nn.Module:
    """The plain layer, in float32, with the weights that a packed one multiplies by."""
    weight, has_bias = layer.unpacked(layer.compute_dtype or torch.float32).float(), layer.bias is not None
    plain: Any
    if layer.was_transposed:
        plain, weight = Conv1D(layer.out_features, layer.in_features), weight.T.contiguous()
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, has_bias, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if has_bias:
        plain.bias = nn.Parameter(layer.bias.data.float(), requires_grad=layer.bias.requires_grad)
    return plain.train(layer.training)


def rows_of(layer: Any, rows: Tensor) -> nn.Module:
    """A packed layer of some outputs of another, with exactly their codes and magnitudes."""
    place = rows.to(layer.weight.device)
    if isinstance(layer, EightBitLinear):
        part: Any = _eight_bit_layer(layer.weight.data[place], layer.scales[place], layer.compute_dtype)
    else:
        part = _four_bit_rows(layer, place)
    part.bias = None if layer.bias is None else nn.Parameter(layer.bias.data[place].clone(), layer.bias.requires_grad)
    return part.train(layer.training)


def adopt(module: Any) -> None:
    """Give one of bitsandbytes' own 4-bit layers the forward pass of ours; leave every other module alone.

    Raises:
        BackboneError: blocks that do not fit its rows, whose weights the CPU has wrong.
    """
    stock = type(module) in (Linear4bit, bitsandbytes.nn.LinearNF4, bitsandbytes.nn.LinearFP4)
    if stock and module.weight.quant_state is not None:
        refuse_ragged(type(module).__name__, module.in_features, module.weight.quant_state.blocksize)
        module.state_dict()  # the one public way to undo the packing of an evaluation on a CPU
        module.__class__, module.quant_state = FourBitLinear, module.weight.quant_state


def refuse_ragged(name: str, inputs: int, block_size: int) -> None:
    """Refuse blocks that reach over the end of a row.

    Raises:
        BackboneError: names the layer, and the largest block size that fits.
    """
    if inputs % block_size:
        fitting = [size for size in get_args(FourBit.model_fields["block_size"].annotation) if inputs % size == 0]
        mend = f"use {max(fitting)} or less" if fitting else "use int8"
        raise BackboneError(
            f"blocks of {block_size} weights do not fit the {inputs} inputs of '{name}', and bitsandbytes unpacks such "
            f"weights wrongly on a CPU; {mend}"
        )


def packed_bytes(layer: FourBitLinear | EightBitLinear) -> int:
    """Bytes of codes and of whatever they are scaled by; without the bias."""
    if isinstance(layer, EightBitLinear):
        return layer.weight.nbytes + layer.scales.nbytes
    state = layer.quant_state
    scales = [state.absmax, state.state2.absmax] if state.nested else [state.absmax]
    return layer.weight.nbytes + sum(one.nbytes for one in scales)


def kind_of(layer: Any) -> str:
    """How a layer is packed, in words."""
    if isinstance(layer, EightBitLinear):
        return str(Int8())
    state = layer.quant_state
    return str(FourBit(kind=state.quant_type, double=state.nested, block_size=state.blocksize))


def _four_bit(weight: Tensor, settings: FourBit) -> Any:
    if weight.is_meta:
        return _four_bit_layer(*_four_bit_shapes(weight, settings), settings)
    packed, state = functional.quantize_4bit(
        weight,
        blocksize=settings.block_size,
        compress_statistics=settings.double,
        quant_type=settings.kind,
        quant_storage=getattr(torch, settings.storage_dtype),
    )
    return _four_bit_layer(packed, state, settings)


def _four_bit_shapes(weight: Tensor, settings: FourBit) -> tuple[Tensor, Any]:
    """What bitsandbytes would make of a weight, without values: asked itself, it keeps tables without values too."""

    def empty(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    blocks = -(-weight.numel() // settings.block_size)
    nested = functional.QuantState(
        absmax=empty(-(-blocks // NESTED_BLOCK)), blocksize=NESTED_BLOCK, code=empty(256), dtype=torch.float32
    )
    state = functional.QuantState(
        absmax=empty(blocks, torch.uint8 if settings.double else torch.float32),
        shape=weight.shape,
        code=empty(16),
        blocksize=settings.block_size,
        quant_type=settings.kind,
        dtype=weight.dtype,
        offset=torch.empty((), device="meta") if settings.double else None,
        state2=nested if settings.double else None,
    )
    storage = getattr(torch, settings.storage_dtype)
    return torch.empty((-(-weight.numel() // (2 * storage.itemsize)), 1), dtype=storage, device="meta"), state


def _four_bit_layer(packed: Tensor, state: Any, settings: FourBit) -> Any:
    outputs, inputs = state.shape
    layer = FourBitLinear(inputs, outputs, False, getattr(torch, settings.compute_dtype), device="meta")
    _put_codes(layer, packed, state)
    return layer


def _put_codes(layer: Any, packed: Tensor, state: Any) -> None:
    layer.weight = Params4bit(
        packed,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=packed.dtype,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state, layer.quant_storage = state, packed.dtype


def _four_bit_rows(layer: Any, rows: Tensor) -> Any:
    state = layer.quant_state
    outputs, inputs = state.shape
    storage = layer.weight.dtype
    codes = layer.weight.data.view(torch.uint8).view(outputs, -1)[rows].flatten().view(storage)[:, None]
    selected = functional.QuantState(
        absmax=_magnitudes(state).view(outputs, -1)[rows].flatten(),
        shape=torch.Size((len(rows), inputs)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    part = FourBitLinear(inputs, len(rows), False, layer.compute_dtype, device="meta")
    _put_codes(part, codes, selected)
    return part


def _magnitudes(state: Any) -> Tensor:
    """The largest magnitude of each block, in float32."""
    if not state.nested:
        return state.absmax
    return functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


def _eight_bit(weight: Tensor, settings: Int8) -> Any:
    if weight.is_meta:
        codes, scales = torch.empty_like(weight, dtype=torch.int8), torch.empty(len(weight), device="meta")
    else:
        # as bitsandbytes does, which would round weights to float16 first and has no code for a row of zeros
        scales = weight.abs().amax(1).float()
        codes = torch.round(weight.float() * (LARGEST / scales.clamp_min(torch.finfo(torch.float32).tiny))[:, None])
        codes = codes.to(torch.int8)
    return _eight_bit_layer(codes, scales, getattr(torch, settings.compute_dtype))


def _eight_bit_layer(codes: Tensor, scales: Tensor, compute_dtype: torch.dtype) -> Any:
    layer: Any = EightBitLinear(codes.shape[1], codes.shape[0], False, has_fp16_weights=False, device="meta")
    layer.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    layer.compute_dtype = compute_dtype
    layer.register_buffer("scales", scales, persistent=False)
    return layer
