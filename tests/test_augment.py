"""Changed copies of training rows: what changes, what stays, and where they came from."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, save_word_tokenizer

from peftkit.cli import main
from peftkit.config import load_run
from peftkit.data import augment
from peftkit.data.augment import BackTranslation, Deletion, Swap, Synonyms, augmented
from peftkit.data.rows import Rows
from peftkit.errors import BackboneError, ConfigError, DataError, UsageError
from peftkit.prepare import prepare

TEXTS = ["the film was very good , and the music  too", "a great actor", "sad", "alice\twent to\nparis"]


def rows(texts: list[str]) -> Rows:
    records = [{"text": text, "label": str(index), "id": index} for index, text in enumerate(texts)]
    return Rows("train.tsv", records, [2, 3, 5, 7][: len(texts)])


def chances(count: int, seed: int = 0) -> list[random.Random]:
    return [random.Random(f"{seed}-{index}") for index in range(count)]


# --- deletion and swap (EDA) --------------------------------------------------------------------------------------


def test_deletion_leaves_words_out_and_nothing_else() -> None:
    for seed in range(30):
        for old, new in zip(TEXTS, Deletion(rate=0.3).changed(TEXTS, chances(4, seed)), strict=True):
            words, left = old.split(), iter(old.split())
            assert all(word in left for word in new.split())  # in order
            assert 1 <= len(new.split()) < len(words) or words == ["sad"] == new.split()
            assert new == new.strip()


def test_deletion_deletes_at_its_rate() -> None:
    text = " ".join(["word"] * 1000)
    (new,) = Deletion(rate=0.25).changed([text], chances(1))
    assert 1000 - len(new.split()) == pytest.approx(250, abs=60)  # more than four standard deviations


def test_swap_keeps_the_words_and_the_gaps() -> None:
    for seed in range(30):
        for old, new in zip(TEXTS, Swap(rate=0.3).changed(TEXTS, chances(4, seed)), strict=True):
            assert Counter(new.split()) == Counter(old.split())
            assert [one for one in new if one.isspace()] == [one for one in old if one.isspace()]
            # n swaps move at most 2 n words
            moved = sum(a != b for a, b in zip(old.split(), new.split(), strict=True))
            assert moved <= 2 * max(1, round(0.3 * len(old.split())))
            assert (new == old) == (len(old.split()) == 1) or moved == 0


# --- synonyms -----------------------------------------------------------------------------------------------------

SYNSETS = {"noun": [["film", "movie", "moving_picture"], ["music"], ["film", "thin_layer"]], "adj": [["good", "fine"]]}


@pytest.fixture
def wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small WordNet, written in the format of its files (wndb(5WN)), where nltk finds it."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    folder = tmp_path / "nltk_data" / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for kind, letter in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        data, places = "  1 WordNet 3.0 Copyright 2006 by Princeton University.\n", dict[str, list[str]]()
        for names in SYNSETS.get(kind, []):
            offset = f"{len(data):08d}"
            for name in names:
                places.setdefault(name, []).append(offset)
            words = " ".join(f"{name} 0" for name in names)
            data += f"{offset} 03 {letter} {len(names):02x} {words} 000 | a gloss\n"
        (folder / f"data.{kind}").write_text(data)
        lines = (f"{name} {letter} {len(at)} 0 {len(at)} 0 {' '.join(at)}  \n" for name, at in sorted(places.items()))
        (folder / f"index.{kind}").write_text("".join(lines))
        (folder / f"{kind}.exc").write_text("")
    for name in ("cntlist.rev", "index.sense"):
        (folder / name).write_text("")
    (folder / "lexnames").write_text("".join(f"{n:02d}\tnoun.Tops\t1\n" for n in range(45)))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    fresh = LazyCorpusLoader("wordnet", WordNetCorpusReader, object())  # in place of other languages'
    monkeypatch.setattr("nltk.corpus.wordnet", fresh)
    yield folder
    for file in fresh._data_file_map.values():  # nltk leaves them open
        file.close()


def test_words_are_replaced_by_others_of_one_meaning(wordnet: Path) -> None:
    assert augment.synonyms("film") == ["movie", "moving picture", "thin layer"]
    assert augment.synonyms("Good") == ["Fine"]
    assert augment.synonyms("films") == augment.synonyms("the") == augment.synonyms("music") == []
    found = set()
    for seed in range(20):
        (new,) = Synonyms(rate=0.1).changed(['The ("film") was good, music too'], chances(1, seed))
        found.add(new)
    texts = [f'The ("{word}") was good, music too' for word in ("movie", "moving picture", "thin layer")]
    assert found == {*texts, 'The ("film") was fine, music too'}
    (new,) = Synonyms(rate=0.5).changed(["film film good the the the"], chances(1))
    assert "film" not in new and "good" not in new and new.endswith("the the the")


def test_a_machine_without_wordnet_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr("nltk.corpus.wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, None))
    with pytest.raises(
        UsageError, match=r"needs WordNet, .* run `python -m nltk.downloader wordnet` once, or set NLTK_DATA"
    ):
        augmented(rows(TEXTS), ["text"], [Synonyms()])


# --- back-translation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def translators(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A random T5 and a random Marian model: what they say is nonsense, and the same every time."""
    from transformers import MarianConfig, MarianMTModel, T5Config, T5ForConditionalGeneration

    folders = [tmp_path_factory.mktemp("t5"), tmp_path_factory.mktemp("marian")]
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    size = {"vocab_size": len(WORDS) + 2, "d_model": 16}
    t5 = T5Config(**size, d_kv=4, d_ff=16, num_layers=1, num_heads=2, initializer_factor=5.0, **ends)
    heads = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    marian = MarianConfig(
        **size, **heads, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=24, init_std=1.0, **ends
    )
    for folder, model in zip(folders, (T5ForConditionalGeneration(t5), MarianMTModel(marian)), strict=True):
        model.save_pretrained(folder)
        save_word_tokenizer(folder)
        _name_padding(folder)
    return folders


