"""What becomes of sound input: trees, texts and bytes with a few changes, most of them to what has a meaning."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

MOST_NESTED = 3000
# fmt: off
TEXTS = (
    "", " ", "\n", "\t", "\r", "\0", "\x1b[2J", "\x85", "\u2028", "\ufeff", "\ud800", "é", "🙂", "١٢", "a" * 300,
    "x" * 5000, "null", "~", "no", "yes", "NaN", "1e400", "0x10", "1_000", "1e-4", "-0", "<<", "*", "&a", "!!int", "{",
    "[", "%s", "{0}", "..", "../../x", "/", "/dev/null", "/nowhere/at/all", "${HOME}", "${NOT_SET}", "bundled:",
    "bundled:minilm", "hub/name", "O", "B-PER", "I-LOC", "(a+)+$", "LORA", "AutoModel", "kind", "lora", "peft", "all",
)
NUMBERS = (
    0, 1, -1, 2, 7, 255, 65_537, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, -0.5, 1e-320, 1e308, -1e308,
    float("inf"), float("nan"),
)
# fmt: on
VALUES = st.one_of(
    st.sampled_from(TEXTS),
    st.sampled_from(NUMBERS),
    st.sampled_from([None, True, False, [], {}, [[]], [None], {"a": 1}, {"kind": "lora"}, {"": {}}]),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.sampled_from([*TEXTS, *NUMBERS]), max_size=4),
)
"""Leaves, and small trees, that stand where something else is expected."""


def changed_tree(draw: st.DrawFn, tree: Any, most: int = 3, nested: int = MOST_NESTED) -> Any:
    """A tree of dictionaries and lists with up to `most` changes, and perhaps a place that is nested deeply."""
    changed = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(changed))
        if not places:
            return _value(draw)
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        _change(draw, holder, key, [at[name] for at, name in places])
    places = list(_places(changed))
    if places and draw(st.integers(0, 19)) == 7:
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        for _ in range(draw(st.integers(2, nested))):
            holder[key] = [holder[key]]
    return changed


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) of a tree."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def _change(draw: st.DrawFn, holder: Any, key: Any, others: Sequence[Any]) -> None:
    match draw(st.sampled_from(("value", "value", "drop", "rename", "add", "wrap", "repeat", "other"))):
        case "value":
            holder[key] = _value(draw)
        case "drop":
            del holder[key]
        case "rename" if isinstance(holder, dict):
            holder[_named(draw, key)] = holder.pop(key)
        case "add" if isinstance(holder, dict):
            holder[_named(draw, key)] = _value(draw)
        case "wrap":
            holder[key] = [holder[key]] if draw(st.booleans()) else {str(key): holder[key]}
        case "repeat" if isinstance(holder[key], (list, str)):
            holder[key] = holder[key] * draw(st.sampled_from((2, 3, 50)))
        case "other":
            holder[key] = copy.deepcopy(others[draw(st.integers(0, len(others) - 1))])
        case _:
            holder[key] = _value(draw)


def _value(draw: st.DrawFn) -> Any:
    """A copy, because the next change may be inside of it."""
    return copy.deepcopy(draw(VALUES))


def _named(draw: st.DrawFn, key: Any) -> str:
    """A key like the one there is, or another."""
    name, cut = str(key), draw(st.integers(0, len(str(key))))
    return draw(
        st.one_of(
            st.just(name[:cut] + name[cut + 1 :]),
            st.just(f"{name[:cut]}{draw(st.characters())}{name[cut:]}"),
            st.sampled_from(TEXTS),
            st.text(max_size=10),
        )
    )


def changed_bytes(draw: st.DrawFn, content: bytes, tokens: Sequence[bytes] = (b"\0", b"\xff"), most: int = 3) -> bytes:
    """Bytes with up to `most` changes; `tokens` have a meaning in their format."""
    changed = content
    for _ in range(draw(st.integers(1, most))):
        start, other = (draw(st.integers(0, len(changed))) for _ in range(2))
        stop = min(len(changed), start + draw(st.sampled_from((0, 1, 1, 2, 8, 100, 10**6))))
        piece = changed[start:stop]
        match draw(st.sampled_from(("insert", "replace", "insert token", "cut", "flip", "repeat", "move", "end"))):
            case "insert":
                changed = changed[:start] + draw(st.binary(max_size=20)) + changed[start:]
            case "replace":
                changed = changed[:start] + draw(st.binary(max_size=len(piece) or 1)) + changed[stop:]
            case "insert token":
                times = draw(st.sampled_from((1, 1, 2, 100)))
                changed = changed[:start] + draw(st.sampled_from(tokens)) * times + changed[start:]
            case "cut":
                changed = changed[:start] + changed[stop:]
            case "flip" if start < len(changed):
                bit = changed[start] ^ (1 << draw(st.integers(0, 7)))
                changed = changed[:start] + bytes([bit]) + changed[start + 1 :]
            case "repeat":
                changed = changed[:start] + piece * draw(st.sampled_from((2, 20))) + changed[stop:]
            case "move":
                changed = changed[:other] + piece + changed[other:]
            case _:
                changed = changed[:start]
    return changed[: 2**20]
