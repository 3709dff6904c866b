"""Packed and padded batches against each example alone; packed training against padded training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CAUSAL, TOKEN, tiny_config
from conftest import write_jsonl
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from peftkit.backbones.causal import check_packing, refuse_encoder, refuse_unpackable
from peftkit.backbones.load import Head, meta_model, wrap
from peftkit.config import Run, load_run
from peftkit.data.collate import IGNORED, collate
from peftkit.data.packing import first_fit_decreasing, lay_out
from peftkit.data.sources import DataSettings
from peftkit.errors import BackboneError, UsageError
from peftkit.experiment import train
from peftkit.methods import LoRA, Prefix
from peftkit.methods.base import trained_parameters
from peftkit.tasks import Completion, TokenClassification

LENGTHS = (11, 3, 7, 2, 20, 9, 5, 1)


def examples(seed: int = 0) -> list[dict[str, Any]]:
    """Of many lengths; the first token of each and some others are not supervised."""
    chance = random.Random(seed)
    found = []
    for length in LENGTHS:
        ids = [chance.randrange(1, 48) for _ in range(length)]
        labels = [token if chance.random() < 0.7 else IGNORED for token in ids]
        found.append({"input_ids": ids, "labels": labels})
    return found


def causal(architecture: str, attention: str = "sdpa", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = tiny_config(architecture, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def attached(method: Any, model: Any) -> Any:
    adapted = method.attach(wrap(model), total_steps=10)
    for parameter in trained_parameters(adapted).values():
        nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


def alone(model: Any, example: dict[str, Any]) -> torch.Tensor:
    """Logits of the supervised tokens, of one example in one unpadded sequence without a mask."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
    places = [place - 1 for place, label in enumerate(example["labels"]) if label != IGNORED and place]
    return logits[places]


def completion(**settings: Any) -> Completion:
    return Completion(data=DataSettings(train="t.jsonl"), max_length=24, **settings)


class TestBins:
    @pytest.mark.parametrize("seed", range(20))
    def test_every_example_is_in_one_bin_that_it_fits(self, seed: int) -> None:
        chance = random.Random(seed)
        lengths = [chance.randint(1, 30) for _ in range(chance.randint(1, 40))]
        bins = first_fit_decreasing(lengths, 24)
        assert sorted(index for one in bins for index in one) == list(range(len(lengths)))
        sums = [sum(lengths[index] for index in one) for one in bins]
        assert all(total <= 24 or len(one) == 1 for total, one in zip(sums, bins, strict=True))
        fitting = [length for length in lengths if length <= 24]
        # Dósa et al. 2013: at most 11/9 of the best + 6/9; what does not fit has a bin of its own
        best = -(-sum(fitting) // 24)
        assert len(bins) - (len(lengths) - len(fitting)) >= best
        assert first_fit_decreasing(lengths, 24) == bins

    def test_by_hand(self) -> None:
        assert first_fit_decreasing([2, 5, 4, 7, 1, 3, 8], 10) == [[6, 0], [3, 5], [1, 2, 4]]

    def test_layout_by_hand(self) -> None:
        mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
        layout = lay_out(mask, 4)
        assert layout.shape == (2, 4)
        assert layout.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]
        packed = layout.packed(torch.tensor([[5, 6, 9], [7, 8, 4], [3, 9, 9]]), mask.bool())
        assert packed.tolist() == [[7, 8, 4, 3], [5, 6, 0, 0]]


class TestLogits:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize(
        ("architecture", "changes"),
        [
            ("gpt2", {}),
            ("llama", {}),
            ("qwen2", {}),
            ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
            ("mistral", {"sliding_window": 4}),
        ],
    )
    @pytest.mark.parametrize("packing", [True, False])
    def test_each_example_has_the_logits_that_it_has_alone(
        self, architecture: str, changes: dict[str, Any], attention: str, packing: bool
    ) -> None:
        model = attached(LoRA(rank=4, targets="all"), causal(architecture, attention, **changes))
        batch = collate(examples(), pad_id=0)
        with torch.no_grad():
            rows = completion(packing=packing).split_logits(model, batch)
        for row, example in zip(rows, examples(), strict=True):
            assert torch.allclose(row, alone(model, example), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_every_packed_example_sees_the_prefix(self, architecture: str) -> None:
        model = attached(Prefix(length=3), causal(architecture))
        with torch.no_grad():
            rows = completion(packing=True).split_logits(model, collate(examples(), pad_id=0))
        for row, example in zip(rows, examples(), strict=True):
            assert torch.allclose(row, alone(model, example), atol=1e-5, rtol=1e-5)

    def test_fewer_tokens_go_through_the_model(self) -> None:
        seen: list[int] = []
        model = causal("llama")
        model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True)
        batch = collate(examples(), pad_id=0)
        check_packing(model)
        seen.clear()
        for packing in (True, False):
            completion(packing=packing).supervised_logits(model, batch)
        assert seen == [3 * 24, len(LENGTHS) * max(LENGTHS)]  # 20 + 3 + 1, 11 + 9 + 2, 7 + 5

    @pytest.mark.parametrize("architecture", ["bert", "roberta", "llama", "gpt2"])
    def test_padding_gives_each_example_of_a_batch_what_it_gets_alone(self, architecture: str) -> None:
        """What sorting by length, in training and evaluation, rests on."""
        torch.manual_seed(0)
        model = AutoModelForTokenClassification.from_config(tiny_config(architecture)).eval()
        task = TokenClassification(data=DataSettings(train="t.conll"))
        given = [{"input_ids": example["input_ids"]} for example in examples()]
        with torch.no_grad():
            together = task.logits(model, collate(given, pad_id=0))
            for row, example in zip(together, given, strict=True):
                own = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
                assert torch.allclose(row[: len(own)], own, atol=1e-5, rtol=1e-5)


