"""A last block that computes what is read against one that computes everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import CAUSAL, SEQUENCE, Place
from test_padding_free import LENGTHS, MASK, batch_of, model_of
from torch import Tensor, nn

from peftkit.backbones.load import wrap
from peftkit.data.collate import IGNORED
from peftkit.data.sources import DataSettings
from peftkit.engine.engage import shortened
from peftkit.engine.last_block import FIRST_TOKEN, KNOWN, LAST, reading, why_whole
from peftkit.engine.padding_free import pretrained
from peftkit.engine.settings import Engine
from peftkit.methods import Bottleneck, LoRA, Prefix
from peftkit.methods.base import trained_parameters
from peftkit.tasks import Completion, SequenceClassification
from peftkit.training.activations import recompute_activations

TEXTS = [name for name in FIRST_TOKEN if name in ("bert", "roberta", "distilbert", "electra")]
DECODERS = [name for name in KNOWN if name not in FIRST_TOKEN]


def labelled() -> dict[str, Any]:
    ids = batch_of()["input_ids"]
    kept = MASK.bool() & (torch.arange(MASK.shape[1]) % 3 == 1)
    return batch_of() | {"labels": torch.where(kept, ids, IGNORED)}


def tasks(architecture: str) -> tuple[Any, dict[str, Any], str]:
    data = DataSettings(train="t.jsonl")
    if architecture in FIRST_TOKEN:
        labels = torch.arange(len(LENGTHS)) % 3
        return SequenceClassification(data=data), batch_of() | {"labels": labels}, SEQUENCE
    return Completion(data=data, max_length=24), labelled(), CAUSAL


def step(task: Any, model: Any, batch: dict[str, Any], engine: Engine) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with shortened(model, engine):
        loss = task.summed_loss(model, batch, torch.ones(3))
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(architecture: str, model: Any, **chosen: Any) -> None:
    task, batch, _ = tasks(architecture)
    expected, wanted = step(task, model, batch, Engine(padding_free=False, supervised_loss=False))
    found, gradients = step(task, model, batch, Engine(**chosen))
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, float(wanted[name].abs().max()))
        assert (gradient - wanted[name]).abs().max() <= (2e-6 if architecture == "gemma" else 1e-9) * scale, name


@pytest.fixture(autouse=True)
def in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)


class TestSame:
    @pytest.mark.parametrize("architecture", [*TEXTS, *DECODERS])
    def test_loss_and_all_gradients(self, architecture: str) -> None:
        model = model_of(Place(architecture, tasks(architecture)[2])).double()
        assert_alike(architecture, model)

    @pytest.mark.parametrize("architecture", ["bert", "distilbert", "llama"])
    def test_a_last_block_that_is_computed_again_computes_everything(self, architecture: str) -> None:
        model = model_of(Place(architecture, tasks(architecture)[2])).double().train()
        recompute_activations(model)
        assert_alike(architecture, model, supervised_loss=False)

    @pytest.mark.parametrize("method", [LoRA(rank=4, targets="all"), Prefix(length=3), Bottleneck(bottleneck_size=4)])
    @pytest.mark.parametrize("architecture", ["roberta", "qwen2"])
    def test_what_methods_add(self, architecture: str, method: Any) -> None:
        model = model_of(Place(architecture, tasks(architecture)[2]))
        model = method.attach(wrap(model), total_steps=10).double().eval()
        for parameter in trained_parameters(model).values():
            nn.init.normal_(parameter, std=0.3)
        assert_alike(architecture, model)

    @pytest.mark.parametrize("architecture", ["bert", "llama"])
    def test_predictions(self, architecture: str) -> None:
        task, batch, kind = tasks(architecture)
        model = model_of(Place(architecture, kind)).double()
        found = []
        for engine in (Engine(padding_free=False, supervised_loss=False), Engine()):
            with torch.no_grad(), shortened(model, engine):
                found.append(task.predict(model, batch, ("a", "b", "c")))
        for ours, theirs in zip(found[1], found[0], strict=True):
            assert ours == {key: pytest.approx(one) if key != "label" else one for key, one in theirs.items()}


class TestWhere:
    @pytest.mark.parametrize("architecture", ["bert", "llama"])
    def test_the_feed_forward_network_of_the_last_block_sees_what_is_read(self, architecture: str) -> None:
        task, batch, kind = tasks(architecture)
        model = model_of(Place(architecture, kind)).double()
        base: Any = pretrained(model)
        sizes: list[int] = []
        with shortened(model, Engine()):
            for block in base.encoder.layer if kind == SEQUENCE else base.layers:
                inner = block.intermediate if kind == SEQUENCE else block.mlp
                inner.register_forward_hook(lambda _, __, output: sizes.append(output.shape[1]))
            task.summed_loss(model, batch, torch.ones(3))
        read = len(LENGTHS) if kind == SEQUENCE else int((batch["labels"][:, 1:] != IGNORED).sum())
        assert sizes == [sum(LENGTHS), read]

    def test_other_architectures_compute_everything(self) -> None:
        model = model_of(Place("gpt2", CAUSAL))
        assert "gpt2 (GPT2Model) may leave out" in why_whole(pretrained(model))
        bottleneck = Bottleneck(bottleneck_size=4).attach(wrap(model_of(Place("bert", SEQUENCE))), total_steps=10)
        assert why_whole(pretrained(bottleneck)) == "something was added to the modules of the last block"

    def test_it_is_asked_for(self) -> None:
        model, batch = model_of(Place("bert", SEQUENCE)).double(), batch_of()
        first = torch.arange(MASK.shape[1]).expand(MASK.shape) == 0
        with torch.no_grad(), shortened(model, Engine()):
            everything = model.bert(**batch).last_hidden_state
            with reading(model, first):
                some = model.bert(**batch).last_hidden_state
        assert (some[:, 0] - everything[:, 0]).abs().max() < 1e-12
        assert not some[:, 1:].any()
        with shortened(model, Engine(read_positions=False)):
            assert not hasattr(pretrained(model), LAST)
