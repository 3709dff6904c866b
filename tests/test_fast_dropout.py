"""Dropout from wide random words: its rate, its independence, its reproducibility, and its gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from peftkit.engine.dropout import dropout, fast_dropout, keep_mask

RATES = (0.001, 0.05, 0.1, 0.25, 1 / 3, 0.5, 0.9, 0.9999)


@pytest.mark.parametrize("rate", RATES)
def test_the_rate_is_exact(rate: float) -> None:
    """Within five standard errors, of which one is below 10⁻⁴; 1/256 off would be forty."""
    torch.manual_seed(0)
    count = 2**24
    dropped = count - int(keep_mask(torch.empty(count), rate).sum(dtype=torch.int64))
    assert abs(dropped / count - rate) < 5 * math.sqrt(rate * (1 - rate) / count)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_elements_fall_independently_of_each_other(rate: float) -> None:
    """Of words, bytes of a word and rows, no two places go together more than chance has it."""
    torch.manual_seed(0)
    mask = keep_mask(torch.empty(2**20, 16), rate).double()
    error = 1 / math.sqrt(len(mask))
    assert (mask.mean(0) - (1 - rate)).abs().max() < 6 * error
    assert (torch.corrcoef(mask.T) - torch.eye(16)).abs().max() < 6 * error
    rows = mask.sum(1)
    assert abs(rows.var() / (16 * rate * (1 - rate)) - 1) < 0.02
    assert abs(torch.corrcoef(torch.stack([rows[1:], rows[:-1]]))[0, 1]) < 6 * error


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1,), (7,), (3, 5, 7)])
def test_every_shape(shape: tuple[int, ...]) -> None:
    mask = keep_mask(torch.empty(shape), 0.3)
    assert mask.shape == shape
    assert mask.dtype == torch.uint8
    assert mask.untyped_storage().nbytes() <= mask.numel() + 8
    assert set(mask.flatten().tolist()) <= {0, 1}


def test_the_seed_decides() -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append([keep_mask(torch.empty(64), 0.3).tolist() for _ in range(2)])
    assert masks[0] == masks[1] != masks[2]
    assert masks[0][0] != masks[0][1]


def test_the_threads_do_not(request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    masks = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        masks.append(keep_mask(torch.empty(2**20), 0.1))
    assert torch.equal(*masks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_go_through_one_mask(dtype: torch.dtype) -> None:
    values = torch.randn(50, 8, dtype=dtype, requires_grad=True)
    torch.manual_seed(3)
    dropped = dropout(values.T, 0.25)
    dropped.backward(torch.full_like(dropped, 3.0))
    torch.manual_seed(3)
    mask = keep_mask(torch.empty(8, 50), 0.25).T.to(dtype)
    assert dropped.dtype == dtype
    torch.testing.assert_close(dropped.T, values * mask / 0.75)
    torch.testing.assert_close(values.grad, 4.0 * mask)
    assert 0 < mask.sum() < mask.numel()


def test_modules_of_a_model_draw_so_while_they_train_and_not_afterwards() -> None:
    model = nn.Sequential(nn.Dropout(0.25), nn.Sequential(nn.Dropout(0.5)), nn.Dropout(1.0), nn.Dropout(0.0))
    values = torch.ones(1000)

    def after_seed(part: Any) -> torch.Tensor:
        torch.manual_seed(4)
        return part(values)

    plain = [after_seed(part) for part in model]
    with fast_dropout(model):
        fast = [after_seed(part) for part in model]
        assert torch.equal(fast[0], after_seed(lambda given: dropout(given, 0.25)))
        assert torch.equal(after_seed(model.eval()), values)
        model.train()
    assert not torch.equal(fast[0], plain[0])
    assert not torch.equal(fast[1], plain[1])
    assert torch.equal(fast[2], plain[2])
    assert torch.equal(fast[3], values)
    assert all(torch.equal(after_seed(part), before) for part, before in zip(model, plain, strict=True))
