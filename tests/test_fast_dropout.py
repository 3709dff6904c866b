"""Dropout from wide random words and by compiled code: its rate, its independence, its reproducibility, and its
gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from peftkit.engine import compiled
from peftkit.engine.compiled_dropout import add_dropped, dropped
from peftkit.engine.dropout import Draw, drawn_seed, dropout, fast_dropout, is_seed, keep_mask, masked

RATES = (0.001, 0.05, 0.1, 0.25, 1 / 3, 0.5, 0.9, 0.9999)
NO_COMPILER = pytest.mark.skipif(bool(compiled.why_not()), reason=compiled.why_not())
DRAWS = pytest.mark.parametrize("draw", [keep_mask, pytest.param(drawn_seed, marks=NO_COMPILER)])


def stays(draw: Draw, shape: tuple[int, ...], rate: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """1 where something stays, else 0."""
    ones = torch.ones(shape, dtype=dtype)
    return masked(ones, draw(ones, rate))


@DRAWS
@pytest.mark.parametrize("rate", RATES)
def test_the_rate_is_exact(draw: Draw, rate: float) -> None:
    """Within five standard errors, of which one is below 10⁻⁴; 1/256 off would be forty."""
    torch.manual_seed(0)
    count = 2**24
    dropped = count - int(stays(draw, (count,), rate).sum(dtype=torch.float64))
    assert abs(dropped / count - rate) < 5 * math.sqrt(rate * (1 - rate) / count)


@DRAWS
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_elements_fall_independently_of_each_other(draw: Draw, rate: float) -> None:
    """Of words, bytes of a word and rows, no two places go together more than chance has it."""
    torch.manual_seed(0)
    mask = stays(draw, (2**20, 16), rate).double()
    error = 1 / math.sqrt(len(mask))
    assert (mask.mean(0) - (1 - rate)).abs().max() < 6 * error
    assert (torch.corrcoef(mask.T) - torch.eye(16)).abs().max() < 6 * error
    rows = mask.sum(1)
    assert abs(rows.var() / (16 * rate * (1 - rate)) - 1) < 0.02
    assert abs(torch.corrcoef(torch.stack([rows[1:], rows[:-1]]))[0, 1]) < 6 * error


@DRAWS
def test_nothing_goes_together_at_any_distance(draw: Draw) -> None:
    """Of rows of the usual widths, blocks of a seed's places, and two draws."""
    torch.manual_seed(0)
    rate, count = 0.1, 2**24
    first, second = (stays(draw, (count,), rate) - (1 - rate) for _ in range(2))
    error = rate * (1 - rate) / math.sqrt(count)
    for distance in (*range(1, 40), 64, 128, 384, 768, 1536, 3072, 4095, 4096, 4097, 8192, 65536):
        assert abs((first[:-distance] * first[distance:]).mean(dtype=torch.float64)) < 5.5 * error, distance
    assert abs((first * second).mean(dtype=torch.float64)) < 5 * error
    for size in (16, 256, 4096):
        sums = first.view(-1, size).sum(1, dtype=torch.float64)
        assert abs(sums.var() / (size * rate * (1 - rate)) - 1) < 5 * math.sqrt(2 / len(sums)), size


@DRAWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1,), (7,), (3, 5, 7), (3, 4096), (100, 1000)])
def test_every_shape(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = stays(draw, shape, 0.3, dtype)
    assert found.shape == shape
    assert found.dtype == dtype
    assert set(found.flatten().tolist()) <= {0, 1}


def test_a_mask_is_of_bytes() -> None:
    mask = keep_mask(torch.empty(3, 5, 7), 0.3)
    assert mask.dtype == torch.uint8
    assert mask.untyped_storage().nbytes() <= mask.numel() + 8


@NO_COMPILER
class TestCompiled:
    def test_what_is_drawn_is_a_seed_where_there_is_code_for_the_values(self) -> None:
        assert is_seed(drawn_seed(torch.empty(8), 0.1))
        assert is_seed(drawn_seed(torch.empty(8, dtype=torch.bfloat16), 0.1))
        for values, rate in ((torch.empty(8).double(), 0.1), (torch.empty(8).half(), 0.1), (torch.empty(8), 0.995)):
            assert not is_seed(drawn_seed(values, rate))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_values_are_what_a_mask_makes_of_them(self, dtype: torch.dtype) -> None:
        seed = drawn_seed(torch.empty(1), 0.3)
        values = torch.randn(37, 1111, dtype=torch.float64).to(dtype)
        mask = dropped(torch.ones_like(values), seed).to(torch.uint8)
        assert 0.29 < 1 - mask.double().mean() < 0.31
        assert torch.equal(dropped(values, seed), masked(values, mask))
        assert torch.equal(dropped(values, seed, 1 / 0.7), masked(values, mask, 1 / 0.7))
        assert torch.equal(dropped(values.T, seed), dropped(values.T.contiguous(), seed))
        total = torch.randn(37, 1111, dtype=torch.float64).to(dtype)
        expected = total.addcmul(values, mask.to(dtype))
        add_dropped(total, values, seed, 0)
        assert torch.equal(total, expected)

    def test_a_part_drops_what_the_whole_does(self) -> None:
        values, seed = torch.randn(10_000), drawn_seed(torch.empty(1), 0.3)
        whole, parts = dropped(values, seed), torch.zeros(10_000)
        for first, end in ((0, 5), (5, 4095), (4095, 4100), (4100, 8192), (8192, 10_000)):
            add_dropped(parts[first:end], values[first:end], seed, first)
        assert torch.equal(parts, whole)

    def test_no_number_stays_no_number(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            values = torch.full((100,), math.nan, dtype=dtype)
            assert dropped(values, drawn_seed(values, 0.3)).isnan().all()


@DRAWS
def test_the_seed_decides(draw: Draw) -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append([stays(draw, (64,), 0.3).tolist() for _ in range(2)])
    assert masks[0] == masks[1] != masks[2]
    assert masks[0][0] != masks[0][1]


@DRAWS
def test_the_threads_do_not(request: pytest.FixtureRequest, draw: Draw) -> None:
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    masks = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        masks.append(stays(draw, (2**20,), 0.1))
    assert torch.equal(*masks)


@DRAWS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_go_through_one_mask(draw: Draw, dtype: torch.dtype) -> None:
    values = torch.randn(50, 8, dtype=dtype, requires_grad=True)
    torch.manual_seed(3)
    dropped = dropout(values.T, 0.25, draw)
    dropped.backward(torch.full_like(dropped, 3.0))
    torch.manual_seed(3)
    mask = stays(draw, (8, 50), 0.25, dtype).T
    assert dropped.dtype == dtype
    torch.testing.assert_close(dropped.T, values * mask / 0.75)
    torch.testing.assert_close(values.grad, 4.0 * mask)
    assert 0 < mask.sum() < mask.numel()


@DRAWS
def test_modules_of_a_model_draw_so_while_they_train_and_not_afterwards(draw: Draw) -> None:
    model = nn.Sequential(nn.Dropout(0.25), nn.Sequential(nn.Dropout(0.5)), nn.Dropout(1.0), nn.Dropout(0.0))
    values = torch.ones(1000)

    def after_seed(part: Any) -> torch.Tensor:
        torch.manual_seed(4)
        return part(values)

    plain = [after_seed(part) for part in model]
    with fast_dropout(model, draw):
        fast = [after_seed(part) for part in model]
        assert torch.equal(fast[0], after_seed(lambda given: dropout(given, 0.25, draw)))
        assert torch.equal(after_seed(model.eval()), values)
        model.train()
    assert not torch.equal(fast[0], plain[0])
    assert not torch.equal(fast[1], plain[1])
    assert torch.equal(fast[2], plain[2])
    assert torch.equal(fast[3], values)
    assert all(torch.equal(after_seed(part), before) for part, before in zip(model, plain, strict=True))
