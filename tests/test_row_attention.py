"""Compiled attention over a row of examples: against the formula in float64, and what its dropout draws."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CAUSAL, SEQUENCE, Place
from test_padding_free import batch_of, computed, model_of
from torch import Tensor

from peftkit.backbones.attention import IN_ROW
from peftkit.engine import compiled
from peftkit.engine.compiled import library, why_not
from peftkit.engine.engage import fallbacks, shortened
from peftkit.engine.row_attention import LONGEST, attend_in_row, in_row
from peftkit.engine.settings import Engine
from peftkit.engine.unpadded import Unpadded
from peftkit.errors import BackboneError

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

LENGTHS = (70, 37, 33, 32, 17, 4, 1)
SPARE = 3
"""Tokens of the row that belong to no example."""
HEADS = {"heads": (4, 4, 32), "narrow": (2, 2, 20), "grouped": (6, 2, 64), "widest": (2, 1, 128)}
"""Heads of queries, of keys, and their width."""


def rows(shape: tuple[int, int, int], lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values in float64."""
    heads, key_heads, width = shape
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths) + SPARE
    sizes = ((tokens, one, width) for one in (heads, key_heads, key_heads))
    return [torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]


def formula(
    query: Tensor, key: Tensor, value: Tensor, causal: bool = False, factors: Sequence[Tensor] | None = None
) -> Tensor:
    """softmax(Q Kᵀ / √width) V, example by example; `factors` (heads, queries, keys) of each are dropout's."""
    found, start = [], 0
    for number, length in enumerate(LENGTHS):
        q, k, v = (one[start : start + length].transpose(0, 1) for one in (query, key, value))
        k, v = (one.repeat_interleave(len(q) // len(one), dim=0) for one in (k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if causal:
            scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
        weights = scores.softmax(-1)
        if factors is not None:
            weights = weights * factors[number]
        found.append((weights @ v).transpose(0, 1))
        start += length
    return torch.cat([*found, torch.zeros_like(query[start:])])


def with_gradients(attend: Callable[..., Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """What is attended, and the gradients of a sum over it in which each number counts differently."""
    leaves = [one.detach().requires_grad_() for one in given]
    output = attend(*leaves)
    weights = torch.arange(output.numel(), dtype=torch.float64).sin().view_as(output)
    weights[sum(LENGTHS) :] = 1e3  # of which nothing may come
    (output * weights.to(output.dtype)).sum().backward()
    return [output.detach(), *(one.grad for one in leaves if one.grad is not None)]


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, as a share of the largest number of its tensor."""
    assert [one.shape for one in found] == [one.shape for one in expected]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


class TestFormula:
    @pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
    @pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS)
    def test_outputs_and_gradients_in_float32(self, shape: tuple[int, int, int], causal: bool) -> None:
        given = rows(shape)
        expected = with_gradients(lambda *one: formula(*one, causal), given)
        found = with_gradients(lambda *one: attend_in_row(*one, LENGTHS, causal), [one.float() for one in given])
        assert distance(found, expected) < 2e-6
        assert not any(one[sum(LENGTHS) :].any() for one in found)

    @pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
    def test_in_bfloat16_only_what_goes_in_and_out_is_rounded(self, causal: bool) -> None:
        given = [one.bfloat16() for one in rows(HEADS["heads"])]
        expected = with_gradients(lambda *one: formula(*one, causal), [one.double() for one in given])
        found = with_gradients(lambda *one: attend_in_row(*one, LENGTHS, causal), given)
        assert {one.dtype for one in found} == {torch.bfloat16}
        assert distance([one.double() for one in found], expected) < 2**-7

    def test_heads_may_stand_in_any_order_in_memory(self) -> None:
        given = [one.float() for one in rows(HEADS["heads"])]
        together = torch.stack(given, dim=1).transpose(0, 2).contiguous().transpose(0, 2)  # (tokens, 3, heads, width)
        expected = with_gradients(lambda *one: attend_in_row(*one, LENGTHS), given)
        found = with_gradients(lambda one: attend_in_row(*one.unbind(1), LENGTHS), [together])
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], torch.stack(expected[1:], dim=1))
        last = [one.transpose(0, 2).contiguous().transpose(0, 2) for one in given]  # widths far apart
        assert torch.equal(attend_in_row(*last, LENGTHS), expected[0])

    def test_scores_of_any_size(self) -> None:
        query, key, value = (one.float() for one in rows(HEADS["heads"]))
        found = attend_in_row(query * 1e4, key, value, LENGTHS)
        assert distance([found], [formula(query.double() * 1e4, key.double(), value.double())]) < 1e-2
        assert attend_in_row(query, key, value, LENGTHS, scale=0.0)[:70].std(dim=0).max() < 1e-6

    def test_a_number_that_is_none_stays_in_its_example(self) -> None:
        given = [one.float() for one in rows(HEADS["heads"])]
        expected = attend_in_row(*given, LENGTHS)
        for number, bad in ((0, math.nan), (1, math.nan), (2, math.inf), (1, math.inf)):
            changed = [one.clone() for one in given]
            changed[number][75, 2, 5] = bad  # of the second example, the third head
            found = attend_in_row(*changed, LENGTHS)
            assert not found[75, 2].isfinite().all()
            found[70:107, 2] = expected[70:107, 2]
            assert torch.equal(found, expected)

    def test_gradients_of_the_others_neither(self) -> None:
        """What one example leaves in memory that is used again reaches no other."""
        given = [one.float() for one in rows(HEADS["grouped"])]
        expected = with_gradients(lambda *one: attend_in_row(*one, LENGTHS), given)
        for number in range(3):
            changed = [one.clone() for one in given]
            changed[number][:37] = math.nan
            changed[number][70:107] = math.inf
            found = with_gradients(lambda *one: attend_in_row(*one, LENGTHS), changed)
            assert not found[0][:107].isfinite().any(dim=-1).all()
            assert all(torch.equal(one[107:], other[107:]) for one, other in zip(found, expected, strict=True))

    def test_threads_change_no_bit(self) -> None:
        given = [one.float() for one in rows(HEADS["grouped"])]
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                torch.manual_seed(0)
                found.append(with_gradients(lambda *one: attend_in_row(*one, LENGTHS, dropout=0.1), given))
        finally:
            torch.set_num_threads(threads)
        assert all(map(torch.equal, *found))


def drawn(dropout: float, lengths: Sequence[int], heads: int = 4, causal: bool = False) -> list[Tensor]:
    """For each example what each weight was multiplied by, (heads, queries, keys), with the seed that is next."""
    width, tokens = 128, sum(lengths) + SPARE
    query = torch.zeros(tokens, heads, width)
    value = torch.cat([torch.eye(width)[:length] for length in (*lengths, SPARE)])[:, None].repeat(1, heads, 1)
    found = attend_in_row(query, query, value, lengths, causal, 1.0, dropout)  # all weights of a query are alike
    parts = found.split([*lengths, SPARE])[:-1]
    seen = [torch.full((length,), length) if not causal else torch.arange(1, length + 1) for length in lengths]
    return [
        (part[..., :length] * one[:, None, None]).transpose(0, 1)
        for part, length, one in zip(parts, lengths, seen, strict=True)
    ]


class TestDropout:
    @pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
    def test_rate(self, probability: float) -> None:
        torch.manual_seed(1)
        factors = torch.cat([one.flatten() for one in drawn(probability, [128] * 40)])
        kept = factors > 0
        assert torch.allclose(factors[kept], torch.tensor(1 / (1 - probability)), rtol=1e-5)
        error = math.sqrt(probability * (1 - probability) / len(kept))
        assert abs(float(kept.double().mean()) - (1 - probability)) < 4 * error

    def test_each_weight_by_itself(self) -> None:
        torch.manual_seed(2)
        kept = torch.stack(drawn(0.3, [128] * 40)).gt(0).double() - 0.7  # (examples, heads, queries, keys)
        again = torch.stack(drawn(0.3, [128] * 40)).gt(0).double() - 0.7
        past = torch.ones(128, 128).tril(-1).bool()
        pairs = {"next seed": (kept, again), "transposed": (kept[..., past], kept.transpose(2, 3)[..., past])}
        for dim, far in itertools.product(range(4), (1, 2, 3)):
            rest = kept.shape[dim] - far
            pairs[f"{far} apart in {dim}"] = kept.narrow(dim, far, rest), kept.narrow(dim, 0, rest)
        for name, (one, other) in pairs.items():
            products = one * other
            assert abs(float(products.mean()) / 0.21) < 5 / math.sqrt(products.numel()), name

    def test_counts_in_rows_and_columns_are_binomial(self) -> None:
        torch.manual_seed(3)
        kept = torch.stack(drawn(0.25, [128] * 40)).gt(0).double()
        for dim in (0, 1, 2, 3):
            counts = kept.sum(dim)
            size = kept.shape[dim]
            ratio = float(counts.var()) / (size * 0.25 * 0.75)
            assert abs(ratio - 1) < 6 * math.sqrt(2 / counts.numel()), dim

    def test_gradients_are_those_of_what_was_drawn(self) -> None:
        given = rows(HEADS["heads"])
        for causal in (False, True):
            torch.manual_seed(4)
            factors = [one.double() for one in drawn(0.2, LENGTHS, causal=causal)]
            expected = with_gradients(lambda *one, f=factors, c=causal: formula(*one, c, f), given)
            torch.manual_seed(4)
            found = with_gradients(
                lambda *one, c=causal: attend_in_row(*one, LENGTHS, c, dropout=0.2), [one.float() for one in given]
            )
            assert distance(found, expected) < 1e-5

    def test_a_seed_draws_the_same_again(self) -> None:
        for _ in range(2):
            torch.manual_seed(5)
            first = torch.cat([one.flatten() for one in drawn(0.5, [40])])
        torch.manual_seed(5)
        assert torch.equal(torch.cat([one.flatten() for one in drawn(0.5, [40])]), first)
        assert not torch.equal(torch.cat([one.flatten() for one in drawn(0.5, [40])]), first)


class TestModels:
    @pytest.mark.parametrize("place", [Place("bert", SEQUENCE), Place("llama", CAUSAL)], ids=str)
    def test_logits_and_gradients_are_those_of_the_padded_batch(self, place: Place) -> None:
        model = model_of(place).float()
        expected, wanted = computed(model, batch_of())
        with shortened(model, Engine(read_positions=False, supervised_loss=False)):
            assert sum(hasattr(part, IN_ROW) for part in model.modules()) == 2
            found, gradients = computed(model, batch_of())
        assert not any(hasattr(part, IN_ROW) for part in model.modules())
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        for name, gradient in gradients.items():
            assert (gradient - wanted[name]).abs().max() <= 1e-5 * max(1.0, float(wanted[name].abs().max())), name

    @pytest.mark.parametrize(
        "settings", [{"attention": "plain"}, {"attention": "sdpa"}, {"compiled_attention": False}], ids=str
    )
    def test_it_is_left_out_when_something_else_is_asked_for(self, settings: dict[str, Any]) -> None:
        model = model_of(Place("bert", SEQUENCE))
        with shortened(model, Engine(**settings)):
            assert not any(hasattr(part, IN_ROW) for part in model.modules())

    def test_where_there_is_no_code_or_no_gain_others_attend(self) -> None:
        def asked(dtype: torch.dtype, length: int, width: int, dropout: float) -> Tensor | None:
            given = [torch.randn(1, 2, length, width, dtype=dtype) for _ in range(3)]
            row = Unpadded(torch.ones(1, length, dtype=torch.long))
            return in_row(row, *given, causal=False, dropout=dropout, scaling=None)

        assert asked(torch.float32, LONGEST, 8, 0.0) is not None
        assert asked(torch.float32, LONGEST + 1, 8, 0.0) is None
        assert asked(torch.float32, LONGEST + 1, 8, 0.1) is not None
        assert asked(torch.float64, 9, 8, 0.0) is None
        assert asked(torch.float16, 9, 8, 0.0) is None
        assert asked(torch.bfloat16, 9, 129, 0.0) is None


class TestCompiling:
    @pytest.fixture(autouse=True)
    def fresh(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Nothing is compiled yet, and nothing of it stays."""
        monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
        library.cache_clear()
        yield
        library.cache_clear()

    def test_once_for_all_processes(self, tmp_path: Path) -> None:
        assert library("attention", HALF=0, PARTS=1).attend
        (made,) = (tmp_path / "cache" / "compiled").iterdir()
        before = made.stat().st_mtime_ns
        library.cache_clear()
        assert library("attention", HALF=0, PARTS=1).attend
        assert made.stat().st_mtime_ns == before
        library("attention", HALF=1, PARTS=1)
        assert len(list((tmp_path / "cache" / "compiled").iterdir())) == 2

    def test_a_compiler_of_c_will_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", shutil.which("gcc") or pytest.skip("there is no gcc"))
        library("attention", HALF=0, PARTS=2)
        (made,) = (tmp_path / "cache" / "compiled").iterdir()
        code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).attend"  # where nothing has loaded C++'s library
        subprocess.run([sys.executable, "-c", code, str(made)], check=True, timeout=60)

    def test_a_library_that_cannot_be_loaded_is_not_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wrong = tmp_path / "wrong"
        wrong.write_text('#!/bin/sh\nfor last in "$@"; do case $last in *.so) echo text > "$last";; esac; done\n')
        wrong.chmod(0o755)
        monkeypatch.setenv("CXX", str(wrong))
        with pytest.raises(BackboneError, match=r"set engine\.compiled_attention: false"):
            library("attention", HALF=0, PARTS=1)
        assert not list((tmp_path / "cache" / "compiled").iterdir())

    def test_a_compiler_that_fails_is_told_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = tmp_path / "broken"
        broken.write_text("#!/bin/sh\necho 'attention.cpp:1: error: no such language' >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        with pytest.raises(BackboneError) as caught:
            library("attention", HALF=0, PARTS=1)
        assert "cannot compile attention.cpp: attention.cpp:1: error: no such language" in str(caught.value)
        assert str(caught.value).endswith("set engine.compiled_attention: false to do without compiled code")
        assert not list((tmp_path / "cache" / "compiled").iterdir())

    def test_a_cache_that_cannot_be_written_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(
            BackboneError, match=r"compiled/attention-.*Not a directory; set engine\.compiled_attention"
        ):
            library("attention", HALF=0, PARTS=1)

    def test_without_a_compiler_auto_is_false_and_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert Engine().compiled_attention is True
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert Engine().compiled_attention is False
        told = fallbacks(model_of(Place("bert", SEQUENCE)), Engine())["compiled_attention"]
        assert told == "there is no C++ compiler (g++, c++, clang++, or what CXX names)"
        asked = Engine(compiled_attention=True)
        assert asked.compiled_attention is True
        with pytest.raises(BackboneError, match=r"^attention\.cpp cannot be compiled: there is no C\+\+ compiler"):
            library("attention", HALF=0, PARTS=1)
        monkeypatch.delenv("CXX")
        monkeypatch.setattr(compiled.sys, "platform", "darwin")
        assert Engine().compiled_attention is False
