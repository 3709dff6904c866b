"""Labels scored by how likely their words are, against the losses that transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftkit.cli import main
from peftkit.data.collate import collate
from peftkit.data.files import Rows
from peftkit.data.sources import DataSettings
from peftkit.errors import DataError, UsageError
from peftkit.tasks import LabelWords
from peftkit.tasks.base import Batch
from peftkit.tasks.likelihood import log_likelihoods

TEMPLATE = "Review: {text}\nSentiment:"
TEXTS = ("a good film", "quite awful , I must say, and very dark", "the story was")
WORDS = {
    "one token": {"bad": " bad", "fine": " fine", "good": " good"},
    "one and two": {"bad": " bad", "fine": " fine", "good": " very good"},
    "beginning alike": {"bad": " very bad", "fine": " very", "good": " very very good"},
    "no two alike": {"bad": " so bad", "fine": " rather good", "good": " the best film"},
}


def rows_of(*records: dict[str, Any]) -> Rows:
    return Rows("train.jsonl", list(records), range(1, len(records) + 1))


ROWS = rows_of(*({"text": text, "label": label} for text, label in zip(TEXTS, WORDS["one token"], strict=True)))


def label_words(**settings: Any) -> LabelWords:
    return LabelWords(data=DataSettings(train="train.jsonl"), **{"template": TEMPLATE} | settings)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    """Byte-level byte pairs without, and with, special tokens around every text; and words that own their space."""
    corpus = [TEMPLATE, *TEXTS, *(word for words in WORDS.values() for word in words.values())] * 3
    found = {}
    for name in ("bytes", "bytes with ends", "words with spaces"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        spaces = name == "words with spaces"
        tokenizer.pre_tokenizer = (
            pre_tokenizers.Metaspace() if spaces else pre_tokenizers.ByteLevel(add_prefix_space=False)
        )
        tokenizer.decoder = decoders.Metaspace() if spaces else decoders.ByteLevel()
        alphabet = [] if spaces else pre_tokenizers.ByteLevel.alphabet()
        special = ["<unk>", "<s>", "</s>"]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
        tokenizer.train_from_iterator(corpus, trainer)
        if name == "bytes with ends":
            ends = [("<s>", 1), ("</s>", 2)]
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
        found[name] = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    return found


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        model: nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=400, initializer_range=0.3, **sizes))
    return model.eval()


def reference(model: Any, tokenizer: Any, prompt: str, words: str, start: list[int]) -> tuple[float, int]:
    """(summed log-likelihood, tokens) of `words` behind `prompt`, from the loss of the whole text in float64."""
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = torch.tensor([start + tokenizer(prompt + words, add_special_tokens=False).input_ids])
    labels = ids.clone()
    labels[:, : len(start) + len(prompt_ids)] = -100
    count = int((labels != -100).sum())
    return -float(model(input_ids=ids, labels=labels).loss) * count, count


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["bytes", "bytes with ends", "words with spaces"])
@torch.no_grad()
def test_scores_are_the_losses_that_transformers_computes(
    name: str, kind: str, words: str, tokenizers: dict[str, Any]
) -> None:
    model, tokenizer = tiny(kind), tokenizers[name]
    start = [1] if name == "bytes with ends" else []
    labels = tuple(WORDS[words])
    summed, mean = (label_words(words=WORDS[words], normalise=how) for how in ("none", "length"))
    batch = collate(summed.encode(ROWS, tokenizer, labels).examples, pad_id=0)
    found, means = summed.logits(model, batch), mean.logits(model, batch)
    exact = model.double()
    for row, text in enumerate(TEXTS):
        for column, label in enumerate(labels):
            prompt = TEMPLATE.replace("{text}", text)
            expected, count = reference(exact, tokenizer, prompt, WORDS[words][label], start)
            assert float(found[row, column]) == pytest.approx(expected, rel=2e-5)
            assert float(means[row, column]) == pytest.approx(expected / count, rel=2e-5)


@pytest.mark.parametrize(
    ("continuations", "passes"),
    [
        ([(1,), (2,), (3,)], 1),
        ([(1,), (2, 3)], 1),
        ([(1, 2), (1, 3), (1,), (4,)], 1),
        ([(1, 2), (3, 4)], 2),
        ([(1, 2, 3), (1, 2), (1, 4, 5)], 2),
        ([(1, 1), (2, 1), (3, 1)], 3),
    ],
)
def test_continuations_that_begin_alike_share_a_pass(continuations: list[tuple[int, ...]], passes: int) -> None:
    model, calls = tiny("llama"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}], pad_id=0)
    with torch.no_grad():
        found = log_likelihoods(model, batch, [tuple(continuations)] * 2)
        assert len(calls) == passes
        for row, prompt in enumerate(([5, 6, 7], [8])):
            for column, ids in enumerate(continuations):
                logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
                behind = len(prompt) - 1
                expected = sum(float(logits[behind + step, token]) for step, token in enumerate(ids))
                assert float(found[row, column]) == pytest.approx(expected, rel=1e-5)


def test_examples_of_one_batch_may_have_different_words() -> None:
    model = tiny("llama")
    examples = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]
    words = [((1, 2), (3,)), ((4,), (9, 10))]
    with torch.no_grad():
        together = log_likelihoods(model, collate(examples, pad_id=0), words)
        alone = [log_likelihoods(model, collate([one], 0), [own]) for one, own in zip(examples, words, strict=True)]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-5)


def batch_of(task: LabelWords, tokenizer: Any) -> Batch:
    return collate(task.encode(ROWS, tokenizer, tuple(WORDS["one and two"])).examples, pad_id=0)


@torch.no_grad()
def test_the_loss_over_words_is_the_cross_entropy_of_the_scores(tokenizers: dict[str, Any]) -> None:
    model, tokenizer, words = tiny("llama"), tokenizers["bytes"], WORDS["one and two"]
    task = label_words(words=words)
    batch = batch_of(task, tokenizer)
    weights = torch.tensor([1.0, 2.0, 3.0])
    scores = torch.tensor(
        [[reference(model, tokenizer, TEMPLATE.replace("{text}", t), w, [])[0] for w in words.values()] for t in TEXTS]
    )
    losses = nn.functional.cross_entropy(scores, torch.arange(3), reduction="none")
    assert float(task.summed_loss(model, batch, weights)) == pytest.approx(float((losses * weights).sum()), rel=1e-4)
    smooth = label_words(words=words, loss="label_smoothed")
    expected = nn.functional.cross_entropy(scores, torch.arange(3), label_smoothing=0.1, reduction="sum")
    assert float(smooth.summed_loss(model, batch, torch.ones(3))) == pytest.approx(float(expected), rel=1e-4)


@torch.no_grad()
def test_the_loss_over_the_vocabulary_is_that_of_the_right_words_alone(tokenizers: dict[str, Any]) -> None:
    model, tokenizer, words = tiny("llama"), tokenizers["bytes"], WORDS["one and two"]
    task = label_words(words=words, loss_over="vocabulary")
    batch, weights, calls = batch_of(task, tokenizer), torch.tensor([1.0, 2.0, 3.0]), list[int]()
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    loss = float(task.summed_loss(model, batch, weights))
    handle.remove()
    nats = [
        reference(model, tokenizer, TEMPLATE.replace("{text}", text), own, [])[0]
        for text, own in zip(TEXTS, words.values(), strict=True)
    ]
    assert len(calls) == 1
    assert loss == pytest.approx(-sum(weight * one for weight, one in zip((1, 2, 3), nats, strict=True)), rel=1e-5)
    assert task.example_weight({"labels": 2}, [1.0, 2.0, 3.0]) == 3.0


def test_predictions_and_scores_are_named_as_those_of_a_head(tokenizers: dict[str, Any]) -> None:
    model, task = tiny("llama"), label_words(words=WORDS["one and two"])
    labels = tuple(WORDS["one and two"])
    batch = batch_of(task, tokenizers["bytes"])
    with torch.no_grad():
        predictions, scores = task.predict(model, batch, labels), task.logits(model, batch)
    for prediction, row in zip(predictions, scores, strict=True):
        assert prediction["label"] == labels[int(row.argmax())]
        assert prediction["probabilities"] == pytest.approx(dict(zip(labels, row.softmax(0).tolist(), strict=True)))
        assert prediction["probability"] == pytest.approx(float(row.softmax(0).max()))
        assert list(prediction["log_likelihoods"].values()) == pytest.approx(row.tolist())
    found = task.score(predictions, ROWS, labels)
    assert list(found.values) == ["accuracy", "macro_f1", "weighted_f1", "matthews"]
    right = [p["label"] == r["label"] for p, r in zip(predictions, ROWS.records, strict=True)]
    assert found.value == pytest.approx(sum(right) / 3)
    most = task.majority(rows_of(*ROWS.records, ROWS.records[2]), ROWS, labels)
    assert most is not None
    assert task.score(most, ROWS, labels).value == pytest.approx(1 / 3)
    assert {one["label"] for one in most} == {"good"}


def test_words_default_to_the_names_of_the_labels(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bytes"]
    rows = rows_of({"text": "a", "label": "0"}, {"text": "b", "label": "1"})
    named = label_words(labels=("bad", "good"))
    example = named.encode(rows, tokenizer, ("bad", "good")).examples[1]
    assert [tokenizer.decode(ids) for ids in example["words"]] == [" bad", " good"]
    assert example["labels"] == 1
    assert tokenizer.decode(example["input_ids"]) == "Review: b\nSentiment:"


def test_demonstrations_stand_in_front_with_their_words(tokenizers: dict[str, Any]) -> None:
    tokenizer, shown = (
        tokenizers["bytes with ends"],
        ({"text": "fine", "label": "good"}, {"text": "no", "label": "bad"}),
    )
    task = label_words(labels=("bad", "good"), words={"bad": " no", "good": " yes"}, demonstrations=shown)
    example = task.encode(rows_of({"text": "hm", "label": "bad"}), tokenizer, ("bad", "good")).examples[0]
    expected = "Review: fine\nSentiment: yes\n\nReview: no\nSentiment: no\n\nReview: hm\nSentiment:"
    assert example["input_ids"] == [1, *tokenizer(expected, add_special_tokens=False).input_ids]


def test_long_texts_are_cut_and_nothing_else(tokenizers: dict[str, Any]) -> None:
    tokenizer, words = tokenizers["bytes with ends"], WORDS["one and two"]
    labels, longest = tuple(words), max(len(tokenizer(w, add_special_tokens=False).input_ids) for w in words.values())
    rows = rows_of({"text": "very good " * 40, "label": "good"}, {"text": "bad", "label": "bad"})
    whole = label_words(words=words, max_length=400).encode(rows, tokenizer, labels)
    short = label_words(words=words, max_length=40).encode(rows, tokenizer, labels)
    assert (whole.truncated, short.truncated) == (0, 1)
    assert len(short.examples[0]["input_ids"]) + longest == 40
    text = tokenizer.decode(short.examples[0]["input_ids"][1:])
    assert text.startswith("Review: very good very good")
    assert text.endswith("\nSentiment:")
    assert short.examples[1] == whole.examples[1]
    assert short.examples[0]["words"] == whole.examples[0]["words"]
    with pytest.raises(DataError, match=r"train.jsonl:1: the template and the answer leave no token for the text"):
        label_words(words=words, max_length=5).encode(rows, tokenizer, labels)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"template": "Review: {sentence}"}, "the template has no {text}"),
        ({"template": "{text} is {label}"}, "the template shows the answer: {label} is the label column"),
        ({"text_pair": "other"}, "the template has no {other}"),
        ({"loss_over": "vocabulary", "loss": "focal"}, "loss_over: vocabulary has no loss 'focal'"),
        ({"labels": ("a", "b"), "words": {"a": " x"}}, "words has none for label 'b'"),
        ({"labels": ("a", "b"), "words": {"a": " x", "b": " y", "c": " z"}}, "words names 'c', which is no label"),
        ({"labels": ("a", "b"), "words": {"a": " x", "b": " "}}, "the words of label 'b' are empty"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=r"LabelWords") as error:
        label_words(**settings)
    assert fault in str(error.value)


def test_words_are_compared_with_the_labels_of_the_data() -> None:
    with pytest.raises(UsageError, match=r"task.words: words has none for label 'fine'"):
        label_words(words={"bad": " no", "good": " yes"}).head(ROWS)
    head = label_words(words=WORDS["one token"]).head(ROWS)
    assert (head.model_class, head.labels) == ("AutoModelForCausalLM", ("bad", "fine", "good"))


def test_words_that_nothing_can_tell_apart_are_refused(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["words with spaces"]
    task = label_words(words={"bad": " ü", "fine": " ö", "good": " good"})  # neither letter is in the vocabulary
    with pytest.raises(DataError, match="labels 'bad' and 'fine' have the same tokens"):
        task.encode(ROWS, tokenizer, ("bad", "fine", "good"))


def test_a_prompt_that_shares_a_token_with_the_words_is_refused(tokenizers: dict[str, Any]) -> None:
    task = label_words(template=f"{TEMPLATE} ", words={"bad": "bad", "fine": "fine", "good": "good"})
    with pytest.raises(DataError, match=r"train.jsonl:1: the end of the prompt and 'bad' share a token"):
        task.encode(ROWS, tokenizers["bytes"], ("bad", "fine", "good"))


def test_typed_texts_need_a_template_of_texts_alone() -> None:
    assert label_words().rows_from_text(["a"]).records == [{"text": "a"}]
    pairs = label_words(template="{text} / {other}:", text_pair="other")
    assert pairs.rows_from_text(["a"], ["b"]).records == [{"text": "a", "other": "b"}]
    with pytest.raises(UsageError, match="the template also takes year; give the rows as --file"):
        label_words(template="{year}: {text}").rows_from_text(["a"])


@pytest.mark.parametrize("loss_over", ["words", "vocabulary"])
def test_a_model_learns_the_words(loss_over: str, tiny_llama: Path, toy_data: Path, tmp_path: Path) -> None:
    files = {split: str(toy_data / f"sentiment_{split}.jsonl") for split in ("train", "dev", "test")}
    config = {
        "backbone": {"name": str(tiny_llama)},
        "task": {"kind": "label_words", "data": files, "max_length": 32, "template": "{text} is"}
        | {"words": {"positive": " good", "negative": " bad"}, "loss_over": loss_over},
        "method": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"},
        "training": {"learning_rate": 0.03, "max_steps": 60, "batch_size": 32, "evaluate_every": 60, "seed": 1},
        "output": {"folder": str(tmp_path / "run")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["after"]["values"]["accuracy"] > 0.9 > 0.7 > scores["before"]["values"]["accuracy"]
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
