"""Tagging in every scheme, against seqeval, hand-made expectations, and a model that sees the whole document."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqeval.metrics
import seqeval.scheme
import sklearn.metrics
import torch
from conftest import FILLERS, PEOPLE, entity_rows, write_jsonl
from seqeval.metrics.sequence_labeling import get_entities
from torch import nn
from transformers import AutoTokenizer

from peftkit.cli import main
from peftkit.data.collate import IGNORED, collate
from peftkit.data.files import Rows, read_file
from peftkit.data.sources import DataSettings
from peftkit.errors import DataError, UsageError
from peftkit.metrics.spans import EntityReport
from peftkit.tasks import TokenClassification
from peftkit.tasks.tagging_schemes import PREFIXES, detect, entity_spans, read_spans, tags_of_types, write_tags
from peftkit.tasks.word_windows import cut, windows

STRICT = {"iobes": seqeval.scheme.IOBES, "bilou": seqeval.scheme.BILOU, "bio": seqeval.scheme.IOB2}
# (PER, 0, 2), (PER, 2, 3), (LOC, 4, 7) and (LOC, 7, 8) in eight words
SPELT = {
    "bio": "B-PER I-PER B-PER O B-LOC I-LOC I-LOC B-LOC",
    "iob1": "I-PER I-PER B-PER O I-LOC I-LOC I-LOC B-LOC",
    "iobes": "B-PER E-PER S-PER O B-LOC I-LOC E-LOC S-LOC",
    "bilou": "B-PER L-PER U-PER O B-LOC I-LOC L-LOC U-LOC",
}
SPANS = [("PER", 0, 2), ("PER", 2, 3), ("LOC", 4, 7), ("LOC", 7, 8)]


def token(**settings: Any) -> TokenClassification:
    return TokenClassification(data=DataSettings(train="train.jsonl"), **settings)


def tagged(*rows: Sequence[Any] | str, tokens: Sequence[Sequence[str]] | None = None) -> Rows:
    """Rows of tags, given as lists or with spaces between."""
    split = [row.split() if isinstance(row, str) else list(row) for row in rows]
    words = tokens or [["w"] * len(row) for row in split]
    records = [{"tokens": list(one), "tags": two} for one, two in zip(words, split, strict=True)]
    return Rows("train.jsonl", records, range(1, len(records) + 1))


def random_tags(chance: random.Random, scheme: Any, words: int) -> list[str]:
    return chance.choices(["O", *tags_of_types(["PER", "LOC", "creative-work"], scheme)], k=words)


def random_spans(chance: random.Random, words: int) -> list[tuple[str, int, int]]:
    spans, at = [], 0
    while at < words:
        end = min(words, at + chance.randint(1, 3))
        if chance.random() < 0.6:
            spans.append((chance.choice(["PER", "LOC"]), at, end))
        at = end
    return spans


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture(scope="module")
def splitting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer in which words of up to three letters a to f have as many sub-words; a soft hyphen has none."""
    from benchmarks.tiny_bert import save_bert_tokenizer

    folder = tmp_path_factory.mktemp("splitting")
    letters = "abcdef"
    save_bert_tokenizer(folder, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)])
    return AutoTokenizer.from_pretrained(folder)


