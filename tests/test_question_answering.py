"""Question answering against SQuAD's definition worked out by hand, transformers' own windows, and brute force."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from conftest import WORDS, save_word_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from benchmarks.tiny_bert import save_bert_tokenizer
from peftkit import load_run, train
from peftkit.artifacts.merge import merge
from peftkit.artifacts.predict import evaluate_rows, predict_rows
from peftkit.backbones.load import BackboneSettings, Head, load
from peftkit.config import Run
from peftkit.data.collate import IGNORED, collate
from peftkit.data.files import Rows, read_file
from peftkit.data.sources import DataSettings, splits_from
from peftkit.errors import DataError, UsageError
from peftkit.methods import LoRA
from peftkit.metrics.squad import answer_scores, normalized, squad_scores
from peftkit.tasks import QuestionAnswering
from peftkit.tasks.base import Encoded

HEAD = Head("AutoModelForQuestionAnswering", ("start", "end"), outputs=2)
CITIES = ("paris", "london", "berlin", "rome")
PEOPLE = ("alice", "bob", "carol", "dave")


def rows_of(*records: dict[str, Any]) -> Rows:
    return Rows("train.json", list(records), range(1, len(records) + 1), by_line=False)


def question(context: str, *answers: str, question: str = "who went to", **more: Any) -> dict[str, Any]:
    found = {"text": list(answers), "answer_start": [context.index(answer) for answer in answers]}
    return {"question": question, "context": context, "answers": found} | more


def toy(count: int, seed: int, impossible: float = 0.0) -> list[dict[str, Any]]:
    """`who` asks for the person, `in` for the city; without the word asked for there is no answer."""
    chance, rows = random.Random(seed), []
    for _ in range(count):
        kind = chance.choice(["alice", "paris"])
        names = CITIES if kind == "paris" else PEOPLE
        words = chance.choices(WORDS[10:21], k=chance.randint(4, 9))
        answer = None if chance.random() < impossible else chance.choice(names)
        if answer:
            words.insert(chance.randrange(len(words) + 1), answer)
        asked = "went to in" if kind == "paris" else "met with"
        rows.append(question(" ".join(words), *([answer] if answer else []), question=asked))
    return rows


def task(**settings: Any) -> QuestionAnswering:
    return QuestionAnswering(data=DataSettings(train="train.json"), **{"max_length": 32, "stride": 4} | settings)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_bert)


class TestScores:
    """Values by hand, from the definition: lower case; punctuation deleted; the words a, an, the deleted; white space
    as one space. Exact match is equality; F1 is of the bags of words, 0 without a common one; the best reference
    counts. Version 2: without a reference the empty answer is right, and references without words are left out."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("The  Eiffel-Tower!", "eiffeltower"),
            ("a theatre, an anthem, the a", "theatre anthem"),
            ("U.S.A.", "usa"),
            ("«Été»\u00a0là", "«été» là"),
            ("The", ""),
        ],
    )
    def test_normalisation(self, text: str, expected: str) -> None:
        assert normalized(text) == expected

    @pytest.mark.parametrize(
        ("prediction", "references", "version", "exact", "f1"),
        [
            # 2 common of 3 and 2: precision 2/3, recall 1, F1 4/5
            ("in Santa Clara", ["Santa Clara"], 1, 0, 0.8),
            # the better of F1 2/5 (1 of 4, 1 of 1) and 2/3 (2 of 4, 2 of 2)
            ("Santa Clara, California USA", ["California", "santa clara"], 1, 0, 2 / 3),
            ("the Denver Broncos.", ["Broncos", "Denver Broncos"], 1, 1, 1),
            # a word counts as often as it occurs in both: 1 common of 3 and 2, 2 · 1/3 · 1/2 / (5/6)
            ("yes yes yes", ["yes no"], 1, 0, 0.4),
            ("Rome", ["Paris"], 1, 0, 0),
            ("", ["Paris"], 1, 0, 0),
            # words of articles alone: equal, and yet without a common word
            ("the", ["a"], 1, 1, 0),
            ("the", ["a"], 2, 1, 1),
            ("Paris", [], 2, 0, 0),
            ("", [], 2, 1, 1),
            ("", ["Paris"], 2, 0, 0),
            ("in paris", ["Paris"], 2, 0, 2 / 3),
        ],
    )
    def test_one_answer(self, prediction: str, references: list[str], version: int, exact: float, f1: float) -> None:
        assert answer_scores(prediction, references, version) == (exact, pytest.approx(f1, abs=1e-15))

    def test_means_of_version_one(self) -> None:
        values = squad_scores(["in Santa Clara", "Rome", "308"], [["Santa Clara"], ["Paris"], ["308", "the 308"]])
        assert values == {"f1": pytest.approx(1.8 / 3), "exact_match": pytest.approx(1 / 3)}

    def test_means_of_version_two(self) -> None:
        values = squad_scores(["in Santa Clara", "", "Rome", ""], [["Santa Clara"], [], [], ["Paris"]])
        assert values == {
            "f1": pytest.approx(1.8 / 4),
            "exact_match": 0.25,
            "has_answer_f1": pytest.approx(0.4),
            "has_answer_exact_match": 0,
            "no_answer_accuracy": 0.5,
        }


