"""A loss taken from some supervised tokens at a time against that of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from architectures import CAUSAL, SEQ2SEQ, tiny_config
from torch import Tensor

from peftkit.backbones.load import wrap
from peftkit.data.collate import IGNORED, collate
from peftkit.data.sources import DataSettings
from peftkit.engine import summed_losses
from peftkit.engine.engage import fallbacks
from peftkit.engine.padding_free import without_padding
from peftkit.engine.settings import Engine
from peftkit.engine.supervised import supervised_only
from peftkit.errors import TrainingError
from peftkit.methods import LoRA
from peftkit.tasks import Completion, Seq2Seq
from peftkit.tasks.losses import CrossEntropy, Focal, LabelSmoothed

LOSSES = [CrossEntropy(), LabelSmoothed(smoothing=0.1), Focal(gamma=2.0)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summed_losses, "CHUNK", 7 * 48)
    monkeypatch.setattr(summed_losses, "LEAST", 1)


def model_of(architecture: str, kind: str = CAUSAL, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, kind).from_config(tiny_config(architecture, **changes))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def batch_of(lengths: tuple[int, ...] = (9, 3, 12, 2, 1)) -> dict[str, Any]:
    chance = torch.Generator().manual_seed(1)
    examples = []
    for length in lengths:
        ids = torch.randint(3, 48, (length,), generator=chance).tolist()
        labels = [IGNORED if place % 4 == 1 else token for place, token in enumerate(ids)]
        examples.append({"input_ids": ids, "labels": labels})
    return collate(examples, pad_id=0)


def task(loss: Any = LOSSES[0], kind: Any = Completion) -> Any:
    return kind(data=DataSettings(train="t.jsonl"), max_length=24, loss=loss)


def computed(one: Any, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = one.summed_loss(model, batch_of(), torch.tensor([]))
    (loss * 0.3).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(one: Any, model: Any, tolerance: float) -> None:
    expected, wanted = computed(one, model)
    with supervised_only(model):
        for _ in range(2):  # the first pass also looks at what the model makes of its logits
            found, gradients = computed(one, model)
            assert abs(found - expected) <= tolerance * expected
            assert gradients.keys() == wanted.keys()
            for name, gradient in gradients.items():
                scale = max(1.0, float(wanted[name].abs().max()))
                assert (gradient - wanted[name]).abs().max() <= tolerance * scale, name


class TestSame:
    @pytest.mark.parametrize("loss", LOSSES, ids=lambda one: one.kind)
    @pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "qwen2", "gemma"])
    def test_loss_and_all_gradients_in_double_precision(
        self, architecture: str, loss: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Tensor, "float", Tensor.double)
        assert_alike(task(loss), model_of(architecture).double(), 1e-6 if architecture == "gemma" else 1e-10)

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_with_lora_in_single_precision_and_without_padding(self, architecture: str) -> None:
        model = LoRA(rank=4, targets="all").attach(wrap(model_of(architecture)), total_steps=10)
        expected, wanted = computed(task(), model)
        with supervised_only(model), without_padding(model):
            found, gradients = computed(task(), model)
        assert found == pytest.approx(float(expected), rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6)

    def test_an_encoder_decoder(self) -> None:
        assert_alike(task(kind=Seq2Seq), model_of("t5", SEQ2SEQ), 1e-5)

    def test_an_output_with_a_bias(self) -> None:
        model = model_of("llama")
        model.lm_head.bias = torch.nn.Parameter(torch.randn(48))
        assert_alike(task(), model, 1e-5)

    def test_mixed_precision(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert_alike(task(), model_of("llama"), 0.02)

    @pytest.mark.parametrize("kind", [Completion, Seq2Seq])
    def test_predictions(self, kind: Any) -> None:
        model = model_of("llama") if kind is Completion else model_of("t5", SEQ2SEQ)
        one = task(kind=kind)
        with torch.no_grad():
            expected = one.predict(model, batch_of(), ())
            with supervised_only(model):
                found = one.predict(model, batch_of(), ())
        assert len(expected) == 5
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == theirs | {"nats": pytest.approx(theirs["nats"], abs=1e-4)}

    def test_a_batch_without_supervision(self) -> None:
        model, batch = model_of("llama"), batch_of()
        batch["labels"][:] = IGNORED
        with supervised_only(model):
            loss = task().summed_loss(model, batch, torch.tensor([]))
        loss.backward()
        assert float(loss.detach()) == 0


class TestWhere:
    def test_logits_are_formed_for_some_tokens_at_a_time(self) -> None:
        model, sizes = model_of("llama"), list[int]()
        loss = CrossEntropy.losses_and_gradients

        def seen(self: CrossEntropy, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            sizes.append(len(logits))
            return loss(self, logits, labels)

        outputs: list[int] = []
        model.register_forward_hook(lambda _, __, output: outputs.append(output.logits.numel()))
        with pytest.MonkeyPatch.context() as patch, supervised_only(model):
            patch.setattr(CrossEntropy, "losses_and_gradients", seen)
            for _ in range(2):
                task().summed_loss(model, batch_of(), torch.tensor([]))
        assert sizes == [7, 7, 1] * 2  # 6, 1, 8, 0 and 0 of the examples
        assert outputs == [48, 0]

    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            (("gemma2", CAUSAL), "changes its logits after the output projection .final_logit_softcapping"),
            (("bart", SEQ2SEQ), "changes its logits after the output projection .final_logits_bias"),
        ],
    )
    def test_what_forms_all_logits_says_why(self, model: tuple[str, str], reason: str) -> None:
        import re

        name, kind = model
        if name == "gemma2":
            config = transformers.Gemma2Config(
                vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                head_dim=8, intermediate_size=40,
            )  # fmt: skip
            built: Any = transformers.Gemma2ForCausalLM(config).eval()
        else:
            built = model_of(name, kind)
        assert re.search(reason, fallbacks(built, Engine())["supervised_loss"])
        assert "supervised_loss" not in fallbacks(built, Engine(supervised_loss=False))
        one = task(kind=Completion if kind == CAUSAL else Seq2Seq)
        expected, _ = computed(one, built)
        with supervised_only(built):
            assert computed(one, built)[0] == expected

    def test_what_comes_behind_unseen_is_noticed(self) -> None:
        model = model_of("llama")
        plain = model.forward

        def doubled(*given: Any, **named: Any) -> Any:
            output = plain(*given, **named)
            output.logits = output.logits * 2
            return output

        model.forward = doubled
        with supervised_only(model), pytest.raises(TrainingError, match=r"llama .*; set engine.supervised_loss: false"):
            task().summed_loss(model, batch_of(), torch.tensor([]))

    def test_the_model_is_afterwards_as_it_was(self) -> None:
        model = model_of("llama")
        before = sorted(vars(model.lm_head))
        with supervised_only(model), supervised_only(model):
            assert sorted(vars(model.lm_head)) != before
        assert sorted(vars(model.lm_head)) == before
