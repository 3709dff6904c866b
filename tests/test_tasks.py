"""Tasks against the tokenizer called directly, torch's losses, float64 formulas and hand-made expectations."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import write_jsonl
from torch import nn
from transformers import AutoModelForTokenClassification, AutoTokenizer

from benchmarks.tiny_bert import save_bert_tokenizer
from peftkit.data.collate import IGNORED, collate
from peftkit.data.files import Rows, read_file
from peftkit.data.sources import DataSettings, splits_from
from peftkit.errors import DataError, UsageError
from peftkit.tasks import SequenceClassification, TokenClassification
from peftkit.tasks.losses import CrossEntropy, Focal, LabelSmoothed, Weighted, summed_loss
from peftkit.tasks.tagging_schemes import entity_spans
from peftkit.tasks.token_classification import split_words

SOMEWHERE = DataSettings(train="train.jsonl")


def rows_of(*records: dict[str, Any]) -> Rows:
    return Rows("train.jsonl", list(records), range(1, len(records) + 1))


def labelled(*labels: Any) -> Rows:
    return rows_of(*({"text": "good film", "label": label} for label in labels))


def tagged(*tags: str) -> Rows:
    return rows_of({"tokens": ["w"] * len(tags), "tags": list(tags)})


def sequence(**settings: Any) -> SequenceClassification:
    return SequenceClassification(data=SOMEWHERE, **settings)


def token(**settings: Any) -> TokenClassification:
    return TokenClassification(data=SOMEWHERE, **settings)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture(scope="module")
def splitting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A WordPiece tokenizer in which `unhappiness` is un ##happi ##ness; a lone soft hyphen has no sub-word."""
    folder = tmp_path_factory.mktemp("splitting")
    vocabulary = "[PAD] [UNK] [CLS] [SEP] [MASK] un ##happi ##ness bob ##by paris the went to in . -"
    save_bert_tokenizer(folder, vocabulary.split())
    return AutoTokenizer.from_pretrained(folder)