def _name_padding(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<s>"
    tokenizer.save_pretrained(folder)


def test_texts_go_there_and_back(translators: list[Path]) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    settings = {"forward": str(translators[0]), "backward": str(translators[1]), "max_new_tokens": 6}
    (forward, backward), texts = translators, ["the film was good", "a great actor and music", "sad"]
    state = torch.get_rng_state()
    found = BackTranslation(**settings, batch_size=2).changed(texts, chances(3))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    for text, new in zip(texts, found, strict=True):
        for folder in (forward, backward):  # one by one, without padding
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
            inputs = {"input_ids": torch.tensor([tokenizer(text)["input_ids"]])}
            made = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1)
            text = tokenizer.batch_decode(made, skip_special_tokens=True)[0]
        assert new == text
    assert found != texts


def test_sampled_translations_differ_by_seed_alone(translators: list[Path]) -> None:
    settings = {
        "forward": str(translators[0]),
        "backward": str(translators[1]),
        "max_new_tokens": 6,
        "temperature": 1.5,
    }
    texts = ["the film was good", "a great actor and music"]
    operation = BackTranslation(**settings)  # type: ignore[arg-type]
    one, same, other = (operation.changed(texts, chances(2, seed)) for seed in (0, 0, 1))
    assert one == same != other


def test_what_is_too_long_to_translate_stays_and_is_left_out(translators: list[Path]) -> None:
    operation = BackTranslation(forward=str(translators[1]), backward=str(translators[0]), max_new_tokens=4)
    found, note = augmented(rows(["good " * 30, "a good film"]), ["text"], [operation])
    assert [found.where(index) for index in range(len(found))] == ["train.tsv:2", "train.tsv:3", "train.tsv:3"]
    assert "1 by back_translation (1 came out unchanged and are left out)" in note


def test_a_model_that_cannot_translate_is_told(tiny_bert: Path) -> None:
    operation = BackTranslation(forward=str(tiny_bert), backward=str(tiny_bert))
    with pytest.raises(BackboneError, match=r"back-translation: cannot load '.*' as an encoder-decoder"):
        operation.changed(["a good film"], chances(1))


# --- copies of rows -----------------------------------------------------------------------------------------------


