"""Prompt and completion against the tokenizers called directly, transformers' own loss and hand-made expectations."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from conftest import write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from peftkit.cli import main
from peftkit.data.collate import IGNORED, collate
from peftkit.data.continuations import continued_ids
from peftkit.data.files import Rows
from peftkit.data.sources import DataSettings
from peftkit.errors import DataError, UsageError
from peftkit.tasks import Completion
from peftkit.tasks.generation import Generation

CORPUS = ["Question: how many eggs?\nAnswer: 72 eggs\n", "the word of the words is a b c", "x\ny  two spaces\n\nend"]
PAIRS = [
    ("Question: how many?\nAnswer:", " 72 eggs"),
    ("the word", " of the words"),
    ("the word", "s of the words"),  # goes on within a word
    ("the word ", "of the words"),  # a space that is a part of the next token
    ("the word  ", "  two spaces"),
    ("end\n", "\nend"),
    ("x\n", "y"),
    ("a", "b"),
    ("a b", " "),
]


def byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def sentence_pieces() -> Any:
    """Like Llama 2's: a space is made up in front of every text, and `<s>` put there."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, initial_alphabet=sorted(set("".join(CORPUS))))
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module", params=["byte_level", "sentence_pieces"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return {"byte_level": byte_level, "sentence_pieces": sentence_pieces}[request.param]()


def rows_of(*records: dict[str, Any]) -> Rows:
    return Rows("t.jsonl", list(records), range(1, len(records) + 1))


def pairs_as_rows(*pairs: tuple[str, Any]) -> Rows:
    return rows_of(*({"prompt": prompt, "completion": text} for prompt, text in pairs))


def completion(**settings: Any) -> Completion:
    return Completion(data=DataSettings(train="t.jsonl"), **settings)