class TestLabels:
    @pytest.mark.parametrize(
        ("labels", "order"),
        [
            (("pos", "neg", "pos"), ("neg", "pos")),
            ((2, 10, 1), ("1", "2", "10")),
            (("2", "10", "1"), ("1", "2", "10")),
            ((1.0, 0.0, 1.0), ("0", "1")),
            ((-1, 1, 0), ("-1", "0", "1")),
            ((0.5, 1.0), ("0.5", "1")),
            ((True, False), ("False", "True")),
            (("--1", "2"), ("--1", "2")),
            ((" b ", "a"), ("a", "b")),
        ],
    )
    def test_order(self, tokenizer: Any, labels: tuple[Any, ...], order: tuple[str, ...]) -> None:
        rows, task = labelled(*labels), sequence()
        assert task.head(rows).labels == order
        texts = [str(int(x) if isinstance(x, float) and x.is_integer() else x).strip() for x in labels]
        found = [example["labels"] for example in task.encode(rows, tokenizer, order).examples]
        assert found == [order.index(text) for text in texts]

    def test_class_names_of_a_data_set(self, tokenizer: Any) -> None:
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a", "unused"])}
        )
        table = datasets.Dataset.from_dict({"text": ["good"] * 4, "label": [1, 0, 1, 0]}, features=features)
        splits, task = splits_from(table, table, label="label"), sequence()
        head = task.head(splits.train)
        assert head.labels == ("z", "a", "unused")
        assert [e["labels"] for e in task.encode(splits.dev, tokenizer, head.labels).examples] == [1, 0, 1, 0]

    def test_a_single_class_is_refused(self) -> None:
        one = Rows("d", [{"text": "a", "label": "x"}], [1], {"label": ("x",)})
        for rows in (labelled("x", "x"), one):
            with pytest.raises(DataError, match="has 1 label; classification needs two"):
                sequence().head(rows)

    def test_names_in_the_configuration_and_numbers_in_the_data(self, tokenizer: Any) -> None:
        task = sequence(labels=("neg", "neutral", "pos"))
        assert task.head(labelled(0, 2)).labels == ("neg", "neutral", "pos")
        examples = task.encode(labelled(2, 0, "1", 1.0, "pos"), tokenizer, ("neg", "neutral", "pos")).examples
        assert [example["labels"] for example in examples] == [2, 0, 1, 1, 2]

    def test_numbers_in_the_configuration_are_never_positions(self, tokenizer: Any) -> None:
        task = sequence(labels=("1", "2"))
        with pytest.raises(DataError, match=r"train\.jsonl:2: label '0' never occurs in training"):
            task.encode(labelled(1, 0), tokenizer, ("1", "2"))

    @pytest.mark.parametrize("labels", [("a",), ("a", "a")])
    def test_configured_labels_must_differ(self, labels: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match="two or more different names"):
            sequence(labels=labels)

    def test_unknown_label_lists_the_rows(self, tokenizer: Any) -> None:
        rows = labelled("pos", "neq", "neg", "neq", "neq", "neq")
        with pytest.raises(DataError) as caught:
            sequence().encode(rows, tokenizer, ("neg", "pos"))
        places = "train.jsonl:2, train.jsonl:4, train.jsonl:5 and 1 more"
        assert str(caught.value) == f"{places}: label 'neq' never occurs in training; did you mean 'neg'?"

    @pytest.mark.parametrize("value", [None, "", "  "])
    def test_missing_label(self, tokenizer: Any, value: Any) -> None:
        with pytest.raises(DataError, match=r"train\.jsonl:2: no label; fill in 'label'"):
            sequence().encode(labelled("a", value), tokenizer, ("a", "b"))

    @pytest.mark.parametrize("value", [None, "", " \t", 7])
    def test_missing_text(self, tokenizer: Any, value: Any) -> None:
        bad = {"text": value, "label": "a"}
        rows = rows_of(bad, {"text": "good", "label": "b"}, bad, bad, bad)
        with pytest.raises(DataError, match=r":1, train\.jsonl:3, train\.jsonl:4 and 1 more: no text in 'text'"):
            sequence().encode(rows, tokenizer, ("a", "b"))

    def test_places_are_lines_of_the_file(self, tokenizer: Any, tmp_path: Path) -> None:
        file = write_jsonl(tmp_path / "dev.jsonl", [{"text": "good", "label": "a"}, {"text": "", "label": "b"}])
        with pytest.raises(DataError, match=r"dev\.jsonl:2: no text in 'text'"):
            sequence().encode(read_file(file), tokenizer, ("a", "b"))

    def test_missing_column_names_the_nearest(self, tokenizer: Any) -> None:
        with pytest.raises(DataError, match="no column 'txt'; did you mean 'text'"):
            sequence(text="txt").encode(labelled("a"), tokenizer, ("a",))


class TestEncodeTexts:
    def test_single_texts(self, tokenizer: Any) -> None:
        encoded = sequence(max_length=16).encode(labelled("a", "b"), tokenizer, ("a", "b"))
        expected = tokenizer("good film")
        assert encoded.examples[0]["input_ids"] == expected["input_ids"]
        assert encoded.lengths == [4, 4]
        assert encoded.truncated == 0

    def test_pairs_equal_the_tokenizer(self, tokenizer: Any) -> None:
        pairs = [("good film", "the actor was sad"), ("bad", "a b c d e f g h i j k l")]
        rows = rows_of(*({"one": a, "two": b, "label": "x"} for a, b in pairs))
        encoded = sequence(text="one", text_pair="two", max_length=10).encode(rows, tokenizer, ("x", "y"))
        for (a, b), example in zip(pairs, encoded.examples, strict=True):
            direct = tokenizer(a, b, truncation=True, max_length=10)
            assert example["input_ids"] == direct["input_ids"]
            assert example["token_type_ids"] == direct["token_type_ids"]
            assert set(example["token_type_ids"]) == {0, 1}
        assert encoded.truncated == 1

    def test_truncation_is_counted_exactly(self, tokenizer: Any) -> None:
        chance = random.Random(0)
        texts = [" ".join(["good"] * chance.randint(1, 14)) for _ in range(200)]
        rows = rows_of(*({"text": text, "label": "a"} for text in texts))
        encoded = sequence(max_length=10).encode(rows, tokenizer, ("a", "b"))
        assert encoded.truncated == sum(len(text.split()) + 2 > 10 for text in texts)
        assert max(encoded.lengths) == 10

    def test_without_labels(self, tokenizer: Any) -> None:
        task = sequence()
        encoded = task.encode(task.rows_from_text(["good", "bad"]), tokenizer, ("a", "b"), supervised=False)
        assert all("labels" not in example for example in encoded.examples)

    def test_typed_text_must_be_what_was_trained_on(self) -> None:
        with pytest.raises(UsageError, match="trained on single texts"):
            sequence().rows_from_text(["a"], ["b"])
        with pytest.raises(UsageError, match="trained on pairs of texts"):
            sequence(text_pair="two").rows_from_text(["a"])


