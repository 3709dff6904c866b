"""Text to text against transformers' own loss, beams and tokenizers, on tiny random encoder-decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import WORDS, write_jsonl
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, MBart50Tokenizer, MBartTokenizer, NllbTokenizer, PreTrainedTokenizerFast

from peftkit.cli import main
from peftkit.config import load_run
from peftkit.data.collate import collate
from peftkit.data.files import Rows
from peftkit.data.sources import DataSettings
from peftkit.errors import BackboneError, DataError, PeftkitError, UsageError
from peftkit.prepare import prepare
from peftkit.tasks.generation import Generation
from peftkit.tasks.language_model import PROMPT
from peftkit.tasks.seq2seq import Seq2Seq

VOCABULARY = ["<pad>", "</s>", "<unk>", "<s>", *WORDS]
SIZES = {"d_model": 32, "vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
STACKS = {
    f"{stack}_{name}": value
    for stack in ("encoder", "decoder")
    for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 40}.items()
} | {"max_position_embeddings": 32, "init_std": 0.3, "dropout": 0.0, "attention_dropout": 0.0}
T5 = {"d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "t5": SIZES | T5,
    "mt5": SIZES | T5 | {"feed_forward_proj": "gated-gelu"},
    "bart": SIZES | STACKS | {"decoder_start_token_id": 1, "forced_eos_token_id": None},
    "marian": SIZES | STACKS | {"decoder_start_token_id": 0},
    "pegasus": SIZES | STACKS | {"decoder_start_token_id": 0},
    "mbart": SIZES | STACKS | {"decoder_start_token_id": 1, "forced_eos_token_id": None},
    "m2m_100": SIZES | STACKS | {"decoder_start_token_id": 1},
}
PAIRS = [
    ("good film", "the good story was very bright"),
    ("alice went to paris with bob", "alice , paris"),
    ("the dark and sad story of a poor actor", "bad !"),
    ("bob", "carol met dave in rome with the music"),
    ("very quite happy music in berlin .", "."),
]


def rows_of(*records: dict[str, Any]) -> Rows:
    return Rows("train.jsonl", list(records), range(1, len(records) + 1))


ROWS = rows_of(*({"source": source, "target": target} for source, target in PAIRS))


def seq2seq(**settings: Any) -> Seq2Seq:
    return Seq2Seq(data=DataSettings(train="train.jsonl"), **settings)


def save_tokenizer(folder: Path, ends: bool = True) -> None:
    """Words; every text ends with `</s>` as T5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def model_of(architecture: str, **changes: Any) -> nn.Module:
    config = transformers.AutoConfig.for_model(architecture, **ARCHITECTURES[architecture] | changes)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForSeq2SeqLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:  # T5's own start makes every text the same
            nn.init.normal_(parameter, std=1.0 if "shared" in name and architecture == "t5" else 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {name: model_of(name) for name in ARCHITECTURES}


def inputs_of(tokenizer: Any) -> dict[str, Tensor]:
    """What transformers is given, padded by hand: labels with -100."""
    sources = tokenizer([source for source, _ in PAIRS], padding=True, return_tensors="pt")
    targets = tokenizer(text_target=[target for _, target in PAIRS], padding=True, return_tensors="pt")
    labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
    return {"input_ids": sources["input_ids"], "attention_mask": sources["attention_mask"], "labels": labels}


def predicted(task: Seq2Seq, model: nn.Module, encoded: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """All examples in one batch."""
    with torch.no_grad():
        found = task.predict(model, collate(encoded.examples, tokenizer.pad_token_id), ())
    return task.join(found, encoded, ROWS, tokenizer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestLoss:
    def test_is_transformers_own(self, architecture: str, models: dict[str, Any], tokenizer: Any) -> None:
        model, task, expected_inputs = models[architecture], seq2seq(), inputs_of(tokenizer)
        encoded = task.encode(ROWS, tokenizer, ())
        batch = collate(encoded.examples, tokenizer.pad_token_id)
        assert {name: batch[name].tolist() for name in expected_inputs} == {
            name: tensor.tolist() for name, tensor in expected_inputs.items()
        }
        with torch.no_grad():
            output = model(**expected_inputs)
            weight = sum(task.example_weight(example, []) for example in encoded.examples)
            assert weight == int((expected_inputs["labels"] != -100).sum())
            found = task.summed_loss(model, batch, torch.tensor([])) / weight
            torch.testing.assert_close(found, output.loss, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(task.logits(model, batch), output.logits, rtol=1e-4, atol=1e-5)
            self.check_scores(task, task.predict(model, batch, ()), output.logits, expected_inputs["labels"])

    def check_scores(self, task: Seq2Seq, predictions: list[Any], logits: Tensor, labels: Tensor) -> None:
        kept = labels != -100
        exact = logits.double()[kept]
        scores = task.score(predictions, ROWS, ()).values
        assert scores["loss"] == pytest.approx(float(cross_entropy(exact, labels[kept])), rel=1e-5)
        assert scores["perplexity"] == pytest.approx(float(cross_entropy(exact, labels[kept]).exp()), rel=1e-4)
        assert scores["token_accuracy"] == pytest.approx(float((exact.argmax(-1) == labels[kept]).double().mean()))

    def test_with_smoothed_labels(self, architecture: str, models: dict[str, Any], tokenizer: Any) -> None:
        model, task, given = models[architecture], seq2seq(loss="label_smoothed"), inputs_of(tokenizer)
        batch = collate(task.encode(ROWS, tokenizer, ()).examples, 0)
        with torch.no_grad():
            logits = model(**given).logits.double().flatten(0, 1)
            expected = cross_entropy(logits, given["labels"].flatten(), label_smoothing=0.1, reduction="sum")
            found = task.summed_loss(model, batch, torch.tensor([]))
        assert float(found) == pytest.approx(float(expected), rel=1e-5)

    def test_of_a_row_does_not_depend_on_its_batch(
        self, architecture: str, models: dict[str, Any], tokenizer: Any
    ) -> None:
        model, task = models[architecture], seq2seq()
        examples = task.encode(ROWS, tokenizer, ()).examples
        with torch.no_grad():
            together = task.summed_loss(model, collate(examples, 0), torch.tensor([]))
            alone = [task.summed_loss(model, collate([one], 0), torch.tensor([])) for one in examples]
        torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=1e-5, atol=1e-4)


class TestGeneration:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("beams", [1, 3])
    def test_is_transformers_generate(
        self, architecture: str, beams: int, models: dict[str, Any], tokenizer: Any
    ) -> None:
        model = models[architecture]
        settings = {"beams": beams, "max_new_tokens": 9, "no_repeat_ngram_size": 2}
        task = seq2seq(generation=Generation(**settings))
        encoded = task.encode(ROWS, tokenizer, (), supervised=False)
        found = [one["text"] for one in predicted(task, model, encoded, tokenizer)]
        alone = []
        for source, _ in PAIRS:
            given = tokenizer([source], return_tensors="pt")
            ids = {name: given[name] for name in ("input_ids", "attention_mask")}
            output = model.generate(**ids, num_beams=beams, max_new_tokens=9, no_repeat_ngram_size=2, do_sample=False)
            alone.append(tokenizer.decode(output[0], skip_special_tokens=True))
        assert found == alone  # each row alone: the batch and its padding change nothing
        assert len(set(found)) > 2

    def test_only_the_first_rows_are_written_where_there_is_a_limit(self, models: Any, tokenizer: Any) -> None:
        task = seq2seq(generation=Generation(max_new_tokens=5, limit=2, metrics=("bleu", "chrf", "rouge")))
        encoded = task.encode(ROWS, tokenizer, ())
        predictions = predicted(task, models["bart"], encoded, tokenizer)
        assert ["text" in one for one in predictions] == [True, True, False, False, False]
        scores = task.score(predictions, ROWS, ())
        assert list(scores.values) == [
            *("loss", "perplexity", "token_accuracy", "bleu", "chrf", "rouge1", "rouge2", "rougeL")
        ]
        assert (scores.headline, scores.lower_is_better, scores.examples) == ("loss", True, 5)

    def test_nothing_is_written_while_training(self, tokenizer: Any) -> None:
        task = seq2seq(generation=Generation()).while_training()
        assert not any(PROMPT in example for example in task.encode(ROWS, tokenizer, ()).examples)


class TestEncode:
    def test_what_the_encoder_reads(self, tokenizer: Any) -> None:
        rows = rows_of({"source": "good", "about": "rome", "target": "bad"})
        task = seq2seq(source_prefix="the ", template="{source} film in {about}")
        (example,) = task.encode(rows, tokenizer, ()).examples
        assert example["input_ids"] == tokenizer("the good film in rome")["input_ids"]
        assert example["labels"] == tokenizer("bad")["input_ids"]

    def test_targets_are_tokenised_as_targets(self, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        # as Marian's tokenizer does, which has a vocabulary for each side
        modes: list[str] = []
        for mode in ("input", "target"):
            monkeypatch.setattr(
                tokenizer, f"_switch_to_{mode}_mode", lambda mode=mode: modes.append(mode), raising=False
            )
        seq2seq().encode(ROWS, tokenizer, (), supervised=False)
        assert set(modes) == {"input"}
        seq2seq().encode(ROWS, tokenizer, ())
        assert "target" in modes
        assert modes[-1] == "input"

    def test_cut_sources_and_targets_are_counted(self, tokenizer: Any) -> None:
        encoded = seq2seq(max_length=5, max_target_length=4).encode(ROWS, tokenizer, ())
        assert encoded.truncated == 3
        assert encoded.notes == ("2 of 5 targets are cut at 4 tokens",)
        assert [len(one["input_ids"]) for one in encoded.examples] == [3, 5, 5, 2, 5]
        assert [len(one["labels"]) for one in encoded.examples] == [4, 4, 3, 4, 2]

    def test_targets_end_though_the_tokenizer_ends_nothing(self, tmp_path: Path) -> None:
        save_tokenizer(tmp_path, ends=False)
        endless = AutoTokenizer.from_pretrained(tmp_path)
        examples = seq2seq(max_target_length=4).encode(ROWS, endless, ()).examples
        assert all(one["labels"][-1] == 1 and len(one["labels"]) <= 4 for one in examples)
        assert examples[1]["labels"] == [*endless("alice , paris")["input_ids"], 1]
        endless.eos_token = None
        with pytest.raises(UsageError, match="has no end token, so nothing would tell where a target ends"):
            seq2seq().encode(ROWS, endless, ())

    def test_several_references(self, tokenizer: Any, models: Any) -> None:
        rows = rows_of({"source": "good", "target": ["bad", "sad film", "dark"]}, {"source": "a", "target": ["the"]})
        task = seq2seq(generation=Generation(metrics=("exact_match",), max_new_tokens=3))
        encoded = task.encode(rows, tokenizer, ())
        assert [one["labels"] for one in encoded.examples] == tokenizer(["bad", "the"])["input_ids"]
        assert encoded.notes == (
            "2 more references are compared with what is generated; the loss is of each row's first",
        )
        predictions = predicted(task, models["t5"], encoded, tokenizer)
        predictions = [one | {"text": text} for one, text in zip(predictions, ["sad film", "a"], strict=True)]
        assert task.score(predictions, rows, ()).values["exact_match"] == 0.5

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"source": " ", "target": "a"}, "train.jsonl:2: no text in 'source'; remove the row or fill it in"),
            ({"source": None, "target": "a"}, "train.jsonl:2: no text in 'source'"),
            ({"source": "a", "target": ""}, "train.jsonl:2: no text in 'target'"),
            ({"source": "a", "target": []}, "train.jsonl:2: no text in 'target'"),
            ({"source": "a", "target": ["b", None]}, "train.jsonl:2: no text in 'target'"),
            ({"source": "a", "target": 3}, "train.jsonl:2: no text in 'target'"),
            ({"source": "a", "targets": "b"}, "train.jsonl:2: no 'target' in this row, though other rows have it"),
        ],
    )
    def test_bad_rows_are_named(self, record: dict[str, Any], message: str, tokenizer: Any) -> None:
        with pytest.raises(DataError) as caught:
            seq2seq().encode(rows_of(ROWS.records[0], record), tokenizer, ())
        assert str(caught.value).startswith(message)

    def test_without_targets_there_is_nothing_to_compare(self, tokenizer: Any, models: Any) -> None:
        task = seq2seq()
        encoded = task.encode(task.rows_from_text(["good film"]), tokenizer, (), supervised=False)
        with pytest.raises(UsageError, match="the decoder reads the targets: give rows with a column 'target'"):
            task.logits(models["t5"], collate(encoded.examples, 0))


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"template": "about {sourc}"}, r"the template has no \{source\}; did you mean 'sourc'"),
            ({"template": "{source} = {target}"}, "shows the answer: 'target' is the target column"),
            ({"source": "text", "target": "text"}, "shows the answer"),
            ({"target_language": "de_DE"}, "belong together; give both or neither"),
            ({"loss": "weighted"}, "loss: weighted is for classes"),
        ],
    )
    def test_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            seq2seq(**settings)

    def test_texts_from_the_command_line(self) -> None:
        assert seq2seq(source="en").rows_from_text(["good"]).records == [{"en": "good"}]
        assert seq2seq(source="en").describe({"text": "gut"}, {"en": "good"}) == {"source": "good", "target": "gut"}
        with pytest.raises(UsageError, match="takes single texts, not pairs"):
            seq2seq().rows_from_text(["good"], ["bad"])
        with pytest.raises(UsageError, match="the template also takes a, b; give the rows as --file FILE"):
            seq2seq(template="{b} {source} {a}").rows_from_text(["good"])


