"""The formula of attention against torch's function, and where it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import SEQUENCE, TOKEN, Place
from test_padding_free import batch_of, computed, model_of
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from peftkit.backbones.attention_inputs import Attention
from peftkit.engine.attention import chosen_attention
from peftkit.engine.dropout import keep_mask
from peftkit.engine.padding_free import without_padding
from peftkit.engine.plain_attention import LONGEST, SHORTEST, PlainAttention, is_faster


def given(
    keys: int = 5, mask: Tensor | None = None, causal: bool = False, groups: int = 1, **options: Any
) -> Attention:
    options = {"dtype": torch.float64, "requires_grad": True} | options
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 8, **options)
    key, value = (torch.randn(2, 4 // groups, keys, 8, **options) for _ in range(2))
    return Attention(query, key, value, mask, None, causal)


SEEN = (torch.arange(5) < torch.tensor([5, 3])[:, None])[:, None, None]
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"mask": SEEN},
    "added": {"mask": torch.zeros(2, 1, 1, 5, dtype=torch.float64).masked_fill(~SEEN, -1e300)},
    "causal": {"causal": True},
    "more keys": {"keys": 8},
    "grouped": {"groups": 2, "mask": SEEN},
}


class TestFormula:
    @pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
    def test_outputs_and_gradients_are_torch_s(self, options: dict[str, Any]) -> None:
        one = given(**options)
        found = PlainAttention(keep_mask, always=True)(one, 0.0, 0.3)
        assert found is not None
        expected = scaled_dot_product_attention(
            *one[:3], attn_mask=one.mask, is_causal=one.causal, scale=0.3, enable_gqa=True
        ).transpose(1, 2)
        assert (found - expected).abs().max() < 1e-12
        parts = [torch.autograd.grad(each.sin().sum(), one[:3]) for each in (found, expected)]
        for ours, theirs in zip(*parts, strict=True):
            assert (ours - theirs).abs().max() < 1e-12

    def test_gradients_with_dropout(self) -> None:
        one = given(mask=SEEN)
        mask = torch.rand(2, 4, 5, 5).gt(0.3).to(torch.uint8)

        def attend(*parts: Tensor) -> Tensor:
            found = PlainAttention(lambda *_: mask, always=True)(Attention(*parts, SEEN, None, False), 0.3, None)
            assert found is not None
            return found

        assert torch.autograd.gradcheck(attend, one[:3])
        weights = (one.query @ one.key.mT * 8**-0.5).masked_fill(~SEEN, -torch.inf).softmax(-1)
        expected = (weights * mask / 0.7) @ one.value
        assert (attend(*one[:3]).transpose(1, 2) - expected).abs().max() < 1e-12

    def test_dropout_has_its_rate(self) -> None:
        torch.manual_seed(0)
        zeros, ones = torch.zeros(50, 2, 10, 4), torch.ones(50, 2, 10, 4)
        found = PlainAttention(keep_mask, always=True)(Attention(zeros, zeros, ones, None, None, False), 0.2, None)
        assert found is not None
        assert found.mean() == pytest.approx(1.0, abs=0.01)
        assert found[..., 0].var() == pytest.approx(0.25 / 10, rel=0.15)


class TestChoice:
    @pytest.mark.parametrize(
        ("dtype", "dropout", "keys", "faster"),
        [
            (torch.float32, 0.0, 64, False),
            (torch.float32, 0.1, SHORTEST, True),
            (torch.float32, 0.1, SHORTEST - 1, False),
            (torch.bfloat16, 0.0, LONGEST, True),
            (torch.bfloat16, 0.0, LONGEST + 1, False),
            (torch.bfloat16, 0.1, 8, True),
        ],
    )
    def test_by_dtype_dropout_and_length(self, dtype: torch.dtype, dropout: float, keys: int, faster: bool) -> None:
        assert is_faster(given(keys, dtype=dtype, requires_grad=False), dropout) == faster

    @pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "modernbert"])
    @pytest.mark.parametrize("free", [True, False])
    def test_models_compute_the_same(self, architecture: str, free: bool) -> None:
        model = model_of(Place(architecture, SEQUENCE)).double()
        expected, wanted = computed(model, batch_of())
        calls: list[None] = []

        def count(*_: Any, **__: Any) -> Tensor:
            calls.append(None)
            return torch.nn.functional.scaled_dot_product_attention(*_, **__)

        with pytest.MonkeyPatch.context() as patch, chosen_attention(model, "plain", keep_mask):
            patch.setattr(nn.functional, "scaled_dot_product_attention", count)
            if free:
                with without_padding(model):
                    found, gradients = computed(model, batch_of())
            else:
                found, gradients = computed(model, batch_of())
        assert not calls
        assert (found - expected).abs().max() < 1e-10 * expected.abs().max()
        for name, gradient in gradients.items():
            assert (gradient - wanted[name]).abs().max() < 1e-10 * max(1.0, float(wanted[name].abs().max())), name

    def test_the_model_is_afterwards_as_it_was(self) -> None:
        model = model_of(Place("llama", TOKEN))
        before = [sorted(vars(part)) for part in model.modules()]
        with (
            chosen_attention(model, "auto", keep_mask),
            without_padding(model),
            chosen_attention(model, "plain", keep_mask),
        ):
            model(**batch_of())
        assert [sorted(vars(part)) for part in model.modules()] == before
