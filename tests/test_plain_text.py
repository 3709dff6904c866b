"""Plain text against transformers' own losses over whole blocks, the tokenizers called directly, and by hand."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config
from conftest import WORDS, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
)

from benchmarks.tiny_bert import save_bert_tokenizer
from peftkit.cli import main
from peftkit.config import load_run
from peftkit.data.blocks import blocks, masked
from peftkit.data.collate import IGNORED, collate
from peftkit.data.files import Rows, read_file
from peftkit.data.sources import DataSettings
from peftkit.errors import BackboneError, DataError, UsageError
from peftkit.experiment import train
from peftkit.tasks import PlainText


def texts_as_rows(*texts: Any) -> Rows:
    return Rows("t.txt", [{"text": text} for text in texts], range(1, len(texts) + 1))


def plain(**settings: Any) -> PlainText:
    return PlainText(data=DataSettings(train="t.txt"), **settings)


def sentences(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), tokenizer


@pytest.fixture(scope="module")
def masked_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT with the head that it was pretrained with."""
    folder = tmp_path_factory.mktemp("masked_bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    save_bert_tokenizer(folder, vocabulary)
    torch.manual_seed(0)
    BertForMaskedLM(tiny_config("bert", vocab_size=len(vocabulary))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(masked_bert: Path) -> tuple[Any, Any]:
    return AutoModelForMaskedLM.from_pretrained(masked_bert).eval(), AutoTokenizer.from_pretrained(masked_bert)


class TestReader:
    TEXT = "\n = Title = \n\nfirst line\r\nsecond  line \n \nlast\u2028one"

    @pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.txt.gz", "a.raw.gz"])
    def test_each_line_that_is_not_blank_is_a_row_as_it_stands(self, tmp_path: Path, name: str) -> None:
        data = self.TEXT.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        rows = read_file(tmp_path / name)
        expected = [" = Title = ", "first line", "second  line ", "last\u2028one"]
        assert [record["text"] for record in rows.records] == expected
        assert [rows.where(index).rpartition(":")[2] for index in range(4)] == ["2", "4", "5", "7"]

    def test_or_each_paragraph(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(self.TEXT.encode())
        rows = read_file(tmp_path / "a.txt", format="paragraphs")
        expected = [" = Title = ", "first line\nsecond  line ", "last\u2028one"]
        assert [record["text"] for record in rows.records] == expected
        assert list(rows.places) == [2, 4, 7]

    def test_an_empty_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.raw").write_text(" \n\n")
        with pytest.raises(DataError, match=r"a\.raw:1"):
            read_file(tmp_path / "a.raw")


class TestBlocks:
    @pytest.mark.parametrize("seed", range(10))
    @pytest.mark.parametrize("joined", [True, False])
    def test_every_token_is_in_one_block_and_belongs_to_its_row(self, seed: int, joined: bool) -> None:
        chance = random.Random(seed)
        lengths, numbers = [chance.randint(1, 20) for _ in range(30)], iter(range(10**6))
        texts = [[next(numbers) for _ in range(length)] for length in lengths]
        found = list(blocks(texts, 8, joined))
        assert [token for block in found for token in block.ids] == [token for text in texts for token in text]
        of_row: dict[int, list[int]] = {row: [] for row in range(30)}
        for block in found:
            assert len(block.ids) <= 8
            assert [start for _, start, _ in block.rows] == [0, *(end for _, _, end in block.rows[:-1])]
            for row, start, end in block.rows:
                of_row[row] += block.ids[start:end]
        assert list(of_row.values()) == texts
        if joined:
            assert {len(block.ids) for block in found[:-1]} == {8}
        else:
            assert all(len(block.rows) == 1 for block in found)

    def test_what_stands_between_rows(self, llama: Any) -> None:
        rows = texts_as_rows("good film", "bad", "the story")
        (example,) = plain().encode(rows, llama[1], ()).examples
        assert llama[1].convert_ids_to_tokens(example["input_ids"]) == (
            ["good", "film", "</s>", "bad", "</s>", "the", "story", "</s>"]
        )
        assert example["labels"] == example["input_ids"]
        (example,) = plain(end_token=False, separator=" . ").encode(rows, llama[1], ()).examples
        assert llama[1].decode(example["input_ids"]) == "good film . bad . the story ."

    def test_an_example_belongs_to_the_row_in_which_it_starts(self, llama: Any) -> None:
        rows = texts_as_rows("good film was", "bad", "the", "story and actor")  # 4, 2, 2 and 4 tokens
        encoded = plain(max_length=3).encode(rows, llama[1], ())
        assert encoded.lengths == [3, 3, 3, 3]
        assert encoded.owners == [0, 0, 2, 3]
        assert encoded.truncated == 0
        alone = plain(max_length=3, joined=False).encode(rows, llama[1], ())
        assert alone.lengths == [3, 1, 2, 2, 3, 1]
        assert plain(max_length=3).encode(rows, llama[1], (), supervised=False).lengths == alone.lengths

    def test_llamas_start_token_begins_every_block(self, real_weights: Path) -> None:
        folder = real_weights / "stories260k"
        if not folder.is_dir():
            pytest.skip(f"{folder} is not there")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
        shuffled = " ".join(random.Random(0).sample(story.split(), len(story.split())))
        perplexities = []
        for text in (story, shuffled):
            task = plain(end_token=False, joined=False)
            rows = texts_as_rows(text)
            encoded = task.encode(rows, tokenizer, ())
            ids = torch.tensor([tokenizer(text).input_ids])
            assert encoded.examples[0]["input_ids"] == ids[0].tolist()
            assert ids[0, 0] == tokenizer.bos_token_id
            with torch.no_grad():
                found = task.predict(model, collate(encoded.examples, 0), ())
                expected = float(model.double()(input_ids=ids, labels=ids).loss)
                model.float()
            scores = task.score(task.join(found, encoded, rows, tokenizer), rows, ())
            assert scores.value == pytest.approx(expected, rel=1e-4)
            perplexities.append(scores.values["perplexity"])
        assert perplexities[0] < 3 < 30 < perplexities[1]


class TestCausalScores:
    def test_each_row_has_the_nats_of_its_own_tokens(self, llama: Any) -> None:
        model, tokenizer = llama
        rows = texts_as_rows(*sentences(20, seed=0))
        task = plain(max_length=16)
        encoded = task.encode(rows, tokenizer, ())
        with torch.no_grad():
            found = task.predict(model, collate(encoded.examples, tokenizer.pad_token_id), ())
        predictions = task.join(found, encoded, rows, tokenizer)
        stream = [
            id for record in rows.records for id in [*tokenizer(record["text"]).input_ids, tokenizer.eos_token_id]
        ]
        owners = [row for row, record in enumerate(rows.records) for _ in range(len(record["text"].split()) + 1)]
        nats, tokens = Counter[int](), Counter[int]()
        for start in range(0, len(stream), 16):
            ids = stream[start : start + 16]
            with torch.no_grad():
                chances = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            for place in range(1, len(ids)):
                nats[owners[start + place]] -= float(chances[place - 1, ids[place]])
                tokens[owners[start + place]] += 1
        assert [prediction["tokens"] for prediction in predictions] == [tokens[row] for row in range(20)]
        for row, prediction in enumerate(predictions):
            assert prediction["nats"] == pytest.approx(nats[row], rel=1e-5, abs=1e-6)
        scores = task.score(predictions, rows, ())
        assert scores.values["perplexity"] == pytest.approx(math.exp(nats.total() / tokens.total()), rel=1e-5)
        assert scores.lower_is_better
        assert set(scores.values) == {"loss", "perplexity", "token_accuracy"}

    def test_a_text_shows_its_own_perplexity(self) -> None:
        shown = plain().describe({"nats": 2 * math.log(7), "tokens": 2, "right": 0}, {"text": "a b c"})
        assert shown == {"text": "a b c", "tokens": 2, "perplexity": pytest.approx(7)}
        assert plain().describe({"nats": 0.0, "tokens": 0, "right": 0}, {"text": "a"})["perplexity"] is None


class TestMasks:
    IDS = range(100, 300)
    MASKABLE = range(10, 190)

    def drawn(self, *seed: int) -> tuple[list[int], list[int]]:
        return masked(self.IDS, self.MASKABLE, mask=7, vocabulary=50, share=0.15, seed=seed)

    def test_fifteen_percent_of_which_eight_in_ten_are_masked(self) -> None:
        fates, places = Counter[str](), Counter[int]()
        for seed in range(400):
            given, labels = self.drawn(seed)
            chosen = [place for place, label in enumerate(labels) if label != IGNORED]
            assert len(chosen) == 27  # round(0.15 · 180)
            assert set(chosen) <= set(self.MASKABLE)
            assert [labels[place] for place in chosen] == [self.IDS[place] for place in chosen]
            assert all(given[place] == self.IDS[place] for place in range(200) if place not in chosen)
            places.update(chosen)
            fates.update("mask" if given[p] == 7 else "kept" if given[p] == self.IDS[p] else "random" for p in chosen)
        total = 400 * 27
        # four standard deviations of a binomial share
        for fate, share in {"mask": 0.8 + 0.1 / 50, "random": 0.1 * 49 / 50, "kept": 0.1}.items():
            assert abs(fates[fate] / total - share) < 4 * math.sqrt(share * (1 - share) / total)
        assert len(places) == 180
        assert max(places.values()) < 400 * 0.15 + 4 * math.sqrt(400 * 0.15 * 0.85)

    def test_a_function_of_seed_and_tokens_alone(self) -> None:
        assert self.drawn(1, 2) == self.drawn(1, 2)
        assert self.drawn(1, 2) != self.drawn(1, 3)
        assert self.drawn(1, 2) != self.drawn(2, 2)
        few = masked([5, 6, 7], [1], mask=7, vocabulary=50, share=0.15, seed=[0])
        assert [label for label in few[1] if label != IGNORED] == [6]  # at least one
        assert masked([5], [], mask=7, vocabulary=50, share=0.15, seed=[0]) == ([5], [IGNORED])

    def test_training_draws_anew_in_every_epoch_and_evaluation_does_not(self, bert: Any) -> None:
        _, tokenizer = bert
        task, rows = plain(objective="masked", max_length=20), texts_as_rows(*sentences(30, seed=1))
        encoded = task.encode(rows, tokenizer, ())
        assert task.encode(rows, tokenizer, ()).examples == encoded.examples
        for example in encoded.examples:
            epochs = [task.for_epoch(example, epoch) for epoch in range(5)]
            labelled = {tuple(one["labels"]) for one in (example, *epochs)}
            assert len(labelled) > 2
            for one in (example, *epochs):
                assert task.example_weight(one, ()) == max(1, round(0.15 * len(one["maskable"])))
                restored = [
                    token if label == IGNORED else label
                    for token, label in zip(one["input_ids"], one["labels"], strict=True)
                ]
                assert tokenizer.mask_token_id not in restored
                assert (restored[0], restored[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
            assert task.for_epoch(epochs[3], 1) == epochs[1]  # whatever was masked before

    def test_loss_is_transformers_and_rows_have_their_own(self, bert: Any) -> None:
        model, tokenizer = bert
        task, rows = plain(objective="masked", max_length=20), texts_as_rows(*sentences(12, seed=2))
        encoded = task.encode(rows, tokenizer, ())
        batch = collate(encoded.examples, tokenizer.pad_token_id)
        with torch.no_grad():
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
            expected = float(model(**inputs).loss)
            weight = sum(task.example_weight(example, ()) for example in encoded.examples)
            assert float(task.summed_loss(model, batch, torch.tensor([]))) / weight == pytest.approx(expected, rel=1e-5)
            predictions = task.join(task.predict(model, batch, ()), encoded, rows, tokenizer)
        assert sum(prediction["tokens"] for prediction in predictions) == weight
        scores = task.score(predictions, rows, ())
        assert scores.value == pytest.approx(expected, rel=1e-5)
        assert scores.values["pseudo_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
        assert "perplexity" not in scores.values

    def test_encoders_have_their_separator_between_rows_and_their_frame_around_blocks(self, bert: Any) -> None:
        _, tokenizer = bert
        (example,) = plain(objective="masked").encode(texts_as_rows("good film", "bad"), tokenizer, ()).examples
        pairs = zip(example["input_ids"], example["labels"], strict=True)
        ids = [token if label == IGNORED else label for token, label in pairs]
        tokens = ["[CLS]", "good", "film", "[SEP]", "bad", "[SEP]", "[SEP]"]
        assert tokenizer.convert_ids_to_tokens(ids) == tokens
        assert example["maskable"] == [1, 2, 4]


class TestWrongInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"end_token": False}, "joined rows need something between them"),
            ({"objective": "masked", "packing": True}, "packing is for causal models"),
            ({"mask_share": 0.2}, "mask_share would change nothing with objective: causal"),
            ({"generation": {}}, "generation has no references in plain text"),
        ],
    )
    def test_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            plain(**settings)

    def test_rows_are_named(self, llama: Any) -> None:
        for text in ("", None, 5):
            with pytest.raises(DataError, match=r"t\.txt:2: no text in 'text'"):
                plain().encode(texts_as_rows("good", text), llama[1], ())

    def test_tokenizers_that_cannot(self, llama: Any) -> None:
        with pytest.raises(UsageError, match=r"needs a mask token.*use causal"):
            plain(objective="masked").encode(texts_as_rows("good"), llama[1], ())

    def test_an_encoder_does_not_learn_the_next_token(
        self, masked_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in sentences(20, seed=3)])
        config = write_config(tmp_path, masked_bert, file, {})
        with pytest.raises(BackboneError, match="is an encoder: its tokens see those behind them"):
            train(load_run(config))


def write_config(folder: Path, backbone: Path, file: Path, task: dict[str, Any], **training: Any) -> Path:
    name = "-".join(map(str, ["run", *task.values(), *training.values()]))
    config = {
        "backbone": {"name": str(backbone)},
        "task": {"kind": "plain_text", "data": {"train": str(file)}, "max_length": 16} | task,
        "method": {"kind": "lora", "rank": 4, "targets": "all"},
        "training": {"learning_rate": 0.02, "max_steps": 24, "batch_size": 8, "seed": 1} | training,
        "output": {"folder": str(folder / name)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


class TestRun:
    @pytest.fixture(scope="class")
    def file(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Lines that count up through the vocabulary, which can be learnt."""
        chance, file = random.Random(0), tmp_path_factory.mktemp("text") / "lines.txt"
        starts = [(chance.randrange(20), chance.randint(3, 15)) for _ in range(400)]
        lines = dict.fromkeys(" ".join(WORDS[start : start + count]) for start, count in starts)
        file.write_text("\n".join(lines) + "\n")
        return file

    def test_causal(self, tiny_llama: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        result = train(load_run(write_config(tmp_path, tiny_llama, file, {})))
        before, after = (result.evaluations[when].scores.values for when in ("before", "after"))
        assert after["perplexity"] < before["perplexity"] / 4
        lines = [json.loads(line) for line in (result.folder / "predictions.jsonl").read_text().splitlines()]
        rows = result.evaluations["after"].split.rows
        assert [line["reference"] for line in lines] == [[record["text"]] for record in rows.records]
        total = sum(line["prediction"]["nats"] for line in lines) / sum(line["prediction"]["tokens"] for line in lines)
        assert after["loss"] == pytest.approx(total)
        capsys.readouterr()
        learnt, other = " ".join(WORDS[3:12]), " ".join(WORDS[12:3:-1])
        assert main(["predict", str(result.folder), learnt, other]) == 0
        shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert shown[0]["perplexity"] < shown[1]["perplexity"]
        assert [one["tokens"] for one in shown] == [9, 9]
        assert main(["merge", str(result.folder), str(tmp_path / "merged")]) == 0

    def test_masked_is_the_same_for_every_micro_batch(self, masked_bert: Path, file: Path, tmp_path: Path) -> None:
        task = {"objective": "masked"}
        whole, parts = (
            train(load_run(write_config(tmp_path, masked_bert, file, task, micro_batch_size=size))) for size in (8, 3)
        )
        assert parts.record.losses == pytest.approx(whole.record.losses, rel=1e-4)
        before, after = (whole.evaluations[when].scores.values for when in ("before", "after"))
        assert after["pseudo_perplexity"] < before["pseudo_perplexity"] / 2
        assert main(["merge", str(whole.folder), str(tmp_path / "merged")]) == 0
        assert main(["evaluate", str(whole.folder), "--data", str(file)]) == 0