class TestTokens:
    @pytest.mark.parametrize(("prompt", "text"), PAIRS)
    def test_the_prompt_is_what_it_is_alone_and_together_they_are_the_text(
        self, tokenizer: Any, prompt: str, text: str
    ) -> None:
        ((first, rest),) = continued_ids(tokenizer, [prompt], [text])
        assert first == tokenizer(prompt, add_special_tokens=False).input_ids
        assert rest
        assert tokenizer.decode([*first, *rest], clean_up_tokenization_spaces=False) == prompt + text

    def test_where_no_token_spans_both_it_is_the_whole_text(self, tokenizer: Any) -> None:
        for prompt, text in PAIRS[:2]:
            ((first, rest),) = continued_ids(tokenizer, [prompt], [text])
            assert [*first, *rest] == tokenizer(prompt + text, add_special_tokens=False).input_ids

    def test_an_example_is_prompt_completion_and_end_and_the_prompt_is_not_supervised(self, tokenizer: Any) -> None:
        encoded = completion().encode(pairs_as_rows(*PAIRS[:-1]), tokenizer, ())
        for (prompt, text), example in zip(PAIRS, encoded.examples, strict=False):
            before = tokenizer(prompt).input_ids  # with `<s>` where the tokenizer has it
            assert example["input_ids"][: len(before)] == before
            assert example["input_ids"][-1] == example["labels"][-1] == tokenizer.eos_token_id
            assert example["labels"] == [IGNORED] * len(before) + example["input_ids"][len(before) :]
            whole = tokenizer.decode(example["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert whole == prompt + text
        assert (encoded.truncated, encoded.notes) == (0, ())

    def test_settings_of_what_is_supervised(self, tokenizer: Any) -> None:
        rows = pairs_as_rows(PAIRS[0])
        (plain,) = completion().encode(rows, tokenizer, ()).examples
        (endless,) = completion(end_token=False).encode(rows, tokenizer, ()).examples
        (whole,) = completion(loss_on="all").encode(rows, tokenizer, ()).examples
        assert endless["input_ids"] == plain["input_ids"][:-1]
        assert whole == {"input_ids": plain["input_ids"], "labels": plain["input_ids"]}

    def test_templates_make_the_same_as_columns(self, tokenizer: Any) -> None:
        record = {"question": "how {many}?", "answer": "72"}
        task = completion(prompt_template="Question: {question}\nAnswer:", completion_template=" {answer}")
        expected = completion().encode(pairs_as_rows(("Question: how {many}?\nAnswer:", " 72")), tokenizer, ())
        assert task.encode(rows_of(record), tokenizer, ()).examples == expected.examples
        assert task.references(rows_of(record), ()) == [[" 72"]]


class TestLongRows:
    def test_the_prompt_loses_its_beginning_first(self, tokenizer: Any) -> None:
        prompt, text = " a b c" * 20, " of the words"
        full = completion(max_length=500).encode(pairs_as_rows((prompt, text)), tokenizer, ()).examples[0]
        supervised = [label for label in full["labels"] if label != IGNORED]
        leading = full["input_ids"][: len(tokenizer("a").input_ids) - len(tokenizer.tokenize("a"))]
        for length in range(len(supervised) + 2, 40):
            encoded = completion(max_length=length).encode(pairs_as_rows((prompt, text)), tokenizer, ())
            (example,) = encoded.examples
            behind = full["input_ids"][len(full["input_ids"]) - (length - len(leading)) :]
            assert example["input_ids"] == [*leading, *behind]
            assert [label for label in example["labels"] if label != IGNORED] == supervised
            assert (encoded.truncated, encoded.notes) == (1, ())

    def test_a_completion_that_does_not_fit_is_cut_and_said_so(self, tokenizer: Any) -> None:
        rows = pairs_as_rows(("the word", " a b c" * 20), ("a", "b"))
        encoded = completion(max_length=12).encode(rows, tokenizer, ())
        example = encoded.examples[0]
        assert len(example["input_ids"]) == 12
        supervised = [label for label in example["labels"] if label != IGNORED]
        assert len(supervised) == 11  # one token stays in front of the first
        ((_, whole),) = continued_ids(tokenizer, ["the word"], [" a b c" * 20])
        assert supervised == whole[:11]
        assert tokenizer.eos_token_id not in supervised
        assert encoded.truncated == 1
        assert encoded.notes == ("1 of 2 completions lose their ends",)

    def test_a_typed_prompt_loses_its_beginning_too(self, tokenizer: Any) -> None:
        task = completion(max_length=8)
        encoded = task.encode(task.rows_from_text([" a b c" * 20, "a"]), tokenizer, (), supervised=False)
        assert encoded.truncated == 1
        assert len(encoded.examples[0]["prompt"]) == 8
        assert encoded.examples[0]["prompt"][-4:] == tokenizer(" a b c" * 20).input_ids[-4:]
        assert encoded.examples[1]["prompt"] == tokenizer("a").input_ids


class TestLoss:
    def test_loss_weight_and_scores_are_transformers(self, tiny_llama: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        tokenizer.pad_token = tokenizer.eos_token  # the end of a completion is the padding's token
        model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
        rows = pairs_as_rows(("the good film was", " bad"), ("alice", " went to paris ."), ("a", " sad dark story"))
        task = completion()
        examples = task.encode(rows, tokenizer, ()).examples
        batch = collate(examples, tokenizer.pad_token_id)
        with torch.no_grad():
            total = float(task.summed_loss(model, batch, torch.tensor([])))
            predictions = task.predict(model, batch, ())
            weight = sum(task.example_weight(example, ()) for example in examples)
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
            assert total / weight == pytest.approx(float(model(**inputs).loss), rel=1e-6)
            for example, prediction in zip(examples, predictions, strict=True):
                ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
                own = model(input_ids=ids, labels=labels)
                count = int((labels != IGNORED).sum())
                assert prediction["tokens"] == count
                assert prediction["nats"] == pytest.approx(float(own.loss) * count, rel=1e-5)
                hits = own.logits[0, :-1].argmax(-1) == labels[0, 1:]
                assert prediction["right"] == int(hits.sum())
        values = task.score(predictions, rows, ()).values
        assert values["loss"] == pytest.approx(total / weight, rel=1e-6)
        assert values["perplexity"] == pytest.approx(float(torch.tensor(total / weight).double().exp()), rel=1e-6)

    @pytest.mark.parametrize("loss", ["weighted", {"kind": "weighted", "weights": [1.0, 2.0]}])
    def test_weights_of_classes_are_refused(self, loss: Any) -> None:
        with pytest.raises(ValueError, match="weighted is for classes"):
            completion(loss=loss)


class TestReferences:
    def predictions(self, *texts: str | None) -> list[dict[str, Any]]:
        return [{"nats": 1.0, "tokens": 2, "right": 0} | ({} if text is None else {"text": text}) for text in texts]

    def test_a_list_is_several_references_and_the_loss_is_of_the_first(self, tokenizer: Any) -> None:
        rows = pairs_as_rows(("a", [" b c", " the word"]), ("b", " c"))
        task = completion(generation={"metrics": ["bleu"]})
        assert task.references(rows, ()) == [[" b c", " the word"], [" c"]]
        first = completion().encode(pairs_as_rows(("a", " b c"), ("b", " c")), tokenizer, ()).examples
        assert [e["input_ids"] for e in task.encode(rows, tokenizer, ()).examples] == [e["input_ids"] for e in first]
        score = task.score(self.predictions("the word of a b", "c d"), rows, ()).values["bleu"]
        expected = sacrebleu.corpus_bleu(["the word of a b", "c d"], [["b c", "c"], ["the word", None]]).score
        assert score == pytest.approx(expected)

    def test_other_columns_are_references_where_a_row_has_them(self, tokenizer: Any) -> None:
        records = [
            {"prompt": "a", "completion": " b", "second": " c", "third": None},
            {"prompt": "b", "completion": " a"},
        ]
        task = completion(reference_columns=("second", "third"), generation={"metrics": ["exact_match"]})
        rows = rows_of(*records)
        assert task.references(rows, ()) == [[" b", " c"], [" a"]]
        assert task.score(self.predictions("c", "c"), rows, ()).values["exact_match"] == 0.5
        labels = [example["labels"] for example in task.encode(rows, tokenizer, ()).examples]
        assert labels == [e["labels"] for e in completion().encode(rows, tokenizer, ()).examples]

    def test_rows_with_one_prompt_are_references_of_one_another(self, tokenizer: Any) -> None:
        rows = pairs_as_rows(("a", " b"), ("b", " c"), ("a", " the word"), ("a", " b"), ("c", " a"))
        task = completion(grouped_references=True, generation={"metrics": ["exact_match"], "limit": 2})
        assert task.references(rows, ())[0] == task.references(rows, ())[2] == [" b", " the word"]
        examples = task.encode(rows, tokenizer, ()).examples
        written = [example["prompt"] for example in examples]
        assert [one is not None for one in written] == [True, True, False, False, False]  # two prompts, once each
        scores = task.score(self.predictions("the word", "b", None, None, None), rows, ())
        assert scores.values["exact_match"] == 0.5
        assert scores.value == 5 / 10  # the loss is of all rows

    def test_gsm8k_compares_the_final_numbers(self) -> None:
        rows = pairs_as_rows(("q", " 48+24 = <<48+24=72>>72\n#### 72"), ("q", " so\n#### 1,000"))
        task = completion(generation=Generation(metrics=("gsm8k",)))
        scores = task.score(self.predictions(" I think\n#### 72.0", " so 999\n#### 1"), rows, ())
        assert scores.values["gsm8k"] == 0.5


class TestWrongInput:
    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"prompt": "a"}, "no 'completion' in this row"),
            ({"prompt": " ", "completion": "b"}, "no text in 'prompt'"),
            ({"prompt": "a", "completion": ""}, "no text in 'completion'"),
            ({"prompt": "a", "completion": None}, "no text in 'completion'; fill it in"),
            ({"prompt": "a", "completion": []}, "no text in 'completion'"),
            ({"prompt": "a", "completion": ["b", " "]}, "no text in 'completion'"),
            ({"prompt": "a", "completion": 7}, "no text in 'completion'; fill it in, or write it with a template"),
            ({"prompt": ["a"], "completion": "b"}, "no text in 'prompt'"),
        ],
    )
    def test_rows_are_named(self, tokenizer: Any, record: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=f"t.jsonl:2.*{message}"):
            completion().encode(rows_of({"prompt": "a", "completion": "b"}, record), tokenizer, ())

    def test_a_column_and_a_template(self) -> None:
        with pytest.raises(ValueError, match="prompt and prompt_template say the same thing"):
            completion(prompt="question", prompt_template="{question}")
        with pytest.raises(ValueError, match="names no column"):
            completion(prompt_template="{}")

    def test_a_tokenizer_without_an_end_token(self, tokenizer: Any) -> None:
        endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
        with pytest.raises(UsageError, match="no end token; set end_token: false"):
            completion().encode(pairs_as_rows(PAIRS[0]), endless, ())

    def test_typed_text_and_templates(self) -> None:
        one = completion(prompt_template="Q: {question}\nA:")
        rows = one.rows_from_text(["how many?"])
        assert rows.records == [{"question": "how many?"}]
        shown = one.describe({"text": " 72"}, rows.records[0])
        assert shown == {"prompt": "Q: how many?\nA:", "completion": " 72"}
        with pytest.raises(UsageError, match=r"takes 2 columns \(a, b\); give a file that has them"):
            completion(prompt_template="{a} {b}").rows_from_text(["x"])
        with pytest.raises(UsageError, match="single texts, not pairs"):
            completion().rows_from_text(["x"], ["y"])


