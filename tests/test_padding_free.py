"""Batches without padding against the same batches with it: logits, gradients, whole trainings."""

from __future__ import annotations

import contextlib
import random
import re
from typing import Any

import pytest
import torch
import transformers
from architectures import CAUSAL, CONFIGS, SEQ2SEQ, SEQUENCE, TASKS, TOKEN, Place, tiny_config
from torch import Tensor, nn

from peftkit.backbones.load import wrap
from peftkit.engine import padding_free, unpadded
from peftkit.engine.engage import fallbacks
from peftkit.engine.padding_free import padded, pretrained, without_padding
from peftkit.engine.settings import Engine
from peftkit.engine.unpadded import ALIKE, Bucket, Unpadded, bucketed, evened
from peftkit.methods import Bottleneck, LoRA, Prefix
from peftkit.methods.base import trained_parameters
from peftkit.training.activations import recompute_activations

LENGTHS = (11, 3, 7, 2, 20, 9, 5, 1)
MASK = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
BY_HAND = ("deberta", "deberta-v2", "mpnet")
PADDED = {"deberta", "deberta-v2", "mpnet", "t5", "bart"}
PLACES = [Place(name, kind) for name in CONFIGS for kind in TASKS[name] if name not in PADDED and kind != SEQ2SEQ]
EXACT = [one for one in PLACES if (one.architecture, one.model_class) != ("albert", SEQUENCE)]


