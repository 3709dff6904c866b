"""Relation extraction: its scores on pairs worked out by hand and by scikit-learn, its markers, and whole runs."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import CITIES, FILLERS, PEOPLE, save_word_tokenizer
from sklearn.metrics import f1_score
from transformers import AutoTokenizer

from peftkit import load_run, train
from peftkit.artifacts.merge import merge
from peftkit.artifacts.predict import evaluate_rows, predict_rows
from peftkit.backbones.new_tokens import add_to_tokenizer
from peftkit.config import Run
from peftkit.data.files import Rows
from peftkit.data.sources import DataSettings, splits_from
from peftkit.errors import DataError, UsageError
from peftkit.metrics.relations import micro_scores, relation_of, semeval_scores
from peftkit.tasks import RelationExtraction
from peftkit.tasks.entity_markers import Span, as_words, kept_tokens, marked

MARKERS = ("<e1>", "</e1>", "<e2>", "</e2>")
LABELS = ("lives-in", "none")


def rows_of(*records: dict[str, Any]) -> Rows:
    return Rows("train.jsonl", list(records), range(1, len(records) + 1))


def task(**settings: Any) -> RelationExtraction:
    return RelationExtraction(data=DataSettings(train="train.jsonl"), **{"max_length": 32} | settings)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    add_to_tokenizer(tokenizer, MARKERS)
    return tokenizer


class TestSemEval:
    """By hand, from the description of scorer version 1.2 and its printed form, P = right / (predicted + wrong way
    round): precision is of all predictions of a relation, whose direction is right, wrong, or of another relation."""

    def test_by_hand(self) -> None:
        references = ["A-B(e1,e2)"] * 3 + ["A-B(e2,e1)"] + ["C-D(e1,e2)"] * 2 + ["Other"] * 2
        predictions = [
            "A-B(e1,e2)",
            "A-B(e2,e1)",
            "Other",
            "A-B(e2,e1)",
            "C-D(e1,e2)",
            "A-B(e1,e2)",
            "C-D(e1,e2)",
            "Other",
        ]
        values, rows = semeval_scores(predictions, references, "Other")
        # A-B: 2 right; predicted 4 times (one the wrong way round, one of a C-D), 4 references
        # C-D: 1 right; predicted twice (one of an Other), 2 references
        assert [(row["name"], row["precision"], row["recall"], row["f1"], row["support"]) for row in rows] == [
            ("A-B", 0.5, 0.5, 0.5, 4),
            ("C-D", 0.5, 0.5, 0.5, 2),
        ]
        assert values == {"macro_f1": 0.5, "macro_precision": 0.5, "macro_recall": 0.5, "accuracy": 0.5}

    def test_a_line_that_the_scorer_printed(self) -> None:
        """Content-Container: P = 160/(194 + 4) = 80.81 %, R = 160/192 = 83.33 %, F1 = 82.05 %: 194 predictions that are
        right or of other relations, 4 the wrong way round, and so 28 references that were missed."""
        pairs = [("C-C(e1,e2)", "C-C(e1,e2)")] * 160 + [("C-C(e1,e2)", "Other")] * 34
        pairs += [("C-C(e2,e1)", "C-C(e1,e2)")] * 4 + [("Other", "C-C(e2,e1)")] * 28
        predictions, references = zip(*pairs, strict=True)
        _, (row,) = semeval_scores(predictions, references, "Other")
        assert round(100 * row["precision"], 2) == 80.81
        assert round(100 * row["recall"], 2) == 83.33
        assert round(100 * row["f1"], 2) == 82.05

    def test_relations_that_the_references_lack_are_no_part_of_the_mean(self) -> None:
        values, rows = semeval_scores(["A-B(e1,e2)", "C-D(e1,e2)"], ["A-B(e1,e2)", "Other"], "Other")
        assert values["macro_f1"] == 1
        assert [row["name"] for row in rows] == ["A-B"]

    def test_is_that_of_sklearn_where_no_direction_is_wrong(self) -> None:
        chance = random.Random(0)
        labels = ["A(e1,e2)", "B(e2,e1)", "C(e1,e2)", "D", "Other"]
        for _ in range(50):
            references = [*labels, *chance.choices(labels, k=30)]
            predictions = chance.choices(labels, k=35)
            expected = f1_score(references, predictions, labels=labels[:-1], average="macro", zero_division=0)
            assert semeval_scores(predictions, references, "Other")[0]["macro_f1"] == pytest.approx(expected)

    def test_is_that_of_sklearn_with_the_wrong_way_round_as_a_mistake_on_both_sides(self) -> None:
        """A wrong direction counts as predicted and as missed, which is what sklearn sees when prediction and reference
        go to two items: (relation, nothing) and (nothing, relation)."""
        chance = random.Random(1)
        labels = [f"{name}({way})" for name in "ABC" for way in ("e1,e2", "e2,e1")] + ["Other"]
        for _ in range(50):
            references, predictions = ([*labels, *chance.choices(labels, k=30)] for _ in range(2))
            pairs = []
            for one, wanted in zip(map(str, predictions), map(str, references), strict=True):
                names = relation_of(one), relation_of(wanted)
                swapped = one != wanted and names[0] == names[1]
                pairs += [(names[0], "-"), ("-", names[1])] if swapped else [names]
            mapped, wanted_names = zip(*pairs, strict=True)
            expected = f1_score(wanted_names, mapped, labels=list("ABC"), average="macro", zero_division=0)
            assert semeval_scores(predictions, references, "Other")[0]["macro_f1"] == pytest.approx(expected)

    def test_nothing_right_is_zero(self) -> None:
        values, _ = semeval_scores(["A(e2,e1)", "Other"], ["A(e1,e2)", "Other"], "Other")
        assert values == {"macro_f1": 0, "macro_precision": 0, "macro_recall": 0, "accuracy": 0.5}


class TestMicro:
    def test_by_hand(self) -> None:
        references = ["a", "a", "b", "none", "none"]
        predictions = ["a", "b", "none", "none", "a"]
        values, rows = micro_scores(predictions, references, ["a", "b", "none"], "none")
        # 1 right of 3 predicted relations and of 3 references
        assert values == {
            "micro_f1": pytest.approx(1 / 3),
            "micro_precision": pytest.approx(1 / 3),
            "micro_recall": pytest.approx(1 / 3),
            "accuracy": 0.4,
        }
        assert [(row["name"], row["support"]) for row in rows] == [("a", 2), ("b", 1)]

    def test_without_a_label_for_none_it_is_accuracy(self) -> None:
        values, _ = micro_scores(["a", "b", "b"], ["a", "a", "b"], ["a", "b"], None)
        assert values["micro_f1"] == pytest.approx(values["accuracy"]) == pytest.approx(2 / 3)

    def test_no_relation_at_all(self) -> None:
        assert micro_scores(["none"], ["none"], ["a", "none"], "none")[0]["micro_f1"] == 0


class TestMarkers:
    @pytest.mark.parametrize(
        ("spans", "expected"),
        [
            ([(0, 5), (10, 13)], "<e1>alice</e1> met <e2>bob</e2>"),
            ([(10, 13), (0, 5)], "<e2>alice</e2> met <e1>bob</e1>"),
            ([(0, 13), (6, 9)], "<e1>alice <e2>met</e2> bob</e1>"),
            ([(0, 5), (0, 9)], "<e2><e1>alice</e1> met</e2> bob"),
            ([(6, 13), (10, 13)], "alice <e1>met <e2>bob</e2></e1>"),
            ([(0, 6), (6, 9)], "<e1>alice </e1><e2>met</e2> bob"),
        ],
    )
    def test_spans_become_markers(self, spans: list[Span], expected: str) -> None:
        assert marked("alice met bob", spans, MARKERS) == expected

    def test_the_space_before_an_entity_goes_inside(self) -> None:
        given = "The <e1>author</e1> of <e2>a keygen</e2>."
        assert as_words(given, MARKERS) == "The<e1> author</e1> of<e2> a keygen</e2>."

    def test_columns_are_as_good_as_markers(self, tokenizer: Any) -> None:
        plain = {"text": "alice met bob in paris", "label": "none"}
        expected = task().encode(
            rows_of(plain | {"text": "<e1>alice</e1> met bob in <e2>paris</e2>"}), tokenizer, LABELS
        )
        lists = plain | {"one": [0, 5], "two": [17, 22]}
        numbers = plain | {"one_start": 0, "one_end": 5, "two_start": 17, "two_end": 22}
        for row in (lists, numbers):
            found = task(entities=("one", "two")).encode(rows_of(row), tokenizer, LABELS)
            assert found.examples == expected.examples
        text = tokenizer.decode(expected.examples[0]["input_ids"])
        assert text.split() == [
            "[CLS]",
            "<e1>",
            "alice",
            "</e1>",
            "met",
            "bob",
            "in",
            "<e2>",
            "paris",
            "</e2>",
            "[SEP]",
        ]

    @pytest.mark.parametrize(
        "text",
        [
            "<e1>alice</e1> met bob",
            "<e1>alice</e1> met <e2>bob</e2> and <e2>carol</e2>",
            "</e1>alice<e1> met <e2>bob</e2>",
            "<e1>alice</e1> met <e2> </e2>",
            "<e1>alice</e1> met <E2>bob</E2>",
        ],
    )
    def test_rows_that_are_not_marked_are_refused(self, tokenizer: Any, text: str) -> None:
        good = {"text": "<e1>alice</e1> met <e2>bob</e2>", "label": "none"}
        with pytest.raises(DataError, match=r"train\.jsonl:2: the text does not have one entity <e1>…</e1> and one"):
            task().encode(rows_of(good, {"text": text, "label": "none"}), tokenizer, LABELS)

    @pytest.mark.parametrize(
        ("spans", "message"),
        [
            ({"one": [0, 5], "two": [17, 23]}, "span is empty or reaches beyond the text"),
            ({"one": [5, 5], "two": [17, 22]}, "span is empty"),
            ({"one": [5, 6], "two": [17, 22]}, "span is empty"),
            ({"one": [0, 5]}, "'one' and 'two' hold no spans; write"),
            ({"one": [0, 5], "two": ["17", 22]}, "hold no spans"),
        ],
    )
    def test_spans_that_cannot_be_are_refused(self, tokenizer: Any, spans: dict[str, Any], message: str) -> None:
        row = {"text": "alice met bob in paris", "label": "none"} | spans
        with pytest.raises(DataError, match=rf"train\.jsonl:1: .*{message}"):
            task(entities=("one", "two")).encode(rows_of(row), tokenizer, LABELS)

    def test_markers_that_are_not_told_apart_are_refused(self) -> None:
        with pytest.raises(ValueError, match="none of them a part of another"):
            task(markers=("#", "#", "$", "$"))
        with pytest.raises(ValueError, match="none of them a part of another"):
            task(markers=("[E1]", "[/E1]", "[E", "[/E2]"))
        with pytest.raises(ValueError, match="must not be blank"):
            task(markers=("[E1]", "[/E1]", " ", "[/E2]"))


class TestCutting:
    def test_keeps_both_entities_and_what_is_next_to_them(self) -> None:
        """Every text of up to 12 tokens with every two entities, in every length."""
        for count, room in itertools.product(range(4, 13), range(2, 13)):
            for bounds in itertools.combinations(range(count + 1), 4):
                entities = [(bounds[0], bounds[1]), (bounds[2], bounds[3])]
                kept = kept_tokens(count, room, entities)
                needed = {*range(*entities[0]), *range(*entities[1])}
                if len(needed) > room:
                    assert kept is None
                    continue
                assert kept is not None
                assert needed <= set(kept)
                assert kept == sorted(set(kept))
                assert len(kept) == min(count, room)
                if bounds[3] - bounds[0] <= room:  # in one piece
                    assert kept == list(range(kept[0], kept[-1] + 1))
                assert kept == kept_tokens(count, room, entities[::-1])

    def test_entities_within_one_another_stay_whole(self) -> None:
        assert kept_tokens(20, 6, [(8, 13), (9, 11)]) == [8, 9, 10, 11, 12, 13]
        assert kept_tokens(20, 4, [(8, 13), (9, 11)]) is None

    def test_encoded(self, tokenizer: Any) -> None:
        far = " ".join(["film"] * 40)
        text = f"{far} <e1>alice</e1> was {far} in <e2>paris</e2> {far}"
        encoded = task(max_length=14).encode(rows_of({"text": text, "label": "none"}), tokenizer, LABELS)
        assert encoded.truncated == 1
        expected = "[CLS] <e1> alice </e1> was film film film film in <e2> paris </e2> [SEP]"
        assert tokenizer.decode(encoded.examples[0]["input_ids"]).split() == expected.split()
        with pytest.raises(DataError, match=r"train\.jsonl:1: the two entities alone are longer than 7 tokens; raise"):
            task(max_length=7).encode(rows_of({"text": text, "label": "none"}), tokenizer, LABELS)


class TestLabels:
    def test_semeval_leaves_other_out_unless_told(self) -> None:
        rows = rows_of({"label": "A(e1,e2)"}, {"label": "Other"})
        assert task(scoring="semeval").no_relation == "Other"
        assert task(scoring="semeval", no_relation=None).no_relation is None
        assert task(scoring="semeval").headline == "macro_f1"
        head = task(scoring="semeval").head(rows)
        assert head.labels == ("A(e1,e2)", "Other")
        assert head.new_tokens == MARKERS

    def test_a_label_for_none_that_is_no_label_is_refused(self) -> None:
        rows = rows_of({"label": "a"}, {"label": "no_relation"})
        with pytest.raises(DataError, match=r"no label 'no-relation', .*; did you mean 'no_relation'\?"):
            task(no_relation="no-relation").head(rows)

    def test_the_answer_that_ignores_the_text_is_a_relation(self) -> None:
        rows = rows_of(*({"text": "x", "label": label} for label in ("none", "none", "none", "a", "b", "b")))
        found = task(no_relation="none").majority(rows, rows.head(2), ("a", "b", "none"))
        assert [one["label"] for one in found] == ["b", "b"]

    def test_typed_texts(self) -> None:
        with pytest.raises(UsageError, match="single texts with both entities marked"):
            task().rows_from_text(["a"], ["b"])


def toy(count: int, seed: int) -> list[dict[str, Any]]:
    """Whoever went to a city lives in it, and whoever met somebody in it does not."""
    chance, rows = random.Random(seed), []
    for _ in range(count):
        label = chance.choice(LABELS)
        said = "went to" if label == "lives-in" else "met in"
        around = " ".join(chance.choices(FILLERS, k=chance.randint(4, 7)))
        text = f"{around} <e1>{chance.choice(PEOPLE)}</e1> {said} <e2>{chance.choice(CITIES)}</e2>"
        rows.append({"text": text, "label": label})
    return rows


@pytest.mark.parametrize(
    ("architecture", "method", "pooling"),
    [("bert", "lora", "markers"), ("llama", "lora", "cls"), ("bert", "full", "cls")],
)
def test_from_training_to_a_merged_model(
    architecture: str, method: str, pooling: str, tiny_bert: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    run = Run.model_validate(
        {
            "backbone": {"name": str({"bert": tiny_bert, "llama": tiny_llama}[architecture])},
            "task": {"kind": "relation_extraction", "max_length": 24, "pooling": pooling},
            "method": {"kind": method},
            "training": {
                "learning_rate": 0.01 if method == "lora" else 0.003,
                "epochs": 4,
                "batch_size": 16,
                "seed": 1,
            },
            "output": {"folder": str(tmp_path / "run")},
        }
    )
    splits = splits_from(toy(160, 1), toy(40, 2), toy(60, 3), label="label")
    result = train(run, splits)
    after = result.evaluations["after"]
    assert after.scores.value > 0.9
    saved = load_run(tmp_path / "run")
    assert splits.test is not None
    assert evaluate_rows(saved, splits.test).scores == after.scores
    texts = ["and <e1>bob</e1> went to <e2>rome</e2>", "and <e1>bob</e1> met in <e2>rome</e2>"]
    shown = predict_rows(saved, saved.run.task.rows_from_text(texts))
    assert [one["label"] for one in shown] == list(LABELS)
    assert merge(saved, tmp_path / "merged", splits.test).equal_predictions == 60
    # by transformers alone, from the folder
    name = {"cls": "AutoModelForSequenceClassification", "markers": "AutoModelForTokenClassification"}[pooling]
    plain: Any = getattr(transformers, name).from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for text, expected in zip(texts, shown, strict=True):
        given = tokenizer(as_words(text, MARKERS), return_tensors="pt")
        logits = plain(**given).logits
        if pooling == "markers":
            tokens = tokenizer.convert_ids_to_tokens(given["input_ids"][0])
            logits = (logits[0, tokens.index("<e1>")] + logits[0, tokens.index("<e2>")]) / 2
        assert plain.config.id2label[int(logits.argmax())] == expected["label"]


def test_words_of_byte_level_tokenizers_begin_with_their_space(tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    add_to_tokenizer(tokenizer, MARKERS)
    row = {"text": "<e1>alice</e1> met <e2>bob</e2>.", "label": "none"}
    ids = task().encode(rows_of(row), tokenizer, LABELS).examples[0]["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<e1>", "alice", "</e1>", "met", "<e2>", "bob", "</e2>", "."]
