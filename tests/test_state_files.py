"""State as safetensors and JSON: what is read is what was written, kind by kind and bit by bit."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftkit.errors import ArtifactError
from peftkit.training.random_state import random_state, restore_random_state
from peftkit.training.state_files import read_tree, write_tree

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
FLOATS = (0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, math.inf, -math.inf, math.nan)
PLAIN: tuple[Any, ...] = (None, True, False, 0, 1, -7, 2**70, "", "tensor", "ä\ud7ff\n", *FLOATS)


def drawn(chance: random.Random, depth: int = 4) -> Any:
    """A tree of everything that a state may be made of."""
    kind = chance.choice(["plain", "tensor"] if depth == 0 else ["plain", "tensor", "list", "tuple", "dict"])
    if kind == "plain":
        return chance.choice(PLAIN)
    if kind == "tensor":
        shape = [chance.randrange(4) for _ in range(chance.randrange(4))]
        return (torch.randn(shape) * 100).to(chance.choice(DTYPES))
    if kind == "dict":
        keys = chance.sample([0, 1, 17, "0", "state", "tensor", "dict", "float", ""], chance.randrange(5))
        return {key: drawn(chance, depth - 1) for key in keys}
    items = [drawn(chance, depth - 1) for _ in range(chance.randrange(4))]
    return items if kind == "list" else tuple(items)


def same(one: Any, other: Any) -> bool:
    """Equal in kind, order and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one.hex() == other.hex()
    return bool(one == other)


def kept(tree: Any, folder: Path) -> Any:
    write_tree(tree, folder, "tree")
    return read_tree(folder, "tree")


@pytest.mark.parametrize("seed", range(40))
def test_any_tree_comes_back_as_it_was(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    tree = drawn(random.Random(seed))
    assert same(kept(tree, tmp_path), tree)


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_every_plain_value_comes_back_as_it_was(value: Any, tmp_path: Path) -> None:
    assert same(kept({"value": value, 3: (value,)}, tmp_path), {"value": value, 3: (value,)})


def test_what_is_there_twice_is_one_tensor_and_parts_are_written_alone(tmp_path: Path) -> None:
    table = torch.arange(1000.0)
    back = kept({"a": table, "b": table, "part": table[5:7], "turned": torch.ones(2, 3).t()}, tmp_path)
    assert back["a"] is back["b"]
    assert torch.equal(back["part"], torch.tensor([5.0, 6.0]))
    assert back["turned"].shape == (3, 2)
    assert (tmp_path / "tree.safetensors").stat().st_size < 4 * 1000 + 500


def test_an_optimizers_state_comes_back_as_it_was(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert state["state"][0]["step"].shape == ()
    assert same(kept(state, tmp_path), state)


@pytest.mark.parametrize("value", [object(), {1.5: 1}, {True: 1}, np.float32(1), {1, 2}, b"bytes", torch.float32])
def test_what_cannot_come_back_is_not_written(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a checkpoint cannot hold"):
        write_tree({"value": value}, tmp_path, "tree")


def test_damaged_values_are_told(tmp_path: Path) -> None:
    write_tree([1, 2], tmp_path, "tree")
    (tmp_path / "tree.json").write_text('{"tree": [1, 2')
    with pytest.raises(ArtifactError, match=r"tree\.json is damaged"):
        read_tree(tmp_path, "tree")


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    def numbers() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.normal(), float(torch.rand(())), float(torch.randn(()))]

    numbers()  # the second of a pair of Gaussian numbers waits now
    state = random_state()
    expected = [numbers() for _ in range(3)]
    restore_random_state(kept(state, tmp_path))
    assert [numbers() for _ in range(3)] == expected