class TestEncodeWords:
    labels = ("O", "B-LOC", "B-PER", "I-PER")

    def test_the_first_sub_word_carries_the_tag(self, splitting: Any) -> None:
        words = ["bobby", "unhappiness", "went", "to", "paris"]
        rows = rows_of({"tokens": words, "tags": ["B-PER", "I-PER", "O", "O", "B-LOC"]})
        example = token().encode(rows, splitting, self.labels).examples[0]
        assert splitting.convert_ids_to_tokens(example["input_ids"]) == (
            ["[CLS]", "bob", "##by", "un", "##happi", "##ness", "went", "to", "paris", "[SEP]"]
        )
        assert example["labels"] == [IGNORED, 2, IGNORED, 3, IGNORED, IGNORED, 0, 0, 1, IGNORED]
        assert example["words"] == [1, 3, 6, 7, 8]

    def test_words_without_a_place_are_predicted_outside_and_kept(self, splitting: Any) -> None:
        words = ["paris", "\u00ad", "unhappiness", "bobby", "paris"]
        tags = ["B-LOC", "B-PER", "O", "B-PER", "B-LOC"]
        rows = rows_of({"tokens": words, "tags": tags}, {"tokens": ["paris"], "tags": ["B-LOC"]})
        encoded = token(max_length=6, long_rows="cut").encode(rows, splitting, self.labels)
        assert encoded.examples[0]["words"] == [1, -1, 2, -1, -1]
        assert encoded.truncated == 1

        class Knows(nn.Module):
            """Says LOC for `paris` and PER for everything else."""

            def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
                paris = input_ids == splitting.convert_tokens_to_ids("paris")
                scores = torch.where(paris[..., None], torch.tensor([0.0, 9, 0, 0]), torch.tensor([0.0, 0, 9, 0]))
                return type("Output", (), {"logits": scores})

        task = token(max_length=6, long_rows="cut")
        predictions = task.predict(Knows(), collate(encoded.examples, 0), self.labels)
        assert [p["tags"] for p in predictions] == [["B-LOC", "O", "B-PER", "O", "O"], ["B-LOC"]]
        assert [len(p["probabilities"]) for p in predictions] == [5, 1]
        scores = task.score(predictions, rows, self.labels)
        assert scores.values["entity_recall"] == pytest.approx(2 / 5)  # every entity of the test counts
        assert scores.values["entity_precision"] == pytest.approx(2 / 3)

    def test_label_order_is_outside_first_then_by_type(self) -> None:
        rows = tagged("O", "I-PER", "B-LOC", "B-PER", "O")
        assert token().head(rows).labels == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
        assert token().head(rows).pretokenized

    @pytest.mark.parametrize("tag", ["PER", "B_PER", "B-", "3"])
    def test_tags_that_are_not_of_an_entity(self, tag: str) -> None:
        with pytest.raises(DataError, match=rf"train\.jsonl:1: tag '{tag}' in 'tags' is not of an entity"):
            token().head(tagged("O", "B-LOC", tag))

    @pytest.mark.parametrize("tag", ["", None])
    def test_a_word_without_a_tag(self, tag: Any) -> None:
        with pytest.raises(DataError, match=r"train\.jsonl:1: a word without a tag in 'tags'"):
            token().head(tagged("O", "B-LOC", tag))

    def test_nothing_to_learn(self) -> None:
        with pytest.raises(DataError, match="has no entity to learn"):
            token().head(tagged("O", "O"))

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"tokens": ["a", "b"], "tags": ["O"]}, "'tokens' and 'tags' differ in length"),
            ({"tokens": [], "tags": []}, "no list of words in 'tokens'"),
            ({"tokens": None, "tags": ["O"]}, "no list of words in 'tokens'"),
            ({"tokens": ["a"], "tags": None}, "no list of tags in 'tags'"),
            ({"tokens": "a b", "tags": "O O"}, "no list of words in 'tokens'"),
            ({"tokens": ["a", 3], "tags": ["O", "O"]}, "'tokens' has something that is not text"),
            ({"tokens": ["a"], "tags": ["B-PEr"]}, "label 'B-PEr' never occurs in training; did you mean 'B-PER'?"),
        ],
    )
    def test_bad_rows_are_named(self, tokenizer: Any, record: dict[str, Any], message: str) -> None:
        rows = rows_of({"tokens": ["a"], "tags": ["O"]}, *[record] * 5)
        with pytest.raises(DataError) as caught:
            token().encode(rows, tokenizer, self.labels)
        places = "train.jsonl:2, train.jsonl:3, train.jsonl:4 and 2 more"
        assert str(caught.value).startswith(f"{places}: {message}")

    def test_tags_that_are_no_list_are_refused_before_the_order_is_made(self) -> None:
        for tags in (None, "O B-LOC"):
            with pytest.raises(DataError, match=r"train\.jsonl:1: no list of tags in 'tags'"):
                token().head(rows_of({"tokens": ["a"], "tags": tags}))


