"""Damage to the files of a folder, drawn by a seed; every one changes bytes, and none leaves an intact older copy."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRIES = 200
BLOCK = 512
"""Bytes: what a disk writes or loses at once."""


@dataclass(frozen=True)
class Mutation:
    """What was done, and the files of which one must be named by whoever notices it."""

    kind: str
    files: tuple[str, ...]


class NothingDone(Exception):
    """This kind of damage does not fit these files; draw again."""


def mutate(folder: Path, other: Path, names: Sequence[str], kind: str, draw: random.Random) -> Mutation:
    """Damage one or two of the files `names` in `folder`.

    Args:
        other: a folder of an older checkpoint, or of another adapter, for stale mixes.
        kind: a key of `KINDS`.

    Raises:
        NothingDone: no file can be damaged in this way.
    """
    before = {name: (folder / name).read_bytes() for name in names}
    for _ in range(TRIES):
        try:
            touched = KINDS[kind](folder, other, names, draw)
        except NothingDone:
            continue
        if any(_differs(folder / name, before[name]) for name in touched if name in before):
            return Mutation(kind, touched)
        for name, content in before.items():
            (folder / name).write_bytes(content)
    raise NothingDone(f"{kind} fits none of {', '.join(names)}")


def _differs(file: Path, before: bytes) -> bool:
    """Whether a file says something else than before: JSON that is only written otherwise says the same."""
    if not file.is_file():
        return True
    content = file.read_bytes()
    if content == before:
        return False
    try:
        return bool(json.loads(content) != json.loads(before))
    except (ValueError, RecursionError):
        return True


def _delete(folder: Path, other: Path, names: Sequence[str], draw: random.Random) -> tuple[str, ...]:
    name = draw.choice(names)
    (folder / name).unlink()
    return (name,)


def _rename(folder: Path, other: Path, names: Sequence[str], draw: random.Random) -> tuple[str, ...]:
    name = draw.choice(names)
    new = draw.choice([f"{name}.bak", f"{name}~", f"_{name}", name.upper()])
    if "/" in name:
        new = f"{name}.bak"
    (folder / name).rename(folder / new)
    return name, new


def _swap(folder: Path, other: Path, names: Sequence[str], draw: random.Random) -> tuple[str, ...]:
    if len(names) < 2:
        raise NothingDone
    one, two = draw.sample(list(names), 2)
    contents = (folder / one).read_bytes(), (folder / two).read_bytes()
    (folder / one).write_bytes(contents[1])
    (folder / two).write_bytes(contents[0])
    return one, two


def _stale(folder: Path, other: Path, names: Sequence[str], draw: random.Random) -> tuple[str, ...]:
    """Some of the files that differ are the other's: all of them would be the other one whole."""
    pairs = [(folder / name, other / name) for name in names]
    differing = [name for name, (new, old) in zip(names, pairs, strict=True) if _are_unlike(new, old)]
    if len(differing) < 2:
        raise NothingDone
    chosen = draw.sample(differing, draw.randrange(1, len(differing)))
    for name in chosen:
        (folder / name).write_bytes((other / name).read_bytes())
    return tuple(chosen)


def _are_unlike(new: Path, old: Path) -> bool:
    return new.is_file() and old.is_file() and _differs(new, old.read_bytes())


def _torn(content: bytes, old: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(1, max(2, len(content)))
    return content[:place] + old[place:]


def _truncate(content: bytes, old: bytes, draw: random.Random) -> bytes:
    if len(content) < 2:
        raise NothingDone
    return content[: draw.choice([len(content) - 1, draw.randrange(len(content)), draw.randrange(len(content))])]


def _flip(content: bytes, first: int, last: int, draw: random.Random) -> bytes:
    if first >= last:
        raise NothingDone
    changed = bytearray(content)
    changed[draw.randrange(first, last)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _header_end(content: bytes) -> int:
    """Where what describes a file ends and its data begin; safetensors say it, of others it is the first block."""
    length = int.from_bytes(content[:8], "little") + 8
    return length if length < len(content) else min(len(content), 64)


def _flip_header(content: bytes, old: bytes, draw: random.Random) -> bytes:
    return _flip(content, 0, _header_end(content), draw)


def _flip_data(content: bytes, old: bytes, draw: random.Random) -> bytes:
    return _flip(content, _header_end(content), len(content), draw)


def _zero_block(content: bytes, old: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(max(1, len(content)))
    end = min(len(content), start + draw.choice([1, 8, BLOCK, 8 * BLOCK]))
    return content[:start] + bytes(end - start) + content[end:]


def _zero_tail(content: bytes, old: bytes, draw: random.Random) -> bytes:
    """What a machine without power leaves: the size is written, the last blocks are not."""
    start = draw.randrange(max(1, len(content)))
    return content[:start] + bytes(len(content) - start)


def _append(content: bytes, old: bytes, draw: random.Random) -> bytes:
    return content + b"\x01" + draw.randbytes(draw.choice([0, 7, BLOCK, 8 * BLOCK]))


def _lost_block(content: bytes, old: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(max(1, len(content)))
    return content[:start] + content[start + draw.choice([1, 8, BLOCK]) :]


def _json_value(content: bytes, old: bytes, draw: random.Random) -> bytes:
    try:
        tree = json.loads(content)
    except ValueError:
        raise NothingDone from None
    places = list(_leaves(tree))
    if not places:
        raise NothingDone
    holder, key = draw.choice(places)
    holder[key] = _other_value(holder[key], draw)
    return json.dumps(tree, indent=2 if b"\n" in content else None).encode()


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    """Every value of a tree that is no object or list, as what holds it and its key there."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found: list[tuple[Any, Any]] = []
    for key, value in pairs:
        found += _leaves(value) if isinstance(value, (dict, list)) and value else [(tree, key)]
    return found


def _other_value(value: Any, draw: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return draw.choice([value + 1, value * 2 + 1, -value - 1])
    if isinstance(value, str):
        return value + draw.choice(["x", ".1", "_"])
    return draw.choice([0, True, "x"])


def _content(change: Callable[[bytes, bytes, random.Random], bytes]) -> Callable[..., tuple[str, ...]]:
    """Damage to what one file holds."""

    def damage(folder: Path, other: Path, names: Sequence[str], draw: random.Random) -> tuple[str, ...]:
        name = draw.choice(names)
        file, old = folder / name, other / name
        file.write_bytes(change(file.read_bytes(), old.read_bytes() if old.is_file() else b"", draw))
        return (name,)

    return damage


KINDS: dict[str, Callable[[Path, Path, Sequence[str], random.Random], tuple[str, ...]]] = {
    "delete": _delete,
    "rename": _rename,
    "swap": _swap,
    "stale": _stale,
    "torn": _content(_torn),
    "empty": _content(lambda content, old, draw: b""),
    "truncate": _content(_truncate),
    "flip header": _content(_flip_header),
    "flip data": _content(_flip_data),
    "zero block": _content(_zero_block),
    "zero tail": _content(_zero_tail),
    "append": _content(_append),
    "lost block": _content(_lost_block),
    "json value": _content(_json_value),
}
"""Kinds of damage by name."""