class TestReading:
    NESTED: ClassVar[dict[str, Any]] = {
        "version": "1.1",
        "data": [
            {
                "title": "Cities",
                "paragraphs": [
                    {
                        "context": "alice went to paris",
                        "qas": [
                            {"id": "q1", "question": "who?", "answers": [{"text": "alice", "answer_start": 0}]},
                            {"id": "q2", "question": "when?", "answers": [], "is_impossible": True},
                        ],
                    }
                ],
            },
            {"title": "Empty", "paragraphs": []},
        ],
    }

    def read(self, folder: Path, document: Any) -> Rows:
        file = folder / "squad.json"
        file.write_text(json.dumps(document))
        return read_file(file)

    def test_nested(self, tmp_path: Path) -> None:
        rows = self.read(tmp_path, self.NESTED)
        assert rows.where(1).endswith("squad.json row 2")
        common = {"title": "Cities", "context": "alice went to paris"}
        assert rows.records == [
            common
            | {"id": "q1", "question": "who?", "answers": {"text": ["alice"], "answer_start": [0]}}
            | {"is_impossible": False},
            common
            | {"id": "q2", "question": "when?", "answers": {"text": [], "answer_start": []}}
            | {"is_impossible": True},
        ]

    @pytest.mark.parametrize(
        ("path", "name", "message"),
        [
            (["data", 0], "paragraphs", r"data\[0\].*: 'paragraphs' is not a list"),
            (["data", 0, "paragraphs", 0], "context", r"data\[0\]\.paragraphs\[0\]: 'context' is not text"),
            (["data", 0, "paragraphs", 0, "qas", 1], "question", r"qas\[1\]: 'question' is not text"),
            (
                ["data", 0, "paragraphs", 0, "qas", 0, "answers", 0],
                "answer_start",
                r"squad\.json: data\[0\]\.paragraphs\[0\]\.qas\[0\]\.answers\[0\]: 'answer_start' is not a number",
            ),
        ],
    )
    def test_what_is_missing_is_named(self, tmp_path: Path, path: list[Any], name: str, message: str) -> None:
        document = json.loads(json.dumps(self.NESTED))
        holder = document
        for step in path:
            holder = holder[step]
        holder[name] = None
        with pytest.raises(DataError, match=message):
            self.read(tmp_path, document)

    def test_other_files_under_a_key_are_left_alone(self, tmp_path: Path) -> None:
        assert self.read(tmp_path, {"data": [{"text": "a"}, {"text": "b"}]}).records == [{"text": "a"}, {"text": "b"}]

    def test_lists_of_answers_are_as_good(self, tokenizer: Any) -> None:
        row = question("alice went to paris", "paris")
        listed = row | {"answers": [{"text": "paris", "answer_start": 14}]}
        one, two = (task().encode(rows_of(record), tokenizer, HEAD.labels).examples for record in (row, listed))
        assert one == two

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"answers": {"text": ["rome"], "answer_start": [6]}}, "does not stand in the context at its answer_start"),
            ({"answers": {"text": ["went"], "answer_start": [-13]}}, "does not stand in the context"),
            ({"answers": {"text": [" "], "answer_start": [5]}}, "an answer is blank"),
            ({"answers": "paris"}, "'answers' holds no answers"),
            ({"answers": {"text": ["paris"], "answer_start": []}}, "'answers' holds no answers"),
            ({"answers": [{"text": "paris"}]}, "'answers' holds no answers"),
            ({"is_impossible": True}, "'is_impossible' and the answers say opposite things"),
            ({"context": " "}, "no text in 'context'"),
            ({"question": None}, "no text in 'question'"),
            ({"question": "the " * 30}, "leaves no more of 32 tokens to its context than the stride of 4"),
        ],
    )
    def test_faults_are_told_with_their_place(self, tokenizer: Any, row: dict[str, Any], message: str) -> None:
        context = "alice went to paris " * 8
        rows = rows_of(question(context, "alice"), question(context, "paris") | row)
        with pytest.raises(DataError, match=rf"train\.json row 2: .*{message}"):
            task().encode(rows, tokenizer, HEAD.labels)

    def test_whether_there_may_be_no_answer(self) -> None:
        with_and_without = rows_of(question("alice met bob", "bob"), question("alice met bob"))
        assert task().head(with_and_without).labels == ("start", "end", "no answer")
        assert task().head(with_and_without.head(1)).labels == ("start", "end")
        assert task(unanswerable=True).head(with_and_without.head(1)).labels == ("start", "end", "no answer")
        with pytest.raises(DataError, match=r"row 2: no answer in 'answers'; give it one, or set task\.unanswerable"):
            task(unanswerable=False).head(with_and_without)

    def test_settings_that_cannot_be(self) -> None:
        with pytest.raises(ValueError, match="stride 32 is not below max_length, which is 32"):
            task(stride=32)
        with pytest.raises(ValueError, match="label_smoothed is for classes, and answers are positions"):
            task(loss={"kind": "label_smoothed"})