class TestDescribe:
    @pytest.mark.parametrize("seed", range(20))
    def test_offsets_of_typed_text(self, seed: int) -> None:
        chance = random.Random(seed)
        pieces = ["Bob", "U.S.", "O'Neil", "@user", "#tag", "naïve", "日本", "😀", ",", "..", "x-y", "3.14", "  ", "\n"]
        text = "".join(chance.choice(pieces) + chance.choice([" ", "", "\t"]) for _ in range(12)) + "end"
        words = split_words(text)
        assert all(text[start:end] == word for word, start, end in words)
        assert "".join(word for word, _, _ in words) == "".join(text.split())  # nothing but space is left out
        record = token().rows_from_text([text]).records[0]
        tags = [chance.choice(["O", "B-PER", "I-PER", "B-LOC"]) for _ in words]
        self.check(record, tags, text)

    def test_offsets_of_given_words(self) -> None:
        # a column that happens to be called `text` is not what the offsets count in
        record = {"tokens": ["Bob", "Ray", "saw", "Rome"], "tags": [], "text": "Bob   Ray saw Rome", "offsets": [1]}
        self.check(record, ["B-PER", "I-PER", "O", "B-LOC"], "Bob Ray saw Rome")

    def test_words_in_a_column_called_text(self) -> None:
        task = token(tokens="text")
        record = task.rows_from_text(["Bob saw"]).records[0]
        assert record["text"] == ["Bob", "saw"]
        assert (
            task.describe({"tags": ["B-PER", "O"], "probabilities": [0.9, 0.8]}, record)["entities"][0]["text"] == "Bob"
        )

    def check(self, record: dict[str, Any], tags: list[str], text: str) -> None:
        chances = [0.5 + index / 1000 for index in range(len(tags))]
        described = token().describe({"tags": tags, "probabilities": chances}, record)
        assert described["text"] == text
        spans = self.spans(tags)
        assert len(described["entities"]) == len(spans)
        for entity, (kind, first, last) in zip(described["entities"], spans, strict=True):
            words = record["tokens"][first : last + 1]
            assert entity["type"] == kind
            assert text[entity["start"] : entity["end"]] == entity["text"]
            assert entity["text"].startswith(words[0])
            assert entity["text"].endswith(words[-1])
            assert "".join(entity["text"].split()) == "".join(words)
            assert entity["probability"] == min(chances[first : last + 1])

    @staticmethod
    def spans(tags: list[str]) -> list[tuple[str, int, int]]:
        """(type, first word, last word), by going through the tags once."""
        found: list[tuple[str, int, int]] = []
        for index, tag in enumerate(tags):
            if tag == "O":
                continue
            continues = tag[0] == "I" and found and found[-1][2] == index - 1 and found[-1][0] == tag[2:]
            if continues:
                found[-1] = (found[-1][0], found[-1][1], index)
            else:
                found.append((tag[2:], index, index))
        return found

    def test_entity_spans(self) -> None:
        tags = ["I-PER", "I-PER", "B-PER", "O", "B-LOC", "I-PER"]
        assert list(entity_spans(tags)) == [("PER", 0, 2), ("PER", 2, 3), ("LOC", 4, 5), ("PER", 5, 6)]