def test_copies_keep_place_and_answer_and_are_counted() -> None:
    train = rows(TEXTS)
    found, note = augmented(train, ["text"], [Deletion(copies=2), Swap()])
    assert found.records[:4] == train.records
    assert note == (
        "augmentation added 9 rows to the 4 of train: 6 by deletion (2 came out unchanged and are left out), "
        "3 by swap (1 came out unchanged and are left out)"
    )
    for index in range(4, len(found)):
        source = train.records[found.records[index]["id"]]
        assert found.where(index) == train.where(source["id"])
        assert found.records[index] == source | {"text": found.records[index]["text"]}
        assert found.records[index]["text"] != source["text"]
    again, _ = augmented(train, ["text"], [Deletion(copies=2), Swap()])
    other, _ = augmented(train, ["text"], [Deletion(copies=2, seed=1), Swap(seed=1)])
    assert found.records == again.records != other.records
    # what a row gets does not depend on the rows behind it
    assert augmented(rows(TEXTS[:2]), ["text"], [Swap()])[0].records[2:] == [
        record for record in augmented(train, ["text"], [Swap()])[0].records[4:] if record["id"] < 2
    ]


def test_both_texts_of_a_pair_change() -> None:
    records = [{"one": "the film was good", "two": "a great actor"}]
    found, _ = augmented(Rows("pairs", records, [1]), ["one", "two"], [Deletion()])
    assert found.records[1]["one"] != records[0]["one"] and found.records[1]["two"] != records[0]["two"]


def test_a_row_without_text_is_told() -> None:
    with pytest.raises(DataError, match=r"train.tsv:3: no text in 'text'"):
        augmented(Rows("train.tsv", [{"text": "a b"}, {"text": None}], [2, 3]), ["text"], [Swap()])


# --- in a run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def with_augmentation(write_config: Callable[..., Path], toy_data: Path) -> Callable[..., Path]:
    def write(kind: str = "sequence_classification", **task: Any) -> Path:
        name = {"sequence_classification": "sentiment_{}.jsonl", "token_classification": "entities_{}.conll"}[kind]
        data = {split: str(toy_data / name.format(split)) for split in ("train", "dev", "test")}
        document = write_config()
        import yaml

        config = yaml.safe_load(document.read_text())
        config["task"] = {"kind": kind, "data": data, "max_length": 32} | task
        document.write_text(yaml.safe_dump(config))
        return document

    return write


def test_train_alone_is_augmented(with_augmentation: Callable[..., Path]) -> None:
    run = load_run(with_augmentation(augmentation=[{"kind": "swap", "rate": 0.3}, {"kind": "deletion", "copies": 2}]))
    data, plain = prepare(run), prepare(load_run(with_augmentation()))
    assert len(plain.train) == 160 and 300 < len(data.train) <= 640
    assert data.dev.rows.records == plain.dev.rows.records and data.test.rows.records == plain.test.rows.records
    assert data.head == plain.head and data.train.rows.records[:160] == plain.train.rows.records
    assert any(note.startswith(f"augmentation added {len(data.train) - 160:,} rows to the 160") for note in data.notes)
    assert data.fingerprint != plain.fingerprint


def test_a_run_trains_on_augmented_rows(with_augmentation: Callable[..., Path], tmp_path: Path) -> None:
    config = with_augmentation(augmentation=[{"kind": "deletion"}])
    assert main(["train", str(config), "training.max_steps=2", "training.evaluate_every=2"]) == 0
    notes = json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"]
    assert any("by deletion" in note for note in notes)


def test_tasks_whose_answers_belong_to_words_refuse(with_augmentation: Callable[..., Path]) -> None:
    config = with_augmentation("token_classification", augmentation=[{"kind": "swap"}])
    with pytest.raises(ConfigError, match=r"the answers of task 'token_classification' belong to single words, or are"):
        load_run(config)


def test_wrong_settings_are_told_with_their_place(with_augmentation: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"no kind 'delete'.*deletion"):
        load_run(with_augmentation(augmentation=[{"kind": "delete"}]))
    with pytest.raises(ConfigError, match=r"task.augmentation.0.rate"):
        load_run(with_augmentation(augmentation=[{"kind": "swap", "rate": 1.5}]))