def multilingual(kind: str, folder: Path) -> Any:
    """A tokenizer as transformers makes it of a vocabulary, with its languages behind it."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [f"▁{word}" for word in WORDS]
    if kind == "nllb":
        letters = sorted({letter for word in WORDS for letter in word})
        made: Any = NllbTokenizer(vocab={p: i for i, p in enumerate([*special, "▁", *letters])}, merges=[])
    else:
        pieces = [(piece, 0.0) for piece in special] + [(word, -1.0) for word in words]
        made = (MBartTokenizer if kind == "mbart" else MBart50Tokenizer)(vocab=pieces)
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


LANGUAGES = {"mbart": ("en_XX", "de_DE"), "mbart50": ("en_XX", "de_DE"), "nllb": ("eng_Latn", "deu_Latn")}


@pytest.mark.parametrize("kind", LANGUAGES)
class TestLanguages:
    def task(self, kind: str) -> Seq2Seq:
        source, target = LANGUAGES[kind]
        settings = Generation(max_new_tokens=6, beams=2)
        return seq2seq(source_language=source, target_language=target, generation=settings)

    def test_sources_targets_and_what_is_written(self, kind: str, tmp_path: Path) -> None:
        tokenizer, (source, target) = multilingual(kind, tmp_path), LANGUAGES[kind]
        task = self.task(kind)
        encoded = task.encode(ROWS, tokenizer, ())
        expected = AutoTokenizer.from_pretrained(tmp_path, src_lang=source, tgt_lang=target)
        given = expected([s for s, _ in PAIRS], text_target=[t for _, t in PAIRS])
        assert [one["input_ids"] for one in encoded.examples] == given["input_ids"]
        assert [one["labels"] for one in encoded.examples] == given["labels"]
        code = expected.convert_tokens_to_ids(target)
        assert code in given["labels"][0]
        architecture = "m2m_100" if kind == "nllb" else "mbart"
        start = {"decoder_start_token_id": None if kind == "mbart" else 2}
        ids = {"vocab_size": len(tokenizer), "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}
        model: Any = model_of(architecture, **ids, **start)
        self.check_loss(task, model, encoded, given)
        begin = {"decoder_start_token_id": code} if kind == "mbart" else {"forced_bos_token_id": code}
        batch = collate(encoded.examples, 1)
        predictions = predicted(task, model, encoded, tokenizer)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        output = model.generate(**inputs, **begin, num_beams=2, max_new_tokens=6)
        assert [one["text"] for one in predictions] == tokenizer.batch_decode(output, skip_special_tokens=True)
        assert output[:, 0 if kind == "mbart" else 1].tolist() == [code] * len(PAIRS)
        assert getattr(model.generation_config, next(iter(begin))) != code  # the model is left as it was

    def check_loss(self, task: Seq2Seq, model: nn.Module, encoded: Any, given: Any) -> None:
        with torch.no_grad():
            for index, example in enumerate(encoded.examples):
                ids, labels = (torch.tensor([given[name][index]]) for name in ("input_ids", "labels"))
                found = task.summed_loss(model, collate([example], 1), torch.tensor([])) / labels.numel()
                torch.testing.assert_close(found, model(input_ids=ids, labels=labels).loss, rtol=1e-5, atol=1e-5)

    def test_refusals(self, kind: str, tmp_path: Path) -> None:
        tokenizer, (source, _) = multilingual(kind, tmp_path), LANGUAGES[kind]
        with pytest.raises(UsageError, match="marks languages; set task"):
            seq2seq().encode(ROWS, tokenizer, ())
        wrong = source[:-1] + "y"
        message = f"task.target_language: no language '{wrong}'; did you mean '{source}'"
        with pytest.raises(UsageError, match=message):
            seq2seq(source_language=source, target_language=wrong).encode(ROWS, tokenizer, ())


def test_languages_for_a_tokenizer_that_knows_none(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"marks no languages; say them in task\.source_prefix"):
        seq2seq(source_language="en_XX", target_language="de_DE").encode(ROWS, tokenizer, ())


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Any]) -> dict[str, Path]:
    """Checkpoints of T5 and BART with the tokenizer."""
    folders = {}
    for name in ("t5", "bart"):
        folders[name] = tmp_path_factory.mktemp(name)
        models[name].save_pretrained(folders[name])
        save_tokenizer(folders[name])
    return folders


def write_config(folder: Path, backbone: Path, method: dict[str, Any], **task: Any) -> Path:
    """A short run that learns PAIRS."""
    import yaml

    data = str(write_jsonl(folder / "rows.jsonl", ROWS.records))
    generation = {"max_new_tokens": 8, "beams": 2, "metrics": ["bleu", "chrf", "rouge"]}
    config = {
        "backbone": {"name": str(backbone)},
        "task": {"kind": "seq2seq", "data": {"train": data, "dev": data}, "max_length": 20, "max_target_length": 20}
        | {"generation": generation}
        | task,
        "method": method,
        "training": {"learning_rate": 0.02, "max_steps": 6, "batch_size": 5, "seed": 1},
        "audit": {"overlap": 1.0},
        "output": {"folder": str(folder / "run")},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"},
    "ia3": {"kind": "ia3"},
    "prefix": {"kind": "prefix", "length": 3},
    "prompt": {"kind": "prompt", "length": 3},
}


class TestRuns:
    @pytest.fixture(autouse=True)
    def no_plots(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("peftkit.training.loop.learning_curve", lambda *_: None)

    @pytest.mark.parametrize("architecture", ["t5", "bart"])
    @pytest.mark.parametrize("method", METHODS)
    def test_methods_train_write_and_predict(
        self, method: str, architecture: str, backbones: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = write_config(tmp_path, backbones[architecture], METHODS[method])
        assert main(["train", str(config)]) == 0
        scores = json.loads((tmp_path / "run" / "scores.json").read_text())
        assert set(scores) == {"before", "after"}
        before, after = scores["before"]["values"], scores["after"]["values"]
        assert after["loss"] < before["loss"]
        assert set(after) == {*("loss", "perplexity", "token_accuracy", "bleu", "chrf", "rouge1", "rouge2", "rougeL")}
        written = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
        capsys.readouterr()
        assert main(["predict", str(tmp_path / "run"), *(source for source, _ in PAIRS)]) == 0
        shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        expected = [
            {"source": source, "target": line["prediction"]["text"]}
            for (source, _), line in zip(PAIRS, written, strict=True)
        ]
        assert shown == expected
        assert [line["reference"] for line in written] == [[target] for _, target in PAIRS]
        if method in ("lora", "ia3"):
            self.check_merged(tmp_path, [line["target"] for line in shown])

    def check_merged(self, folder: Path, texts: list[str]) -> None:
        """Plain transformers, read from disk, writes what the adapter wrote."""
        assert main(["merge", str(folder / "run"), str(folder / "merged")]) == 0
        merged: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "merged").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
        for (source, _), text in zip(PAIRS, texts, strict=True):
            ids = tokenizer([source], return_tensors="pt")["input_ids"]
            output = merged.generate(input_ids=ids, num_beams=2, max_new_tokens=8)
            assert tokenizer.decode(output[0], skip_special_tokens=True) == text

    @pytest.mark.parametrize(
        ("changes", "settings", "error", "message"),
        [
            ({"decoder_start_token_id": None}, {}, BackboneError, "has no decoder_start_token_id"),
            (
                {},
                {"max_target_length": 33},
                UsageError,
                r"task\.max_target_length is 33, but the decoder takes at most 32",
            ),
            (
                {},
                {"generation": {"max_new_tokens": 30}},
                UsageError,
                r"task\.generation\.max_new_tokens is 30, but the decoder takes at most 32 tokens, of which the method "
                "takes 3",
            ),
        ],
    )
    def test_what_a_backbone_cannot_do_is_said_before_its_weights_load(
        self,
        changes: dict[str, Any],
        settings: dict[str, Any],
        error: type[PeftkitError],
        message: str,
        backbones: Any,
        tmp_path: Path,
    ) -> None:
        folder = tmp_path / "backbone"
        folder.mkdir()
        save_tokenizer(folder)
        config = json.loads((backbones["bart"] / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        method = METHODS["prefix"] if "generation" in settings else METHODS["lora"]
        run = load_run(write_config(tmp_path, folder, method, **settings))
        with pytest.raises(error, match=message):
            prepare(run)

    def test_a_model_without_a_decoder_is_refused(self, tiny_bert: Path, tmp_path: Path) -> None:
        run = load_run(write_config(tmp_path, tiny_bert, METHODS["lora"], max_target_length=20))
        with pytest.raises(BackboneError, match="'bert' cannot serve this task"):
            prepare(run)