class TestMeanPooling:
    @pytest.fixture(scope="class")
    def model(self, tiny_bert: Path) -> nn.Module:
        torch.manual_seed(0)
        return AutoModelForTokenClassification.from_pretrained(tiny_bert, num_labels=3).eval()

    def test_is_the_masked_mean_and_independent_of_padding(self, model: nn.Module, tokenizer: Any) -> None:
        task = sequence(pooling="mean")
        assert task.head(labelled("a", "b")).model_class == "AutoModelForTokenClassification"
        texts = ["good", "the very dark film was sad", "bad story ."]
        encoded = task.encode(task.rows_from_text(texts), tokenizer, ("a", "b", "c"), supervised=False)
        with torch.no_grad():
            together = task.logits(model, collate(encoded.examples, 0))
            for text, row in zip(texts, together, strict=True):
                alone = model(**tokenizer(text, return_tensors="pt")).logits[0].double().mean(0)
                assert torch.allclose(row.double(), alone, atol=1e-6)
        assert together.shape == (3, 3)

    def test_prediction_is_the_softmax(self, model: nn.Module, tokenizer: Any) -> None:
        task = sequence(pooling="mean")
        encoded = task.encode(task.rows_from_text(["good film"]), tokenizer, ("a", "b", "c"), supervised=False)
        batch = collate(encoded.examples, 0)
        with torch.no_grad():
            (prediction,) = task.predict(model, batch, ("a", "b", "c"))
            scores = task.logits(model, batch)[0].double()
        expected = (scores.exp() / scores.exp().sum()).tolist()
        assert list(prediction["probabilities"].values()) == pytest.approx(expected, abs=1e-6)
        assert prediction["label"] == "abc"[expected.index(max(expected))]
        assert prediction["probability"] == max(prediction["probabilities"].values())