class TestSchemes:
    @pytest.mark.parametrize("scheme", SPELT)
    def test_by_hand(self, scheme: Any) -> None:
        tags = SPELT[scheme].split()
        assert read_spans(tags) == SPANS
        assert write_tags(SPANS, 8, scheme) == tags
        assert detect([tags]) == (scheme, 0)

    def test_io_runs_neighbours_of_one_type_together(self) -> None:
        tags = write_tags(SPANS, 8, "io")
        assert tags == ["I-PER", "I-PER", "I-PER", "O", "I-LOC", "I-LOC", "I-LOC", "I-LOC"]
        assert read_spans(tags) == [("PER", 0, 3), ("LOC", 4, 8)]
        assert detect([tags]) == ("io", 0)

    @pytest.mark.parametrize("scheme", SPELT)
    @pytest.mark.parametrize("seed", range(5))
    def test_what_is_written_is_read_back(self, scheme: Any, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(40):
            spans = random_spans(chance, 9)
            tags = write_tags(spans, 9, scheme)
            assert read_spans(tags) == spans
            assert entity_spans(tags, scheme) == spans
            assert all(tag == "O" or tag[0] in PREFIXES[scheme] for tag in tags)
            if scheme in STRICT:  # seqeval finds nothing to object to
                found = seqeval.scheme.Entities([tags], STRICT[scheme]).entities[0]
                assert [(one.tag, one.start, one.end) for one in found] == spans

    @pytest.mark.parametrize("seed", range(10))
    def test_tags_that_contradict_themselves_are_read_as_seqeval_does(self, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(30):
            for scheme in ("bio", "io", "iobes"):
                tags = random_tags(chance, scheme, 12)
                assert read_spans(tags) == [(kind, a, b + 1) for kind, a, b in get_entities(tags)]
            for strict in ("iobes", "bilou"):
                tags = random_tags(chance, strict, 12)
                found = seqeval.scheme.Entities([tags], STRICT[strict]).entities[0]
                assert entity_spans(tags, strict) == [(one.tag, one.start, one.end) for one in found]

    def test_tags_without_a_type(self) -> None:
        assert read_spans(["B", "I", "O", "B"]) == [("", 0, 2), ("", 3, 4)]
        assert write_tags([("", 0, 2), ("", 3, 4)], 4, "iobes") == ["B", "E", "O", "S"]
        assert entity_spans(["B", "E", "O", "S"], "iobes") == [("", 0, 2), ("", 3, 4)]
        assert token().head(tagged("B I O B")).labels == ("O", "B", "I")

    def test_detection_goes_by_the_least_contradiction(self) -> None:
        noisy = [*[SPELT["bio"].split()] * 5, ["O", "I-PER", "O"]]
        assert detect(noisy) == ("bio", 1)
        noisy = [*[SPELT["iob1"].split()] * 5, ["O", "B-PER", "O"]]
        assert detect(noisy) == ("iob1", 1)
        assert detect([["B-PER", "O"], ["E-PER", "L-PER"]]) is None


class TestReading:
    @pytest.mark.parametrize("scheme", ["bio", "iobes", "bilou"])
    @pytest.mark.parametrize("source", SPELT)
    def test_any_scheme_is_converted_to_the_tasks(self, source: str, scheme: Any, tokenizer: Any) -> None:
        rows, task = tagged(SPELT[source]), token(scheme=scheme)
        labels = task.head(rows).labels
        assert set(labels) == {"O", *(f"{letter}-{kind}" for letter in PREFIXES[scheme] for kind in ("LOC", "PER"))}
        assert task.references(rows, labels) == [SPELT[scheme].split()]
        encoded = task.encode(rows, tokenizer, labels)
        assert [labels[i] for i in encoded.examples[0]["labels"] if i != IGNORED] == SPELT[scheme].split()
        said = f"tags are {source.upper()}, learnt as {scheme.upper()}"
        assert encoded.notes == (() if source == scheme else (said,))

    @pytest.mark.parametrize(("alias", "scheme"), [("iob2", "bio"), ("bioes", "iobes")])
    def test_other_names(self, alias: Any, scheme: str) -> None:
        assert token(scheme=alias).scheme == scheme
        assert token(data_scheme=alias).data_scheme == scheme

    def test_contradictions_are_counted(self, tokenizer: Any) -> None:
        rows = tagged(*[SPELT["bio"]] * 3, "O I-PER I-PER")
        task = token()
        assert task.encode(rows, tokenizer, task.head(rows).labels).notes == (
            "1 tags are not as BIO has them; entities were read as the CoNLL evaluation does",
        )
        assert task.references(rows, task.head(rows).labels)[3] == ["O", "B-PER", "I-PER"]

    def test_a_given_scheme_refuses_others(self) -> None:
        rows = tagged(SPELT["bio"], SPELT["iobes"])
        with pytest.raises(DataError, match=r"train\.jsonl:2: tag 'E-PER' in 'tags' is not IOB1 \(O, B-type, I-type\)"):
            token(data_scheme="iob1").head(rows)
        assert "B-PER" in token(data_scheme="iobes").head(rows).labels

    def test_letters_of_two_schemes(self, tokenizer: Any) -> None:
        rows = tagged("B-PER E-PER", "B-PER L-PER")
        with pytest.raises(DataError, match="has tags with B-, E-, L-, which no scheme has together"):
            token().encode(rows, tokenizer, token().head(rows).labels)

    def test_numbers_have_names(self) -> None:
        rows, task = tagged([1, 2, 0, 3]), token(tag_names=("O", "B-PER", "I-PER", "B-LOC"))
        assert task.head(rows).labels == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
        assert task.references(rows, task.head(rows).labels) == [["B-PER", "I-PER", "O", "B-LOC"]]
        with pytest.raises(DataError, match=r"tag '1' in 'tags' is not of an entity .* for numbers tag_names"):
            token().head(rows)

    def test_the_audit_knows_how_the_data_may_spell_the_labels(self) -> None:
        task = token(scheme="io")
        labels = task.head(tagged(SPELT["bio"])).labels
        assert labels == ("O", "I-LOC", "I-PER")
        assert set(task.spellings(labels)) == {"O", *(f"{x}-{kind}" for x in "BIESLU" for kind in ("LOC", "PER"))}
        assert set(token(data_scheme="iobes").spellings(labels)) & {"L-PER", "U-PER"} == set()
        assert token(scheme="none").spellings(("DET", "X")) == ("DET", "X")

    def test_a_type_that_train_does_not_have(self) -> None:
        labels = token().head(tagged(SPELT["bio"])).labels
        with pytest.raises(DataError, match=r"train\.jsonl:2: label 'S-PRE' never occurs in training"):
            token().references(tagged("O", "S-PRE"), labels)

    def test_a_spelling_that_train_does_not_have_can_be_predicted(self) -> None:
        task = token(scheme="iobes")
        labels = task.head(tagged("S-PER O")).labels
        assert task.references(tagged("B-PER I-PER I-PER"), labels) == [["B-PER", "I-PER", "E-PER"]]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"stride": 8, "max_length": 8}, "stride 8 is not below max_length, which is 8"),
            ({"stride": 2, "long_rows": "cut"}, "stride is of windows; leave it out with long_rows: cut"),
            ({"scheme": "none", "data_scheme": "bio"}, "data_scheme is of entities"),
            ({"tag_names": ("O", "O")}, "tag_names must be two or more different names"),
        ],
    )
    def test_settings_that_do_not_belong_together(self, settings: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            token(**settings)


class TestSubWords:
    words = ("ab", "cde", "f", "\u00ad", "ab")

    @pytest.mark.parametrize(
        ("scheme", "supervise", "expected"),
        [
            ("bio", "first", ["B-PER", None, "I-PER", None, None, "O", "B-PER", None]),
            ("bio", "all", ["B-PER", "I-PER", "I-PER", "I-PER", "I-PER", "O", "B-PER", "I-PER"]),
            ("iobes", "all", ["B-PER", "I-PER", "E-PER", "I-PER", "I-PER", "O", "S-PER", "I-PER"]),
            ("io", "all", ["I-PER", "I-PER", "I-PER", "I-PER", "I-PER", "O", "I-PER", "I-PER"]),
        ],
    )
    def test_which_are_learnt(self, splitting: Any, scheme: Any, supervise: Any, expected: list[Any]) -> None:
        rows = tagged("B-PER I-PER O O B-PER", tokens=[self.words])
        task = token(scheme=scheme, supervise=supervise)
        labels = task.head(rows).labels
        (example,) = task.encode(rows, splitting, labels).examples
        found = [None if label == IGNORED else labels[label] for label in example["labels"]]
        assert found == [None, *expected, None]
        assert example["words"] == [1, 3, 6, -1, 7]

    def test_plain_tags_of_all_sub_words(self, splitting: Any) -> None:
        rows = tagged("X Y X X Y", tokens=[self.words])
        task = token(scheme="none", supervise="all")
        labels = task.head(rows).labels
        (example,) = task.encode(rows, splitting, labels).examples
        assert [labels[i] for i in example["labels"] if i != IGNORED] == list("XXYYYXYY")


class TestScores:
    @pytest.mark.parametrize("scheme", ["bio", "iobes", "bilou"])
    @pytest.mark.parametrize("seed", range(3))
    def test_equal_seqevals(self, scheme: Any, seed: int) -> None:
        chance = random.Random(seed)
        rows = tagged(*(write_tags(random_spans(chance, 12), 12, scheme) for _ in range(25)))
        task = token(scheme=scheme)
        labels = task.head(rows).labels
        predictions = [
            # half of the rows are right except for some words, so that there is something to find
            [tag if chance.random() < 0.8 else chance.choice(labels) for tag in record["tags"]]
            for record in rows.records
        ]
        references = [record["tags"] for record in rows.records]
        scores = task.score([{"tags": tags} for tags in predictions], rows, labels)
        options: dict[str, Any] = {"mode": "strict", "scheme": STRICT[scheme]} if scheme != "bio" else {}
        report = seqeval.metrics.classification_report(
            references, predictions, output_dict=True, zero_division=0, **options
        )
        assert 0 < scores.value < 1
        micro = report["micro avg"]
        found = [scores.values[f"entity_{name}"] for name in ("precision", "recall", "f1")]
        assert found == pytest.approx([micro["precision"], micro["recall"], micro["f1-score"]], abs=1e-12)
        accuracy = np.mean(
            [a == b for one, two in zip(references, predictions, strict=True) for a, b in zip(one, two, strict=True)]
        )
        assert scores.values["tag_accuracy"] == pytest.approx(accuracy)
        for row in scores.per_class:
            one = report[row["name"]]
            assert (row["precision"], row["recall"]) == pytest.approx((one["precision"], one["recall"]), abs=1e-12)
            assert (row["f1"], row["support"]) == pytest.approx((one["f1-score"], one["support"]), abs=1e-12)

    def test_iobes_counts_only_what_is_spelt_right(self) -> None:
        references = [["B-PER", "I-PER", "E-PER", "O", "S-LOC"]]
        for tags, right in (("B-PER I-PER I-PER O S-LOC", 1), ("B-PER E-PER E-PER O S-LOC", 1), (SPELT["iobes"], 0)):
            found: Any = EntityReport(scheme="iobes").compute(predictions=[tags.split()[:5]], references=references)
            assert found["entity_recall"] == right / 2

    def test_no_entity_anywhere(self) -> None:
        for scheme in ("bio", "iobes"):
            found: Any = EntityReport(scheme=scheme).compute(predictions=[["O"]], references=[["O"]])
            assert (found["entity_f1"], found["tag_accuracy"], found["per_class"]) == (0.0, 1.0, [])

    def test_io_is_scored_on_the_entities_of_the_data(self, tokenizer: Any) -> None:
        rows, task = tagged(SPELT["bio"]), token(scheme="io")
        labels = task.head(rows).labels
        best = [{"tags": task.references(rows, labels)[0]}]
        scores = task.score(best, rows, labels)
        assert scores.values["entity_recall"] == 0.0  # all four have a neighbour of their type
        assert [row["support"] for row in scores.per_class] == [2, 2]
        notes = task.encode(rows, tokenizer, labels).notes
        assert "IO runs 2 of 4 entities into a neighbour of their type" in notes

    def test_plain_tags_are_scored_word_by_word(self) -> None:
        chance = random.Random(0)
        tags = ["NOUN", "VERB", "DET", "X"]
        rows = tagged(*(chance.choices(tags, k=chance.randint(1, 9)) for _ in range(30)))
        task = token(scheme="none")
        labels = task.head(rows).labels
        assert (task.headline, labels) == ("accuracy", ("DET", "NOUN", "VERB", "X"))
        predictions = [{"tags": chance.choices(tags, k=len(r["tags"]))} for r in rows.records]
        scores = task.score(predictions, rows, labels)
        right = [tag for record in rows.records for tag in record["tags"]]
        found = [tag for prediction in predictions for tag in prediction["tags"]]
        assert scores.value == pytest.approx(sklearn.metrics.accuracy_score(right, found))
        assert scores.values["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(right, found, average="macro"))
        assert sum(row["support"] for row in scores.per_class) == len(right)

    def test_a_word_without_a_prediction_is_wrong(self) -> None:
        rows, task = tagged("X Y"), token(scheme="none")
        scores = task.score([{"tags": ["X", ""]}], rows, ("X", "Y"))
        assert scores.value == 0.5
        assert scores.values["macro_f1"] == pytest.approx(0.5)

    def test_entities_without_a_scheme_are_told(self, tokenizer: Any) -> None:
        task = token(scheme="none")
        (note,) = task.encode(tagged("B-PER O"), tokenizer, ("B-PER", "O")).notes
        assert note.endswith("scheme: bio scores whole entities")
        assert task.encode(tagged("NOUN O"), tokenizer, ("NOUN", "O")).notes == ()

    def test_described_word_by_word(self) -> None:
        task = token(scheme="none")
        (record,) = task.rows_from_text(["Bob ran."]).records
        described = task.describe({"tags": ["N", "V", "P"], "probabilities": [0.9, 0.8, 0.7]}, record)
        assert described["words"] == [
            {"tag": "N", "text": "Bob", "start": 0, "end": 3, "probability": 0.9},
            {"tag": "V", "text": "ran", "start": 4, "end": 7, "probability": 0.8},
            {"tag": "P", "text": ".", "start": 7, "end": 8, "probability": 0.7},
        ]


class TestWindows:
    @pytest.mark.parametrize("seed", range(200))
    def test_every_word_is_answered_once_and_with_most_context(self, seed: int) -> None:
        chance = random.Random(seed)
        sizes = chance.choices([0, 1, 1, 1, 2, 3, 15], k=chance.randint(1, 40))
        body = [word for word, size in enumerate(sizes) for _ in range(size)]
        ids: list[int | None] = [None, *body, None]
        longest = chance.randint(6, 20)
        found = windows(ids, len(sizes), longest, chance.randint(0, longest - 3))
        assert [word for window in found for word in window.words] == list(range(len(sizes)))
        for window in found:
            assert len(window.tokens) <= longest
            assert (window.tokens[0], window.tokens[-1]) == (0, len(ids) - 1)
            inner = list(window.tokens)[1:-1]
            assert inner == list(range(inner[0], inner[0] + len(inner))) if inner else not body
            for word in window.words:
                if word in body:
                    at = ids.index(word)
                    assert at in inner
                    assert self.context(inner, at, len(ids)) == max(
                        self.context(list(other.tokens)[1:-1], at, len(ids)) for other in found
                    )

    @staticmethod
    def context(inner: list[int], at: int, tokens: int) -> float:
        """Tokens to the nearer edge; the row's own edges do not count."""
        if at not in inner:
            return -1
        left = float("inf") if inner[0] == 1 else at - inner[0]
        return min(left, float("inf") if inner[-1] == tokens - 2 else inner[-1] - at)

    def test_neighbours_share_the_stride(self) -> None:
        ids = [None, *range(50), None]
        found = windows(ids, 50, 12, 4)
        for one, two in itertools.pairwise(found):
            assert len(set(one.tokens) & set(two.tokens)) == 2 + 4
        assert len(found) == 1 + -(-(50 - 10) // 6)

    def test_cutting_is_the_tokenizers(self, splitting: Any) -> None:
        words = ["ab", "c", "def", "a", "bc"] * 4
        direct = splitting(words, is_split_into_words=True, truncation=True, max_length=9)
        whole = splitting(words, is_split_into_words=True)
        kept = cut(whole.word_ids(), len(words), 9)
        assert [whole["input_ids"][at] for at in kept.tokens] == direct["input_ids"]
        rows = Rows("input", [{"tokens": words}], [1])
        encoded = token(max_length=9, long_rows="cut").encode(rows, splitting, ("O", "B-X"), supervised=False)
        assert encoded.examples[0]["input_ids"] == direct["input_ids"]
        assert (encoded.truncated, encoded.owners) == (1, None)

    def test_a_stride_that_leaves_no_room(self, splitting: Any) -> None:
        rows = Rows("input", [{"tokens": ["ab"] * 9}], [1])
        with pytest.raises(
            UsageError, match=r"task\.stride is 7, but a window of task\.max_length 8 holds 6 sub-words"
        ):
            token(max_length=8, stride=7).encode(rows, splitting, ("O", "B-X"), supervised=False)

    def test_each_word_is_learnt_once(self, splitting: Any) -> None:
        chance = random.Random(0)
        words = [chance.choice(["a", "bc", "def", "\u00ad"]) for _ in range(40)]
        rows = tagged(["B-X"] * 40, ["B-X"], ["B-X"] * 40, tokens=[words, ["a"], words])
        task = token(max_length=12, stride=4)
        labels = task.head(rows).labels
        encoded = task.encode(rows, splitting, labels)
        assert encoded.owners is not None
        assert list(encoded.owners) == sorted(encoded.owners)
        assert (encoded.owners.count(1), encoded.truncated) == (1, 0)
        weight = sum(task.example_weight(example, [1.0] * 3) for example in encoded.examples)
        assert weight == 2 * sum(word != "\u00ad" for word in words) + 1
        assert max(encoded.lengths) == 12

    @pytest.mark.parametrize("seed", range(6))
    def test_a_long_document_is_tagged_as_if_at_once(self, splitting: Any, seed: int) -> None:
        """By a model that looks two tokens to each side, so that a window with more context than that is enough."""
        chance = random.Random(seed)
        words = [chance.choice(["a", "bc", "def", "b", "\u00ad"]) for _ in range(chance.randint(60, 90))]
        rows = Rows("input", [{"tokens": ["a", "bc"]}, {"tokens": words}, {"tokens": ["f"]}], [1, 2, 3])
        labels = ("O", "B-X", "I-X")
        at_once = self.tags(token(max_length=512), rows, splitting, labels)
        assert len(at_once) == 3
        windowed, encoded = token(max_length=16, stride=6), None
        encoded = windowed.encode(rows, splitting, labels, supervised=False)
        assert len(encoded) > 8
        assert max(encoded.lengths) <= 16
        assert self.tags(windowed, rows, splitting, labels) == at_once
        cut_off = self.tags(token(max_length=16, long_rows="cut"), rows, splitting, labels)
        assert cut_off[1] != at_once[1]
        assert set(cut_off[1][14:]) == {"O"}
        # entities lie across the edges of windows
        starts = {window.words[0] for window in windows(self.word_ids(words, splitting), len(words), 16, 6)[1:]}
        assert any(at_once[1][start] == "I-X" for start in starts)

    @staticmethod
    def word_ids(words: list[str], splitting: Any) -> Any:
        return splitting(words, is_split_into_words=True, verbose=False).word_ids()

    @staticmethod
    def tags(task: TokenClassification, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> list[list[str]]:
        encoded = task.encode(rows, tokenizer, labels, supervised=False)
        found = task.predict(LooksAround(), collate(encoded.examples, 0), labels)
        return [one["tags"] for one in task.join(found, encoded, rows, tokenizer)]


class LooksAround(nn.Module):
    """Scores that depend on a token and on two to each side of it, nothing else; special tokens count as nothing."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        table = torch.randn(32, 5, 3, generator=torch.Generator().manual_seed(3)).double()
        table[:5] = 0
        table[:, 2, 2] += 1.0 * (torch.arange(32) > 4)
        padded = nn.functional.pad(input_ids, (2, 2))
        width = input_ids.shape[1]
        scores = sum(table[padded[:, shift : shift + width], shift] for shift in range(5))
        return type("Output", (), {"logits": scores})


@pytest.mark.parametrize("scheme", ["iobes", "none"])
def test_a_run_with_windows_learns_and_is_read_back(
    scheme: str, tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows three times as long as `max_length`: trained on, evaluated, merged and predicted."""
    files = {}
    for seed, (split, count) in enumerate({"train": 180, "dev": 24, "test": 30}.items()):
        parts = entity_rows(count, seed)
        rows = [
            {key: [one for part in parts[i : i + 3] for one in part[key]] for key in ("tokens", "tags")}
            for i in range(0, count, 3)
        ]
        files[split] = str(write_jsonl(tmp_path / f"{split}.jsonl", rows))
    tree = {
        "backbone": {"name": str(tiny_bert)},
        "task": {"kind": "token_classification", "data": files, "max_length": 12, "stride": 4, "scheme": scheme},
        "method": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"},
        "training": {"learning_rate": 0.02, "epochs": 4, "evaluate_every": 24, "batch_size": 16, "seed": 1},
        "output": {"folder": str(tmp_path / "run")},
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tree))
    assert main(["train", str(config)]) == 0
    assert "tags are BIO, learnt as IOBES" in capsys.readouterr().out or scheme == "none"
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    headline = scores["after"]["headline"]
    assert headline == ("accuracy" if scheme == "none" else "entity_f1")
    assert scores["after"]["values"][headline] > scores["majority"]["values"][headline] + 0.2
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    test = read_file(files["test"])
    assert [len(line["prediction"]["tags"]) for line in lines] == [len(one["tags"]) for one in test.records]
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.dumps(scores["after"]["values"][headline])[:8] in json.dumps(printed)
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    text = " ".join([*FILLERS, PEOPLE[0], "went to paris ."] * 2)
    assert main(["predict", str(tmp_path / "run"), text]) == 0
    (answer,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    if scheme == "none":
        assert "".join(word["text"] for word in answer["words"]) == text.replace(" ", "")
    else:
        assert [(one["type"], one["text"]) for one in answer["entities"]].count(("LOC", "paris")) == 2
        assert all(text[one["start"] : one["end"]] == one["text"] for one in answer["entities"])