ANSWERS = {"good": "great", "bad": "awful", "happy": "bright", "sad": "dark"}


def opposite_rows(split: str) -> list[dict[str, Any]]:
    """`the film was good !` is answered by `great story`; no row occurs twice."""
    starts = [" ".join(words) for words in itertools.product(["the", "a", "film", "music", "actor"], repeat=3)]
    pairs = [(start, word) for start in starts for word in sorted(ANSWERS)]
    random.Random(0).shuffle(pairs)
    part = {"train": pairs[:96], "dev": pairs[96:112], "test": pairs[112:136]}[split]
    return [{"text": f"{start} was {word} !", "answer": f"{ANSWERS[word]} story"} for start, word in part]


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt to answer, with its data beside it."""
    folder = tmp_path_factory.mktemp("completion")
    files = {
        split: str(write_jsonl(folder / f"{split}.jsonl", opposite_rows(split))) for split in ("train", "dev", "test")
    }
    generation = {"max_new_tokens": 4, "metrics": ["exact_match", "rouge"], "limit": 20}
    templates = {"prompt_template": "{text}", "completion_template": " {answer}"}
    config = {
        "backbone": {"name": str(tiny_llama)},
        "task": {"kind": "completion", "data": files, "max_length": 16, "generation": generation} | templates,
        "method": {"kind": "lora", "rank": 8, "alpha": 16, "targets": "all"},
        "training": {"learning_rate": 0.02, "epochs": 8, "batch_size": 16, "evaluation_batch_size": 8, "seed": 1},
        "output": {"folder": str(folder / "run")},
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["train", str(folder / "config.json")]) == 0
    return folder


class TestRun:
    def test_it_learns_and_says_what_it_left_out(self, finished: Path) -> None:
        scores = json.loads((finished / "run" / "scores.json").read_text())
        assert set(scores) == {"before", "after"}
        assert scores["after"]["values"]["exact_match"] == 1.0 > scores["before"]["values"]["exact_match"]
        assert scores["after"]["values"]["loss"] < 0.5 < scores["before"]["values"]["loss"]
        manifest = json.loads((finished / "run" / "manifest.json").read_text())
        assert "test: text is generated for 20 of 24 rows, and the loss is of all" in manifest["notes"]
        lines = [json.loads(line) for line in (finished / "run" / "predictions.jsonl").read_text().splitlines()]
        assert len(lines) == 24
        assert lines[0]["reference"] == [" " + opposite_rows("test")[0]["answer"]]
        assert [("text" in line["prediction"]) for line in lines] == [True] * 20 + [False] * 4
        log = [json.loads(line) for line in (finished / "run" / "log.jsonl").read_text().splitlines()]
        assert not any("dev_exact_match" in line for line in log)
        assert any("dev_loss" in line for line in log)

    def test_predict_writes_the_answer(self, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["predict", str(finished / "run"), "the music was sad !", "a film was good !"]) == 0
        shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [one["completion"].strip() for one in shown] == ["dark story", "great story"]
        assert shown[0]["prompt"] == "the music was sad !"
        assert main(["predict", str(finished / "run"), "--file", str(finished / "test.jsonl")]) == 0
        shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [one["completion"].strip() for one in shown] == [row["answer"] for row in opposite_rows("test")]

    def test_evaluate_finds_the_same_figures(self, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["evaluate", str(finished / "run"), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["scores"]
        kept = json.loads((finished / "run" / "scores.json").read_text())["after"]["values"]
        assert found == pytest.approx(kept, rel=1e-5)

    def test_the_merged_model_is_plain_and_has_the_same_loss(
        self, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "merged"
        assert main(["merge", str(finished / "run"), str(target), "--data", str(finished / "test.jsonl")]) == 0
        assert "24 of 24 predictions equal" in capsys.readouterr().out
        model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
        nats, tokens = 0.0, 0
        for row in opposite_rows("test"):
            before = len(tokenizer(row["text"]).input_ids)
            ids = torch.tensor([[*tokenizer(f"{row['text']} {row['answer']}").input_ids, tokenizer.eos_token_id]])
            labels = ids.clone()
            labels[:, :before] = -100
            with torch.no_grad():
                nats += float(model.double()(input_ids=ids, labels=labels).loss) * (ids.shape[1] - before)
            tokens += ids.shape[1] - before
        kept = json.loads((finished / "run" / "scores.json").read_text())["after"]["values"]
        assert nats / tokens == pytest.approx(kept["loss"], rel=1e-4)

    def test_a_merge_is_compared_on_as_much_as_memory_is_set_aside_for(
        self, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("peftkit.artifacts.probe.MOST_LOGITS", 1)
        data = ["--data", str(finished / "test.jsonl")]
        assert main(["merge", str(finished / "run"), str(tmp_path / "merged"), *data]) == 0
        said = capsys.readouterr().out
        assert "8 of 8 predictions equal" in said
        assert "compared on the first 8 of 24 examples" in said
        report = json.loads((tmp_path / "merged" / "peftkit_merge.json").read_text())
        assert (report["rows"], report["examples"], report["equal_predictions"]) == (8, 24, 8)