class TestLosses:
    @pytest.fixture
    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(40, 4, generator=generator)
        labels = torch.randint(0, 4, (40,), generator=generator)
        labels[::7] = IGNORED
        return logits, labels

    def mean(self, loss: Any, logits: torch.Tensor, labels: torch.Tensor, weights: list[float]) -> torch.Tensor:
        weight = token().example_weight({"labels": labels.tolist()}, weights)
        kept = labels != IGNORED
        return summed_loss(loss, logits[kept], labels[kept], torch.tensor(weights)) / weight

    def test_cross_entropy(self, batch: Any) -> None:
        weights = CrossEntropy().class_weights([5, 1, 1, 1])
        assert weights == [1.0] * 4
        assert torch.allclose(self.mean(CrossEntropy(), *batch, weights), nn.CrossEntropyLoss()(*batch))

    @pytest.mark.parametrize("given", ["balanced", (0.5, 2.0, 1.0, 7.0)])
    def test_weighted_is_torchs(self, batch: Any, given: Any) -> None:
        logits, labels = batch
        loss, kept = Weighted(weights=given), labels[labels != IGNORED]
        counts = torch.bincount(kept, minlength=4).tolist()
        weights = loss.class_weights(counts)
        if given == "balanced":
            from sklearn.utils.class_weight import compute_class_weight

            expected_weights = compute_class_weight("balanced", classes=np.arange(4), y=kept.numpy())
            assert weights == pytest.approx(expected_weights.tolist())
        else:
            assert weights == list(given)
        assert torch.allclose(
            self.mean(loss, logits, labels, weights), nn.CrossEntropyLoss(torch.tensor(weights))(*batch)
        )

    def test_label_smoothed_is_torchs(self, batch: Any) -> None:
        found = self.mean(LabelSmoothed(smoothing=0.2), *batch, [1.0] * 4)
        assert torch.allclose(found, nn.CrossEntropyLoss(label_smoothing=0.2)(*batch))

    @pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
    def test_focal_in_float64(self, batch: Any, gamma: float) -> None:
        logits, labels = batch
        total, count = 0.0, 0
        for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
            if label != IGNORED:
                p = math.exp(row[label]) / sum(map(math.exp, row))
                total, count = total + (1 - p) ** gamma * -math.log(p), count + 1
        assert float(self.mean(Focal(gamma=gamma), logits, labels, [1.0] * 4)) == pytest.approx(total / count, rel=1e-5)

    @pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
    def test_focal_gradient_is_finite_where_the_model_is_certain(self, gamma: float) -> None:
        logits = torch.tensor([[60.0, -60.0], [-60.0, 60.0]], requires_grad=True)
        summed_loss(Focal(gamma=gamma), logits, torch.tensor([0, 0]), torch.ones(2)).backward()
        assert logits.grad is not None
        assert bool(logits.grad.isfinite().all())

    def test_half_precision_logits_are_scored_in_float32(self, batch: Any) -> None:
        logits, labels = batch
        half = logits.bfloat16()
        kept = labels != IGNORED
        found = summed_loss(CrossEntropy(), half[kept], labels[kept], torch.ones(4))
        assert found.dtype == torch.float32
        assert torch.allclose(found, nn.CrossEntropyLoss(reduction="sum")(half.float(), labels))

    def test_a_wrong_number_of_weights(self) -> None:
        with pytest.raises(DataError, match=r"task\.loss\.weights has 2 weights for 3 labels"):
            Weighted(weights=(1.0, 2.0)).class_weights([1, 1, 1])

    def test_by_name(self) -> None:
        assert isinstance(sequence(loss="focal").loss, Focal)
        assert sequence(loss={"kind": "weighted", "weights": [1.0, 2.0]}).loss == Weighted(weights=(1.0, 2.0))


class TestCollate:
    def test_pads_on_the_right(self) -> None:
        examples = [
            {"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 1], "labels": [1, IGNORED, 2], "words": [0, 2]},
            {"input_ids": [8], "token_type_ids": [1], "labels": [0], "words": [0]},
        ]
        batch = collate(examples, pad_id=9)
        assert batch.pop("words") == [[0, 2], [0]]
        assert {key: tensor.tolist() for key, tensor in batch.items()} == {
            "input_ids": [[5, 6, 7], [8, 9, 9]],
            "token_type_ids": [[0, 0, 1], [1, 0, 0]],
            "labels": [[1, IGNORED, 2], [0, IGNORED, IGNORED]],
            "attention_mask": [[1, 1, 1], [1, 0, 0]],
        }
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}

    def test_a_real_token_with_the_padding_id_is_attended_to(self) -> None:
        batch = collate([{"input_ids": [1, 1], "labels": 0}, {"input_ids": [1, 2, 1], "labels": 3}], pad_id=1)
        assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
        assert batch["labels"].tolist() == [0, 3]

    def test_equals_the_tokenizers_own_padding(self, tokenizer: Any) -> None:
        texts = ["good", "the very dark film", "bad story ."]
        examples = [{key: tokenizer(text)[key] for key in ("input_ids", "token_type_ids")} for text in texts]
        expected = tokenizer(texts, padding=True, return_tensors="pt")
        for key, tensor in collate(examples, tokenizer.pad_token_id).items():
            assert torch.equal(tensor, expected[key])


class TestMajority:
    def test_classes(self) -> None:
        train, test = labelled("a", "b", "b"), labelled("a", "a", "b")
        predictions = sequence().majority(train, test, ("a", "b"))
        assert [p["label"] for p in predictions] == ["b"] * 3
        assert sequence().score(predictions, test, ("a", "b")).value == pytest.approx(1 / 3)

    def test_tags(self) -> None:
        rows = tagged("O", "O", "B-LOC")
        predictions = token().majority(rows, rows, ("O", "B-LOC"))
        assert predictions[0]["tags"] == ["O"] * 3
        assert token().score(predictions, rows, ("O", "B-LOC")).value == 0.0