class TestRefused:
    @pytest.mark.parametrize(
        ("kind", "settings", "reason"),
        [
            ("bloom", {"n_layer": 1}, "does not make its masks from position ids"),
            ("falcon", {"num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True}, "counts positions from key"),
            ("mamba", {"num_hidden_layers": 1}, "does not make its masks from position ids"),
        ],
    )
    def test_architectures_whose_shapes_tell(self, kind: str, settings: dict[str, Any], reason: str) -> None:
        model = meta_model(AutoConfig.for_model(kind, vocab_size=48, hidden_size=32, **settings), Head(CAUSAL))
        with pytest.raises(UsageError, match=f"task.packing: {kind} .* {reason}.*; set packing: false"):
            refuse_unpackable(model)

    @pytest.mark.parametrize("kind", ["opt", "falcon"])
    def test_architectures_that_have_to_be_tried(self, kind: str) -> None:
        torch.manual_seed(0)
        sizes = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        own = {"opt": {"ffn_dim": 40, "word_embed_proj_dim": 32, "init_std": 0.2}, "falcon": {"initializer_range": 0.2}}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **own[kind]))
        refuse_unpackable(model)
        batch = collate(examples(), pad_id=0)
        with pytest.raises(UsageError, match="does not keep examples apart by their position ids"):
            completion(packing=True).supervised_logits(model, batch)
        completion().supervised_logits(model, batch)
        assert model.training  # as it was

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_those_that_keep_them_apart_pass(self, dtype: str) -> None:
        for architecture in ("gpt2", "llama", "gpt_neox", "gemma", "qwen3"):
            check_packing(causal(architecture).to(getattr(torch, dtype)))

    @pytest.mark.parametrize("method", [{"kind": "prompt", "length": 3}, {"kind": "p_tuning", "length": 3}])
    def test_tokens_in_front_of_a_sequence(self, method: dict[str, Any]) -> None:
        sections = {
            "backbone": {"name": "llama"},
            "task": {"kind": "completion", "data": {"train": "t.jsonl"}, "packing": True},
            "training": {"learning_rate": 0.1},
        }
        with pytest.raises(ValueError, match="only the first would see them; leave packing out, or use kind: prefix"):
            Run.model_validate(sections | {"method": method})
        Run.model_validate(sections | {"method": {"kind": "prefix", "length": 3}})

    def test_an_encoder_under_a_causal_head(self) -> None:
        with pytest.raises(BackboneError, match=r"bert \(BertLMHeadModel\) is an encoder.*choose a decoder"):
            meta_model(tiny_config("bert"), Head(CAUSAL))
        meta_model(tiny_config("bert"), Head(TOKEN))
        for architecture in ("gpt2", "llama", "bart"):
            refuse_encoder(meta_model(tiny_config(architecture), Head(CAUSAL)))


class TestTraining:
    def test_packing_changes_neither_losses_nor_scores(self, tiny_llama: Path, tmp_path: Path) -> None:
        chance = random.Random(0)
        words = ["good", "bad", "film", "story", "the", "a"]
        rows = [
            {
                "prompt": " ".join(chance.choices(words, k=chance.randint(1, 6))),
                "completion": " " + chance.choice(words),
            }
            for _ in range(24)
        ]
        file = write_jsonl(tmp_path / "rows.jsonl", rows)
        results = {}
        for name, packing, micro in (("plain", False, None), ("packed", True, None), ("micro", True, 3)):
            config = tmp_path / f"{name}.yaml"
            task = {"kind": "completion", "max_length": 16, "packing": packing, "data": {"train": str(file)}}
            training = {"learning_rate": 0.01, "max_steps": 6, "batch_size": 8, "micro_batch_size": micro}
            sections = {"backbone": {"name": str(tiny_llama)}, "task": task, "training": training}
            method, output = {"kind": "lora", "rank": 4, "targets": "all"}, {"folder": str(tmp_path / name)}
            config.write_text(json.dumps(sections | {"method": method, "output": output}))
            results[name] = train(load_run(config))
        expected = results["plain"]
        assert expected.record.losses[0] > expected.record.losses[-1]
        for name in ("packed", "micro"):
            assert results[name].record.losses == pytest.approx(expected.record.losses, rel=1e-5)
            for when in ("before", "after"):
                found, wanted = (one.evaluations[when].scores.values for one in (results[name], expected))
                assert found == pytest.approx(wanted, rel=1e-5)