class TestWindows:
    @pytest.mark.parametrize(("length", "stride"), [(16, 0), (16, 4), (20, 11), (64, 8)])
    def test_as_transformers_cuts_them(self, tokenizer: Any, length: int, stride: int) -> None:
        chance = random.Random(length)
        contexts = [" ".join(chance.choices(WORDS, k=chance.randint(1, 60))) for _ in range(20)]
        rows = rows_of(*(question(context, context.split()[0]) for context in contexts))
        encoded = task(max_length=length, stride=stride).encode(rows, tokenizer, HEAD.labels, supervised=False)
        expected = tokenizer(
            ["who went to"] * 20,
            contexts,
            truncation="only_second",
            max_length=length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        assert [one["input_ids"] for one in encoded.examples] == expected["input_ids"]
        assert [one["token_type_ids"] for one in encoded.examples] == expected["token_type_ids"]
        assert encoded.owners == expected["overflow_to_sample_mapping"]
        for index, one in enumerate(encoded.examples):
            given = zip(expected["offset_mapping"][index], expected.sequence_ids(index), strict=True)
            assert one["offsets"] == [list(offsets) if part == 1 else [-1, -1] for offsets, part in given]

    def test_labels_are_the_answer_where_it_is_whole(self, tokenizer: Any) -> None:
        words = random.Random(0).choices(WORDS[10:21], k=50)
        rows = []
        for start in range(49):
            answered = [*words[:start], "alice", "bob", *words[start + 2 :]]
            rows.append(question(" ".join(answered), "alice bob"))
        encoded = task(max_length=20).encode(rows_of(*rows), tokenizer, HEAD.labels)
        learnt = dict.fromkeys(range(49), 0)
        for index, example in enumerate(encoded.examples):
            owner, (start, end) = encoded.owner(index), example["labels"]
            text = rows[owner]["context"]
            seen = [text[a:b] for a, b in example["offsets"] if a >= 0]
            if ("alice", "bob") in itertools.pairwise(seen):
                learnt[owner] += 1
                assert text[example["offsets"][start][0] : example["offsets"][end][1]] == "alice bob"
            else:
                assert (start, end) == (0, 0)
        assert min(learnt.values()) > 0
        assert max(learnt.values()) == 2

    def test_answers_longer_than_what_windows_share_can_be_lost(self, tokenizer: Any) -> None:
        words = ["the"] * 40
        words[7:17] = ["alice"] * 10
        rows = rows_of(question(" ".join(words), "alice " * 9 + "alice"))
        encoded = task(max_length=18).encode(rows, tokenizer, HEAD.labels)
        assert {tuple(example["labels"]) for example in encoded.examples} == {(IGNORED, IGNORED)}
        assert encoded.notes == ("1 answers are whole in no window of 18 tokens, and are not learnt",)
        assert all(task().example_weight(example, []) == 0 for example in encoded.examples)

    def test_parts_of_words_and_white_space(self, tmp_path: Path) -> None:
        words = ["un", "##happi", "##ness", "who", "met", "bob", "##by", "the"]
        save_bert_tokenizer(tmp_path, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        context = "Unhappiness met\u00a0 bobby"
        for text, tokens in {"happi": (2, 2), "nhappi": (1, 2), " bobby": (5, 6), "met\u00a0 bob": (4, 5)}.items():
            found = task().encode(rows_of(question(context, text, question="who")), tokenizer, HEAD.labels)
            first = found.examples[0]["input_ids"].index(tokenizer.sep_token_id)
            assert found.examples[0]["labels"] == [first + one for one in tokens], text

    def test_decoders_have_the_question_in_front(self, tmp_path: Path) -> None:
        save_word_tokenizer(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        found = task().encode(rows_of(question("alice met bob", "bob")), tokenizer, HEAD.labels).examples[0]
        assert tokenizer.decode(found["input_ids"]) == "who went to alice met bob".replace("who", "</s>")
        assert found["labels"] == [5, 5]


class TestLoss:
    def batch(self, tokenizer: Any, count: int = 6) -> list[dict[str, Any]]:
        encoded = task(max_length=20).encode(rows_of(*toy(count, 0, 0.3)), tokenizer, HEAD.labels)
        return encoded.examples

    @torch.no_grad()
    def test_mean_of_both_ends_over_what_can_be_an_answer(self, tokenizer: Any, tiny_bert: Path) -> None:
        torch.manual_seed(0)
        model = load(BackboneSettings(name=str(tiny_bert)), HEAD).model.eval()
        examples = self.batch(tokenizer)
        losses = []
        for example in examples:
            ids, types = (torch.tensor([example[name]]) for name in ("input_ids", "token_type_ids"))
            output = model(input_ids=ids, token_type_ids=types)
            possible = [i for i, (start, _) in enumerate(example["offsets"]) if start >= 0 or i == 0]
            for logits, label in zip((output.start_logits, output.end_logits), example["labels"], strict=True):
                at = torch.tensor([possible.index(label)])
                losses.append(cross_entropy(logits[:, possible].double(), at))
        weight = sum(task().example_weight(example, []) for example in examples)
        for size in (1, 2, 6):  # padding differs with the batch
            parts = [collate(examples[i : i + size], 0) for i in range(0, 6, size)]
            total = sum(task().summed_loss(model, part, torch.tensor([])) for part in parts)
            assert float(total) / weight == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)

    @torch.no_grad()
    def test_transformers_loss_where_everything_can_be_an_answer(self, tokenizer: Any, tiny_bert: Path) -> None:
        model = load(BackboneSettings(name=str(tiny_bert)), HEAD).model.eval()
        example = self.batch(tokenizer)[0]
        batch = collate([example | {"offsets": [[0, 1]] * len(example["input_ids"])}], 0)
        start, end = (torch.tensor([one]) for one in example["labels"])
        ids, types = batch["input_ids"], batch["token_type_ids"]
        expected = model(input_ids=ids, token_type_ids=types, start_positions=start, end_positions=end).loss
        assert float(task().summed_loss(model, batch, torch.tensor([]))) / 2 == pytest.approx(float(expected), rel=1e-5)


class Fixed(torch.nn.Module):
    """Answers with the logits that it was given."""

    def __init__(self, start: torch.Tensor, end: torch.Tensor) -> None:
        super().__init__()
        self.output = transformers.modeling_outputs.QuestionAnsweringModelOutput(start_logits=start, end_logits=end)

    def forward(self, **_: Any) -> Any:
        return self.output


class TestPrediction:
    @pytest.mark.parametrize("longest", [1, 3, 40])
    def test_best_spans_by_brute_force(self, tokenizer: Any, longest: int) -> None:
        one = task(max_length=20, max_answer_length=longest, n_best=7)
        encoded = one.encode(rows_of(*toy(9, 1)), tokenizer, HEAD.labels, supervised=False)
        batch = collate(encoded.examples, 0)
        torch.manual_seed(longest)
        start, end = torch.randn(2, *batch["input_ids"].shape)
        found = one.predict(Fixed(start, end), batch, HEAD.labels)
        for row, example in enumerate(encoded.examples):
            inside = [i for i, (begin, _) in enumerate(example["offsets"]) if begin >= 0]
            spans = [
                (float(start[row, i] + end[row, j]), example["offsets"][i][0], example["offsets"][j][1])
                for i in inside
                for j in inside
                if i <= j < i + longest
            ]
            expected = sorted(spans, reverse=True)[:7]
            assert [tuple(span) for span in found[row]["spans"]] == [pytest.approx(span) for span in expected]

    def join(self, windows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
        rows = rows_of({"context": "alice met  bob in rome", "question": "who"})
        encoded = Encoded([{}] * len(windows), 0, [0] * len(windows))
        (joined,) = task(**settings).join(windows, encoded, rows, None)  # type: ignore[arg-type]
        return joined

    def test_the_best_of_all_windows(self) -> None:
        windows = [{"spans": [[1.0, 0, 5], [0.5, 6, 9]]}, {"spans": [[3.0, 9, 14], [2.0, 0, 5]]}]
        found = self.join(windows, n_best=2)
        # white space at its ends is no part of the answer
        assert (found["answer"], found["start"], found["end"], found["score"]) == ("bob", 11, 14, 3.0)
        assert [(one["answer"], one["score"]) for one in found["candidates"]] == [("bob", 3.0), ("alice", 2.0)]
        chances = torch.tensor([3.0, 2.0]).softmax(0).tolist()
        assert [one["probability"] for one in found["candidates"]] == pytest.approx(chances)

    @pytest.mark.parametrize(
        ("nulls", "threshold", "answer"),
        [((5.0, 2.9), 0.0, "bob"), ((5.0, 3.1), 0.0, ""), ((5.0, 3.1), 0.2, "bob"), ((5.0, 2.9), -0.2, "")],
    )
    def test_no_answer_is_the_least_of_all_windows(
        self, nulls: tuple[float, float], threshold: float, answer: str
    ) -> None:
        windows = [{"spans": [[1.0, 0, 5]], "null": nulls[0]}, {"spans": [[3.0, 11, 14]], "null": nulls[1]}]
        found = self.join(windows, null_threshold=threshold)
        assert found["answer"] == answer
        assert found["start"] == (11 if answer else None)
        assert len(found["candidates"]) == 3

    def test_the_answer_that_ignores_the_question(self) -> None:
        one, rows = task(), rows_of(question("Alice met bob. He left. ", "bob"))
        assert one.majority(rows, rows, HEAD.labels)[0]["answer"] == "Alice met bob."
        without = rows_of(question("alice met bob"), question("alice met bob"), question("alice met bob", "bob"))
        assert [found["answer"] for found in one.majority(without, rows, HEAD.labels)] == [""]

    def test_texts_need_their_contexts(self) -> None:
        rows = task().rows_from_text(["who?"], ["alice met bob"])
        assert rows.records == [{"question": "who?", "context": "alice met bob"}]
        with pytest.raises(UsageError, match="1 questions and no contexts; give each question its context"):
            task().rows_from_text(["who?"])
        with pytest.raises(UsageError, match="1 questions and 2 contexts"):
            task().rows_from_text(["who?"], ["one", "two"])


def run(backbone: Path, folder: Path, **sections: Any) -> Run:
    return Run.model_validate(
        {
            "backbone": {"name": str(backbone)},
            "task": {"kind": "question_answering", "max_length": 24, "stride": 4},
            "method": {"kind": "lora", "rank": 4},
            "training": {"learning_rate": 0.02, "epochs": 4, "evaluate_every": 26, "batch_size": 16, "seed": 1},
            "output": {"folder": str(folder)},
        }
        | sections
    )


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_from_training_to_a_merged_model(architecture: str, tiny_bert: Path, tiny_llama: Path, tmp_path: Path) -> None:
    backbone = {"bert": tiny_bert, "llama": tiny_llama}[architecture]
    splits = splits_from(toy(200, 1, 0.2), toy(24, 2, 0.2), toy(40, 3, 0.2))
    result = train(run(backbone, tmp_path / "run"), splits)
    before, after = (result.evaluations[name].scores for name in ("majority", "after"))
    assert after.headline == "f1"
    assert after.value > max(0.6, before.value)
    saved = load_run(tmp_path / "run")
    assert splits.test is not None
    again = evaluate_rows(saved, splits.test)
    assert again.scores == after
    shown = predict_rows(saved, saved.run.task.rows_from_text(["met with"], ["the film was bob and dark"]))
    assert shown[0]["answer"] in {"", *WORDS} or " " in shown[0]["answer"]
    assert shown[0]["question"] == "met with"
    merged = merge(saved, tmp_path / "merged", splits.test)
    assert merged.equal_predictions == merged.rows
    plain: Any = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged")
    assert plain.qa_outputs.out_features == 2


def test_llama_weights_are_those_of_the_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    """transformers' class for it looks for the blocks under another name than the checkpoint has."""
    backbone = load(BackboneSettings(name=str(tiny_llama)), HEAD)
    ids = torch.tensor([[3, 7, 11, 5]])
    hidden = transformers.AutoModel.from_pretrained(tiny_llama).eval()(input_ids=ids).last_hidden_state
    model: Any = backbone.model.eval()
    start, end = model.qa_outputs(hidden).unbind(-1)
    output = model(input_ids=ids)
    torch.testing.assert_close(output.start_logits, start)
    torch.testing.assert_close(output.end_logits, end)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).start_logits, start)


def test_unlike_questions_in_one_batch_do_not_disturb_each_other(tiny_bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = load(BackboneSettings(name=str(tiny_bert)), HEAD)
    model = LoRA(rank=2).attach(backbone, 1).eval()
    one = task(max_length=20)
    encoded = one.encode(rows_of(*toy(8, 4)), AutoTokenizer.from_pretrained(tiny_bert), HEAD.labels, supervised=False)
    with torch.no_grad():
        together = one.predict(model, collate(encoded.examples, 0), HEAD.labels)
        apart = [one.predict(model, collate([example], 0), HEAD.labels)[0] for example in encoded.examples]
    for left, right in zip(together, apart, strict=True):
        assert [span[1:] for span in left["spans"]] == [span[1:] for span in right["spans"]]
