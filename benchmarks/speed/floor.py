"""The least time that a step could take: its arithmetic at the measured matrix rate, and the bytes that must move.

    FLOPs = Σ 2 · inputs · outputs · rows · (1 + [its input needs a gradient] + [it trains])
            + 12 · attended width · Σ length² · layers (half of it under a causal mask)

over all linear layers, which for LoRA is 2NT + 2N′T + Σ 6r(in + out)T + 4dVT′ + attention (N parameters of the blocks,
N′ of them above the lowest adapter, T tokens, T′ supervised ones), and for full fine-tuning 6NT + 6dVT′ + attention.
Rows are real tokens, examples for what reads one position of each, and supervised tokens for a language model's head.

Bytes: each frozen weight, embedded token, kept activation and gradient once. Kept are the input of each group of
products, what attends (queries, keys, values) and what goes into the feed-forward network's nonlinearity; gradients
are of the outputs of each product. Trained weights and their gradients are in float32.

Techniques that leave work out altogether may come below this floor: of the last block, only what is read need be
computed. `unread_flops` says how much that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.speed.products import Product, Shapes

BYTES = {"float32": 4, "bfloat16": 2}
RESIDUAL = ("output", "down")
"""Roles whose outputs are added to the residual stream, and kept as the next group's input only."""
FOR_ALL_TOKENS = ("key", "value")
"""Roles of the last block that every token is needed for."""


@dataclass(frozen=True)
class Amount:
    """How much a step reads, on average."""

    tokens: float
    examples: float
    supervised: float
    """Tokens with a label, in language models."""
    squares: float
    """Σ length² over examples."""

    def rows(self, product: Product) -> float:
        """How many rows a product has."""
        counts = {"token": self.tokens, "example": self.examples, "supervised": self.supervised}
        return counts[product.rows]


def flops(shapes: Shapes, amount: Amount) -> dict[str, float]:
    """The arithmetic of a step, part by part."""
    parts: dict[str, float] = {}
    for one in shapes.products:
        whose = "trained" if one.trains else "frozen"
        size = one.size * amount.rows(one)
        for what, needed in (
            ("forward", True),
            ("gradients of inputs", one.needs_input_gradient),
            ("gradients of weights", one.trains),
        ):
            if needed:
                parts[f"{whose}: {what}"] = parts.get(f"{whose}: {what}", 0.0) + size
    return parts | {"attention": shapes.layers * 12 * shapes.attended * amount.squares / (2 if shapes.is_causal else 1)}


def unread_flops(shapes: Shapes, amount: Amount) -> float:
    """What of that is of positions of the last block that nobody reads."""
    read = amount.examples if shapes.reads_one else amount.supervised if shapes.is_causal else amount.tokens
    last = (one for one in shapes.products if one.is_last and one.role not in FOR_ALL_TOKENS)
    return sum(one.size * (amount.tokens - read) * (1 + one.needs_input_gradient + one.trains) for one in last)


def moved(shapes: Shapes, amount: Amount, dtype: str) -> dict[str, float]:
    """The bytes that a step must move, part by part."""
    size = BYTES[dtype]
    blocks = [one for one in shapes.products if one.role and one.is_base]
    inputs = {one.group: one.inputs for one in blocks}
    kept = sum(inputs.values()) + sum(one.outputs for one in blocks if one.role not in RESIDUAL)
    frozen = sum(one.inputs * one.outputs for one in shapes.products if not one.trains)
    return {
        "frozen weights": size * frozen,
        "embedded tokens": size * amount.tokens * shapes.width,
        "kept activations": size * amount.tokens * kept,
        "gradients of activations": size * amount.tokens * sum(one.outputs for one in blocks),
        "trained weights and their gradients": 2 * 4 * shapes.trained,
    }


def floor(shapes: Shapes, amount: Amount, rates: dict[str, float], dtype: str) -> dict[str, Any]:
    """The whole list for frozen weights and activations of `dtype`, with the seconds and tokens a second it comes to.

    Args:
        rates: arithmetic a second by dtype, and `bandwidth` in bytes a second.
    """
    arithmetic, traffic = flops(shapes, amount), moved(shapes, amount, dtype)
    unread = unread_flops(shapes, amount)
    seconds = sum(arithmetic.values()) / rates[dtype] + sum(traffic.values()) / rates["bandwidth"]
    shorter = seconds - unread / rates[dtype]
    return {
        "flops": arithmetic,
        "bytes": traffic,
        "flops_a_second": rates[dtype],
        "bytes_a_second": rates["bandwidth"],
        "seconds": seconds,
        "tokens_per_second": amount.tokens / seconds,
        "matrix_tokens_per_second": amount.tokens * rates[dtype] / sum(arithmetic.values()),
        "unread_flops": unread,
        "tokens_per_second_without_unread": amount.tokens / shorter,
    }


def listed(floors: dict[str, Any], tokens: float) -> list[str]:
    """The list as lines of text, for each dtype."""
    lines = []
    for dtype, one in floors.items():
        lines.append(f"floor in {dtype}, a step of {tokens:,.0f} tokens:")
        lines += [f"  {amount / 1e9:10.2f} GFLOP  {name}" for name, amount in one["flops"].items()]
        lines += [f"  {amount / 1e6:10.1f} MB     {name}" for name, amount in one["bytes"].items()]
        lines.append(
            f"  at {one['flops_a_second'] / 1e9:,.0f} GFLOP/s and {one['bytes_a_second'] / 1e9:,.1f} GB/s: "
            f"{one['seconds']:.3f} s, {one['tokens_per_second']:,.0f} tokens/s "
            f"({one['tokens_per_second_without_unread']:,.0f} without what nobody reads in the last block)"
        )
    return lines