def model_of(place: Place, attention: str = "sdpa", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = tiny_config(place.architecture, **changes)
    chosen = "eager" if place.architecture in BY_HAND else attention
    return getattr(transformers, place.model_class).from_config(config, attn_implementation=chosen).eval()


def batch_of(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 48, MASK.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids * MASK, "attention_mask": MASK}


def outputs(model: Any, batch: dict[str, Tensor], every: bool = False) -> Tensor:
    """Logits (items, outputs): of examples, or of real tokens."""
    logits: Tensor = model(**batch).logits
    return logits if logits.ndim == 2 or every else logits[batch["attention_mask"].bool()]


def computed(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a sum over them in which each counts differently."""
    model.zero_grad()
    logits = outputs(model, batch)
    (logits * torch.arange(1, logits.numel() + 1).view_as(logits).to(logits).sin()).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(model: Any, batch: dict[str, Tensor], tolerance: float) -> None:
    expected, wanted = computed(model, batch)
    with without_padding(model) as reason:
        assert not reason
        found, gradients = computed(model, batch)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, float(wanted[name].abs().max()))
        assert (gradient - wanted[name]).abs().max() <= tolerance * scale, name


class TestRow:
    @pytest.mark.parametrize("seed", range(10))
    def test_buckets_hold_all_lengths_and_little_padding(self, seed: int) -> None:
        chance = random.Random(seed)
        lengths = sorted((chance.randint(1, 90) for _ in range(chance.randint(1, 40))), reverse=True)
        buckets = bucketed(lengths)
        assert [length for one in buckets for length in one] == lengths
        assert all(one[-1] >= ALIKE * one[0] for one in buckets)

    def test_there_and_back(self) -> None:
        row = Unpadded(MASK)
        batch = torch.randn(*MASK.shape, 3) * MASK[..., None]
        assert row.row(batch).shape == (1, sum(LENGTHS), 3)
        assert torch.equal(row.batch(row.row(batch)), batch)
        assert torch.equal(row.row(batch)[0, row.firsts], batch[:, 0])

    def test_few_lengths_of_even_rows_and_little_more_of_them(self) -> None:
        for start in (32, 256, 4096):
            lengths = [evened(tokens) for tokens in range(start, 2 * start)]
            assert all(tokens <= one <= tokens * 17 / 16 for tokens, one in enumerate(lengths, start))
            assert len(set(lengths)) == 17  # with both ends
        assert [evened(tokens) for tokens in range(1, 32)] == list(range(1, 32))

    def test_there_and_back_in_an_even_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(unpadded, "evened", lambda tokens: tokens + 5)
        row = Unpadded(MASK, even=True)
        batch = torch.randn(*MASK.shape, 3) * MASK[..., None]
        assert row.row(batch).shape == (1, sum(LENGTHS) + 5, 3)
        assert torch.equal(row.batch(row.row(batch)), batch)

    def test_a_bucket_by_hand(self) -> None:
        bucket = Bucket((3, 3, 2), torch.device("cpu"))
        rows = torch.arange(1.0, 9).view(8, 1, 1)
        assert bucket.padded(rows)[:, 0, :, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 1]]
        assert bucket.rows(bucket.padded(rows).transpose(1, 2)).flatten().tolist() == list(range(1, 9))
        seen = bucket.mask(causal=False, additive=False, dtype=torch.float32)
        assert seen is not None
        assert seen[:, 0, 0].tolist() == [[True] * 3, [True] * 3, [True, True, False]]
        assert bucket.mask(causal=True, additive=False, dtype=torch.float32) is None
        future = bucket.mask(causal=True, additive=True, dtype=torch.float32)
        assert future is not None
        assert (future[0, 0] == 0).tolist() == [[True, False, False], [True, True, False], [True] * 3]

    def test_gradients_of_going_into_a_bucket_and_out_of_it(self) -> None:
        bucket = Bucket((3, 2, 2), torch.device("cpu"))
        rows = torch.randn(7, 1, 2, dtype=torch.float64, requires_grad=True)

        def through(rows: Tensor) -> Tensor:
            held = bucket.padded(rows).transpose(1, 2)
            return bucket.rows(held * bucket.real[..., None, None]).sin()

        assert torch.autograd.gradcheck(through, rows)


class TestSame:
    @pytest.mark.parametrize("place", EXACT, ids=str)
    def test_logits_and_gradients_in_double_precision(self, place: Place) -> None:
        # Gemma normalises in float32 whatever its weights are in
        assert_alike(model_of(place).double(), batch_of(), 1e-6 if place.architecture == "gemma" else 1e-10)

    @pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert", "gpt2", "llama", "qwen3"])
    def test_spare_places_at_the_end_of_a_row_change_nothing(
        self, architecture: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(unpadded, "evened", lambda tokens: tokens + 5)
        monkeypatch.setattr(padding_free, "makes_code", lambda base: True)
        for kind in (SEQUENCE, TOKEN):
            assert_alike(model_of(Place(architecture, kind)).double(), batch_of(), 1e-10)

    @pytest.mark.parametrize(("dtype", "places"), [(torch.float32, 57), (torch.bfloat16, 58)])
    def test_rows_are_even_where_products_are_compiled(self, dtype: torch.dtype, places: int) -> None:
        model, seen = model_of(Place("bert", SEQUENCE)).to(dtype), []
        model.bert.encoder.layer[0].register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
        with without_padding(model):
            outputs(model, {name: part[:-1] for name, part in batch_of().items()})
        assert seen == [places]

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "qwen3"])
    def test_logits_and_gradients_in_single_precision(self, architecture: str, attention: str) -> None:
        assert_alike(model_of(Place(architecture, TOKEN), attention), batch_of(), 3e-6)

    @pytest.mark.parametrize("method", [LoRA(rank=4, targets="all"), Prefix(length=3), Bottleneck(bottleneck_size=4)])
    @pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2", "llama"])
    def test_what_methods_add(self, architecture: str, method: Any) -> None:
        model = method.attach(wrap(model_of(Place(architecture, SEQUENCE))), total_steps=10).double().eval()
        for parameter in trained_parameters(model).values():
            nn.init.normal_(parameter, std=0.3)
        assert_alike(model, batch_of(), 1e-10)

    @pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2", "llama"])
    def test_blocks_that_are_computed_again_in_the_backward_pass(self, architecture: str) -> None:
        model = model_of(Place(architecture, TOKEN)).double()
        _, wanted = computed(model, batch_of())
        model.train()
        recompute_activations(model)
        with without_padding(model):
            _, found = computed(model, batch_of())
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("architecture", ["bert", "llama"])
    def test_no_example_sees_another(self, architecture: str) -> None:
        model, batch = model_of(Place(architecture, TOKEN)), batch_of()
        for changed in range(len(LENGTHS)):
            other = {name: value.clone() for name, value in batch.items()}
            other["input_ids"][changed] = (other["input_ids"][changed] + 17) % 45 + 3
            with torch.no_grad(), without_padding(model):
                before, after = (outputs(model, one, every=True) for one in (batch, other))
            kept = [index for index in range(len(LENGTHS)) if index != changed]
            assert torch.equal(before[kept], after[kept])
            assert not torch.allclose(before[changed], after[changed], atol=1e-3)

    def test_token_types_and_given_positions(self) -> None:
        model = model_of(Place("bert", TOKEN), type_vocab_size=2).double()
        types = (torch.arange(MASK.shape[1]) > 2).long().expand(MASK.shape)
        batch = batch_of() | {"token_type_ids": types, "position_ids": torch.arange(MASK.shape[1]).flip(0)[None]}
        assert_alike(model, batch, 1e-10)

    def test_attention_dropout_keeps_its_share(self) -> None:
        """Of attention over equal values, dropout leaves the mean and a variance of p/(1 − p) Σ weight²."""
        row = Unpadded(torch.ones(40, 6).long().index_fill_(1, torch.tensor(5), 0))
        query, value = torch.zeros(1, 2, 200, 4), torch.ones(1, 2, 200, 4)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            own = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.2)
            return own.transpose(1, 2)

        torch.manual_seed(0)
        found = torch.stack([row.attended(attend, query, query, value, False, False)[..., 0] for _ in range(40)])
        assert found.mean() == pytest.approx(1.0, abs=0.01)
        assert found.var() == pytest.approx(0.25 / 5, rel=0.05)


class TestWhere:
    def test_only_real_tokens_go_through_linear_layers_and_norms(self) -> None:
        model = model_of(Place("bert", SEQUENCE))
        seen: set[int] = set()

        def count(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.add(output.shape[:-1].numel())

        for name, part in model.bert.named_modules():
            if isinstance(part, nn.Linear | nn.LayerNorm) and "pooler" not in name:
                part.register_forward_hook(count)
        with without_padding(model):
            model(**batch_of())
        assert seen == {sum(LENGTHS)}

    @pytest.mark.parametrize(
        ("architecture", "model_class", "reason"),
        [
            ("deberta-v2", TOKEN, "deberta-v2 .* computes its attention scores by itself"),
            ("mpnet", SEQUENCE, "mpnet .* computes its attention scores by itself"),
            ("t5", TOKEN, "t5 .* counts positions inside attention"),
            ("bart", SEQ2SEQ, "bart .* is an encoder-decoder"),
            ("albert", SEQUENCE, "albert .* has a pooler that takes the first tokens by itself"),
        ],
    )
    def test_what_stays_padded_says_why(self, architecture: str, model_class: str, reason: str) -> None:
        model = model_of(Place(architecture, model_class))
        assert re.match(reason, fallbacks(model, Engine())["padding_free"])
        assert "padding_free" not in fallbacks(model, Engine(padding_free=False))
        with without_padding(model) as told:
            assert re.match(reason, told)

    @pytest.mark.parametrize(
        "changes",
        [
            {"attention_mask": MASK.flip(1)},
            {"attention_mask": torch.ones_like(MASK)},
            {"attention_mask": None},
            {"use_cache": True},
        ],
        ids=["left", "no padding", "no mask", "cache"],
    )
    def test_what_goes_as_it_is(self, changes: dict[str, Any]) -> None:
        model, batch = model_of(Place("llama", CAUSAL)), batch_of() | changes
        with torch.no_grad():
            expected = model(**batch)
            with without_padding(model):
                found = model(**batch)
        assert torch.equal(found.logits, expected.logits)
        if "use_cache" in changes:
            assert found.past_key_values.get_seq_length() == MASK.shape[1]

    @pytest.mark.parametrize("window", [4, 20])
    def test_windows_of_attention(self, window: int) -> None:
        model = model_of(Place("mistral", TOKEN), sliding_window=window).double()
        assert_alike(model, batch_of(), 1e-10)

    def test_the_model_is_afterwards_as_it_was(self) -> None:
        model = model_of(Place("llama", SEQUENCE))
        before = [(name, len(part._forward_pre_hooks), sorted(vars(part))) for name, part in model.named_modules()]
        with without_padding(model), without_padding(model):
            with padded(model):
                model(**batch_of())
            model(**batch_of())
        after = [(name, len(part._forward_pre_hooks), sorted(vars(part))) for name, part in model.named_modules()]
        assert after == before
        assert all(part.config is model.config for part in pretrained(model).modules() if hasattr(part, "config"))


def test_two_hundred_steps() -> None:
    curves = []
    for free in (False, True):
        model = model_of(Place("bert", SEQUENCE)).train()
        model = LoRA(rank=4, targets="all").attach(wrap(model), total_steps=200)
        optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-3)
        losses = []
        with without_padding(model) if free else contextlib.nullcontext():
            for step in range(200):
                batch = batch_of(step % 7)
                loss = nn.functional.cross_entropy(outputs(model, batch), batch["input_ids"][:, 0] % 3)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
